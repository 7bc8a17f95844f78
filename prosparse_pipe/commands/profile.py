"""`prosparse-pipe profile`: activation rate of every neuron on text."""

import json
from pathlib import Path

import click

from prosparse_pipe.checkpoint import RATES_NAME, SparseInfo, resolve_run
from prosparse_pipe.errors import ProsparseError


def data_sources(data: tuple[str, ...], run: Path) -> list[str]:
    """--data, or the text that the run was trained on.

    Raises:
        ProsparseError: neither is known.
    """
    if data:
        return list(data)
    known = SparseInfo.load(run).provenance.get("data")
    if isinstance(known, str):
        known = [known]
    if not known:
        raise ProsparseError(f"{run} does not say what it was trained on", "give text with --data")
    return [str(source) for source in known]


@click.command("profile", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option(
    "-d", "--data", multiple=True, help="Text, as for `train`; repeatable.  [default: what RUN was trained on]"
)
@click.option(
    "--split", type=click.Choice(["heldout", "train"]), default="heldout", show_default=True, help="Part of it."
)
@click.option("-n", "--tokens", type=click.IntRange(1), default=100_000, show_default=True, help="Tokens at most.")
@click.option("--seq-len", type=click.IntRange(8), default=512, show_default=True, help="Tokens per block.")
@click.option("-b", "--batch-size", type=click.IntRange(1), default=4, show_default=True, help="Blocks at once.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of the weights; bfloat16 halves the memory.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, ...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    run: Path | None,
    data: tuple[str, ...],
    split: str,
    tokens: int,
    seq_len: int,
    batch_size: int,
    dtype: str,
    device: str,
    as_json: bool,
) -> None:
    """Measure how often every neuron of RUN (default: the newest run) is active.

    Writes activation_rates.safetensors and activation_rates.png into the run folder; `export` sorts the neurons by it.

    \b
    prosparse-pipe profile
    prosparse-pipe profile runs/NAME --data notes.txt --data chats.jsonl --tokens 1000000
    """
    import numpy as np
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from prosparse_pipe.profile import PLOT_NAME, profile_run
    from prosparse_pipe.sparsity import HOT_SHARES

    folder = resolve_run(run)
    sources = data_sources(data, folder)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("tokens", total=tokens)
        result = profile_run(
            folder,
            sources,
            tokens=tokens,
            seq_len=seq_len,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            split=split,
            seen=lambda count: bar.advance(task, count),
        )
        bar.update(task, total=result.tokens, completed=result.tokens)
    if as_json:
        click.echo(json.dumps(result.as_json()))
        return
    table = Table(title=f"{folder.name}: {result.tokens} tokens of {', '.join(sources)}")
    table.add_column("layer", justify="right")
    table.add_column("sparsity", justify="right")
    for share in HOT_SHARES:
        table.add_column(f"hottest {share:.0%}", justify="right")
    rows = [
        (str(il), *values)
        for il, values in enumerate(zip(result.sparsity, *np.transpose(result.coverage), strict=True))
    ]
    rows.append(("mean", float(np.mean(result.sparsity)), *np.mean(result.coverage, axis=0)))
    for label, *values in rows:
        table.add_row(label, *(f"{100 * value:.1f} %" for value in values), end_section=label == rows[-2][0])
    Console().print(table)
    click.echo(f"wrote {folder / RATES_NAME} and {folder / PLOT_NAME}", err=True)
    click.echo(f"next: prosparse-pipe export --gguf {folder}", err=True)
