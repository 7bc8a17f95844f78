"""The FFN weights of a sparse model alone: with the base model that it was trained from, they make the whole model.

A model of which only the FFNs were trained (`trainable: ffn`) shares everything else with its base. `write_ffn` keeps
what differs; `assemble` puts it together with the base's GGUF, whose other tensors are copied bit for bit.

The tensors of an FFN file are coded in blocks that run over the whole matrix, row after row: {256, n / 256} instead of
{n_embd, n_ff}. So the k-quants serve widths that are no multiple of 256, such as the 576 of SmolLM2-135M.
"""

import ctypes
import hashlib
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType

from prosparse_pipe.atomic import atomic_path
from prosparse_pipe.convert.hf_to_gguf import (
    ModelSource,
    Progress,
    TensorReader,
    short_write_is_disk_full,
    write_prosparse_keys,
)
from prosparse_pipe.convert.names import RELU_SCALE, TensorNames
from prosparse_pipe.errors import CheckpointError, GGUFError, ProsparseError

GENERAL_TYPE = "ffn"
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
FILE_TYPES = {"Q8_0": LlamaFileType.MOSTLY_Q8_0, "F16": LlamaFileType.MOSTLY_F16, "F32": LlamaFileType.ALL_F32}


def base_id(base: GGUFReader) -> str:
    """32 hex digits of everything in a GGUF but its FFN matrices and keys: names, types and bits of the tensors."""
    digest = hashlib.sha256()
    for tensor in sorted(base.tensors, key=lambda tensor: tensor.name):
        if not _is_ffn_matrix(tensor.name):
            digest.update(f"{tensor.name} {tensor.tensor_type.name} {tensor.shape.tolist()}\n".encode())
            digest.update(tensor.data.data)
    return digest.hexdigest()[:32]


def _is_ffn_matrix(name: str) -> bool:
    return re.fullmatch(r"blk\.\d+\.ffn_(gate|up|down)\.weight", name) is not None


def quantize_rows(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Rows as ggml's own quantizer codes them.

    Args:
        values: f32 (n_rows, n), n a multiple of the type's block.

    Returns:
        uint8 (n_rows, bytes of a row).
    """
    import llama_cpp

    ggml = llama_cpp.llama_cpp._lib
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    values = np.ascontiguousarray(values, np.float32)
    block, size = GGML_QUANT_SIZES[kind]
    coded = np.empty((len(values), values.shape[1] // block * size), np.uint8)
    ggml.ggml_quantize_chunk(int(kind), values.ctypes.data, coded.ctypes.data, 0, *values.shape, None)
    return coded


def write_ffn(
    source: ModelSource, base_path: Path, target: Path, kind: str = "Q6_K", progress: Progress | None = None
) -> None:
    """Writes the FFN weights of a run.

    Args:
        source: the run, opened for export; neurons are sorted if it has orders.
        base_path: GGUF of the base model, whose other tensors must be those of the run.
        kind: one of TYPES.
        progress: called with tensors done and tensors in all.

    Raises:
        CheckpointError: the run changed more than its FFNs, or has FFN biases.
        GGUFError: the base cannot be read.
        ProsparseError: the type does not fit the matrices; the disk is full.
    """
    if kind not in TYPES:
        raise ProsparseError(f"unknown type {kind} for an FFN file", f"one of {' '.join(TYPES)}")
    base = open_gguf(base_path)
    _check_same_base(source, base, base_path)
    names = TensorNames(source.architecture, source.n_layer)
    qtype = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[qtype]
    matrices = [(ggml, name) for name in source.weights.shapes if _is_ffn_matrix(ggml := names.to_ggml(name) or "")]
    matrices.sort(key=lambda pair: (int(pair[0].split(".")[1]), pair[0]))
    with atomic_path(target) as path:
        writer = GGUFWriter(path, source.architecture.gguf_arch)
        try:
            writer.add_type(GENERAL_TYPE)
            writer.add_name(source.name)
            writer.add_string("prosparse.ffn.base", _general_name(base, base_path))
            writer.add_string("prosparse.ffn.base_id", base_id(base))
            write_prosparse_keys(writer, source)
            for ggml, name in matrices:
                elements = math.prod(source.weights.shapes[name])
                if elements % block:
                    raise ProsparseError(
                        f"{ggml} has {elements} weights, no multiple of the {block} of {kind}", "use another type: F16"
                    )
                coded = (elements // block, size)
                writer.add_tensor_info(ggml, coded, np.dtype(np.uint8), elements // block * size, raw_dtype=qtype)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, (_, name) in enumerate(matrices, 1):
                values = TensorReader(source, name, GGMLQuantizationType.F32)()
                with short_write_is_disk_full():
                    writer.write_tensor_data(quantize_rows(values.reshape(-1, block), qtype))
                if progress is not None:
                    progress(done, len(matrices))
        finally:
            writer.close()


def _check_same_base(source: ModelSource, base: GGUFReader, path: Path) -> None:
    """Raises CheckpointError unless the run's tensors outside the FFNs are the base's, and its FFNs have no biases."""
    from gguf.quants import dequantize

    names = TensorNames(source.architecture, source.n_layer)
    tensors = {tensor.name: tensor for tensor in base.tensors}
    for name in source.weights.shapes:
        ggml = names.to_ggml(name)
        if ggml is None or _is_ffn_matrix(ggml) or (ggml == "output.weight" and ggml not in tensors):
            continue
        if ".ffn_" in ggml and ggml.endswith(".bias"):
            raise CheckpointError(f"{source.run} has FFN biases ({ggml})", "export the whole model")
        wanted = tensors.get(ggml)
        if wanted is None:
            raise CheckpointError(f"{path} lacks the tensor {ggml}", "give the GGUF that the run was trained from")
        values = TensorReader(source, name, GGMLQuantizationType.F32)()
        if not np.array_equal(values.ravel(), dequantize(wanted.data, wanted.tensor_type).ravel()):
            raise CheckpointError(
                f"{ggml} is not the base model's",
                "an FFN file needs a run with `--trainable ffn` and its own base; export the whole model",
            )


def open_gguf(path: Path) -> GGUFReader:
    """A reader of a file.

    Raises:
        GGUFError: it is missing or damaged.
    """
    try:
        return GGUFReader(path)
    except (OSError, ValueError) as error:
        raise GGUFError(f"{path} cannot be read: {error}", "is it whole? restore the file") from None


def is_ffn_file(reader: GGUFReader) -> bool:
    field = reader.get_field("general.type")
    return field is not None and field.contents() == GENERAL_TYPE


def _general_name(reader: GGUFReader, path: Path) -> str:
    field = reader.get_field("general.name")
    return str(field.contents()) if field else path.stem


def read_matrix(reader: GGUFReader, name: str, shape: tuple[int, int]) -> np.ndarray:
    """A matrix of an FFN file or of any GGUF as f32 (rows, columns).

    Raises:
        GGUFError: it is missing or has another size.
    """
    from gguf.quants import dequantize

    tensor = next((tensor for tensor in reader.tensors if tensor.name == name), None)
    if tensor is None:
        raise GGUFError(f"the tensor {name} is missing", "give the FFN file of this model")
    if tensor.n_elements != math.prod(shape):
        raise GGUFError(f"{name} has {tensor.n_elements} weights instead of {shape[0]} x {shape[1]}", "another model?")
    return dequantize(tensor.data, tensor.tensor_type).reshape(shape)


def assemble(
    ffn_path: Path, base_path: Path, target: Path, kind: str = "Q8_0", progress: Progress | None = None
) -> None:
    """Writes the whole model: the base's GGUF with the FFN file's matrices in place of its own, and the ReLU scales.

    Args:
        ffn_path: what `write_ffn` wrote.
        base_path: GGUF of the base model, the same bits.
        kind: type of the FFN matrices in the result: F32, F16 or Q8_0.
        progress: called with bytes written and bytes in all.

    Raises:
        GGUFError: a file is damaged, is no FFN file, or the base is another.
        ProsparseError: the disk is full.
    """
    ffn, base = open_gguf(ffn_path), open_gguf(base_path)
    if not is_ffn_file(ffn):
        raise GGUFError(f"{ffn_path} is not an FFN file", "`prosparse-pipe export --ffn-only` writes one")
    wanted = ffn.get_field("prosparse.ffn.base_id")
    if wanted is None or wanted.contents() != base_id(base):
        raise GGUFError(
            f"{base_path} is not the base model of {ffn_path.name}", f"it needs {_general_name(ffn, ffn_path)}'s base"
        )
    qtype = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[qtype]
    item = np.dtype({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8))
    f32 = GGMLQuantizationType.F32
    plan: list[_Planned] = []
    for tensor in base.tensors:
        if _is_ffn_matrix(tensor.name):
            columns, rows = (int(n) for n in tensor.shape)
            shape = (rows, columns if item.itemsize > 1 else columns // block * size)
            plan.append(
                _Planned(tensor.name, shape, item, qtype, partial(_read_as, ffn, tensor.name, (rows, columns), qtype))
            )
        else:
            data = np.asarray(tensor.data)
            plan.append(_Planned(tensor.name, data.shape, data.dtype, tensor.tensor_type, partial(np.asarray, data)))
        gate_or_up = re.fullmatch(r"blk\.\d+\.ffn_(gate|up)\.weight", tensor.name)
        if gate_or_up:
            scale = np.array([RELU_SCALE if gate_or_up[1] == "gate" else 1.0 / RELU_SCALE], np.float32)
            name = tensor.name.replace(".weight", ".scale")
            plan.append(_Planned(name, (1,), scale.dtype, f32, partial(np.asarray, scale)))

    with atomic_path(target) as path:
        writer = GGUFWriter(path, str(base.fields["general.architecture"].contents()))
        try:
            _copy_keys(writer, base, lambda name: not name.startswith(("GGUF.", "general.", "prosparse.")))
            _copy_keys(writer, base, lambda name: name in ("general.license", "general.languages"))
            _copy_keys(writer, ffn, lambda name: name == "general.name" or name.startswith("prosparse."))
            writer.add_type("model")
            writer.add_finetune("ProSparse")
            writer.add_tags(["prosparse", "relu", "sparse"])
            writer.add_file_type(FILE_TYPES[kind])
            writer.add_quantization_version(2)
            for planned in plan:
                writer.add_tensor_info(
                    planned.name, planned.shape, planned.item, planned.n_bytes, raw_dtype=planned.kind
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            total, done = sum(planned.n_bytes for planned in plan), 0
            for planned in plan:
                with short_write_is_disk_full():
                    writer.write_tensor_data(planned.read())
                done += planned.n_bytes
                if progress is not None:
                    progress(done, total)
        finally:
            writer.close()


class _Planned(NamedTuple):
    """A tensor of the result: shape and item as stored, and the function that reads it."""

    name: str
    shape: tuple[int, ...]
    item: np.dtype
    kind: GGMLQuantizationType
    read: Callable[[], np.ndarray]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.item.itemsize


def _read_as(ffn: GGUFReader, name: str, shape: tuple[int, int], kind: GGMLQuantizationType) -> np.ndarray:
    """One matrix of an FFN file, coded as the result has it."""
    values = read_matrix(ffn, name, shape)
    if kind == GGMLQuantizationType.F32:
        return values
    return values.astype(np.float16) if kind == GGMLQuantizationType.F16 else quantize_rows(values, kind)


def _copy_keys(writer: GGUFWriter, reader: GGUFReader, wanted: Callable[[str], bool]) -> None:
    for name, field in reader.fields.items():
        if wanted(name):
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
