"""`prosparse-pipe bench`: sparse beside stock llama.cpp on the same file."""

from pathlib import Path
from typing import Any

import click

from prosparse_pipe.commands.options import llama_kwargs, runtime_options
from prosparse_pipe.shipped import resolve_model


class IntList(click.ParamType):
    """Comma-separated integers, e.g. 1,2,4."""

    name = "N[,N...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            numbers = [int(part) for part in str(value).split(",") if part.strip()]
        except ValueError:
            self.fail(f"{value!r} is not a list of integers like 128,256", param, ctx)
        if any(n < 0 for n in numbers):
            self.fail(f"{value!r} has a negative number", param, ctx)
        return [n for n in numbers if n > 0]  # 0 switches a kind of test off, as in llama-bench


@click.command("bench")
@click.argument("model", required=False)
@click.option("-m", "--model", "model_option", metavar="MODEL", help="same as the argument")
@click.option(
    "-p", "--n-prompt", type=IntList(), default="512", show_default=True, help="tokens of the prefill tests; 0: none"
)
@click.option(
    "-n", "--n-gen", type=IntList(), default="128", show_default=True, help="tokens of the decode tests; 0: none"
)
@click.option(
    "-np", "--parallel", type=IntList(), default="0", show_default=True, help="sequences decoded at once; 0: no test"
)
@click.option(
    "-r", "--repetitions", type=click.IntRange(1), default=5, show_default=True, help="timed runs of each side"
)
@click.option("-o", "--output", type=click.Choice(["md", "json", "jsonl", "csv"]), default="md", show_default=True)
@click.option("--sweep-threads", type=IntList(), help="several thread counts, e.g. 1,2,4 (instead of -t)")
@click.option(
    "-f", "--file", "prompt_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="text to evaluate"
)
@runtime_options
def command(
    model: str | None,
    model_option: str | None,
    n_prompt: list[int],
    n_gen: list[int],
    parallel: list[int],
    repetitions: int,
    output: str,
    sweep_threads: list[int] | None,
    prompt_file: Path | None,
    **runtime: Any,
) -> None:
    """Compare sparse with stock dense decoding of MODEL: same file, same threads, interleaved, medians.

    MODEL is a GGUF file or a run folder (default: the newest export). Rows go to standard output.
    """
    from prosparse_pipe.bench import format_rows, run_bench

    if model and model_option:
        raise click.UsageError("give the model once: as the argument or with --model")
    if not n_prompt and not n_gen and not parallel:
        raise click.UsageError("--n-prompt, --n-gen and --parallel are all 0: nothing to measure")
    kwargs = llama_kwargs(**runtime)
    text = prompt_file.read_text(errors="replace") if prompt_file else None
    rows = run_bench(
        resolve_model(model or model_option),
        n_prompt,
        n_gen,
        sweep_threads or [runtime["threads"]],
        repetitions,
        kwargs,
        text,
        parallel,
    )
    for line in format_rows(rows, output):
        click.echo(line)
