"""Ways to a sparse model on equal tokens: perplexity against sparsity of each, on text of the training's kinds and not.

    python benchmarks/sparsity_study.py --model smollm2-135m-instruct --data data/tokens \\
        --text prose=data/heldout/prose.jsonl --text unseen=data/heldout/unseen_encyclopedic.jsonl --jsonl study.jsonl
    python benchmarks/sparsity_study.py --plot docs/images/sparsity-study.png --jsonl study.jsonl

Every run trains the FFN weights on the same blocks in the same order (another seed: another order), with the same
optimizer and the same distillation loss. Runs that the file holds already are skipped; --minutes stops in between.
"""

import argparse
import dataclasses
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = {
    "relu": "ReLU",
    "shifted": "shifted ReLU",
    "fixed-l1": "ReLU, fixed L1",
    "prosparse": "ProSparse as published",
    "l1-steered": "L1, steered",
    "count": "count, steered",
    "count-threshold": "count, steered, threshold .1 in training",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A way, how strong, and the seed of the order of the data."""

    way: str
    strength: float = 0.0
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """Settings of `train` beyond those that all runs share."""
        steered = {"target_sparsity": self.strength, "target_ramp": [0.1, 0.7]}
        return {
            "relu": {"schedule": [[0, 1]]},
            "shifted": {"schedule": [[0, 1]]},
            "fixed-l1": {"schedule": [[self.strength, 1]]},
            "prosparse": {"schedule": "prosparse", "schedule_scale": self.strength},
            "l1-steered": {"regularizer": "l1", **steered},
            "count": {"regularizer": "count", **steered},
            "count-threshold": {
                "regularizer": "count",
                "train_threshold": 0.1,
                "train_threshold_start": 0.4,
                "threshold": 0.1,
                **steered,
            },
        }[self.way]


RUNS = [  # the most telling first
    *(Run("count", 0.88, seed) for seed in range(3)),
    *(Run("l1-steered", 0.88, seed) for seed in range(3)),
    Run("prosparse", 20),
    Run("relu"),
    Run("count-threshold", 0.88),
    Run("prosparse", 60),
    Run("fixed-l1", 3),
    Run("shifted", 0.5),
    Run("count", 0.92),
    Run("count", 0.82),
    Run("prosparse", 6),
    Run("fixed-l1", 1),
    Run("l1-steered", 0.82),
    Run("l1-steered", 0.92),
]


def shift_relu(shift: float) -> None:
    """Makes relu(x - shift) of FATReLU: only this study trains it, no file format has a place for the shift."""
    import torch

    from prosparse_pipe import relu

    class ShiftedReLU(relu.FATReLU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.relu(x - shift)

    relu.FATReLU = ShiftedReLU  # type: ignore[misc]


def measure(run: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains one run in a temporary folder; its row."""
    import torch
    from transformers import AutoTokenizer

    from prosparse_pipe import relu
    from prosparse_pipe.data import load_blocks
    from prosparse_pipe.evaluate import evaluate
    from prosparse_pipe.train import choose_bf16, train
    from prosparse_pipe.train_config import load_config

    torch._dynamo.config.recompile_limit = 64
    original = relu.FATReLU
    if run.way == "shifted":
        shift_relu(run.strength)
    with tempfile.TemporaryDirectory() as folder:
        shared = {
            "model": arguments.model,
            "data": arguments.data,
            "out": folder + "/run",
            "steps": max(2, round(arguments.tokens / (arguments.batch_size * arguments.seq_len))),
            "seq_len": arguments.seq_len,
            "batch_size": arguments.batch_size,
            "lr": arguments.lr,
            "distill": 1.0,
            "ce_weight": 0.1,
            "trainable": "ffn",
            "threshold": 0.0,
            "heldout_tokens": arguments.eval_tokens,
            "save_steps": 1_000_000,
            "seed": run.seed,
        }
        start = time.monotonic()
        try:
            result = train(load_config(None, {**shared, **run.settings()}))
        finally:
            relu.FATReLU = original  # type: ignore[misc]
        assert result is not None
        records = [json.loads(line) for line in (result.run / "training.jsonl").read_text().splitlines()]
        if run.way == "shifted":
            shift_relu(run.strength)
        model, _, _ = relu.load_sparse_model(result.run, device="cuda" if torch.cuda.is_available() else "cpu")
        relu.FATReLU = original  # type: ignore[misc]
        tokenizer = AutoTokenizer.from_pretrained(result.run)
        texts = {}
        for text in arguments.text:
            name, _, source = text.partition("=")
            blocks = load_blocks(tokenizer, [source], arguments.seq_len, "all", arguments.eval_tokens, 0)
            found = evaluate(model, blocks, arguments.batch_size, choose_bf16("auto")[0])
            texts[name] = {"perplexity": found.perplexity, "sparsity": found.mean_sparsity}
    heldout = {"perplexity": result.sparse.perplexity, "sparsity": result.sparse.mean_sparsity}
    return {
        **dataclasses.asdict(run),
        "tokens": shared["steps"] * arguments.batch_size * arguments.seq_len,
        "texts": {"heldout": heldout, **texts},
        "heldout_dense": result.dense.perplexity,
        "kl": records[-1]["kl"],
        "lambda": records[-1]["lambda"],
        "sparsity_per_layer": [round(s, 4) for s in result.sparse.sparsity],
        "seconds": round(time.monotonic() - start, 1),
    }


def machine() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity over sparsity, a panel for each text, a line for each way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(rows[0]["texts"])
    figure, panels = plt.subplots(1, len(names), figsize=(5 * len(names), 4.2), squeeze=False, layout="constrained")
    for panel, name in zip(panels[0], names, strict=True):
        for i, (way, label) in enumerate(NAMES.items()):
            found = [row["texts"][name] for row in rows if row["way"] == way]
            points = sorted((100 * point["sparsity"], point["perplexity"]) for point in found)
            if points:
                panel.plot(*zip(*points, strict=True), "o-", ms=4, lw=1, color=f"C{i}", label=label)
        panel.set(title=name, xlabel="sparsity, %", ylabel="perplexity", yscale="log")
        panel.yaxis.set_minor_formatter("{x:.0f}")
        panel.grid(alpha=0.3, which="both")
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=SOURCE", help="to judge on, repeatable")
    parser.add_argument("--tokens", type=float, default=5e6, help="of a run")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--eval-tokens", type=int, default=65536)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after so many")
    parser.add_argument("--jsonl", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="draw the file's rows instead of training")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.jsonl.read_text().splitlines()] if arguments.jsonl.exists() else []
    if arguments.plot:
        plot(rows, arguments.plot)
        return
    done = {(row["way"], row["strength"], row["seed"]) for row in rows}
    start = time.monotonic()
    for run in RUNS:
        if dataclasses.astuple(run) in done or time.monotonic() - start > 60 * arguments.minutes:
            continue
        row = {"bench": "sparsity_study", "commit": commit(), "machine": machine(), **measure(run, arguments)}
        with open(arguments.jsonl, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({key: row[key] for key in ("way", "strength", "seed", "texts", "seconds")}), flush=True)


if __name__ == "__main__":
    main()
