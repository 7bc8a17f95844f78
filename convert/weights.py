"""The weights of a checkpoint folder, read tensor by tensor from safetensors (one file or shards)."""

import hashlib
import json
from pathlib import Path
from typing import Any

from prosparse_pipe.errors import CheckpointError

_SAMPLES, _SAMPLE_BYTES = 64, 65536


class Weights:
    """Tensors of a checkpoint by their Hugging Face names.

    Args:
        folder: with model.safetensors, or model.safetensors.index.json and its shards.

    Raises:
        CheckpointError: no safetensors, a shard that the index names is missing, or a file is truncated.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        self.files = _weight_files(folder)
        self._handles: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for file in self.files:
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file} cannot be read: {error}", "the file is truncated: copy or train it again"
                ) from None
            for name in sorted(handle.keys()):
                part = handle.get_slice(name)
                self._handles[name] = handle
                self.shapes[name] = tuple(part.get_shape())
                self.dtypes[name] = part.get_dtype()

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def read(self, name: str) -> Any:
        """One tensor, torch, in its stored dtype."""
        return self._handles[name].get_tensor(name)

    def widest_float(self) -> str:
        """The GGUF float type that holds every tensor without loss: F32, F16 or BF16."""
        kinds = set(self.dtypes.values())
        if kinds == {"BF16"}:
            return "BF16"
        return "F16" if kinds == {"F16"} else "F32"


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
            raise CheckpointError(f"{index} is not a safetensors index", "copy or train the checkpoint again") from None
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        other = next(iter(sorted(folder.glob("*.bin"))), None)
        hint = "save the checkpoint as safetensors" if other else "copy or train the checkpoint again"
        raise CheckpointError(f"{missing} does not exist", hint)
    return files


def fingerprint(folder: Path) -> str:
    """32 hex digits that tell checkpoints apart: sizes, headers and samples spread over the weight files."""
    digest = hashlib.sha256()
    for path in _weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for step in range(_SAMPLES):
                file.seek(size * step // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]
