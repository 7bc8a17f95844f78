"""Text that a dense model writes itself: what it knows, in the proportions it knows it, for distillation.

Every row starts as `free` (after the token that ends a document), as `chat` (the chat template up to the user's
message, so the model writes both sides) or as `text` (the first tokens of a real document), and is sampled to a fixed
length. A document that ends is followed by the next, as in pretraining.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

from prosparse_pipe.data import read_documents
from prosparse_pipe.errors import ProsparseError
from prosparse_pipe.token_file import write_tokens

STARTS = ("free", "chat", "text")
_ROWS_SAMPLED = 2048  # rows whose probabilities exist in f32 at a time
_MARK = "\ue000"


@dataclasses.dataclass
class GenerateConfig:
    """Settings of `prosparse-pipe generate-data`.

    Attributes:
        tokens: in all, about.
        length: tokens of a row.
        batch_size: rows sampled at a time; a file each.
        temperature: 1 samples the model's own distribution.
        starts: share of the files by kind of start; they need not add up to 1.
        seed_data: sources of the documents that `text` starts with.
        seed_tokens: how many of their first tokens are given.
    """

    tokens: int = 1_000_000
    length: int = 512
    batch_size: int = 64
    temperature: float = 1.0
    starts: dict[str, float] = dataclasses.field(default_factory=lambda: {"free": 0.5, "chat": 0.5})
    seed_data: list[str] = dataclasses.field(default_factory=list)
    seed_tokens: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Rejects settings that make no text.

        Raises:
            ProsparseError: naming the setting.
        """
        unknown = next((start for start in self.starts if start not in STARTS), None)
        if unknown is not None or not any(share > 0 for share in self.starts.values()):
            raise ProsparseError(f"unknown start {unknown or '(none)'}", f"known: {', '.join(STARTS)}")
        if self.starts.get("text", 0) > 0 and not self.seed_data:
            raise ProsparseError("`text` starts need real text", "give it with --seed-data")
        if self.length <= self.seed_tokens + 1:
            raise ProsparseError(f"length must be above seed_tokens ({self.seed_tokens})", "e.g. 512")
        if min(self.tokens, self.batch_size, self.seed_tokens) < 1 or self.temperature <= 0:
            raise ProsparseError("tokens, batch size, seed tokens and temperature must be above 0", "see --help")

    def kinds(self) -> Iterator[str]:
        """The kind of start of each file, the shares kept as evenly as files allow."""
        total = sum(self.starts.values())
        made = dict.fromkeys(self.starts, 0)
        for n in itertools.count(1):
            kind = max(self.starts, key=lambda k: self.starts[k] / total * n - made[k])
            made[kind] += 1
            yield kind


def generate_data(
    model: Any,
    tokenizer: Any,
    config: GenerateConfig,
    out: Path,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Writes files of tokens (see token_file.py) into `out`; files that are there are kept, so a killed run goes on.

    Args:
        model: dense causal language model, on its device.
        progress: called with the tokens done and in all, after every step.

    Returns:
        The files, in order.

    Raises:
        ProsparseError: no chat template for `chat`, too little text for `text`, or the disk is full.
    """
    n_files = max(1, round(config.tokens / (config.batch_size * config.length)))
    total = n_files * config.batch_size * config.length
    files = [out / f"{i:05d}-{kind}.safetensors" for i, kind in enumerate(itertools.islice(config.kinds(), n_files))]
    seeds = _seed_rows(tokenizer, config) if config.starts.get("text", 0) > 0 else iter(())
    for i, path in enumerate(files):
        kind = path.stem.partition("-")[2]
        if kind == "text":
            start = np.stack(list(itertools.islice(seeds, config.batch_size)))
        else:
            start = np.tile(_start(tokenizer, kind), (config.batch_size, 1))
        if path.exists():
            continue
        done = i * config.batch_size * config.length

        def report(column: int, done: int = done) -> None:
            if progress is not None:
                progress(done + column * config.batch_size, total)

        rows = sample(model, start, config.length, config.temperature, config.seed + i, report)
        write_tokens(path, list(rows), model.config.vocab_size)
    return files


@torch.no_grad()
def sample(
    model: Any,
    start: np.ndarray,
    length: int,
    temperature: float,
    seed: int,
    report: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Continues rows by sampling from softmax(logits / temperature).

    Args:
        start: int (rows, columns).
        length: columns of the result, the start's among them.

    Returns:
        int64 (rows, length).
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.empty((len(start), length), dtype=torch.int64, device=device)
    n = start.shape[1]
    rows[:, :n] = torch.from_numpy(start.astype(np.int64)).to(device)
    cache = Cache(layer_class_to_replicate=type("Layer", (PreallocatedLayer,), {"length": length}))
    given = rows[:, :n]
    for column in range(n, length):
        logits = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        given = rows[:, column : column + 1]
        for i in range(0, len(rows), _ROWS_SAMPLED):
            part = slice(i, i + _ROWS_SAMPLED)
            p = torch.softmax(logits[part].float() / temperature, -1)
            noise = torch.empty_like(p).exponential_(generator=generator)  # argmax p / Exp(1) is a sample of p
            given[part, 0] = (p / noise).argmax(-1)
        if report is not None:
            report(column + 1)
    return rows.cpu().numpy()


class PreallocatedLayer(DynamicLayer):
    """Keys and values of a layer in memory that is taken once: the default cache copies itself at every token."""

    length: int

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        shape = (*key_states.shape[:2], self.length, key_states.shape[-1])
        self._keys, self._values = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = start + key_states.shape[-2]
        self._keys[:, :, start:end], self._values[:, :, start:end] = key_states, value_states
        self.keys, self.values = self._keys[:, :, :end], self._values[:, :, :end]
        return self.keys, self.values


def _start(tokenizer: Any, kind: str) -> np.ndarray:
    """Tokens that a `free` or `chat` row starts with, int64 (n,)."""
    if kind == "free":
        end = tokenizer.get_vocab().get("<|endoftext|>")
        if end is None:
            end = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return np.array([end], np.int64)
    if not tokenizer.chat_template:
        raise ProsparseError("the model has no chat template", "leave `chat` out of --starts")
    text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False).partition(_MARK)[0]
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)


def _seed_rows(tokenizer: Any, config: GenerateConfig) -> Iterator[np.ndarray]:
    """The first seed_tokens tokens of documents, int64 (seed_tokens,); over again with their next tokens at the end."""
    for skip in itertools.count():
        found = False
        for document in read_documents(tokenizer, config.seed_data, "train", config.seed + skip):
            if isinstance(document, str):
                text = document[: (skip + 2) * config.seed_tokens * 16]
                document = np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)
            row = document[skip * 2 * config.seed_tokens :][: config.seed_tokens]
            if len(row) == config.seed_tokens:
                found = True
                yield row.astype(np.int64)
        if not found:
            raise ProsparseError("--seed-data has too little text", "give more, or fewer --tokens")
