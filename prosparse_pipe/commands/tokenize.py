"""`prosparse-pipe tokenize`: text as files of tokens."""

from pathlib import Path

import click


@click.command("tokenize", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", default="smollm2-135m-instruct")
@click.option("-d", "--data", multiple=True, required=True, help="Text, as for `train`; repeatable.")
@click.option("-o", "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of files.")
@click.option(
    "--split", type=click.Choice(["train", "heldout", "all"]), default="train", show_default=True, help="Part of it."
)
@click.option("-n", "--tokens", type=click.IntRange(1), help="Stop after that many.  [default: all]")
@click.option(
    "--file-tokens", type=click.IntRange(1), default=30_000_000, show_default=True, help="Tokens of a file, about."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the shuffle.")
def command(
    model: str, data: tuple[str, ...], out: Path, split: str, tokens: int | None, file_tokens: int, seed: int
) -> None:
    """Write text as tokens of MODEL (folder, hub name or .gguf), shuffled, so that training elsewhere starts at once.

    Every command that takes text takes the files. What --split leaves out is in none of them.

    \b
    prosparse-pipe tokenize --data books.txt --data chats.jsonl --out data/tokens
    prosparse-pipe train --data data/tokens ...
    """
    from transformers import AutoTokenizer

    from prosparse_pipe.checkpoint import resolve_base_model
    from prosparse_pipe.token_file import tokenize

    path = Path(resolve_base_model(model))
    is_gguf = path.suffix == ".gguf"
    files = {"gguf_file": path.name} if is_gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(path.parent if is_gguf else str(path), **files)
    for written, n in tokenize(tokenizer, list(data), split, out, tokens, file_tokens, seed):
        click.echo(f"{written}  {n:,} tokens")
