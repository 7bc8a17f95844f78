"""Opens a GGUF in llama-cpp-python with its feed-forward networks computed sparsely.

llama = prosparse_pipe.load("model-Q8_0.gguf", n_ctx=4096)   # a llama_cpp.Llama
"""

import ctypes
import dataclasses
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import llama_cpp

from prosparse_pipe.backend import NotSparseError, SparseModel
from prosparse_pipe.errors import GGUFError, ProsparseError

# What goes to the backend's buffer type; everything else stays with stock llama.cpp.
FFN_TENSORS = rb"blk\.\d+\.ffn_(gate|up|down)\.(weight|scale)"

_sparse_models: "weakref.WeakKeyDictionary[llama_cpp.Llama, SparseModel]" = weakref.WeakKeyDictionary()
_constructing = threading.Lock()


class _TensorBuftOverride(ctypes.Structure):
    """`struct llama_model_tensor_buft_override`; the list ends with a null pattern."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


@dataclasses.dataclass
class ActivationStats:
    """Active neurons since the last reset.

    Attributes:
        tokens: tokens that every layer computed.
        active: neurons that were active, summed over tokens and layers.
        total: neurons there were, summed likewise.
        layer_rates: per layer, share of active neurons, 0 to 1.
    """

    tokens: int
    active: int
    total: int
    layer_rates: list[float]

    @property
    def activation_rate(self) -> float:
        return self.active / self.total if self.total else 0.0

    @property
    def sparsity(self) -> float:
        return 1.0 - self.activation_rate


@contextmanager
def _buffer_type_for_ffn(model: SparseModel) -> Iterator[None]:
    """Llama() made inside puts its FFN tensors into the model's buffer type.

    `Llama` does not expose tensor_buft_overrides, but builds on llama_model_default_params(), looked up in its module.
    """
    overrides = (_TensorBuftOverride * 2)()
    overrides[0] = _TensorBuftOverride(FFN_TENSORS, model.buffer_type)
    module = llama_cpp.llama_cpp
    original = module.llama_model_default_params

    def with_overrides() -> Any:
        params = original()
        params.tensor_buft_overrides = ctypes.addressof(overrides)
        return params

    with _constructing:
        module.llama_model_default_params = with_overrides
        try:
            yield
        finally:
            module.llama_model_default_params = original


def _check_gguf(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise GGUFError(f"{path} cannot be opened: {error.strerror}", "give a .gguf file") from None
    if magic != b"GGUF":
        raise GGUFError(f"{path} is not a GGUF file", "give a .gguf file; `prosparse-pipe export --gguf` writes one")


def load(path: str | os.PathLike[str], *, sparse: bool = True, **llama_kwargs: Any) -> llama_cpp.Llama:
    """Opens a model.

    Args:
        path: GGUF file, or the first shard of a split one.
        sparse: use the sparse backend if the file is a sparse model; False runs stock llama.cpp.
        llama_kwargs: of `llama_cpp.Llama`; `verbose` is False unless given.

    Returns:
        A `llama_cpp.Llama`. A file without prosparse keys runs dense, with a note on standard error.

    Raises:
        GGUFError: the file is missing, truncated or not a model.
        BackendError: the native library is missing or was built for another ggml.
    """
    path = Path(path)
    _check_gguf(path)
    kwargs = {"verbose": False, **llama_kwargs}
    if kwargs.get("n_ctx"):  # llama.cpp rounds up as well; Llama's own arrays do not follow it and overflow
        kwargs["n_ctx"] = -(-kwargs["n_ctx"] // 256) * 256
    llama_cpp._logger.set_verbose(kwargs["verbose"])  # also for what ggml logs before Llama() does this
    model = None
    if sparse:
        try:
            model = SparseModel(path)
        except NotSparseError as error:
            click.echo(f"note: {error}; it runs in stock llama.cpp", err=True)
    try:
        if model is None:
            return llama_cpp.Llama(str(path), **kwargs)
        with _buffer_type_for_ffn(model):
            llama = llama_cpp.Llama(str(path), **kwargs)
    except (ValueError, RuntimeError) as error:
        if model is not None:
            model.close()
        if "Failed to load model" in str(error):
            raise GGUFError(f"llama.cpp cannot load {path}", "is it whole? -vv shows llama.cpp's own log") from None
        if "Failed to create" in str(error):
            raise ProsparseError(f"llama.cpp: {error}", "use a smaller --ctx-size") from None
        raise
    _sparse_models[llama] = model
    weakref.finalize(llama, model.close)
    return llama


def activation_stats(llama: llama_cpp.Llama, reset: bool = False) -> ActivationStats | None:
    """How many neurons were active since the last reset; None for a model that runs dense."""
    model = _sparse_models.get(llama)
    if model is None:
        return None
    layers = model.activity(reset)
    return ActivationStats(
        tokens=min((layer.n_tokens for layer in layers), default=0),
        active=sum(layer.n_active for layer in layers),
        total=sum(layer.n_tokens * layer.n_ff for layer in layers),
        layer_rates=[layer.n_active / max(1, layer.n_tokens * layer.n_ff) for layer in layers],
    )


def set_sparse(llama: llama_cpp.Llama, sparse: bool) -> None:
    """Switches a sparse model to computing every neuron, and back.

    Raises:
        ProsparseError: the model runs in stock llama.cpp.
    """
    model = _sparse_models.get(llama)
    if model is None:
        raise ProsparseError("this model runs dense in stock llama.cpp", "load a sparse model with sparse=True")
    model.set_sparse(sparse)
