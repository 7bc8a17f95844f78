"""What a sparse model is trained for: next token, the dense model's distribution, and few active neurons.

    loss = ce_weight * CE + distill * KL(dense || sparse) + distill_hidden * hidden + lambda * sum of the penalty

`hidden` is how far the FFNs' inputs are from the dense model's: mean over layers of |x - y|^2 / |y|^2. The sum of the
penalty is over layers.

The L1 penalty is on x1 = relu(gate) * up, as in ProSparse (arXiv 2402.13516). The paper does not say how it is
normalised; here every penalty is the mean over tokens and neurons of a layer, summed over layers, so lambda means the
same for every batch and width.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from prosparse_pipe.relu import GatedFFN

IGNORED = -100


def l1_penalty(x1: torch.Tensor) -> torch.Tensor:
    """mean |x1|, f32 (); x1 = r * up, any float type."""
    return x1.abs().mean(dtype=torch.float32)


def count_penalty(r: torch.Tensor, tau: float) -> torch.Tensor:
    """mean r / (r + tau), f32 (): a smooth count of the active neurons; r = relu(gate), any float type.

    Where the L1 of a layer falls with every activation that shrinks, the count falls only with those that come close to
    zero. tau is the gate value that counts as half a neuron.
    """
    r = r.float()
    return (r / (r + tau)).mean()


class ActivationPenalty:
    """Collects the penalty and the share of non-zeros of every layer while a forward pass runs.

    The penalty is a tensor of the graph that the caller adds to the loss, so loss scaling, gradient accumulation and
    the averaging of DDP and FSDP treat it like every other part. Under gradient checkpointing a layer runs again during
    backward; the hooks then compute the same tensors (the checkpoint compares them) but do not collect them. All layers
    share the hooks, which leave what they find on the modules, so layers that are compiled are compiled once.

    Args:
        ffns: of the model, from `substitute_relu`. Hooks stay until `close`.
        regularizer: `l1` or `count`.
        tau: of `count`.
    """

    def __init__(self, ffns: list[GatedFFN], regularizer: str = "l1", tau: float = 0.1) -> None:
        self.tau = tau
        self.collecting = False
        self._downs: list[Any] = [ffn.down for ffn in ffns]
        self._penalized: list[Any] = self._downs
        self._handles = [down.register_forward_pre_hook(self._measure_rate) for down in self._downs]
        if regularizer == "l1":
            self._handles += [down.register_forward_pre_hook(self._measure_l1) for down in self._downs]
        elif regularizer == "count":
            self._penalized = [getattr(ffn.module, ffn.activation_attribute) for ffn in ffns]
            self._handles += [module.register_forward_hook(self._measure_count) for module in self._penalized]
        else:
            raise ValueError(f"regularizer must be l1 or count, not {regularizer}")

    def _measure_rate(self, down: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if self.collecting:
            down.active_share = (inputs[0].detach() != 0).float().mean()

    def _measure_l1(self, down: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        penalty = l1_penalty(inputs[0])
        if self.collecting:
            down.penalty = penalty

    def _measure_count(self, activation: Any, inputs: tuple[torch.Tensor, ...], r: torch.Tensor) -> None:
        penalty = count_penalty(r, self.tau)
        if self.collecting:
            activation.penalty = penalty

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Around the forward pass whose penalty is wanted."""
        self.collecting = True
        try:
            yield
        finally:
            self.collecting = False

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum over layers of the penalty, f32 (), with its graph; and activation rates, f32 (n_layer,), without."""
        penalties = [module.__dict__.pop("penalty", None) for module in self._penalized]
        rates = [down.__dict__.pop("active_share", None) for down in self._downs]
        if any(found is None for found in (*penalties, *rates)):
            raise RuntimeError("a layer's FFN did not run in this forward pass")
        device = penalties[0].device
        return torch.stack([p.to(device) for p in penalties]).sum(), torch.stack([r.to(device) for r in rates])

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


class FFNInputs:
    """Collects what every layer's FFN reads while a forward pass runs: the residual stream after its norm.

    Args:
        ffns: of the model. Hooks stay until `close`.
    """

    def __init__(self, ffns: list[GatedFFN]) -> None:
        self.collecting = False
        self._modules: list[Any] = [ffn.module for ffn in ffns]
        self._handles = [module.register_forward_pre_hook(self._keep) for module in self._modules]

    def _keep(self, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if self.collecting:
            module.ffn_input = inputs[0]

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Around the forward pass whose inputs are wanted."""
        self.collecting = True
        try:
            yield
        finally:
            self.collecting = False

    def take(self) -> list[torch.Tensor]:
        """Per layer, (batch, tokens, n_embd), with its graph."""
        return [module.__dict__.pop("ffn_input") for module in self._modules]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def hidden_loss(inputs: list[torch.Tensor], dense: list[torch.Tensor]) -> torch.Tensor:
    """Mean over layers of the squared distance to the dense model's FFN inputs, over their mean square; f32 ()."""
    losses = []
    for x, y in zip(inputs, dense, strict=True):
        wanted = y.float()
        losses.append((x.float() - wanted).square().mean() / wanted.square().mean())
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def _chunk_loss(
    logits: torch.Tensor, teacher: torch.Tensor | None, target: torch.Tensor, ce_weight: float, distill: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of CE and KL over the tokens of a chunk, f32 (), and the gradient of their weighted sum, f32 as logits.

    Tokens whose target is IGNORED count nothing.
    """
    counts = (target != IGNORED).unsqueeze(1)
    target = target.clamp(min=0).unsqueeze(1)
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)  # (chunk, vocabulary)
    ce = -(log_p.gather(1, target) * counts).sum()
    gradient = log_p.exp() * (ce_weight + (distill if teacher is not None else 0.0))
    kl = torch.zeros_like(ce)
    if teacher is not None:
        log_q = torch.log_softmax(teacher, -1, dtype=torch.float32)
        q = log_q.exp()
        kl = ((q * (log_q - log_p)).sum(1, keepdim=True) * counts).sum()
        gradient = gradient - distill * q
    hot = torch.arange(logits.shape[1], device=logits.device) == target
    return ce, kl, (gradient - ce_weight * hot) * counts


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
        targets: torch.Tensor,
        ce_weight: float,
        distill: float,
        chunk: int,
        compiled: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n = (targets != IGNORED).sum()
        gradient = torch.empty_like(logits)
        sums = torch.zeros(2, device=logits.device, dtype=torch.float32)
        chunk_loss = _compiled_chunk_loss() if compiled else _chunk_loss
        for i in range(0, len(logits), chunk):
            part = slice(i, i + chunk)
            target = targets[part]
            ce, kl, d = chunk_loss(logits[part], None if teacher is None else teacher[part], target, ce_weight, distill)
            sums += torch.stack([ce, kl])
            gradient[part] = d.mul_(1.0 / n)
        ctx.save_for_backward(gradient)
        means = sums / n
        ctx.mark_non_differentiable(means)
        return ce_weight * means[0] + distill * means[1], means

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None, None, None, None


@functools.cache
def _compiled_chunk_loss() -> Any:
    return torch.compile(_chunk_loss, dynamic=False)


def token_loss(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    labels: torch.Tensor,
    ce_weight: float = 1.0,
    distill: float = 0.0,
    chunk: int = 128,
    compiled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Next-token loss of a batch.

    Args:
        logits: (batch, tokens, vocabulary), any float type.
        teacher_logits: of the dense model for the same tokens, or None.
        labels: int64 (batch, tokens): the tokens themselves; logits at t are scored against labels at t + 1.
        chunk: tokens whose softmax exists at a time.
        compiled: with torch.compile; for GPUs.

    Returns:
        loss (), cross entropy () and KL divergence () in nats per token; the last two without a graph.
    """
    words = logits.shape[-1]
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).reshape(-1)  # nothing follows a last token
    teacher = None if teacher_logits is None or distill == 0 else teacher_logits.reshape(-1, words)
    student = logits.reshape(-1, words)
    loss, means = _TokenLoss.apply(student, teacher, targets, ce_weight, distill, chunk, compiled)
    return loss, means[0], means[1]
