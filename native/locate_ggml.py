"""Tells CMake where the ggml of the installed llama-cpp-python is, and gets the private header that its wheel lacks.

Run by native/CMakeLists.txt as `python locate_ggml.py HEADER_CACHE`. Prints KEY=VALUE lines. The header
ggml-backend-impl.h comes out of the source distribution of exactly the installed release (pip download, seconds).
"""

import ctypes
import importlib.metadata
import importlib.util
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HEADER = "ggml-backend-impl.h"


def fail(message: str) -> None:
    sys.exit(f"prosparse-pipe: {message}")


def locate_llama_cpp() -> tuple[Path, str]:
    """Folder of the installed package llama_cpp (not imported: that would load it) and its version."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        fail(f"llama-cpp-python is not installed for {sys.executable}: pip install llama-cpp-python first")
    return Path(spec.origin).parent, importlib.metadata.version("llama-cpp-python")


def ggml_version(library: Path) -> str:
    """`ggml_version()` of the library that will be in the process."""
    ggml = ctypes.CDLL(str(library))
    ggml.ggml_version.restype = ctypes.c_char_p
    return ggml.ggml_version().decode()


def fetch_private_header(version: str, cache: Path) -> Path:
    """Puts HEADER of llama-cpp-python `version` into `cache/version` and returns that folder."""
    folder = cache / version
    if (folder / HEADER).is_file():
        return folder
    print(f"fetching the sources of llama-cpp-python {version} for {HEADER}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", "llama-cpp-python", "--no-build-isolation", "--dest", temporary]
        result = subprocess.run([*command, f"llama-cpp-python=={version}"], capture_output=True, text=True)
        archives = list(Path(temporary).glob("llama_cpp_python-*.tar.gz"))
        if result.returncode != 0 or not archives:
            fail(
                f"could not download the sources of llama-cpp-python {version}; give a llama.cpp tree of that release"
                f" with -DLLAMA_CPP_SOURCE_DIR=DIR\n{result.stderr.strip()}"
            )
        with tarfile.open(archives[0]) as archive:
            for member in archive:
                if member.name.endswith(f"/vendor/llama.cpp/ggml/src/{HEADER}"):
                    content = archive.extractfile(member) or io.BytesIO()
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / HEADER).write_bytes(content.read())
                    return folder
    fail(f"the sources of llama-cpp-python {version} hold no {HEADER}")
    raise AssertionError


def main() -> None:
    package, version = locate_llama_cpp()
    library = next(iter(sorted((package / "lib").glob("libggml-base.*"))), None)
    include = package.parent / "include"
    if library is None:
        fail(f"{package} has no lib/libggml-base: this llama-cpp-python was built without shared libraries")
    if not (include / "ggml-backend.h").is_file():
        fail(f"{include} has no ggml headers: reinstall llama-cpp-python")
    print(f"LLAMA_CPP_PYTHON_VERSION={version}")
    print(f"GGML_INCLUDE_DIR={include.as_posix()}")
    print(f"GGML_LIBRARY_DIR={(package / 'lib').as_posix()}")
    print(f"GGML_VERSION={ggml_version(library)}")
    if len(sys.argv) > 1:
        print(f"GGML_PRIVATE_DIR={fetch_private_header(version, Path(sys.argv[1])).as_posix()}")


main()
