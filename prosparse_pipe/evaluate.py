"""Held-out figures of a model: perplexity, sparsity, and the threshold that costs little of the first."""

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from prosparse_pipe.relu import GatedFFN, set_threshold
from prosparse_pipe.sparsity import ActivationRecorder

THRESHOLDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)


@dataclasses.dataclass
class Evaluation:
    """Perplexity over `tokens` predicted tokens; per layer sparsity (0 to 1) and activation rates, f32 (n_ff,)."""

    perplexity: float
    tokens: int
    sparsity: list[float]
    rates: list[np.ndarray]

    @property
    def mean_sparsity(self) -> float:
        return sum(self.sparsity) / len(self.sparsity)


@torch.no_grad()
def evaluate(model: Any, blocks: np.ndarray, batch_size: int = 4, bf16: bool = False) -> Evaluation:
    """Perplexity and activations on blocks, int (n_blocks, seq_len); every token but a block's first is predicted."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = 0.0
    with ActivationRecorder(model) as recorder, torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for i in range(0, len(blocks), batch_size):
            ids = torch.from_numpy(blocks[i : i + batch_size].astype(np.int64)).to(device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            for row, target in zip(logits, ids[:, 1:], strict=True):  # one row's f32 logits at a time
                total += torch.nn.functional.cross_entropy(row.float(), target, reduction="sum").item()
    model.train(was_training)
    tokens = len(blocks) * (blocks.shape[1] - 1)
    return Evaluation(math.exp(min(total / tokens, 700.0)), tokens, recorder.sparsity(), recorder.rates())


def search_threshold(
    model: Any,
    ffns: list[GatedFFN],
    blocks: np.ndarray,
    baseline: Evaluation,
    tolerance: float,
    batch_size: int = 4,
    bf16: bool = False,
    floor: float = 0.0,
) -> tuple[float, Evaluation]:
    """The largest of THRESHOLDS whose perplexity is at most (1 + tolerance) times the baseline's, and its figures.

    `floor` is the threshold of the baseline; smaller ones are not tried.

    Source: arXiv 2402.13516, section 3.2 step 3, which chooses among .005, .01, .02 and .03 by hand.
    """
    best = (floor, baseline)
    for threshold in (t for t in THRESHOLDS if t > floor):
        set_threshold(ffns, threshold)
        found = evaluate(model, blocks, batch_size, bf16)
        if found.perplexity > baseline.perplexity * (1 + tolerance):
            break
        best = (threshold, found)
    set_threshold(ffns, best[0])
    return best
