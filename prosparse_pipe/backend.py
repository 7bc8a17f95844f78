"""ctypes binding of libggml-prosparse, and loading it into the ggml that llama-cpp-python uses."""

import ctypes
import dataclasses
import functools
import importlib.metadata
import os
from pathlib import Path

import llama_cpp

from prosparse_pipe.errors import BackendError, GGUFError

API_VERSION = 1
LIBRARY_NAME = "libggml-prosparse.so"
REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir prosparse-pipe"


class LayerStats(ctypes.Structure):
    """`struct prosparse_layer_stats`: tokens computed, active neurons summed over them, neurons of the layer."""

    _fields_ = (("n_tokens", ctypes.c_uint64), ("n_active", ctypes.c_uint64), ("n_ff", ctypes.c_uint64))


def find_library() -> Path:
    """The native library: $PROSPARSE_LIBRARY, or lib/ of the installed package.

    Raises:
        BackendError: there is none.
    """
    override = os.environ.get("PROSPARSE_LIBRARY")
    if override:
        if not Path(override).is_file():
            raise BackendError(f"PROSPARSE_LIBRARY={override} does not exist", "unset it, or build the library")
        return Path(override)
    path = Path(
        str(importlib.metadata.distribution("prosparse-pipe").locate_file(f"prosparse_pipe/lib/{LIBRARY_NAME}"))
    )
    if path.is_file():
        return path
    raise BackendError(f"{LIBRARY_NAME} is not part of this installation", REINSTALL)


def _declare(library: ctypes.CDLL) -> None:
    text, handle = ctypes.c_char_p, ctypes.c_void_p
    for name, result, arguments in (
        ("prosparse_api_version", ctypes.c_int, []),
        ("prosparse_built_for_ggml", text, []),
        ("prosparse_kernels", text, []),
        ("prosparse_abi_error", text, []),
        ("prosparse_model_open", handle, [text, text, ctypes.c_size_t, ctypes.POINTER(ctypes.c_bool)]),
        ("prosparse_model_free", None, [handle]),
        ("prosparse_model_buffer_type", handle, [handle]),
        ("prosparse_model_set_sparse", None, [handle, ctypes.c_bool]),
        ("prosparse_model_n_layer", ctypes.c_int, [handle]),
        ("prosparse_model_stats", None, [handle, ctypes.POINTER(LayerStats), ctypes.c_bool]),
    ):
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments


@functools.cache
def load_backend() -> ctypes.CDLL:
    """Loads the backend into the registry of libllama's ggml, once for the process.

    libllama links libggml.so.0, and llama_cpp._ggml may open libggml.so: two registries. A backend in the wrong one is
    ignored without a word, so it goes through libllama's own symbols, and the device must show up there.

    Raises:
        BackendError: the library is missing, cannot be loaded, or was built for another ggml.
    """
    path = find_library()
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError) as error:
        raise BackendError(f"{path} cannot be loaded: {error}", REINSTALL) from None
    if library.prosparse_api_version() != API_VERSION:
        raise BackendError(f"{path} belongs to another version of prosparse-pipe", REINSTALL)
    abi_error = library.prosparse_abi_error()
    if abi_error is not None:
        raise BackendError(abi_error.decode(), f"{REINSTALL}, or pip install llama-cpp-python in the version named")
    ggml = llama_cpp.llama_cpp._lib
    ggml.ggml_backend_load.restype = ctypes.c_void_p
    ggml.ggml_backend_load.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_dev_by_name.restype = ctypes.c_void_p
    ggml.ggml_backend_dev_by_name.argtypes = [ctypes.c_char_p]
    if not ggml.ggml_backend_load(str(path).encode()) or not ggml.ggml_backend_dev_by_name(b"ProSparse"):
        raise BackendError(f"ggml did not accept {path}", REINSTALL)
    return library


@dataclasses.dataclass
class LayerActivity:
    """Of one layer since the last reset: tokens computed, active neurons summed over them, neurons."""

    n_tokens: int
    n_active: int
    n_ff: int


class SparseModel:
    """A sparse GGUF as the backend sees it: where its FFN weights go, and what was active.

    Args:
        path: the file, or the first shard of a split one.

    Raises:
        GGUFError: the file is damaged or not understood; `is_dense` of the error is True for a GGUF without our keys.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.library = load_backend()
        error = ctypes.create_string_buffer(1024)
        is_dense = ctypes.c_bool(False)
        self.handle = self.library.prosparse_model_open(os.fsencode(path), error, len(error), ctypes.byref(is_dense))
        if not self.handle:
            message = error.value.decode()
            if is_dense.value:
                raise NotSparseError(message)
            raise GGUFError(message, "export it again, or restore the file")

    @property
    def buffer_type(self) -> int:
        """Address of the ggml buffer type of this file's FFN tensors."""
        return self.library.prosparse_model_buffer_type(self.handle)

    def set_sparse(self, sparse: bool) -> None:
        self.library.prosparse_model_set_sparse(self.handle, sparse)

    def activity(self, reset: bool = False) -> list[LayerActivity]:
        layers = (LayerStats * self.library.prosparse_model_n_layer(self.handle))()
        self.library.prosparse_model_stats(self.handle, layers, reset)
        return [LayerActivity(layer.n_tokens, layer.n_active, layer.n_ff) for layer in layers]

    def close(self) -> None:
        """Drops the handle; buffers that llama.cpp still holds stay valid."""
        if self.handle:
            self.library.prosparse_model_free(self.handle)
            self.handle = None


class NotSparseError(GGUFError):
    """A good GGUF without prosparse keys."""
