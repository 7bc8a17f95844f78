"""llama.cpp's own quantizer, run in a process of its own: Ctrl-C stops it at once, and its log stays out of the way.

python -m prosparse_pipe.convert.quantize SOURCE.gguf TARGET.gguf FTYPE THREADS [IMATRIX.gguf]
"""

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from prosparse_pipe.errors import GGUFError, ProsparseError

# llama_ftype of llama.h
QUANT_TYPES = {
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q8_0": 7,
    "Q2_K": 10,
    "Q2_K_S": 21,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ1_S": 24,
    "IQ1_M": 31,
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "IQ2_S": 28,
    "IQ2_M": 29,
    "IQ3_XXS": 23,
    "IQ3_XS": 22,
    "IQ3_S": 26,
    "IQ3_M": 27,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "TQ1_0": 36,
    "TQ2_0": 37,
}
_STEP = re.compile(r"^\[\s*(\d+)/\s*(\d+)\]")


def quantize(
    source: Path,
    target: Path,
    kind: str,
    *,
    threads: int = 0,
    imatrix: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    verbose: bool = False,
) -> None:
    """Quantizes a float GGUF with llama.cpp's quantizer.

    Args:
        kind: a key of QUANT_TYPES.
        threads: 0: all cores.
        imatrix: importance matrix (GGUF) that llama-imatrix made from a file with the same neuron order.
        progress: called with tensors done and tensors in all.
        verbose: show the quantizer's log on stderr.

    Raises:
        GGUFError: the quantizer refuses the model, type or importance matrix; the message is its own.
        ProsparseError: the disk is full.
    """
    command = [sys.executable, "-m", "prosparse_pipe.convert.quantize", str(source), str(target)]
    command += [str(QUANT_TYPES[kind]), str(threads), *([str(imatrix)] if imatrix else [])]
    log: list[str] = []
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            log.append(line)
            if verbose:
                sys.stderr.write(line)
            step = _STEP.match(line)
            if step and progress is not None:
                progress(int(step[1]), int(step[2]))
        status = process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if status == 0:
        return
    if "iostream" in "".join(log) and shutil.disk_usage(target.parent).free < 2**24:
        raise ProsparseError(
            f"no space left in {target.parent} while quantizing to {kind}", "free some disk space and try again"
        )
    from prosparse_pipe.convert.vocab import last_error

    raise GGUFError(f"llama.cpp cannot quantize to {kind}: {last_error(log)}", "-v shows the quantizer's log")


def read_imatrix(path: Path) -> dict[str, np.ndarray]:
    """Importance per input column of each weight: f32 (matrices * n_columns,).

    Raises:
        GGUFError: not an importance matrix in GGUF form.
    """
    from gguf import GGUFReader

    try:
        tensors = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    except (OSError, ValueError) as error:
        raise GGUFError(
            f"{path} is not an importance matrix: {error}", "make it with llama-imatrix (GGUF form)"
        ) from None
    importance = {}
    for name, sums in tensors.items():
        if name.endswith(".in_sum2"):
            weight = name.removesuffix(".in_sum2")
            counts = np.maximum(np.asarray(tensors[f"{weight}.counts"], np.float32).reshape(-1, 1), 1)
            importance[weight] = np.ascontiguousarray(sums.reshape(counts.shape[0], -1) / counts, np.float32).reshape(
                -1
            )
    if not importance:
        raise GGUFError(f"{path} is not an importance matrix: it has no .in_sum2 tensors", "make it with llama-imatrix")
    return importance


def _run(source: str, target: str, ftype: int, threads: int, imatrix: str | None) -> int:
    import llama_cpp

    def log(_level: int, text: bytes, _data: Any) -> None:
        sys.stderr.write(text.decode("utf-8", "replace"))
        sys.stderr.flush()

    callback = llama_cpp.llama_log_callback(log)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = ftype
    params.nthread = threads
    if imatrix:
        importance = read_imatrix(Path(imatrix))
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
        for entry, (name, values) in zip(entries, importance.items(), strict=False):
            entry.name = name.encode()
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = values.size
        params.imatrix = entries
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))


if __name__ == "__main__":
    _source, _target, _ftype, _threads, *_imatrix = sys.argv[1:]
    sys.exit(1 if _run(_source, _target, int(_ftype), int(_threads), _imatrix[0] if _imatrix else None) else 0)
