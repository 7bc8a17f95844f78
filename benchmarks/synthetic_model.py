"""Sparse models of real shapes with random weights and the activation rates of a real model.

    python benchmarks/synthetic_model.py llama2-7b --layers 6 --type Q4_0 --out models/

Speed depends on shapes, types and which neurons are active, not on what the weights mean. The hottest 10/20/30/50 % of
the neurons cover 34/49/60/77 % of the activations, as in SmolLM2-135M made sparse on chats, and `sparsity` is the mean
over neurons and tokens.

How the rates come about: the first 256 channels of the residual stream are constant (no layer writes to them) and
dwarf the others, so after the norm they are a bias. A gate row holds b there and random weights elsewhere: its value is
normal with mean b and known spread over tokens, and b is chosen for the rate. 256 channels are whole blocks of every
quant type, so a bias never shares a scale with other weights.
"""

import argparse
import dataclasses
from pathlib import Path
from statistics import NormalDist

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType

from prosparse_pipe.atomic import atomic_path
from prosparse_pipe.convert.ffn_file import quantize_rows
from prosparse_pipe.convert.names import RELU_SCALE

BIAS = 256  # constant channels
POOL = 2048  # different random rows; a matrix draws from them
COVERAGE = {0.0: 0.0, 0.1: 0.342, 0.2: 0.493, 0.3: 0.604, 0.5: 0.774, 1.0: 1.0}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a llama."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_vocab: int

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


SHAPES = {
    "llama2-7b": Shape(32, 4096, 11008, 32, 32, 32000),
    "llama2-13b": Shape(40, 5120, 13824, 40, 40, 32000),
    "mistral-7b": Shape(32, 4096, 14336, 32, 8, 32000),
    "llama3-8b": Shape(32, 4096, 14336, 32, 8, 128256),
    "qwen2.5-1.5b": Shape(28, 1536, 8960, 12, 2, 151936),
}
TYPES = {
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
    "Q5_0": LlamaFileType.MOSTLY_Q5_0,
    "Q5_1": LlamaFileType.MOSTLY_Q5_1,
    "IQ4_NL": LlamaFileType.MOSTLY_IQ4_NL,
    "Q4_K_M": LlamaFileType.MOSTLY_Q4_K_M,
    "Q5_K_M": LlamaFileType.MOSTLY_Q5_K_M,
    "Q6_K": LlamaFileType.MOSTLY_Q6_K,
}


def activation_rates(n_ff: int, sparsity: float) -> np.ndarray:
    """Rate of every neuron, hottest first, f64 (n_ff,), with mean 1 - sparsity and the coverage of a real model."""
    shares, covered = np.array(list(COVERAGE)), np.array(list(COVERAGE.values()))
    # slopes of the coverage at the middle of each section, joined by straight lines in the logarithm
    middles, slopes = (shares[1:] + shares[:-1]) / 2, np.diff(covered) / np.diff(shares)
    places = (np.arange(n_ff) + 0.5) / n_ff
    rates = np.exp(np.interp(places, middles, np.log(slopes)))
    return np.minimum(rates * (1 - sparsity) / rates.mean(), 0.97)


def type_of(kind: str, name: str, layer: int, n_layer: int) -> GGMLQuantizationType:
    """Type of a matrix in a file of the type; the K mixes give some matrices Q6_K, as llama.cpp's quantizer does."""
    if kind in ("Q4_K_M", "Q5_K_M"):
        better = name == "output" or (
            name in ("ffn_down", "attn_v")
            and (layer < n_layer // 8 or layer >= 7 * n_layer // 8 or (layer - n_layer // 8) % 3 == 2)
        )
        return GGMLQuantizationType.Q6_K if better else GGMLQuantizationType[kind[:4]]
    if name == "output" and kind not in ("F16", "BF16", "Q8_0"):
        return GGMLQuantizationType.Q6_K
    return GGMLQuantizationType[kind]


class Weights:
    """Coded random rows, drawn from a pool for each width and type.

    Args:
        seed: of everything random.
    """

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.pools: dict[tuple[int, str, float], np.ndarray] = {}

    def rows(self, n: int, width: int, kind: GGMLQuantizationType, scale: float) -> np.ndarray:
        """n rows of normal weights with standard deviation scale / sqrt(width), uint8 (n, bytes)."""
        key = (width, kind.name, scale)
        if key not in self.pools:
            values = self.random.standard_normal((POOL, width), np.float32) * (scale / np.sqrt(width))
            self.pools[key] = quantize_rows(values, kind)
        return self.pools[key][self.random.integers(0, POOL, n)]

    def matrix(self, n: int, width: int, kind: GGMLQuantizationType, scale: float, bias: np.ndarray) -> np.ndarray:
        """Rows whose first BIAS columns all hold bias[row]; f64 (n,) or a number."""
        constant = np.broadcast_to(np.asarray(bias, np.float32).reshape(-1, 1), (n, BIAS))
        return np.concatenate([quantize_rows(constant, kind), self.rows(n, width - BIAS, kind, scale)], axis=1)


def write_model(
    target: Path, name: str, shape: Shape, kind: str, n_layer: int, sparsity: float = 0.89, seed: int = 0
) -> None:
    """Writes a synthetic model.

    Args:
        kind: a key of TYPES.
        n_layer: of them; fewer than the shape's make a cut that fits memory and time.
    """
    weights = Weights(seed)
    n_embd, n_ff, n_kv = shape.n_embd, shape.n_ff, shape.n_head_kv * shape.head_dim
    f32 = GGMLQuantizationType.F32
    gate_scale = 1.0
    # After the norm the constant channels are 1 (times their norm weight), the others normal with spread 1 or so.
    rates = activation_rates(n_ff, sparsity)
    bias = np.array([NormalDist().inv_cdf(rate) for rate in rates]) * gate_scale / BIAS
    ones = np.ones(n_embd, np.float32)
    # The constant channels are 8 times the others, so what layers add hardly moves the norm.
    level = 8.0
    rms = np.float32(np.sqrt((BIAS * level**2 + (n_embd - BIAS)) / n_embd))
    norm = ones * rms
    norm[:BIAS] = rms / level
    with atomic_path(target) as path:
        writer = GGUFWriter(path, "llama")
        writer.add_name(f"{name} synthetic" if n_layer == shape.n_layer else f"{name} synthetic, {n_layer} layers")
        writer.add_file_type(TYPES[kind])
        writer.add_block_count(n_layer)
        writer.add_context_length(4096)
        writer.add_embedding_length(n_embd)
        writer.add_feed_forward_length(n_ff)
        writer.add_head_count(shape.n_head)
        writer.add_head_count_kv(shape.n_head_kv)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        writer.add_rope_dimension_count(shape.head_dim)
        _add_vocabulary(writer, shape.n_vocab)
        writer.add_uint32("prosparse.version", 1)
        writer.add_string("prosparse.activation", "relu")
        writer.add_float32("prosparse.threshold", 0.0)
        writer.add_float32("prosparse.scale", RELU_SCALE)
        writer.add_bool("prosparse.sorted", True)
        writer.add_array("prosparse.sparsity", [sparsity] * n_layer)
        writer.add_string("prosparse.id", f"synthetic{seed:023d}")

        plan = []  # (name, rows, width, type, function)
        embedding = type_of(kind, "token_embd", 0, n_layer)
        plan.append(
            ("token_embd.weight", shape.n_vocab, n_embd, embedding, lambda t: weights.matrix(
                shape.n_vocab, n_embd, t, np.sqrt(n_embd - BIAS), level))
        )  # fmt: skip
        for il in range(n_layer):
            for part, rows, width in (
                ("attn_q", n_embd, n_embd), ("attn_k", n_kv, n_embd), ("attn_v", n_kv, n_embd),
                ("attn_output", n_embd, n_embd), ("ffn_gate", n_ff, n_embd), ("ffn_up", n_ff, n_embd),
                ("ffn_down", n_embd, n_ff),
            ):  # fmt: skip
                matrix = type_of(kind, part, il, n_layer)
                plan.append((f"blk.{il}.{part}.weight", rows, width, matrix, _maker(weights, part, rows, width, bias)))
        output = type_of(kind, "output", 0, n_layer)
        plan.append(
            ("output.weight", shape.n_vocab, n_embd, output, lambda t: weights.matrix(
                shape.n_vocab, n_embd, t, 3.0, 0.0))
        )  # fmt: skip
        vectors = {"output_norm.weight": ones * rms}
        for il in range(n_layer):
            vectors[f"blk.{il}.attn_norm.weight"] = norm
            vectors[f"blk.{il}.ffn_norm.weight"] = norm
            vectors[f"blk.{il}.ffn_gate.scale"] = np.array([RELU_SCALE], np.float32)
            vectors[f"blk.{il}.ffn_up.scale"] = np.array([1 / RELU_SCALE], np.float32)
        for tensor, rows, width, matrix, _ in plan:
            block, size = GGML_QUANT_SIZES[matrix]
            coded = (rows, width // block * size)
            writer.add_tensor_info(tensor, coded, np.dtype(np.uint8), coded[0] * coded[1], raw_dtype=matrix)
        for tensor, vector in vectors.items():
            writer.add_tensor_info(tensor, vector.shape, vector.dtype, vector.nbytes, raw_dtype=f32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, _, matrix, make in plan:
            writer.write_tensor_data(make(matrix))
        for vector in vectors.values():
            writer.write_tensor_data(vector)
        writer.close()


def _maker(weights: Weights, part: str, rows: int, width: int, bias: np.ndarray):
    """A function from a type to the coded matrix of a part."""

    def make(kind: GGMLQuantizationType) -> np.ndarray:
        if part == "ffn_gate":
            return weights.matrix(rows, width, kind, 1.0, bias)
        if part in ("attn_output", "ffn_down"):  # nothing is written to the constant channels
            matrix = weights.rows(rows, width, kind, 0.3)
            matrix[:BIAS] = quantize_rows(np.zeros((1, width), np.float32), kind)
            return matrix
        return weights.matrix(rows, width, kind, 1.0, 0.0)

    return make


def _add_vocabulary(writer: GGUFWriter, n_vocab: int) -> None:
    """Sentencepiece with one token for each byte and unused ones up to n_vocab."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    tokens += [f"<unused{i}>" for i in range(len(tokens), n_vocab)]
    kinds += [TokenType.UNUSED] * (n_vocab - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * n_vocab)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def file_name(name: str, kind: str, n_layer: int) -> str:
    whole = n_layer == SHAPES[name].n_layer
    return f"{name}-{kind}.gguf" if whole else f"{name}-{n_layer}layers-{kind}.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--type", default="Q4_0", choices=TYPES)
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--sparsity", type=float, default=0.89)
    parser.add_argument("--out", type=Path, default=Path("models"))
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    n_layer = arguments.layers or shape.n_layer
    target = arguments.out / file_name(arguments.shape, arguments.type, n_layer)
    write_model(target, arguments.shape, shape, arguments.type, n_layer, arguments.sparsity)
    print(f"{target}  {target.stat().st_size / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
