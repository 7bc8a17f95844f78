"""ReLU in the place of a gated FFN's activation, and the FATReLU threshold (arXiv 2402.13516, steps 1 and 3).

A gated FFN computes x1 = act(gate_proj(x)) * up_proj(x) and down_proj(x1). It is found by its three projections and not
by a list of classes, so Llama, Mistral, Qwen, SmolLM2 and Gemma are one case.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.activations import ACT2FN

from prosparse_pipe.checkpoint import SparseInfo
from prosparse_pipe.convert.vocab import restore_pre_tokenizer
from prosparse_pipe.errors import CheckpointError, UnsupportedModelError

RELU_NAMES = ("relu", "fatrelu")  # of the activation in config.json


class FATReLU(nn.Module):
    """x where x >= threshold and x > 0, else 0. With threshold 0 this is ReLU.

    Source: arXiv 2402.13516, section 3.2 step 3.
    """

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.threshold == 0.0:
            return nn.functional.relu(x)
        return torch.where(x >= self.threshold, x, torch.zeros((), dtype=x.dtype, device=x.device))

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


@dataclasses.dataclass
class GatedFFN:
    """One layer's gated FFN: `module` holds gate (d -> d_ff), up (d -> d_ff), down (d_ff -> d) and its activation."""

    layer: int
    name: str
    module: nn.Module
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    activation_attribute: str


def find_ffns(model: nn.Module) -> list[GatedFFN]:
    """The gated FFNs of a decoder, in layer order.

    Raises:
        UnsupportedModelError: there is none, or one has no activation module to replace (e.g. fused gate_up_proj).
    """
    ffns: list[GatedFFN] = []
    for name, module in model.named_modules():
        gate, up, down = (getattr(module, f"{part}_proj", None) for part in ("gate", "up", "down"))
        if gate is None or up is None or down is None:
            continue
        attribute = next((a for a in ("act_fn", "activation_fn", "act") if callable(getattr(module, a, None))), None)
        if attribute is None:
            raise UnsupportedModelError(
                f"{name} has no activation (act_fn) to replace", "only act(gate) * up FFNs can be made sparse"
            )
        ffns.append(GatedFFN(len(ffns), name, module, gate, up, down, attribute))
    if not ffns:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise UnsupportedModelError(
            f"a {kind} model has no FFN with gate_proj, up_proj and down_proj",
            "ProSparse needs a gated FFN: Llama, Mistral, Qwen2/3, SmolLM2, Gemma",
        )
    return ffns


def substitute_relu(model: nn.Module, threshold: float = 0.0) -> list[GatedFFN]:
    """Replaces the activation of every gated FFN by FATReLU(threshold) and says so in the config.

    The config gets `hidden_act: relu` (Gemma: `hidden_activation` too), so plain transformers computes ReLU, and
    `hidden_act_param: threshold`, the field of the released ProSparse models.

    Returns:
        The FFNs, in layer order.

    Raises:
        UnsupportedModelError: no gated FFN.
    """
    ffns = find_ffns(model)
    for ffn in ffns:
        setattr(ffn.module, ffn.activation_attribute, FATReLU(threshold))
    config: Any = model.config
    config.hidden_act = "relu"
    if hasattr(config, "hidden_activation"):
        config.hidden_activation = "relu"
    config.hidden_act_param = threshold
    return ffns


def set_threshold(ffns: list[GatedFFN], threshold: float) -> None:
    """Sets the FATReLU threshold of FFNs whose activation `substitute_relu` replaced."""
    for ffn in ffns:
        getattr(ffn.module, ffn.activation_attribute).threshold = threshold


def drop_quantizer(model: Any) -> None:
    """Makes a model that was dequantized from GGUF an ordinary one, which saves and whose config knows no GGUF."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def load_model(path: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A causal language model and its tokenizer from a folder, a hub name or a .gguf file.

    Raises:
        CheckpointError: it cannot be read, with the reason in one line.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = os.path.split(path)
    arguments = {"gguf_file": name} if name.endswith(".gguf") else {}
    source = folder or "." if arguments else path
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **arguments)
        tokenizer = AutoTokenizer.from_pretrained(source, **arguments)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{path} cannot be loaded: {reason[0]}", "is it a whole checkpoint that transformers reads?"
        ) from None
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:  # transformers would go on with random values; tied weights are not reported
        raise CheckpointError(f"{path} lacks the tensor {missing[0]}", "it is not a whole checkpoint: restore the file")
    if arguments:
        drop_quantizer(model)
        restore_pre_tokenizer(tokenizer, path)
    return model, tokenizer


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder}/config.json cannot be read: {error}", "train again, or restore the file"
        ) from None


def config_activation(config: dict[str, Any]) -> str | None:
    """The FFN's activation as a config names it: silu, relu, fatrelu, ..."""
    return config.get("hidden_activation") or config.get("hidden_act")


def load_sparse_model(
    run: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, Any, SparseInfo]:
    """A sparse checkpoint with its threshold in place, ready to evaluate, its tokenizer, and what it says of itself.

    Reads both layouts: `hidden_act: relu` and the released models' `fatrelu`, with `hidden_act_param`.

    Raises:
        UnsupportedModelError: the checkpoint is not a ReLU model.
        CheckpointError: it is damaged.
    """
    config = read_config(run)
    activation = config_activation(config)
    if activation not in RELU_NAMES:
        raise UnsupportedModelError(
            f"{run} is not a ReLU model (hidden_act is {activation})", "make it one with `prosparse-pipe train` first"
        )
    if activation == "fatrelu":
        ACT2FN.setdefault("fatrelu", FATReLU)
    model, tokenizer = load_model(str(run), dtype)
    threshold = float(config.get("hidden_act_param") or 0.0)
    substitute_relu(model, threshold)
    has_info = (run / "prosparse.json").is_file()
    info = SparseInfo.load(run) if has_info else SparseInfo("fatrelu" if threshold else "relu", threshold)
    return model.to(device).eval(), tokenizer, info
