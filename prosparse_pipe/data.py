"""Text in, blocks of tokens out: the same for training, held-out evaluation, profiles and predictors.

A source is
  - a file, a folder or a glob of .txt/.md, .jsonl/.json, .parquet or .safetensors (token_file.py) files,
  - the name of a dataset on the hub (`user/name`, `user/name:split`), streamed,
  - `chitchat`: the conversations of the package chitchat-dataset (extra `demo`).

A row of jsonl, parquet or a hub dataset is a document: `text`, or a chat in one of the usual forms (`messages` with
role and content; `conversations` with from and value, as in ShareGPT; `instruction`, `input`, `output`, as in Alpaca),
which the tokenizer's chat template renders. Plain text is cut at blank lines into documents of about 2,000 characters.

A tokenizer is one of transformers, or of a GGUF (`scoring.GGUFTokenizer`); nothing here needs torch.
"""

import dataclasses
import glob
import hashlib
import importlib.util
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from prosparse_pipe.errors import ProsparseError
from prosparse_pipe.token_file import read_tokens

if TYPE_CHECKING:
    import torch

HELDOUT_SHARE = 0.02
DOCUMENT_CHARACTERS = 2000
WHOLE_CHARACTERS = 1 << 20  # of a document of plain text where text is not split: a file, unless it is very long
SHUFFLE_BUFFER = 10_000  # documents
SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".parquet", ".safetensors")


class DataError(ProsparseError):
    """A source is missing, unreadable, or holds no text."""


# ---- documents


def read_chitchat() -> Iterator[dict[str, Any]]:
    """Conversations of the package chitchat-dataset; the two speakers take the roles of user and assistant in turn."""
    spec = importlib.util.find_spec("chitchat_dataset")
    if spec is None or spec.origin is None:
        raise DataError(
            "the text `chitchat` is not installed", "pip install 'prosparse-pipe[demo]', or give --data FILE"
        )
    path = Path(spec.origin).parent / "dataset.json"
    for conversation in json.loads(path.read_text(encoding="utf-8")).values():
        turns = ["\n".join(message["text"] for message in turn).strip() for turn in conversation["messages"]]
        turns = [turn for turn in turns if turn]
        if len(turns) >= 2:
            yield {"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]}


def read_text(path: Path, characters: int = DOCUMENT_CHARACTERS) -> Iterator[dict[str, Any]]:
    """Documents of a plain text file, cut after so many characters at a blank line, or at any if none comes."""
    lines: list[str] = []
    size = 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            enough = size >= characters * (1 if not line.strip() else 2)  # text without blank lines
            if enough:
                yield {"text": "\n".join(lines).strip("\n")}
                lines, size = [], 0
            lines.append(line.rstrip("\n"))
            size += len(line)
    text = "\n".join(lines).strip("\n")
    if text.strip():
        yield {"text": text}


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a jsonl file, or of a json file that holds one list."""
    if path.suffix != ".json":
        yield from (row for _, row in read_numbered_jsonl(path))
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {error}", "repair the file") from None
    if not isinstance(rows, list):
        raise DataError(f"{path} does not hold a list of rows", "give a list, or one JSON object a line (.jsonl)")
    yield from rows


def read_numbered_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, row) of a jsonl file, lines counted from 1; empty ones are passed over.

    Raises:
        DataError: a line is not JSON.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number} is not valid JSON: {error.msg}", "repair or remove it"
                ) from None


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file, read in batches."""
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a readable parquet file: {error}", "download or write it again") from None


def read_token_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Documents of a file of tokens, as `ids`."""
    for ids in read_tokens(path):
        yield {"ids": ids}


def read_hub(name: str) -> Iterator[dict[str, Any]]:
    """Rows of a dataset on the hub, streamed; `user/name:split`, the split is `train` unless given."""
    from datasets import load_dataset

    repository, _, split = name.partition(":")
    try:
        yield from load_dataset(repository, split=split or "train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"dataset {name} cannot be read: {reason}", "give a local file, or check name and network"
        ) from None


def find_files(source: str) -> list[Path]:
    """The files that a path, folder or glob names, sorted; empty if it names none."""
    if Path(source).is_dir():
        return sorted(p for p in Path(source).rglob("*") if p.suffix in SUFFIXES)
    return [Path(p) for p in sorted(glob.glob(source, recursive=True)) if Path(p).is_file()]


def locate_source(source: str) -> list[Path]:
    """The files of a source; none for `chitchat` and what may be a dataset on the hub.

    Raises:
        DataError: it does not exist, or a file has an unknown format.
    """
    if source == "chitchat":
        return []
    files = find_files(source)
    is_path = source.startswith((".", "/", "~")) or Path(source).suffix in SUFFIXES or "*" in source
    if not files and (is_path or source.count("/") != 1):
        raise DataError(f"data {source} does not exist", "give a file, a folder, a glob, `chitchat` or user/dataset")
    for path in files:
        if path.suffix not in SUFFIXES:
            raise DataError(
                f"{path} has the unknown format {path.suffix or 'without suffix'}", f"known: {', '.join(SUFFIXES)}"
            )
    return files


def read_source(source: str, characters: int = DOCUMENT_CHARACTERS) -> Iterator[dict[str, Any]]:
    """Rows of one source, in its own order; plain text in documents of about so many characters.

    Raises:
        DataError: it does not exist, has an unknown format, or cannot be read.
    """
    files = locate_source(source)
    if source == "chitchat":
        yield from read_chitchat()
    elif not files:
        yield from read_hub(source)
    for path in files:
        if path.suffix == ".parquet":
            yield from read_parquet(path)
        elif path.suffix == ".safetensors":
            yield from read_token_rows(path)
        elif path.suffix in (".jsonl", ".json"):
            yield from read_jsonl(path)
        else:
            yield from read_text(path, characters)


def render(row: Any, tokenizer: Any) -> str:
    """The document of a row as text; chats through the tokenizer's template.

    Raises:
        DataError: the row has neither text nor a chat.
    """
    try:
        return _render(row, tokenizer)
    except (KeyError, TypeError, AttributeError, TemplateError) as error:
        raise DataError(f"a row's chat cannot be read: {error!r}", "see docs/train.md for the formats") from None


def _render(row: Any, tokenizer: Any) -> str:
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return row["text"]
        messages = None
        if isinstance(row.get("messages"), list):
            messages = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
        elif isinstance(row.get("conversations"), list):
            roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
            messages = [{"role": roles.get(m["from"], "user"), "content": m["value"]} for m in row["conversations"]]
        elif isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
            question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
        if messages is not None:
            if tokenizer.chat_template:
                return tokenizer.apply_chat_template(messages, tokenize=False)
            return "\n".join(f"{m['role']}: {m['content']}" for m in messages)
    keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise DataError(f"a row has neither `text` nor a chat; it has: {keys}", "see docs/train.md for the formats")


def is_heldout(digest: bytes) -> bool:
    """Held-out documents are chosen by content, so that the choice survives reordering and further sources."""
    return int.from_bytes(digest[:8], "big") < HELDOUT_SHARE * 2**64


def interleave(sources: list[Iterator[Any]]) -> Iterator[Any]:
    """One row of each source in turn, until all are exhausted: a run that stops early has seen them all."""
    while sources:
        left = []
        for source in sources:
            for row in source:
                yield row
                left.append(source)
                break
        sources = left


def document_of(row: Any, tokenizer: Any) -> tuple[str | np.ndarray, bytes]:
    """The document of a row, text or tokens, and its content as bytes; no bytes: blank.

    Raises:
        DataError: see `render`.
    """
    if isinstance(row, dict) and isinstance(row.get("ids"), np.ndarray):
        return row["ids"], row["ids"].astype(np.int32).tobytes()
    document = render(row, tokenizer)
    return document, document.encode() if document.strip() else b""


def read_documents(tokenizer: Any, sources: Iterable[str], split: str, seed: int) -> Iterator[str | np.ndarray]:
    """Distinct documents of the sources, shuffled within a buffer of SHUFFLE_BUFFER; or all as they come.

    Args:
        split: "train" or "heldout", which takes 2 % of the documents by their hash; "all" takes every document in the
            order of the sources, repeated ones too, and plain text in documents of WHOLE_CHARACTERS.
        seed: of the shuffle; the order depends on nothing else.
    """
    if split == "all":
        rows = interleave([read_source(source, WHOLE_CHARACTERS) for source in sources])
        yield from (document for document, content in (document_of(row, tokenizer) for row in rows) if content)
        return
    order = random.Random(seed)
    seen: set[bytes] = set()
    buffer: list[str | np.ndarray] = []
    for row in interleave([read_source(source) for source in sources]):
        document, content = document_of(row, tokenizer)
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if not content or digest in seen or is_heldout(digest) != (split == "heldout"):
            continue
        seen.add(digest)
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(document)
            continue
        place = order.randrange(SHUFFLE_BUFFER)
        buffer[place], document = document, buffer[place]
        yield document
    order.shuffle(buffer)
    yield from buffer


# ---- tokens


def leading_bos(tokenizer: Any) -> list[int]:
    """[BOS] if the tokenizer puts it in front of text, else []: models that were trained with it need it."""
    first = list(tokenizer("a")["input_ids"][:1])
    return first if first == [tokenizer.bos_token_id] else []


def token_blocks(
    tokenizer: Any,
    sources: Iterable[str],
    seq_len: int,
    *,
    split: str = "train",
    limit_tokens: int | None = None,
    seed: int = 0,
    bos_each_block: bool = False,
    size_option: str = "--seq-len",
) -> Iterator[np.ndarray]:
    """Documents packed into blocks, each after BOS (if the tokenizer adds one) and followed by EOS.

    Args:
        split: "train", "heldout" or "all", see `read_documents`.
        limit_tokens: stop after the block that reaches it; None: all.
        bos_each_block: a block that goes on with a document starts with BOS too (if the tokenizer adds one).
        size_option: the option that sets seq_len, for the hint of an error.

    Yields:
        int64 (seq_len,). What does not fill a last block is dropped.

    Raises:
        DataError: a source is missing or unreadable, or there is not enough text for one block.
    """
    if split not in ("train", "heldout", "all"):
        raise ValueError(f"split must be train, heldout or all, not {split}")
    sources = list(sources)
    bos = leading_bos(tokenizer)
    eos = [tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0]
    pending: list[np.ndarray] = []
    n_pending = n_blocks = 0
    for document in read_documents(tokenizer, sources, split, seed):
        if isinstance(document, str):
            document = np.array(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"], np.int64)
        start = [] if list(document[:1]) == bos else bos
        pending += [np.array(start, np.int64), document.astype(np.int64), np.array(eos, np.int64)]
        n_pending += len(start) + len(document) + 1
        if n_pending < seq_len:
            continue
        tokens = np.concatenate(pending)
        while len(tokens) >= seq_len:
            yield tokens[:seq_len].copy()
            tokens = tokens[seq_len:]
            if bos_each_block and bos and len(tokens) and tokens[0] != bos[0]:
                tokens = np.concatenate([bos, tokens])
            n_blocks += 1
            if limit_tokens is not None and n_blocks * seq_len >= limit_tokens:
                return
        pending, n_pending = [tokens], len(tokens)
    if n_blocks == 0:
        raise DataError(
            f"{', '.join(sources)}: {'the' if split == 'all' else f'the {split}'} text has {n_pending} tokens, "
            f"fewer than one block of {seq_len}",
            f"give more text{'' if split == 'all' else ' (2 % of the documents are held out)'}, "
            f"or a smaller {size_option}",
        )


@dataclasses.dataclass
class PackedBlocks:
    """Blocks of tokens, int32 (n_blocks, seq_len), and the order in which a run sees them.

    Passes over the text are shuffled one after the other from `seed`, so sample i of a run is the same whatever the
    number of processes, and a resumed run goes on with the sample that would have been next.
    """

    blocks: np.ndarray
    n_samples: int
    seed: int = 0

    def __post_init__(self) -> None:
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.n_samples

    def __getitem__(self, sample: int) -> "dict[str, torch.Tensor]":
        import torch  # here, so that text can be read without it

        epoch, place = divmod(sample, len(self.blocks))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.blocks)))
        ids = torch.from_numpy(self.blocks[self._order[1][place]].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def load_blocks(
    tokenizer: Any, sources: Iterable[str], seq_len: int, split: str, limit_tokens: int | None, seed: int
) -> np.ndarray:
    """All blocks of `token_blocks` at once, int32 (n_blocks, seq_len)."""
    blocks = token_blocks(tokenizer, sources, seq_len, split=split, limit_tokens=limit_tokens, seed=seed)
    return np.stack([block.astype(np.int32) for block in blocks])
