"""Profile: the activation rate of every neuron of a sparse model on text, and what the hottest neurons cover."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prosparse_pipe.atomic import atomic_path
from prosparse_pipe.checkpoint import SparseInfo, save_activation_rates
from prosparse_pipe.errors import ProsparseError
from prosparse_pipe.sparsity import HOT_SHARES, ActivationRecorder, coverage

PLOT_NAME = "activation_rates.png"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass
class Profile:
    """Activation of a model on text.

    Attributes:
        rates: per layer, f32 (n_ff,): share of tokens for which a neuron is active.
        sparsity: per layer, share of zeros of x1.
        coverage: per layer, the share of all activations that the hottest 10, 20, 30, 50 % of the neurons make.
        tokens: tokens seen.
        data: where the text came from.
    """

    rates: list[np.ndarray]
    sparsity: list[float]
    coverage: list[list[float]]
    tokens: int
    data: list[str]

    def as_json(self) -> dict[str, Any]:
        """Everything but the rates, for --json."""
        return {
            "tokens": self.tokens,
            "data": self.data,
            "sparsity": self.sparsity,
            "mean_sparsity": float(np.mean(self.sparsity)),
            "hot_shares": list(HOT_SHARES),
            "coverage": self.coverage,
        }


def batches(blocks: Iterable[np.ndarray], batch_size: int) -> Iterator[torch.Tensor]:
    """Stacks token blocks of equal length into int64 (<= batch_size, seq_len)."""
    rows: list[np.ndarray] = []
    for block in blocks:
        rows.append(np.asarray(block, np.int64))
        if len(rows) == batch_size:
            yield torch.from_numpy(np.stack(rows))
            rows = []
    if rows:
        yield torch.from_numpy(np.stack(rows))


def measure(
    model: Any, blocks: Iterable[np.ndarray], batch_size: int, seen: Callable[[int], None] | None = None
) -> ActivationRecorder:
    """Counts activations over token blocks, one batch in memory at a time.

    Args:
        model: sparse decoder.
        blocks: int64 (seq_len,) each.
        seen: called with the tokens of each batch.
    """
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode(), ActivationRecorder(model) as recorder:
        for batch in batches(blocks, batch_size):
            # the decoder alone: logits of a large vocabulary would cost more than a small model itself
            model.base_model(input_ids=batch.to(device), use_cache=False)
            if seen is not None:
                seen(batch.numel())
    return recorder


def profile_run(
    run: Path,
    sources: list[str],
    *,
    tokens: int,
    seq_len: int,
    batch_size: int,
    dtype: str = "float32",
    device: str = "cpu",
    split: str = "heldout",
    seen: Callable[[int], None] | None = None,
) -> Profile:
    """Profiles a run and writes activation_rates.safetensors, activation_rates.png and the sparsity in prosparse.json.

    Args:
        run: folder written by `train`.
        sources: as `train` takes them.
        tokens: at most so many.
        dtype: of the weights: float32, bfloat16 or float16.
        split: `heldout` or `train` part of the text.
        seen: called with the tokens of each batch.

    Raises:
        CheckpointError: the run cannot be loaded.
        ProsparseError: the text gives not even one block.
    """
    from prosparse_pipe.data import token_blocks
    from prosparse_pipe.relu import load_sparse_model

    model, tokenizer, info = load_sparse_model(run, dtype=DTYPES[dtype], device=device)
    blocks = token_blocks(tokenizer, sources, seq_len, split=split, limit_tokens=tokens)
    recorder = measure(model, blocks, batch_size, seen)
    count = recorder.tokens[0]
    if count == 0:
        raise ProsparseError(
            f"the {split} part of {', '.join(sources)} holds less than one block of {seq_len} tokens",
            "give more text, a smaller --seq-len or --split train",
        )
    rates = recorder.rates()
    result = Profile(rates, recorder.sparsity(), [coverage(rate) for rate in rates], count, sources)
    save_profile(run, result, info)
    return result


def save_profile(run: Path, result: Profile, info: SparseInfo) -> None:
    """Writes the rates, the plot and the sparsity of a profile into the run folder."""
    metadata = {"tokens": str(result.tokens), "text": " ".join(result.data), "threshold": str(info.threshold)}
    save_activation_rates(run, result.rates, metadata)
    plot_rates(result.rates, run / PLOT_NAME)
    info.sparsity = result.sparsity
    info.save(run)


def plot_rates(rates: list[np.ndarray], target: Path) -> None:
    """Draws rate against rank (log-log) and cumulative coverage, one line per layer coloured from first to last."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    scale = Normalize(0, max(len(rates) - 1, 1))
    smallest = min((float(rate[rate > 0].min()) for rate in rates if (rate > 0).any()), default=1e-3)
    for il, rate in enumerate(rates):
        colour = colormaps["viridis"](scale(il))
        hot_first = np.sort(rate)[::-1].astype(np.float64)
        rank = np.arange(1, rate.size + 1)
        left.plot(rank, np.where(hot_first > 0, hot_first, np.nan), color=colour, linewidth=1)
        total = hot_first.sum()
        if total > 0:
            right.plot(100 * rank / rate.size, 100 * np.cumsum(hot_first) / total, color=colour, linewidth=1)
    left.set(xscale="log", yscale="log", xlabel="neuron, hottest first", ylabel="activation rate")
    left.set_ylim(smallest / 2, 1.5)
    left.set_title("Activation rate of every neuron")
    left.grid(alpha=0.3)
    right.plot([0, 100], [0, 100], color="0.6", linewidth=1, linestyle="--")
    right.annotate("all equally hot", (62, 62), xytext=(66, 52), color="0.4")
    right.set(xlabel="hottest neurons, %", ylabel="activations covered, %", xlim=(0, 100), ylim=(0, 101))
    right.set_title("What the hottest neurons cover")
    right.grid(alpha=0.3)
    figure.colorbar(ScalarMappable(scale, "viridis"), ax=[left, right], label="layer")
    with atomic_path(target) as path:
        figure.savefig(path, dpi=120)
