"""Architectures and tensor names: the Hugging Face side mapped to the ggml side, once.

A ReLU model runs in stock llama.cpp because blk.N.ffn_gate.scale = K and blk.N.ffn_up.scale = 1/K turn the SiLU gate
of the graph into a ReLU: silu(K g) * (u / K) -> relu(g) * u. The scales are loaded for every architecture, but only
some graphs multiply with them; the others would silently compute SiLU. So an architecture is written only if it stands
in `ARCHITECTURES`, read from the graph sources of llama.cpp (llama-cpp-python 0.3.36) and tested against that build.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import gguf

from prosparse_pipe.errors import UnsupportedModelError

RELU_SCALE = 65536.0  # K: relative L2 error of the logits 2e-6; 2^10 still shows 1e-4


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How a Hugging Face model type is written.

    Attributes:
        model_type: `model_type` of config.json.
        gguf_arch: architecture of the GGUF, whose stock graph applies the scale tensors.
        permute_rope: Q and K rows go from half-split rope (HF) to interleaved rope (llama).
        biases: regex of the bias tensors that the graph adds.
    """

    model_type: str
    gguf_arch: str
    permute_rope: bool
    biases: str


_LLAMA_BIASES = r"self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj"
ARCHITECTURES = {
    # Mistral and Qwen2 are Llama but for sliding windows and QKV biases; llama.cpp's qwen2 graph ignores the scales.
    **{name: Architecture(name, "llama", True, _LLAMA_BIASES) for name in ("llama", "mistral", "qwen2")},
    "qwen3": Architecture("qwen3", "qwen3", False, r"self_attn\.[qkv]_proj"),
}

_REASONS = {
    "gemma": "its graph computes GELU and ignores the scale tensors that make it ReLU",
    "phi3": "its fused gate_up projection takes no scale tensors",
    "olmo2": "its graph ignores the scale tensors that make it ReLU",
    "smollm3": "its graph ignores the scale tensors that make it ReLU",
    "internlm2": "its graph ignores the scale tensors that make it ReLU",
    "falcon": "it has no gated FFN",
    "opt": "it has no gated FFN",
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture to write for a checkpoint.

    Args:
        config: config.json of the checkpoint.

    Raises:
        UnsupportedModelError: stock llama.cpp would not compute this model's ReLU FFN: its graph ignores the scales,
            the activation is not ReLU, or rope or experts are of a kind that the graph does not have.
    """
    kind = str(config.get("model_type", "unknown"))
    architecture = ARCHITECTURES.get(kind)
    if architecture is None:
        reason = next(
            (text for prefix, text in _REASONS.items() if kind.startswith(prefix)), "it is not known to apply ReLU"
        )
        raise UnsupportedModelError(
            f"a {kind} model cannot be exported: in stock llama.cpp {reason}",
            f"supported: {', '.join(ARCHITECTURES)} (SmolLM2 is llama); see docs/export.md",
        )
    activation = config.get("hidden_act")
    if activation not in ("relu", "fatrelu"):
        raise UnsupportedModelError(
            f"this {kind} model computes {activation}, not ReLU", "train it first: prosparse-pipe train --model ..."
        )
    if float(rope_parameters(config).get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedModelError(
            "partial rotary embeddings cannot be exported: llama.cpp's graph rotates whole heads", "see docs/export.md"
        )
    return architecture


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope settings of old (`rope_theta`, `rope_scaling`) and new (`rope_parameters`) configs in one layout."""
    values = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    values.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    values["rope_type"] = values.get("rope_type") or values.get("type") or "default"
    values.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    return values


_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)$")


class TensorNames:
    """Names of one checkpoint's tensors on the ggml side.

    Args:
        architecture: what is written.
        n_layer: layers of the checkpoint.
    """

    def __init__(self, architecture: Architecture, n_layer: int) -> None:
        self.architecture = architecture
        self.n_layer = n_layer
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.gguf_arch)
        self._map = gguf.get_tensor_name_map(arch, n_layer)

    def to_ggml(self, name: str) -> str | None:
        """The ggml name, e.g. blk.0.attn_q.weight; None for tensors that are computed and not stored (rotary inv_freq).

        Raises:
            UnsupportedModelError: the graph has no place for this tensor, so leaving it out would change the model.
        """
        if name.endswith(".rotary_emb.inv_freq"):
            return None
        mapped = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        layer = _LAYER.match(name)
        misplaced = layer is not None and int(layer[1]) >= self.n_layer
        foreign_bias = name.endswith(".bias") and not (layer and re.fullmatch(self.architecture.biases, layer[2]))
        if mapped is None or misplaced or foreign_bias:
            raise UnsupportedModelError(
                f"llama.cpp's {self.architecture.gguf_arch} graph has no place for the tensor {name}",
                "adapters and other extra weights must be merged first",
            )
        return mapped


def layer_and_part(name: str) -> tuple[int, str, str] | None:
    """(2, "mlp.gate_proj", "weight") for model.layers.2.mlp.gate_proj.weight; None outside the layers."""
    match = _LAYER.match(name)
    return (int(match[1]), match[2], match[3]) if match else None
