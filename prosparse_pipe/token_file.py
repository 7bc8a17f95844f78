"""Files of tokens: documents that need no tokenizer any more, so that a run on a rented GPU starts at once.

A file is a safetensors with `tokens`, uint16 or int32 (n,), and `ends`, int64 (n_documents,): where each document ends.
Its metadata name the format and the size of the vocabulary.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from prosparse_pipe.atomic import atomic_path
from prosparse_pipe.errors import ProsparseError

FORMAT = "prosparse-tokens"
_BATCH = 256  # documents: a file may hold so many more than asked for


def write_tokens(path: Path, documents: Iterable[np.ndarray], vocab_size: int) -> int:
    """Writes documents, int (n,) each; returns the number of tokens.

    Raises:
        ProsparseError: no documents, or the disk is full.
    """
    from safetensors.numpy import save_file

    kind = np.uint16 if vocab_size <= 2**16 else np.int32
    kept = [document.astype(kind) for document in documents]
    if not kept:
        raise ProsparseError(f"no documents to write to {path}", "give more text")
    ends = np.cumsum([len(document) for document in kept], dtype=np.int64)
    metadata = {"format": FORMAT, "vocab_size": str(vocab_size)}
    with atomic_path(path) as temporary:
        save_file({"tokens": np.concatenate(kept), "ends": ends}, temporary, metadata)
    return int(ends[-1])


def read_tokens(path: Path) -> Iterator[np.ndarray]:
    """The documents of a file, uint16 or int32 (n,) each.

    Raises:
        ProsparseError: it is not a file of tokens, or truncated.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise ProsparseError(f"{path} is not a file of tokens", "make one with `prosparse-pipe tokenize`")
            tokens, ends = file.get_tensor("tokens"), file.get_tensor("ends")
    except (SafetensorError, OSError) as error:
        raise ProsparseError(f"{path} cannot be read: {error}", "copy or make it again") from None
    start = 0
    for end in ends:
        yield tokens[start:end]
        start = end


def tokenize(
    tokenizer: Any, sources: list[str], split: str, out: Path, limit: int | None, file_tokens: int, seed: int
) -> Iterator[tuple[Path, int]]:
    """Writes the documents of `sources` (data.py), shuffled, to out/00000.safetensors and so on.

    Args:
        split: "train", "heldout" or "all", see data.py.
        limit: tokens in all; None: no limit.
        file_tokens: a file is closed when it has as many.

    Yields:
        Each file and its tokens.

    Raises:
        ProsparseError: a source is missing or unreadable, there is no text, or the disk is full.
    """
    from prosparse_pipe.data import read_documents

    documents = read_documents(tokenizer, sources, split, seed)
    left = limit
    for number in itertools.count():
        kept: list[np.ndarray] = []
        n, most = 0, file_tokens if left is None else min(left, file_tokens)
        for batch in iter(lambda: list(itertools.islice(documents, _BATCH)), []):
            texts = [document for document in batch if isinstance(document, str)]
            encoded = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
            found = [np.array(next(encoded)) if isinstance(document, str) else document for document in batch]
            kept += found
            n += sum(len(ids) for ids in found)
            if n >= most:
                break
        if not kept and number:
            return
        path = out / f"{number:05d}.safetensors"
        yield path, write_tokens(path, kept, len(tokenizer))
        if left is not None:
            left -= n
            if left <= 0:
                return
