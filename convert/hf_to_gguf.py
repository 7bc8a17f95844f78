"""A sparse Hugging Face checkpoint written as a GGUF whose ReLU every stock llama.cpp computes.

Tensors are read, changed and written one at a time. Neurons are sorted from hot to cold: rows of gate and up, columns
of down.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType, size_label

from prosparse_pipe.atomic import atomic_path
from prosparse_pipe.checkpoint import SparseInfo
from prosparse_pipe.convert.names import (
    RELU_SCALE,
    Architecture,
    TensorNames,
    architecture_of,
    layer_and_part,
    rope_parameters,
)
from prosparse_pipe.convert.vocab import Vocab, check_vocab, read_vocab
from prosparse_pipe.convert.weights import Weights, fingerprint
from prosparse_pipe.errors import CheckpointError, GGUFError, UnsupportedModelError

FLOAT_TYPES = {
    "F32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "F16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "BF16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
Progress = Callable[[int, int], None]


@contextlib.contextmanager
def short_write_is_disk_full() -> Iterator[None]:
    """Gives the error of numpy's tofile on a full disk, which has no errno, the one it should have."""
    try:
        yield
    except OSError as error:
        if error.errno is None and "written" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device") from error
        raise


@dataclasses.dataclass
class ModelSource:
    """A checkpoint, opened and checked, ready to be written.

    Attributes:
        config: config.json.
        orders: per layer, int64 (n_ff,): the neuron of the checkpoint that stands at each place of the file; None keeps
            the checkpoint's order.
        id: 32 hex digits; the same for every type that is written from the same weights in the same order.
        name: general.name.
    """

    run: Path
    config: dict[str, Any]
    architecture: Architecture
    info: SparseInfo
    weights: Weights
    tokenizer: Any
    vocab: Vocab
    orders: list[np.ndarray] | None
    id: str
    name: str

    @property
    def n_layer(self) -> int:
        return int(self.config["num_hidden_layers"])


def hot_to_cold(rate: np.ndarray) -> np.ndarray:
    """int64 (n_ff,): neurons by falling activation rate; equal rates keep their order."""
    return np.argsort(-np.asarray(rate, np.float64), kind="stable")


def permute_rope(weight: Any, n_head: int) -> Any:
    """Q or K rows (or bias) from half-split rope (HF) to interleaved rope (ggml NORM).

    Args:
        weight: torch (n_head * head_dim, ...).
    """
    rows = weight.shape[0]
    return weight.reshape(n_head, 2, rows // n_head // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def open_source(run: Path, rates: list[np.ndarray] | None, name: str | None = None) -> ModelSource:
    """Opens and checks a run folder for export.

    Args:
        run: a folder written by `train`.
        rates: activation rates per layer; None leaves the neurons unsorted.
        name: general.name; None: made from the base model's name.

    Raises:
        UnsupportedModelError: stock llama.cpp could not compute this model.
        CheckpointError: files are missing or damaged, tensors missing, or the rates are of another model.
    """
    from transformers import AutoTokenizer

    config = _read_json(run / "config.json")
    architecture = architecture_of(config)
    info = SparseInfo.load(run)
    weights = Weights(run)
    n_layer, n_ff = int(config["num_hidden_layers"]), int(config["intermediate_size"])
    if rates is not None and [rate.shape for rate in rates] != [(n_ff,)] * n_layer:
        found = f"{len(rates)} x {rates[0].shape[0] if rates else 0}"
        raise CheckpointError(
            f"the activation rates are of another model: {found} neurons instead of {n_layer} x {n_ff}",
            f"run `prosparse-pipe profile {run}` again",
        )
    _check_tensors(config, architecture, weights)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(run))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{run} has no usable tokenizer: {str(error).splitlines()[0]}", "copy the tokenizer files"
        ) from None
    stop = _read_json(run / "generation_config.json", optional=True).get("eos_token_id")
    stop_tokens = stop if isinstance(stop, list) else [stop] if isinstance(stop, int) else []
    n_vocab = weights.shapes["model.embed_tokens.weight"][0]
    vocab = read_vocab(tokenizer, n_vocab, stop_tokens)
    orders = [hot_to_cold(rate) for rate in rates] if rates is not None else None
    digest = hashlib.sha256(fingerprint(run).encode())
    for order in orders or []:
        digest.update(order.astype("<i4").tobytes())
    return ModelSource(
        run=run,
        config=config,
        architecture=architecture,
        info=info,
        weights=weights,
        tokenizer=tokenizer,
        vocab=vocab,
        orders=orders,
        id=digest.hexdigest()[:32],
        name=name or default_name(info, run, weights),
    )


def default_name(info: SparseInfo, run: Path, weights: Weights) -> str:
    """E.g. SmolLM2-135M-Instruct-ProSparse: the base model's name, a size label if it has none, and ProSparse."""
    base = str(info.provenance.get("base_model") or run.resolve().name)
    name = re.split(r"[/\\]", base.rstrip("/\\"))[-1].removesuffix(".gguf")
    name = re.sub(r"[-._](I?Q\d\w*|BF16|F16|F32)$", "", name, flags=re.IGNORECASE)
    name = re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "model"
    if not re.search(r"(^|[-_.])\d+(\.\d+)?[KMBT]([-_.]|$)", name, flags=re.IGNORECASE):
        total = sum(math.prod(shape) for shape in weights.shapes.values())
        name += f"-{size_label(total, total, 0, 0)}"
    return name if "prosparse" in name.lower() else f"{name}-ProSparse"


def write_model(source: ModelSource, target: Path, dtype: str, progress: Progress | None = None) -> None:
    """Writes one GGUF and checks its tokenizer against transformers'.

    Args:
        target: the file; written beside and renamed when complete.
        dtype: F32, F16 or BF16: type of the matrices; vectors stay F32.
        progress: called with bytes written and bytes in all.

    Raises:
        CheckpointError: a weight is not finite, or does not fit into F16.
        GGUFError: llama.cpp's tokenizer disagrees with transformers' on a string; nothing is kept.
        ProsparseError: the disk is full.
    """
    with atomic_path(target) as path:
        writer = GGUFWriter(path, source.architecture.gguf_arch)
        try:
            _write_keys(writer, source, dtype)
            plan = _plan_tensors(source, dtype)
            for name, shape, kind, _ in plan:
                item = np.dtype(np.float32 if kind == GGMLQuantizationType.F32 else np.uint16)
                writer.add_tensor_info(name, shape, item, math.prod(shape) * item.itemsize, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            total = sum(math.prod(shape) * (4 if kind == GGMLQuantizationType.F32 else 2) for _, shape, kind, _ in plan)
            done = 0
            for _, _, _, read in plan:
                data = read()
                with short_write_is_disk_full():
                    writer.write_tensor_data(data)
                done += data.nbytes
                if progress is not None:
                    progress(done, total)
        finally:
            writer.close()
        check_vocab(path, source.tokenizer, source.vocab)


def _read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        if optional:
            return {}
        raise CheckpointError(f"{path} does not exist", "give a folder written by `prosparse-pipe train`") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise CheckpointError(f"{path} is not valid JSON", "copy or train the checkpoint again") from None
    return values


def _check_tensors(config: dict[str, Any], architecture: Architecture, weights: Weights) -> None:
    parts = ["input_layernorm", "post_attention_layernorm"]
    parts += [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    if architecture.gguf_arch == "qwen3":
        parts += ["self_attn.q_norm", "self_attn.k_norm"]
    n_layer = int(config["num_hidden_layers"])
    wanted = ["model.embed_tokens.weight", "model.norm.weight"]
    wanted += [f"model.layers.{il}.{part}.weight" for il in range(n_layer) for part in parts]
    if not config.get("tie_word_embeddings"):
        wanted.append("lm_head.weight")
    missing = next((name for name in wanted if name not in weights), None)
    if missing is not None:
        raise CheckpointError(f"{weights.folder} lacks the tensor {missing}", "copy or train the checkpoint again")
    n_ff, n_embd = int(config["intermediate_size"]), int(config["hidden_size"])
    for il in range(n_layer):
        for part, shape in (("gate", (n_ff, n_embd)), ("up", (n_ff, n_embd)), ("down", (n_embd, n_ff))):
            name = f"model.layers.{il}.mlp.{part}_proj.weight"
            if weights.shapes[name] != shape:
                raise CheckpointError(f"{name} has shape {weights.shapes[name]}, config.json says {shape}")


def _heads(config: dict[str, Any]) -> tuple[int, int, int]:
    """(query heads, key heads, head size)."""
    n_head = int(config["num_attention_heads"])
    n_head_kv = int(config.get("num_key_value_heads") or n_head)
    return n_head, n_head_kv, int(config.get("head_dim") or int(config["hidden_size"]) // n_head)


def context_length(config: dict[str, Any]) -> int:
    """Tokens for which the file computes what the checkpoint does: up to the sliding window, where there is one.

    llama.cpp's llama graph attends to the whole context; below the window's size that is the same.
    """
    length = int(config["max_position_embeddings"])
    window = config.get("sliding_window")
    if config.get("model_type", "").startswith("qwen") and not config.get("use_sliding_window"):
        window = None
    return min(length, int(window)) if window else length


def _write_keys(writer: GGUFWriter, source: ModelSource, dtype: str) -> None:
    config = source.config
    n_head, n_head_kv, head_dim = _heads(config)
    total = sum(math.prod(shape) for shape in source.weights.shapes.values())
    writer.add_type("model")
    writer.add_name(source.name)
    writer.add_finetune("ProSparse")
    writer.add_size_label(size_label(total, total, 0, 0))
    writer.add_tags(["prosparse", "relu", "sparse"])
    writer.add_file_type(FLOAT_TYPES[dtype][1])
    writer.add_vocab_size(len(source.vocab.tokens))
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(source.n_layer)
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_dimension_count(head_dim)
    _write_rope_keys(writer, config)
    source.vocab.write(writer)

    write_prosparse_keys(writer, source)


def write_prosparse_keys(writer: GGUFWriter, source: ModelSource) -> None:
    """What the sparse backend and prosparse-pipe read; docs/format.md."""
    info = source.info
    writer.add_uint32("prosparse.version", 1)
    writer.add_string("prosparse.activation", "fatrelu" if info.threshold > 0 else "relu")
    writer.add_float32("prosparse.threshold", info.threshold)
    writer.add_float32("prosparse.scale", RELU_SCALE)
    writer.add_bool("prosparse.sorted", source.orders is not None)
    if len(info.sparsity) == source.n_layer:
        writer.add_array("prosparse.sparsity", [float(value) for value in info.sparsity])
    writer.add_string("prosparse.id", source.id)
    for key in ("base_model", "data", "version", "created"):
        value = info.provenance.get(key)
        if value:
            text = value if isinstance(value, str) else json.dumps(value)
            writer.add_string(f"prosparse.provenance.{key}", text if key == "data" else re.split(r"[/\\]", text)[-1])
    if info.provenance.get("tokens"):
        writer.add_uint64("prosparse.provenance.tokens", int(info.provenance["tokens"]))


def _write_rope_keys(writer: GGUFWriter, config: dict[str, Any]) -> None:
    rope = rope_parameters(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope["rope_type"]
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(int(original))
        for key, add in (
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key) is not None:
                add(float(rope[key]))
        if rope.get("attention_factor") is not None or rope.get("mscale") is not None or rope.get("truncate") is False:
            raise UnsupportedModelError(
                "yarn with attention_factor, mscale or truncate: false cannot be exported", "see docs/export.md"
            )
    elif kind not in ("default", "llama3"):
        raise UnsupportedModelError(
            f"rope of type {kind} cannot be exported", "supported: default, linear, yarn, llama3; see docs/export.md"
        )


def llama3_rope_factors(config: dict[str, Any]) -> np.ndarray | None:
    """Divisors of the rope frequencies, f32 (head_dim / 2,), for rope of type llama3; else None.

    Source: Llama 3.1: low frequencies are divided by `factor`, high ones kept, those between interpolated.
    """
    rope = rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return None
    head_dim = _heads(config)[2]
    wavelength = 2 * np.pi * float(rope["rope_theta"]) ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = float(rope["original_max_position_embeddings"]) / wavelength
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


PlannedTensor = tuple[str, tuple[int, ...], GGMLQuantizationType, Callable[[], np.ndarray]]


def _plan_tensors(source: ModelSource, dtype: str) -> list[PlannedTensor]:
    """Names, shapes and types of the file's tensors in its order, each with a function that reads it."""
    names = TensorNames(source.architecture, source.n_layer)
    matrix = FLOAT_TYPES[dtype][0]
    f32 = GGMLQuantizationType.F32
    plan: list[PlannedTensor] = []
    for name, shape in source.weights.shapes.items():
        ggml = names.to_ggml(name)
        if ggml is None or (ggml == "output.weight" and source.config.get("tie_word_embeddings")):
            continue
        kind = matrix if len(shape) > 1 else f32
        plan.append((ggml, shape, kind, TensorReader(source, name, kind)))
    factors = llama3_rope_factors(source.config)
    if factors is not None:
        plan.append(("rope_freqs.weight", factors.shape, f32, lambda: factors))
    for il in range(source.n_layer):
        for part, value in (("gate", RELU_SCALE), ("up", 1.0 / RELU_SCALE)):
            plan.append((f"blk.{il}.ffn_{part}.scale", (1,), f32, partial(np.array, [value], np.float32)))
    order = [int(match[1]) if (match := re.match(r"blk\.(\d+)\.", name)) else -1 for name, *_ in plan]
    return [plan[i] for i in sorted(range(len(plan)), key=lambda i: order[i])]


class TensorReader:
    """Reads one tensor, permutes what must be permuted, and converts it."""

    def __init__(self, source: ModelSource, name: str, kind: GGMLQuantizationType) -> None:
        self.source, self.name, self.kind = source, name, kind

    def __call__(self) -> np.ndarray:
        import torch

        tensor = self.source.weights.read(self.name)
        place = layer_and_part(self.name)
        if place is not None:
            tensor = self._permute(tensor, *place)
        wide = tensor.float()
        if not bool(torch.isfinite(wide).all()):
            raise CheckpointError(
                f"the tensor {self.name} holds NaN or infinity", "train again from an earlier checkpoint"
            )
        if self.kind == GGMLQuantizationType.F32:
            return wide.contiguous().numpy()
        if self.kind == GGMLQuantizationType.BF16:
            return wide.bfloat16().contiguous().view(torch.int16).numpy().view(np.uint16)
        half = wide.half()
        if not bool(torch.isfinite(half).all()):
            raise CheckpointError(f"the tensor {self.name} does not fit into F16", "export BF16 or F32 instead")
        return half.contiguous().numpy().view(np.uint16)

    def _permute(self, tensor: Any, il: int, part: str, kind: str) -> Any:
        import torch

        n_head, n_head_kv, _ = _heads(self.source.config)
        if self.source.architecture.permute_rope and part in ("self_attn.q_proj", "self_attn.k_proj"):
            return permute_rope(tensor, n_head if part == "self_attn.q_proj" else n_head_kv)
        if self.source.orders is None:
            return tensor
        order = torch.from_numpy(self.source.orders[il])
        if part in ("mlp.gate_proj", "mlp.up_proj"):
            return tensor[order]
        if part == "mlp.down_proj" and kind == "weight":
            return tensor[:, order]
        return tensor


def check_written(path: Path, source: ModelSource) -> None:
    """Checks that a file, perhaps quantized since, still carries the ReLU scales in F32 and all prosparse keys.

    Raises:
        GGUFError: it does not, so stock llama.cpp would not compute ReLU.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for il in range(source.n_layer):
        for part, value in (("gate", RELU_SCALE), ("up", 1.0 / RELU_SCALE)):
            scale = tensors.get(f"blk.{il}.ffn_{part}.scale")
            right = scale is not None and scale.tensor_type == GGMLQuantizationType.F32
            if scale is None or not right or scale.data.tolist() != [value]:
                raise GGUFError(f"{path.name}: blk.{il}.ffn_{part}.scale was lost or changed", "please report it")
    for key, wanted in (("prosparse.id", source.id), ("prosparse.version", 1), ("prosparse.scale", RELU_SCALE)):
        field = reader.get_field(key)
        if field is None or field.contents() != wanted:
            raise GGUFError(f"{path.name}: the key {key} was lost or changed", "please report it")
