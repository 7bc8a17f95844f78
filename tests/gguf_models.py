"""Tiny random sparse GGUFs of every quantization type, their float64 reference, and stock llama.cpp on them."""

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType as Type

RELU_SCALE = 65536.0  # K of silu(K g) * (u / K)
N_THREADS = 1  # models this small gain nothing from more, and spinning threads starve each other on a busy machine


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a tiny llama; the FFN sizes fit the 256-element blocks of the k-quants."""

    n_vocab: int = 288
    n_layer: int = 2
    n_embd: int = 256
    n_ff: int = 512
    n_head: int = 4
    n_head_kv: int = 2
    eps: float = 1e-5
    rope_base: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


def quantize(values: np.ndarray, qtype: Type) -> np.ndarray:
    """Rows of float32 (n_rows, n) as ggml's own quantizer codes them: uint8 (n_rows, bytes), or floats."""
    values = np.ascontiguousarray(values, np.float32)
    if qtype in (Type.F32, Type.F16):
        return values.astype({Type.F32: np.float32, Type.F16: np.float16}[qtype])
    ggml = llama_cpp.llama_cpp._lib
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    n_rows, n = values.shape
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    coded = np.zeros((n_rows, n // block * size), np.uint8)
    importance = np.ones(n, np.float32)  # the smallest IQ types insist on one
    ggml.ggml_quantize_chunk(int(qtype), values.ctypes.data, coded.ctypes.data, 0, n_rows, n, importance.ctypes.data)
    return coded


def dequantize(coded: np.ndarray, qtype: Type) -> np.ndarray:
    return gguf.quants.dequantize(coded, qtype).astype(np.float64)


@dataclasses.dataclass
class TinyModel:
    """A written file and its exact (dequantized) weights, float64, by GGUF name."""

    path: Path
    shape: Shape
    threshold: float
    weights: dict[str, np.ndarray]


def write_model(
    path: Path,
    *,
    ffn_type: Type = Type.F32,
    down_type: Type | None = None,
    other_type: Type = Type.F32,
    threshold: float = 0.0,
    shape: Shape | None = None,
    seed: int = 0,
    keys: dict[str, Any] | None = None,
    without_keys: bool = False,
    without: Sequence[str] = (),
    replace: dict[str, np.ndarray] | None = None,
) -> TinyModel:
    """Writes a random ReLU llama with about a quarter of its neurons active.

    Args:
        ffn_type: type of gate, up and (unless `down_type`) down.
        other_type: type of embeddings and attention.
        keys: replaces or adds prosparse keys, e.g. {"prosparse.version": 2}.
        without_keys: no prosparse keys at all: a dense file.
        without: tensors to leave out.
        replace: other values for tensors, written as F32.
    """
    shape = shape or Shape()
    rng = np.random.default_rng(seed)
    n_embd, n_ff, n_kv = shape.n_embd, shape.n_ff, shape.n_head_kv * shape.head_dim

    def normal(*size: int) -> np.ndarray:
        return (rng.standard_normal(size) / np.sqrt(size[-1])).astype(np.float32)

    tensors: dict[str, tuple[np.ndarray, Type]] = {}
    embedding = rng.standard_normal((shape.n_vocab, n_embd)).astype(np.float32)
    embedding[:, 0] = 4.0  # a constant channel acts as the bias that makes gates mostly negative
    tensors["token_embd.weight"] = embedding, other_type
    for il in range(shape.n_layer):
        block = f"blk.{il}"
        gate = normal(n_ff, n_embd)
        gate[:, 0] = -np.sort(np.abs(rng.standard_normal(n_ff))) * 0.4  # hot neurons first, as export sorts them
        tensors[f"{block}.attn_norm.weight"] = 1 + 0.1 * normal(1, n_embd)[0], Type.F32
        tensors[f"{block}.ffn_norm.weight"] = 1 + 0.1 * normal(1, n_embd)[0], Type.F32
        for name, value in (("q", normal(n_embd, n_embd)), ("k", normal(n_kv, n_embd)), ("v", normal(n_kv, n_embd))):
            tensors[f"{block}.attn_{name}.weight"] = value, other_type
        tensors[f"{block}.attn_output.weight"] = normal(n_embd, n_embd), other_type
        tensors[f"{block}.ffn_gate.weight"] = gate, ffn_type
        tensors[f"{block}.ffn_up.weight"] = 2 * normal(n_ff, n_embd), ffn_type
        tensors[f"{block}.ffn_down.weight"] = 3 * normal(n_embd, n_ff), ffn_type if down_type is None else down_type
        if not without_keys:
            tensors[f"{block}.ffn_gate.scale"] = np.array([RELU_SCALE], np.float32), Type.F32
            tensors[f"{block}.ffn_up.scale"] = np.array([1 / RELU_SCALE], np.float32), Type.F32
    tensors["output_norm.weight"] = np.ones(n_embd, np.float32), Type.F32
    tensors["output.weight"] = 3 * normal(shape.n_vocab, n_embd), other_type

    tensors.update({name: (value.astype(np.float32), Type.F32) for name, value in (replace or {}).items()})

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(2048)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_rope_dimension_count(shape.head_dim)
    _add_vocabulary(writer, shape.n_vocab)
    if not without_keys:
        prosparse: dict[str, Any] = {
            "prosparse.version": 1,
            "prosparse.activation": "fatrelu" if threshold > 0 else "relu",
            "prosparse.threshold": threshold,
            "prosparse.scale": RELU_SCALE,
            "prosparse.sorted": True,
            "prosparse.id": "0123abcd",
            **(keys or {}),
        }
        add: dict[type, Callable[[str, Any], None]] = {
            int: writer.add_uint32, str: writer.add_string, float: writer.add_float32, bool: writer.add_bool,
        }  # fmt: skip
        for key, value in prosparse.items():
            if value is not None:
                add[type(value)](key, value)
        writer.add_array("prosparse.sparsity", [0.75] * shape.n_layer)
    weights = {}
    for name, (value, qtype) in tensors.items():
        if name in without:
            continue
        coded = quantize(value if value.ndim > 1 else value[None], qtype)
        weights[name] = dequantize(coded, qtype).reshape(value.shape)
        writer.add_tensor(name, coded if value.ndim > 1 else coded[0], raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return TinyModel(path, shape, threshold, weights)


def _add_vocabulary(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    """Sentencepiece with one token for each byte and unused ones up to n_vocab."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, *[gguf.TokenType.BYTE] * 256]
    for i in range(len(tokens), n_vocab):
        tokens.append(f"<unused{i}>")
        kinds.append(gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * n_vocab)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


@dataclasses.dataclass
class TinyLora:
    """A written adapter and what it adds to each weight, float64."""

    path: Path
    deltas: dict[str, np.ndarray]


def write_lora(path: Path, shape: Shape, *, rank: int = 4, seed: int = 1) -> TinyLora:
    """A LoRA adapter on gate, up and down of every layer, big enough to change the answer."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    deltas = {}
    for il in range(shape.n_layer):
        for name in ("gate", "up", "down"):
            n_in, n_out = (shape.n_ff, shape.n_embd) if name == "down" else (shape.n_embd, shape.n_ff)
            a = (rng.standard_normal((rank, n_in)) / np.sqrt(n_in)).astype(np.float32)
            b = (rng.standard_normal((n_out, rank)) * 0.2).astype(np.float32)
            writer.add_tensor(f"blk.{il}.ffn_{name}.weight.lora_a", a)
            writer.add_tensor(f"blk.{il}.ffn_{name}.weight.lora_b", b)
            deltas[f"blk.{il}.ffn_{name}.weight"] = b.astype(np.float64) @ a.astype(np.float64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return TinyLora(path, deltas)


def reference_logits(model: TinyModel, tokens: Sequence[int]) -> np.ndarray:
    """The network in float64 numpy with the file's dequantized weights, plain ReLU or FATReLU: (n_tokens, n_vocab)."""
    s, w = model.shape, model.weights
    n, d = len(tokens), s.head_dim

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + s.eps) * weight

    angle = np.arange(n)[:, None] * s.rope_base ** (-np.arange(0, d, 2) / d)  # (n, d / 2)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def rope(x: np.ndarray) -> np.ndarray:  # (n, heads, d), neighbouring elements are a pair
        even, odd = x[..., ::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    x = w["token_embd.weight"][list(tokens)]
    mask = np.triu(np.full((n, n), -np.inf), 1)
    for il in range(s.n_layer):
        block = f"blk.{il}"
        h = norm(x, w[f"{block}.attn_norm.weight"])
        q = rope((h @ w[f"{block}.attn_q.weight"].T).reshape(n, s.n_head, d))
        k = rope((h @ w[f"{block}.attn_k.weight"].T).reshape(n, s.n_head_kv, d))
        v = (h @ w[f"{block}.attn_v.weight"].T).reshape(n, s.n_head_kv, d)
        group = s.n_head // s.n_head_kv
        k, v = k.repeat(group, 1), v.repeat(group, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(d) + mask
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", scores, v).reshape(n, -1) @ w[f"{block}.attn_output.weight"].T
        h = norm(x, w[f"{block}.ffn_norm.weight"])
        gate = h @ w[f"{block}.ffn_gate.weight"].T
        gate = np.where((gate > 0) & (gate >= model.threshold), gate, 0.0)
        x = x + (gate * (h @ w[f"{block}.ffn_up.weight"].T)) @ w[f"{block}.ffn_down.weight"].T
    return norm(x, w["output_norm.weight"]) @ w["output.weight"].T


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 259, count)]


def load_stock(path: Path, **kwargs: Any) -> llama_cpp.Llama:
    """Stock llama.cpp on the file, with its plain kernels: repacked and AMX weights are other roundings."""
    module = llama_cpp.llama_cpp
    original = module.llama_model_default_params

    def plain() -> Any:
        params = original()
        params.use_extra_bufts = False
        return params

    module.llama_model_default_params = plain
    try:
        return llama_cpp.Llama(str(path), **llama_arguments(**kwargs))
    finally:
        module.llama_model_default_params = original


def llama_arguments(**changes: Any) -> dict[str, Any]:
    """What both engines get: one thread, F32 cache, all logits."""
    return {
        "n_ctx": 256,
        "n_batch": 256,
        "n_threads": N_THREADS,
        "n_threads_batch": N_THREADS,
        "logits_all": True,
        "verbose": False,
        "type_k": llama_cpp.GGML_TYPE_F32,
        "type_v": llama_cpp.GGML_TYPE_F32,
        **changes,
    }


def logits(llama: llama_cpp.Llama, tokens: Sequence[int], batch: int | None = None) -> np.ndarray:
    """Logits of all tokens, read from an empty cache in pieces of `batch` (None: at once): float64."""
    llama.reset()
    llama._ctx.kv_cache_clear()
    step = batch or len(tokens)
    for start in range(0, len(tokens), step):
        llama.eval(tokens[start : start + step])
    return np.array(llama.scores[: len(tokens)], np.float64)


def greedy(llama: llama_cpp.Llama, tokens: Sequence[int], count: int) -> list[int]:
    """The most probable continuation, never stopping."""
    logits(llama, tokens)
    found: list[int] = []
    for _ in range(count):
        found.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(found[-1:])
    return found


def relative_l2(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
