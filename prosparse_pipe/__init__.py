"""prosparse-pipe: make language models sparse with ProSparse (arXiv 2402.13516) and run them in stock llama.cpp."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prosparse_pipe.runtime import load

__version__ = version("prosparse-pipe")
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":  # llama_cpp takes half a second to import: only when a model is wanted
        from prosparse_pipe.runtime import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
