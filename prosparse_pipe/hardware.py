"""What this machine is: processor, memory bandwidth, GPUs. Every figure that leaves the project names its machine."""

import ctypes
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def usable_cores() -> int:
    """Cores that this process may run on (affinity mask, not the machine's total)."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's model name, as the operating system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def measure_read_bandwidth(n_threads: int, size_bytes: int = 1 << 28, repetitions: int = 3) -> float:
    """GB/s of a plain streaming read (sum of float32) by `n_threads` threads: best of `repetitions`, memory, not cache.

    Args:
        size_bytes: read in each repetition; far above the last-level cache's share of one tenant.
    """
    import numpy as np

    data = np.ones(size_bytes // 4, np.float32)  # (size_bytes / 4,), written once so that pages exist
    parts = np.array_split(data, n_threads)
    best = 0.0
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(repetitions):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))  # numpy releases the GIL
            best = max(best, data.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def gpu_names() -> list[str]:
    """GPUs that this llama-cpp-python can use, by ggml's device list; empty for a CPU-only build."""
    import llama_cpp

    lib = llama_cpp.llama_cpp._lib
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    lib.ggml_backend_dev_get.restype = ctypes.c_void_p
    lib.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    lib.ggml_backend_dev_type.restype = ctypes.c_int
    lib.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    lib.ggml_backend_dev_description.restype = ctypes.c_char_p
    lib.ggml_backend_dev_description.argtypes = [ctypes.c_void_p]
    devices = [lib.ggml_backend_dev_get(i) for i in range(lib.ggml_backend_dev_count())]
    return [lib.ggml_backend_dev_description(d).decode() for d in devices if lib.ggml_backend_dev_type(d) == 1]


def describe_machine(n_threads: int) -> dict[str, Any]:
    """The `machine` field of a benchmark row: CPU, cores, GB/s read with `n_threads`, GPUs or null."""
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_gb_s": round(measure_read_bandwidth(n_threads), 1),
        "gpu": ", ".join(gpu_names()) or None,
    }
