"""What a sparse model is trained for: next token, the dense model's distribution, and few active neurons.

    loss = ce_weight * CE + distill * KL(dense || sparse) + lambda * sum over layers of mean |x1|

The L1 term is on x1 = relu(gate) * up, as in ProSparse (arXiv 2402.13516). The paper does not say how it is normalised;
here it is the mean over tokens and neurons of a layer, summed over layers, so lambda means the same for every batch and
width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prosparse_pipe.relu import GatedFFN


class ActivationPenalty:
    """Collects mean |x1| and the share of non-zeros of every layer while a forward pass runs.

    The penalty is a tensor of the graph that the caller adds to the loss, so loss scaling, gradient accumulation and
    the averaging of DDP and FSDP treat it like every other part. Under gradient checkpointing a layer runs again during
    backward; the hook then computes the same tensors (the checkpoint compares them) but does not collect them.

    Args:
        ffns: of the model, from `find_ffns`. Hooks stay until `close`.
    """

    def __init__(self, ffns: list[GatedFFN]) -> None:
        self.means: list[torch.Tensor | None] = [None] * len(ffns)
        self.rates: list[torch.Tensor | None] = [None] * len(ffns)
        self.collecting = False
        self._handles = [ffn.down.register_forward_pre_hook(self._hook(il)) for il, ffn in enumerate(ffns)]

    def _hook(self, il: int) -> Any:
        def measure(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x1 = inputs[0]
            mean = x1.abs().mean(dtype=torch.float32)
            if self.collecting:
                self.means[il] = mean
                self.rates[il] = (x1.detach() != 0).float().mean()

        return measure

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Around the forward pass whose penalty is wanted."""
        self.collecting = True
        try:
            yield
        finally:
            self.collecting = False

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum over layers of mean |x1|, f32 (), with its graph; and activation rates, f32 (n_layer,), without."""
        means = [mean for mean in self.means if mean is not None]
        rates = [rate for rate in self.rates if rate is not None]
        if len(means) != len(self.means):
            raise RuntimeError("a layer's FFN did not run in this forward pass")
        self.means = [None] * len(self.means)
        return torch.stack([m.to(means[0].device) for m in means]).sum(), torch.stack(
            [r.to(rates[0].device) for r in rates]
        )

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


class _TokenLoss(torch.autograd.Function):
    """Mean over tokens of ce_weight * CE + distill * KL(teacher || student), its gradient formed chunk by chunk.

    Softmaxes over 50,000 to 150,000 words in f32 exist for one chunk only; what is kept is one gradient, in the type of
    the logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        teacher: torch.Tensor | None,
        labels: torch.Tensor,
        ce_weight: float,
        distill: float,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n = logits.shape[0]
        gradient = torch.empty_like(logits)
        sums = torch.zeros(2, device=logits.device, dtype=torch.float32)
        for i in range(0, n, chunk):
            part = slice(i, i + chunk)
            log_p = torch.log_softmax(logits[part], -1, dtype=torch.float32)  # (chunk, vocabulary)
            target = labels[part].unsqueeze(1)
            sums[0] -= log_p.gather(1, target).sum()
            d = log_p.exp().mul_(ce_weight + (distill if teacher is not None else 0.0))
            if teacher is not None:
                log_q = torch.log_softmax(teacher[part], -1, dtype=torch.float32)
                q = log_q.exp()
                sums[1] += torch.dot(q.view(-1), log_q.sub_(log_p).view(-1))
                d.sub_(q, alpha=distill)
            d.scatter_add_(1, target, torch.full_like(target, -ce_weight, dtype=d.dtype))
            gradient[part] = d.mul_(1.0 / n)
        ctx.save_for_backward(gradient)
        means = sums / n
        ctx.mark_non_differentiable(means)
        return ce_weight * means[0] + distill * means[1], means

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None, None, None


def token_loss(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    labels: torch.Tensor,
    ce_weight: float = 1.0,
    distill: float = 0.0,
    chunk: int = 128,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Next-token loss of a batch.

    Args:
        logits: (batch, tokens, vocabulary), any float type.
        teacher_logits: of the dense model for the same tokens, or None.
        labels: int64 (batch, tokens): the tokens themselves; logits at t are scored against labels at t + 1.
        chunk: tokens whose softmax exists at a time.

    Returns:
        loss (), cross entropy () and KL divergence () in nats per token; the last two without a graph.
    """
    words = logits.shape[-1]
    student = logits[:, :-1].reshape(-1, words)
    teacher = None if teacher_logits is None or distill == 0 else teacher_logits[:, :-1].reshape(-1, words)
    loss, means = _TokenLoss.apply(student, teacher, labels[:, 1:].reshape(-1), ce_weight, distill, chunk)
    return loss, means[0], means[1]
