"""`prosparse-pipe generate-data`: text that the dense model writes, to distill on."""

from pathlib import Path

import click


def parse_shares(context: click.Context, parameter: click.Parameter, value: str) -> dict[str, float]:
    """`free:0.5,chat:0.5` as a dict; a name alone counts 1."""
    shares = {}
    for part in value.split(","):
        name, _, share = part.strip().partition(":")
        try:
            shares[name] = float(share or 1)
        except ValueError:
            raise click.BadParameter(f"{share} is not a number") from None
    return shares


@click.command("generate-data", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", default="smollm2-135m-instruct")
@click.option("-o", "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of files.")
@click.option("-n", "--tokens", type=click.IntRange(1), default=1_000_000, show_default=True, help="In all, about.")
@click.option("--length", type=click.IntRange(8), default=512, show_default=True, help="Tokens of a row.")
@click.option("-b", "--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Rows of a file.")
@click.option("--temp", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, help="Temperature.")
@click.option(
    "--starts",
    callback=parse_shares,
    default="free:0.5,chat:0.5",
    show_default=True,
    help="Kinds of rows and their shares: free (any text), chat (both sides), text (goes on from --seed-data).",
)
@click.option("--seed-data", multiple=True, help="Real text, as for `train`, that `text` rows begin with; repeatable.")
@click.option("--seed-tokens", type=click.IntRange(1), default=16, show_default=True, help="Tokens taken from it.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling.")
@click.option("--device", default=None, help="cpu, cuda, ...  [default: a GPU if there is one]")
def command(
    model: str,
    out: Path,
    tokens: int,
    length: int,
    batch_size: int,
    temp: float,
    starts: dict[str, float],
    seed_data: tuple[str, ...],
    seed_tokens: int,
    seed: int,
    device: str | None,
) -> None:
    """Let the dense MODEL (folder, hub name or .gguf) write text for `train --data OUT --distill 1`.

    Files that OUT holds already are kept: the same command goes on after an interruption.

    \b
    prosparse-pipe generate-data --out data/own --tokens 20000000 --batch-size 4096
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from prosparse_pipe.checkpoint import resolve_base_model
    from prosparse_pipe.generate import GenerateConfig, generate_data
    from prosparse_pipe.relu import load_model
    from prosparse_pipe.train import choose_bf16

    config = GenerateConfig(tokens, length, batch_size, temp, starts, list(seed_data), seed_tokens, seed)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if choose_bf16("auto")[0] else torch.float32
    dense, tokenizer = load_model(resolve_base_model(model), dtype)
    dense.to(device).eval()
    columns = (TextColumn("writing {task.completed:,.0f} tokens"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        files = generate_data(
            dense,
            tokenizer,
            config,
            out,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    click.echo(f"{out}  {len(files)} files, {len(files) * batch_size * length:,} tokens")
