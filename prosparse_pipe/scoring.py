"""How well a model predicts text: perplexity, sparsity, and the distance to a dense model, for `prosparse-pipe eval`.

A `Scorer` is an open model: `GGUFScorer` here, which needs no torch, or `checkpoint_scorer.CheckpointScorer`. Both get
the same blocks of tokens, and what is computed of their logits is the same code, so their figures can be compared.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import click
import llama_cpp
import numpy as np
from jinja2 import TemplateError
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from prosparse_pipe.backend import NotSparseError, SparseModel
from prosparse_pipe.checkpoint import resolve_base_model
from prosparse_pipe.convert.vocab import CHECK_STRINGS
from prosparse_pipe.data import token_blocks
from prosparse_pipe.errors import CheckpointError, GGUFError, ProsparseError
from prosparse_pipe.runtime import activation_stats, load
from prosparse_pipe.shipped import SHIPPED_NAME, resolve_model

ROWS = 64  # rows of logits that are worked on at a time
BATCH = 512  # tokens that llama.cpp evaluates at a time, a multiple of ROWS


class Scorer(Protocol):
    """An open model.

    Attributes:
        name: as the user gave it.
        runtime: `torch`, or of llama.cpp `sparse` or `stock`.
        tokenizer: what `data.token_blocks` takes.
        n_vocab: width of the logits.
        n_ctx_train: tokens of context that the model was trained with.
        threshold: FATReLU threshold that is applied; None for a dense model and in stock llama.cpp.
    """

    name: str
    runtime: str
    tokenizer: Any
    n_vocab: int
    n_ctx_train: int
    threshold: float | None

    def logits(self, ids: np.ndarray, start: int = 0) -> Iterator[np.ndarray]:
        """Logits after each token from `start` on, read from an empty cache.

        Args:
            ids: int (n,), no more than the context.

        Yields:
            f32 (<= ROWS, n_vocab), in order; valid until the next one.
        """
        ...

    def count_activations(self) -> None:
        """Starts counting active neurons anew."""
        ...

    def sparsity(self) -> list[float] | None:
        """Per layer, the share of exact zeros of x1 since `count_activations`, 0 to 1; None for a dense model."""
        ...

    def n_bytes(self, ids: np.ndarray) -> int:
        """Bytes of text that the tokens int (n,) stand for; special tokens stand for none."""
        ...

    def close(self) -> None: ...


class GGUFTokenizer:
    """llama.cpp's tokenizer of an open model, with what data.py uses of a transformers tokenizer's interface."""

    def __init__(self, llama: llama_cpp.Llama) -> None:
        self._llama = llama
        self.bos_token_id = llama.token_bos() if llama.token_bos() >= 0 else None
        self.eos_token_id = llama.token_eos() if llama.token_eos() >= 0 else None
        self.chat_template: str | None = llama.metadata.get("tokenizer.chat_template")

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = False) -> dict[str, list[int]]:
        """{"input_ids": tokens}; special tokens that the text spells out are recognized."""
        return {"input_ids": self._llama.tokenize(text.encode("utf-8", "replace"), add_special_tokens, special=True)}

    @functools.cached_property
    def _formatter(self) -> Jinja2ChatFormatter:
        bos, eos = (
            "" if token is None else self._llama._model.token_get_text(token)
            for token in (self.bos_token_id, self.eos_token_id)
        )
        return Jinja2ChatFormatter(self.chat_template or "", eos, bos, add_generation_prompt=False)

    def apply_chat_template(self, messages: list[Any], tokenize: bool = False) -> str:
        """The chat as text.

        Raises:
            TemplateError: the template refuses the messages.
        """

        try:
            return self._formatter(messages=messages).prompt
        except ValueError as error:  # the template's own raise_exception
            raise TemplateError(str(error)) from None


class GGUFScorer:
    """A GGUF in llama.cpp, F32 cache; see `Scorer`.

    Args:
        path: the file, or the first shard of a split one.
        backend: `sparse`, `stock`, or `auto`: sparse if the file is a sparse model.
        n_ctx: most tokens of a block.
        verbose: show llama.cpp's log.

    Raises:
        GGUFError: the file is missing, truncated, not a model, or dense and `backend` is sparse.
        BackendError: the native library is missing or was built for another ggml.
    """

    def __init__(
        self, path: Path, *, backend: str = "auto", n_ctx: int = 1024, threads: int = 1, verbose: bool = False
    ) -> None:
        if backend == "sparse":
            try:
                SparseModel(path).close()
            except NotSparseError as error:
                raise GGUFError(error.message, "give a file of `prosparse-pipe export`, or --backend stock") from None
        self._llama = load(
            path, sparse=backend != "stock", n_ctx=n_ctx, n_batch=BATCH, n_threads=threads, n_threads_batch=threads,
            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, verbose=verbose,
        )  # fmt: skip
        self.name = str(path)
        self.runtime = "stock" if activation_stats(self._llama) is None else "sparse"
        self.tokenizer = GGUFTokenizer(self._llama)
        self.n_vocab = self._llama.n_vocab()
        self.n_ctx_train = self._llama._model.n_ctx_train()
        written = float(self._llama.metadata.get("prosparse.threshold", 0))
        self.threshold = written if self.runtime == "sparse" else None
        if written and self.threshold is None:
            click.echo(f"note: stock llama.cpp does not apply the threshold of {written:g}", err=True)

    def logits(self, ids: np.ndarray, start: int = 0) -> Iterator[np.ndarray]:
        llama = self._llama
        llama._ctx.kv_cache_clear()
        for begin in range(0, len(ids), llama.n_batch):
            part = [int(token) for token in ids[begin : begin + llama.n_batch]]
            skipped = min(max(start - begin, 0), len(part))
            batch = llama._batch
            batch.set_batch(part, begin, True)
            for i in range(min(skipped, len(part) - 1)):
                batch.batch.logits[i] = False
            try:
                llama._ctx.decode(batch)
            except RuntimeError as error:
                raise ProsparseError(f"{self.name}: llama.cpp cannot evaluate the text: {error}") from None
            count = len(part) - skipped
            if count:
                rows = np.ctypeslib.as_array(llama._ctx.get_logits(), (count, self.n_vocab))
                yield from (rows[i : i + ROWS] for i in range(0, count, ROWS))

    def count_activations(self) -> None:
        activation_stats(self._llama, reset=True)

    def sparsity(self) -> list[float] | None:
        stats = activation_stats(self._llama)
        return None if stats is None else [1.0 - rate for rate in stats.layer_rates]

    def n_bytes(self, ids: np.ndarray) -> int:
        vocab = self._llama._model.vocab  # with no room for the text, llama.cpp answers minus its length
        return sum(-llama_cpp.llama_token_to_piece(vocab, int(token), None, 0, 0, False) for token in ids)

    def close(self) -> None:
        self._llama.close()


def open_scorer(
    model: str,
    *,
    backend: str = "auto",
    n_ctx: int = 1024,
    threads: int = 1,
    dtype: str = "float32",
    device: str = "cpu",
    verbose: bool = False,
) -> Scorer:
    """Opens a .gguf file in llama.cpp, or a folder with a checkpoint in torch.

    Args:
        model: a path, or the name of the embedded model or of its dense base.
        backend: of a GGUF, see `GGUFScorer`.
        dtype, device: of a checkpoint's weights.

    Raises:
        CheckpointError: there is no such model, or its checkpoint is damaged.
        GGUFError, BackendError: see `GGUFScorer`.
        ModuleNotFoundError: it is a checkpoint, and the extra `train` is not installed.
    """
    path = resolve_model(model) if model == SHIPPED_NAME else Path(resolve_base_model(model))
    if path.is_file():
        scorer: Scorer = GGUFScorer(path, backend=backend, n_ctx=n_ctx, threads=threads, verbose=verbose)
    elif not path.exists():
        raise CheckpointError(
            f"model {model} does not exist", "give a folder or a .gguf file; `hf download` fetches one"
        )
    elif not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json", "give a run folder, a Hugging Face folder or a .gguf file")
    elif backend != "auto":
        raise click.UsageError(f"--backend {backend} is for GGUF files; {model} is a checkpoint")
    else:
        from prosparse_pipe.checkpoint_scorer import CheckpointScorer

        scorer = CheckpointScorer(path, dtype=dtype, device=device, threads=threads)
    if n_ctx > scorer.n_ctx_train:
        click.echo(
            f"note: {model} was trained with {scorer.n_ctx_train} tokens of context, fewer than {n_ctx}", err=True
        )
    return scorer


def check_same_vocabulary(model: Scorer, dense: Scorer) -> None:
    """The tokens of one model must mean the same to the other.

    Raises:
        ProsparseError: the logits have other widths, or a string is split into other tokens.
    """
    hint = "give the model that this one was made of"
    if model.n_vocab != dense.n_vocab:
        raise ProsparseError(
            f"{dense.name} has a vocabulary of {dense.n_vocab} tokens, {model.name} of {model.n_vocab}", hint
        )
    for text in CHECK_STRINGS:
        left, right = (list(s.tokenizer(text, add_special_tokens=False)["input_ids"]) for s in (model, dense))
        if left != right:
            raise ProsparseError(
                f"{dense.name} has another tokenizer than {model.name}: {text!r} is {right[:8]} and not {left[:8]}",
                hint,
            )


def text_blocks(model: Scorer, source: str, context: int, split: str, max_tokens: int) -> np.ndarray:
    """The blocks of a text that are scored, int64 (n, context): whole ones, at most max_tokens but at least one.

    Raises:
        DataError: the text is missing, unreadable or too short.
    """
    limit = max(1, max_tokens // context) * context
    blocks = token_blocks(
        model.tokenizer, [source], context, split=split, limit_tokens=limit, bos_each_block=True,
        size_option="--context",
    )  # fmt: skip
    return np.stack(list(blocks))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities, f32 (n, n_vocab), of logits of that shape; the normalizer is summed in float64."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return shifted


@dataclasses.dataclass
class TextScore:
    """Figures of a model on a text; the last five are None without a dense model.

    Attributes:
        text: the source.
        tokens: tokens that were predicted: all of a block but its first.
        blocks: blocks of tokens.
        perplexity: exp of the mean negative log-probability of a token.
        bits_per_byte: bits that the predicted tokens cost, per byte of their text.
        sparsity: share of exact zeros of x1, 0 to 1, mean of the layers; None for a dense model, as the next three.
        sparsity_min, sparsity_max: of the least and the most sparse layer.
        sparsity_layers: of each layer.
        dense_perplexity, dense_bits_per_byte: of the dense model.
        perplexity_ratio: perplexity / dense_perplexity.
        kl: mean KL divergence of the model from the dense model, KL(dense || model), nats a token.
        top1_agreement: share of the tokens for which both models find the same token the most probable, 0 to 1.
    """

    text: str
    tokens: int
    blocks: int
    perplexity: float
    bits_per_byte: float
    sparsity: float | None = None
    sparsity_min: float | None = None
    sparsity_max: float | None = None
    sparsity_layers: list[float] | None = None
    dense_perplexity: float | None = None
    dense_bits_per_byte: float | None = None
    perplexity_ratio: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None


def score_text(
    model: Scorer,
    text: str,
    blocks: np.ndarray,
    dense: Scorer | None = None,
    seen: Callable[[int], None] | None = None,
) -> TextScore:
    """Scores blocks of tokens, int (n_blocks, context); every token but a block's first is predicted.

    Args:
        text: its name.
        dense: the model to compare with; it has the same vocabulary.
        seen: called with the tokens of each block.

    Raises:
        ProsparseError: a model gives logits that are not numbers.
    """
    scorers = [model] if dense is None else [model, dense]
    nats = [0.0] * len(scorers)
    kl, agreed, n_bytes = 0.0, 0, 0
    model.count_activations()
    for block in blocks:
        place = 1
        for pieces in zip(*(scorer.logits(block) for scorer in scorers), strict=True):
            targets = block[place : place + len(pieces[0])]  # after the last token comes none
            place += len(pieces[0])
            found = [log_softmax(piece[: len(targets)]) for piece in pieces]
            for i, log_p in enumerate(found):
                nats[i] -= log_p[np.arange(len(targets)), targets].sum(dtype=np.float64)
            if dense is not None:
                kl += (np.exp(found[1]) * (found[1] - found[0])).sum(dtype=np.float64)
                agreed += int((found[0].argmax(axis=1) == found[1].argmax(axis=1)).sum())
        n_bytes += model.n_bytes(block[1:])
        if seen is not None:
            seen(len(block))
    for scorer, total in zip(scorers, nats, strict=True):
        if not math.isfinite(total):
            raise ProsparseError(f"{scorer.name} gives logits that are not numbers", "is the file whole?")
    tokens = len(blocks) * (blocks.shape[1] - 1)
    perplexity = [math.exp(min(total / tokens, 700.0)) for total in nats]
    bits = [float(total / math.log(2) / max(n_bytes, 1)) for total in nats]
    score = TextScore(text, tokens, len(blocks), perplexity[0], bits[0])
    layers = model.sparsity()
    if layers:
        score.sparsity_layers = layers
        score.sparsity, score.sparsity_min, score.sparsity_max = float(np.mean(layers)), min(layers), max(layers)
    if dense is not None:
        score.dense_perplexity, score.dense_bits_per_byte = perplexity[1], bits[1]
        score.perplexity_ratio = perplexity[0] / perplexity[1]
        score.kl, score.top1_agreement = float(kl / tokens), agreed / tokens
    return score
