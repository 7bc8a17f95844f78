"""Pictures that a run leaves behind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prosparse_pipe.atomic import atomic_path


def plot_training(records: Sequence[dict[str, Any]], target: Path, title: str = "") -> None:
    """Loss, sparsity and lambda over the optimizer steps, one above the other, as PNG.

    Args:
        records: of training.jsonl: step, ce, kl, penalty, lambda, sparsity, sparsity_per_layer.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [record["step"] for record in records]
    layers = [record["sparsity_per_layer"] for record in records]
    figure, (loss, sparsity, penalty) = plt.subplots(
        3, 1, sharex=True, figsize=(8, 8), height_ratios=[3, 3, 2], layout="constrained"
    )
    loss.plot(steps, [record["ce"] for record in records], color="C0", label="cross entropy")
    if any(record["kl"] for record in records):
        loss.plot(steps, [record["kl"] for record in records], color="C1", label="KL to the dense model")
    loss.set_ylabel("nats per token")
    loss.set_ylim(bottom=0)
    loss.legend(frameon=False)
    low, high = ([f(layer) * 100 for layer in layers] for f in (min, max))
    sparsity.fill_between(steps, low, high, color="C2", alpha=0.2, linewidth=0, label="least and most sparse layer")
    sparsity.plot(
        steps,
        [record["sparsity"] * 100 for record in records],
        color="C2",
        label="mean of the layers, before the threshold",
    )
    sparsity.set_ylabel("sparsity of x1, %")
    sparsity.legend(frameon=False, loc="lower right")
    penalty.plot(steps, [record["lambda"] for record in records], color="C3", label="λ")
    penalty.set_ylabel("λ")
    penalty.set_ylim(bottom=0)
    penalty.set_xlabel("optimizer step")
    for axes in (loss, sparsity, penalty):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title)
    with atomic_path(target) as path:
        figure.savefig(path, dpi=120)
    plt.close(figure)
