"""How sparse the FFNs of a model are: counts of active neurons, and what the hottest neurons cover.

A neuron is active for a token if its x1 = act(gate) * up, the input of down_proj, is not exactly zero. activation_rate
is the share of tokens for which a neuron is active; sparsity = 1 - rate.
"""

from collections.abc import Sequence
from types import TracebackType

import numpy as np
import torch
from torch import nn

from prosparse_pipe.relu import GatedFFN, find_ffns

HOT_SHARES = (0.1, 0.2, 0.3, 0.5)


class ActivationRecorder:
    """Counts, while it is open, for how many tokens each FFN neuron is active.

        with torch.no_grad(), ActivationRecorder(model) as recorder:
            for block in blocks:
                model(block)
        recorder.sparsity()

    Counts stay on the device of each layer, so recording costs no synchronisation. Not for gradient checkpointing:
    a layer that is recomputed would count twice.

    Args:
        model: a decoder with gated FFNs, see `find_ffns`.
        mask: bool (batch, tokens), False for padding; None counts every token. May be changed between forward passes.

    Attributes:
        counts: per layer, int64 (intermediate_size,): tokens for which the neuron was active.
        tokens: per layer, tokens counted.
    """

    def __init__(self, model: nn.Module, mask: torch.Tensor | None = None) -> None:
        self.ffns: list[GatedFFN] = find_ffns(model)
        self.mask = mask
        self.counts = [
            torch.zeros(ffn.down.in_features, dtype=torch.int64, device=ffn.down.weight.device) for ffn in self.ffns
        ]
        self.tokens = [0] * len(self.ffns)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "ActivationRecorder":
        for il, ffn in enumerate(self.ffns):
            self._handles.append(ffn.down.register_forward_pre_hook(self._hook(il)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, il: int):
        def count(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            active = inputs[0].detach() != 0  # (B, T, n_ff)
            if self.mask is not None:
                active = active[self.mask.to(active.device).bool()]
            active = active.reshape(-1, active.shape[-1])
            self.counts[il] += active.sum(dim=0)
            self.tokens[il] += active.shape[0]

        return count

    def rates(self) -> list[np.ndarray]:
        """Per layer, f32 (intermediate_size,): share of the tokens for which the neuron was active, 0 to 1."""
        return [
            (count.double() / max(tokens, 1)).float().cpu().numpy()
            for count, tokens in zip(self.counts, self.tokens, strict=True)
        ]

    def sparsity(self) -> list[float]:
        """Per layer, the share of exact zeros of x1, 0 to 1. No tokens counted: 1."""
        return [
            1.0 - float(count.sum()) / (max(tokens, 1) * count.numel())
            for count, tokens in zip(self.counts, self.tokens, strict=True)
        ]


def coverage(rate: np.ndarray, shares: Sequence[float] = HOT_SHARES) -> list[float]:
    """Share of all activations of a layer that its hottest neurons make.

    Args:
        rate: activation rates (intermediate_size,).
        shares: shares of the neurons, 0 to 1; each is rounded to whole neurons.

    Returns:
        Per share, 0 to 1. A layer that is never active is covered: 1.
    """
    hot_first = np.sort(np.asarray(rate, np.float64))[::-1]
    cumulative = np.concatenate([[0.0], np.cumsum(hot_first)])
    if cumulative[-1] == 0:
        return [1.0] * len(shares)
    return [float(cumulative[round(share * hot_first.size)] / cumulative[-1]) for share in shares]


def sparsity_of(rates: Sequence[np.ndarray]) -> list[float]:
    """Per layer, 1 - the mean activation rate: the share of zeros of x1."""
    return [1.0 - float(np.mean(rate, dtype=np.float64)) for rate in rates]
