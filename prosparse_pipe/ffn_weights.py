"""FFN weights of another run or of a GGUF, to start from."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from prosparse_pipe.convert.ffn_file import is_ffn_file, open_gguf
from prosparse_pipe.convert.weights import Weights
from prosparse_pipe.errors import CheckpointError
from prosparse_pipe.relu import GatedFFN

PARTS = ("gate", "up", "down")


def load_ffn_weights(ffns: list[GatedFFN], path: Path) -> None:
    """Copies gate, up and down of every layer from `path` into the FFNs.

    Args:
        ffns: of the model that starts.
        path: a folder of safetensors (a run), or a GGUF with `blk.N.ffn_{gate,up,down}.weight`, quantized or not, a
            whole model or an FFN file; its other tensors are not read. The neurons may be in any order, the same for
            the three.

    Raises:
        CheckpointError: the folder cannot be read, or a tensor is missing or has another shape.
        GGUFError: the file cannot be read.
    """
    any_shape = False  # an FFN file keeps the matrices as rows of blocks
    if path.is_dir():
        weights = Weights(path)
        read: Callable[[str], torch.Tensor] = weights.read
        names = {part: f"{{}}.{part}_proj.weight" for part in PARTS}
        known = set(weights.shapes)
    else:
        from gguf.quants import dequantize

        reader = open_gguf(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        any_shape = is_ffn_file(reader)

        def read(name: str) -> torch.Tensor:
            tensor = tensors[name]
            return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))

        names = {part: f"blk.{{}}.ffn_{part}.weight" for part in PARTS}
        known = set(tensors)
    for ffn in ffns:
        for part in PARTS:
            name = names[part].format(ffn.name if path.is_dir() else ffn.layer)
            weight = getattr(ffn, part).weight
            if name not in known:
                raise CheckpointError(f"{path} lacks the tensor {name}", "give a run of the same base model")
            found = read(name)
            if any_shape and found.numel() == weight.numel():
                found = found.reshape(weight.shape)
            if found.shape != weight.shape:
                raise CheckpointError(
                    f"{path}: {name} has the shape {tuple(found.shape)} instead of {tuple(weight.shape)}",
                    "give a run of the same base model",
                )
            with torch.no_grad():
                weight.copy_(found)
