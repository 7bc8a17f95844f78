"""`prosparse-pipe eval`: how good a model is, beside the dense one, and how sparse."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prosparse_pipe.hardware import usable_cores
from prosparse_pipe.shipped import SHIPPED_NAME

if TYPE_CHECKING:
    from prosparse_pipe.scoring import TextScore
    from prosparse_pipe.tasks import TaskScore


@click.command("eval", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", default=SHIPPED_NAME)
@click.option("--text", "texts", multiple=True, help="text, as `train --data` takes it; repeatable")
@click.option(
    "--tasks",
    "task_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="multiple-choice questions, a .jsonl file; repeatable",
)
@click.option("--dense", "dense_model", metavar="MODEL", help="compare with this model of the same vocabulary")
@click.option(
    "--backend",
    type=click.Choice(["auto", "sparse", "stock"]),
    default="auto",
    show_default=True,
    help="of llama.cpp for a GGUF; auto: sparse if it is a sparse model",
)
@click.option(
    "--split",
    type=click.Choice(["all", "heldout", "train"]),
    default="all",
    show_default=True,
    help="part of the text, as `train` splits it",
)
@click.option("-c", "--context", type=click.IntRange(8), default=1024, show_default=True, help="tokens of a window")
@click.option(
    "-n", "--max-tokens", type=click.IntRange(1), default=65536, show_default=True, help="tokens of each text at most"
)
@click.option(
    "-t",
    "--threads",
    type=click.IntRange(1),
    default=usable_cores(),
    show_default="usable cores",
    help="CPU threads",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="of a checkpoint's weights",
)
@click.option("--device", default="cpu", show_default=True, help="of a checkpoint: cpu, cuda, ...")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@click.option("-v", "--verbose", count=True, help="-vv: llama.cpp's log on stderr")
def command(
    model: str,
    texts: tuple[str, ...],
    task_files: tuple[Path, ...],
    dense_model: str | None,
    backend: str,
    split: str,
    context: int,
    max_tokens: int,
    threads: int,
    dtype: str,
    device: str,
    as_json: bool,
    verbose: int,
) -> None:
    """Measure MODEL (default: the embedded one) on text and questions: a run folder, a Hugging Face folder or a GGUF.

    A GGUF is read by llama.cpp and needs no torch; the same windows of tokens for a checkpoint and its GGUF.

    \b
    prosparse-pipe eval model-Q4_K_M.gguf --text wiki.txt --dense dense.gguf
    prosparse-pipe eval runs/NAME --text chitchat --split heldout --tasks questions.jsonl
    """
    from prosparse_pipe.data import locate_source
    from prosparse_pipe.scoring import check_same_vocabulary, open_scorer, score_text, text_blocks
    from prosparse_pipe.tasks import read_questions, score_tasks

    if not texts and not task_files:
        raise click.UsageError("give --text, --tasks or both: there is nothing to measure on")
    for text in texts:  # before models are loaded, which may take long
        locate_source(text)
    tasks = {str(path): read_questions(path) for path in task_files}
    options: dict[str, Any] = {
        "n_ctx": context, "threads": threads, "dtype": dtype, "device": device, "verbose": verbose > 1
    }  # fmt: skip
    with closing(open_scorer(model, backend=backend, **options)) as scorer:
        click.echo(f"{model}: {_runtime(scorer.runtime, scorer.threshold)}", err=True)
        with closing(open_scorer(dense_model, **options)) if dense_model is not None else nullcontext() as dense:
            if dense is not None:
                check_same_vocabulary(scorer, dense)
            text_scores, task_scores = [], []
            blocks = {text: text_blocks(scorer, text, context, split, max_tokens) for text in texts}
            for text, found in blocks.items():
                with _progress(text, found.size) as seen:
                    text_scores.append(score_text(scorer, text, found, dense, seen))
            for name, questions in tasks.items():
                with _progress(name, len(questions)) as seen:
                    task_scores.append(score_tasks(scorer, name, questions, context, dense, seen))
            values = {
                "model": model,
                "runtime": scorer.runtime,
                "threshold": scorer.threshold,
                "dense": dense_model,
                "dense_runtime": dense.runtime if dense is not None else None,
                "context": context,
                "split": split,
                "texts": [dataclasses.asdict(score) for score in text_scores],
                "tasks": [dataclasses.asdict(score) for score in task_scores],
            }
    if as_json:
        click.echo(json.dumps(values))
        return
    tables = [_text_table(text_scores), _task_table(task_scores)]
    click.echo("\n\n".join("\n".join(table) for table in tables if table))


def _runtime(runtime: str, threshold: float | None) -> str:
    name = {"torch": "torch", "sparse": "llama.cpp with the sparse backend", "stock": "stock llama.cpp"}[runtime]
    return name + (f", threshold {threshold:g}" if threshold else "")


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; what it yields is called with what was done since."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=total)
        yield lambda count: bar.advance(task, count)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; columns that are empty in all rows are left out. No rows: no table."""
    shown = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [[head[i] for i in shown], ["---"] * len(shown), *([row[i] for i in shown] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines] if rows else []


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _text_table(scores: "list[TextScore]") -> list[str]:
    head = ("text", "tokens", "perplexity", "bits/byte", "sparsity", "least, most sparse layer", "dense perplexity",
            "ratio", "KL, nats", "same top token")  # fmt: skip
    rows = [
        (
            score.text,
            f"{score.tokens}",
            f"{score.perplexity:.4g}",
            f"{score.bits_per_byte:.4f}",
            _number(score.sparsity, ".1%"),
            "" if score.sparsity is None else f"{score.sparsity_min:.1%}, {score.sparsity_max:.1%}",
            _number(score.dense_perplexity, ".4g"),
            _number(score.perplexity_ratio, ".4f"),
            _number(score.kl, ".4f"),
            _number(score.top1_agreement, ".1%"),
        )
        for score in scores
    ]
    return _table(head, rows)


def _task_table(scores: "list[TaskScore]") -> list[str]:
    head = ("tasks", "questions", "acc", "acc_norm", "dense acc", "dense acc_norm", "acc, points", "acc_norm, points")

    def share(value: float | None, error: float | None) -> str:
        return _number(value, ".1%") + ("" if error is None else f" ± {error:.1%}")

    def points(value: float | None, error: float | None) -> str:
        return _number(value, "+.1f") + ("" if error is None else f" ± {error:.1f}")

    rows = [
        (
            score.tasks,
            f"{score.questions}",
            share(score.acc, score.acc_stderr),
            share(score.acc_norm, score.acc_norm_stderr),
            share(score.dense_acc, score.dense_acc_stderr),
            share(score.dense_acc_norm, score.dense_acc_norm_stderr),
            points(score.acc_difference, score.acc_difference_stderr),
            points(score.acc_norm_difference, score.acc_norm_difference_stderr),
        )
        for score in scores
    ]
    return _table(head, rows)
