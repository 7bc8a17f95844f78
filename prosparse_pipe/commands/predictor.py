"""`prosparse-pipe predictor`: low-rank activation predictors for every layer."""

import json
from pathlib import Path

import click

from prosparse_pipe.checkpoint import PREDICTORS_NAME, resolve_run
from prosparse_pipe.commands.profile import data_sources


def _ranks(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        ranks = sorted({int(part) for part in value.split(",")})
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a comma list of numbers") from None
    if ranks[0] < 1:
        raise click.BadParameter("ranks must be at least 1")
    return tuple(ranks)


@click.command("predictor", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("-d", "--data", multiple=True, help="Text, as for `train`; repeatable.  [default: that of RUN]")
@click.option(
    "--input",
    "kind",
    type=click.Choice(["post_norm", "pre_norm"]),
    default="post_norm",
    show_default=True,
    help="What it reads: the FFN's input, or the residual stream before the norm.",
)
@click.option("-n", "--tokens", type=click.IntRange(256), default=100_000, show_default=True, help="Tokens at most.")
@click.option(
    "--ranks",
    callback=_ranks,
    default="32,64,128,256,512,1024",
    show_default=True,
    help="Candidates; a layer takes the one with which a token reads the fewest weights.",
)
@click.option(
    "--recall-target",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.95,
    show_default=True,
    help="Share of the active neurons that must be predicted.",
)
@click.option("--epochs", type=click.IntRange(1), default=2, show_default=True)
@click.option("--seq-len", type=click.IntRange(8), default=512, show_default=True, help="Tokens per block.")
@click.option("-b", "--batch-size", type=click.IntRange(1), default=4, show_default=True, help="Blocks at once.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, ...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    run: Path | None,
    data: tuple[str, ...],
    kind: str,
    tokens: int,
    ranks: tuple[int, ...],
    recall_target: float,
    epochs: int,
    seq_len: int,
    batch_size: int,
    dtype: str,
    device: str,
    as_json: bool,
) -> None:
    """Train predictors that say which neurons of RUN (default: the newest run) will be active.

    Activations are recorded to disk, in the run folder, and removed afterwards. Layers that are finished survive an
    interruption: the same command goes on with the others.

    \b
    prosparse-pipe predictor
    prosparse-pipe predictor runs/NAME --tokens 400000 --ranks 256,512,1024 --recall-target 0.98
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from prosparse_pipe.predictor import LayerPredictor, PredictorSettings, train_predictors

    folder = resolve_run(run)
    settings = PredictorSettings(
        input=kind,
        ranks=ranks,
        recall_target=recall_target,
        tokens=tokens,
        epochs=epochs,
        seq_len=seq_len,
        batch_size=batch_size,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        recording = bar.add_task("recording tokens", total=tokens)
        training = bar.add_task("training layers", total=None)

        def finished(il: int, layers: int, layer: LayerPredictor) -> None:
            text = f"layer {il}: rank {layer.rank}, recall {layer.recall:.3f}, predicted sparsity"
            bar.console.print(f"{text} {layer.predicted_sparsity:.3f} of {layer.sparsity:.3f}", highlight=False)
            bar.update(training, completed=il + 1, total=layers)

        result = train_predictors(
            folder,
            data_sources(data, folder),
            settings,
            dtype=dtype,
            device=device,
            seen=lambda count: bar.advance(recording, count),
            finished=finished,
        )
    share = result.bytes / result.model_bytes
    if as_json:
        figures = {
            "tokens": result.tokens,
            "recall": result.mean("recall"),
            "predicted_sparsity": result.mean("predicted_sparsity"),
            "bytes": result.bytes,
            "share_of_model": share,
            "layers": [layer.figures() for layer in result.layers],
        }
        click.echo(json.dumps(figures))
        return
    table = Table(title=f"{folder.name}: predictors, {result.tokens} tokens, {kind}")
    for column in ("layer", "rank", "recall", "predicted sparsity", "sparsity", "MiB"):
        table.add_column(column, justify="right")
    for il, layer in enumerate(result.layers):
        percent = (f"{100 * value:.1f} %" for value in (layer.recall, layer.predicted_sparsity, layer.sparsity))
        table.add_row(str(il), str(layer.rank), *percent, f"{layer.figures()['bytes'] / 2**20:.2f}")
    table.add_section()
    means = (f"{100 * result.mean(figure):.1f} %" for figure in ("recall", "predicted_sparsity", "sparsity"))
    table.add_row("all", f"{result.mean('rank'):.0f}", *means, f"{result.bytes / 2**20:.2f}")
    Console().print(table)
    click.echo(f"{100 * share:.1f} % of the model's weights at 16 bits", err=True)
    click.echo(f"wrote {folder / PREDICTORS_NAME}", err=True)
    click.echo(f"next: prosparse-pipe export --gguf {folder}", err=True)
