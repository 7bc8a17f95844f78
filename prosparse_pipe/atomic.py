"""Nothing half-written: write beside the target, flush, then rename."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prosparse_pipe.errors import ProsparseError


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the target's folder; renames it onto the target when the block succeeds.

    The temporary file keeps the target's suffix (writers such as matplotlib look at it) and is removed when the block
    fails or is interrupted.

    Raises:
        ProsparseError: the disk is full, or the folder cannot be written.
    """
    target = Path(target)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ProsparseError(
                f"no space left while writing {target}", "free some disk space and try again"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise ProsparseError(
                f"cannot write {target}: {error.strerror}", "choose another folder with --out"
            ) from error
        raise
    finally:
        with suppress(FileNotFoundError, NotADirectoryError):
            temporary.unlink()
