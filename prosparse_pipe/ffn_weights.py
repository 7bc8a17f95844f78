"""FFN weights of another run or of a GGUF, to start from."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from prosparse_pipe.convert.weights import Weights
from prosparse_pipe.errors import CheckpointError
from prosparse_pipe.relu import GatedFFN

PARTS = ("gate", "up", "down")


def load_ffn_weights(ffns: list[GatedFFN], path: Path) -> None:
    """Copies gate, up and down of every layer from `path` into the FFNs.

    Args:
        ffns: of the model that starts.
        path: a folder of safetensors (a run), or a GGUF with `blk.N.ffn_{gate,up,down}.weight`, quantized or not; its
            other tensors are not read. The neurons may be in any order, the same for the three.

    Raises:
        CheckpointError: the file cannot be read, or a tensor is missing or has another shape.
    """
    if path.is_dir():
        weights = Weights(path)
        read: Callable[[str], torch.Tensor] = weights.read
        names = {part: f"{{}}.{part}_proj.weight" for part in PARTS}
        known = set(weights.shapes)
    else:
        tensors = _gguf_tensors(path)

        def read(name: str) -> torch.Tensor:
            from gguf.quants import dequantize

            tensor = tensors[name]
            return torch.from_numpy(np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type)))

        names = {part: f"blk.{{}}.ffn_{part}.weight" for part in PARTS}
        known = set(tensors)
    for ffn in ffns:
        for part in PARTS:
            name = names[part].format(ffn.name if path.is_dir() else ffn.layer)
            weight = getattr(ffn, part).weight
            if name not in known:
                raise CheckpointError(f"{path} lacks the tensor {name}", "give a run of the same base model")
            found = read(name)
            if found.shape != weight.shape:
                raise CheckpointError(
                    f"{path}: {name} has the shape {tuple(found.shape)} instead of {tuple(weight.shape)}",
                    "give a run of the same base model",
                )
            with torch.no_grad():
                weight.copy_(found)


def _gguf_tensors(path: Path) -> dict:
    from gguf import GGUFReader

    try:
        return {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "give a run folder or a GGUF of FFN weights") from None
