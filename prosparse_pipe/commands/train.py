"""`prosparse-pipe train`: a ReLU-sparse model from a dense one."""

import logging
from pathlib import Path
from typing import Any

import click


@click.command("train")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file of settings, see recipes/")
@click.option("--model", help="base model: folder, hub name, .gguf file, or smollm2-135m-instruct")
@click.option("--data", multiple=True, help="text: file, folder, glob, hub dataset or `chitchat`; repeatable")
@click.option("--out", help="run folder  [default: runs/MODEL]")
@click.option("--steps", type=int, help="optimizer steps")
@click.option("--seq-len", type=int, help="tokens of a block")
@click.option("--batch-size", type=int, help="blocks in a forward pass of one process")
@click.option("--grad-accum", type=int, help="forward passes before an optimizer step")
@click.option("--lr", type=float, help="peak learning rate")
@click.option("--schedule", help="7b, 13b or 1b as published, or [[lambda, share], ...]")
@click.option("--distill", type=float, help="weight of the KL divergence to the dense model")
@click.option("--trainable", type=click.Choice(["all", "ffn", "lora"]), help="all weights, the FFNs' only, or adapters")
@click.option("--regularizer", type=click.Choice(["l1", "count"]), help="penalty: L1 as published, or a smooth count")
@click.option("--target-sparsity", type=float, help="steer lambda to this sparsity, e.g. 0.89, instead of a schedule")
@click.option("--init", help="FFN weights to start from: a run, or a GGUF")
@click.option("--threshold", help="FATReLU threshold: a number, or `search`")
@click.option(
    "--layout", type=click.Choice(["relu", "fatrelu"]), help="config.json for transformers, or as released (vLLM)"
)
@click.option("--bf16", type=click.Choice(["auto", "on", "off"]), help="compute in bf16")
@click.option("--gradient-checkpointing/--no-gradient-checkpointing", default=None, help="less memory, more time")
@click.option("--seed", type=int, help="of data order and everything random")
@click.option("--report-to", multiple=True, help="tensorboard, wandb, trackio ...; repeatable")
@click.option("--push-to-hub", metavar="USER/MODEL", help="upload the result")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="any other setting, see docs/train.md")
@click.option("--resume", is_flag=True, help="go on from the last checkpoint of --out, or start")
@click.option("--overwrite", is_flag=True, help="start anew in a folder that holds a run")
@click.option("-v", "--verbose", is_flag=True, help="show the libraries' own messages")
def command(
    config_file: Path | None, settings: tuple[str, ...], resume: bool, overwrite: bool, verbose: bool, **flags: Any
) -> None:
    """Turn a dense model with gated FFNs into a ReLU-sparse one.

    Settings come from --config, then --set, then the flags. The result is a folder that transformers loads.
    """
    from prosparse_pipe.train_config import load_config

    overrides: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise click.UsageError(f"--set {setting}: give NAME=VALUE")
        overrides[name.strip()] = value
    overrides.update({name: value for name, value in flags.items() if value not in (None, ())})
    config = load_config(config_file, overrides)

    import transformers

    from prosparse_pipe.train import Interrupted, train

    logging.basicConfig(format="%(message)s", level=logging.INFO if verbose else logging.WARNING)
    logging.getLogger("prosparse_pipe").setLevel(logging.INFO)
    if not verbose:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    try:
        result = train(config, resume, overwrite)
    except Interrupted as stop:
        click.echo(str(stop), err=True)
        raise click.exceptions.Exit(130) from None
    if result is None:
        if resume:
            click.echo(f"{config.out} is finished already", err=True)
        return
    click.echo("| held-out | perplexity | sparsity | least, most sparse layer |\n| --- | --- | --- | --- |")
    for name, found in (("dense", result.dense), ("ReLU, untrained", result.substituted), ("sparse", result.sparse)):
        click.echo(
            f"| {name} | {found.perplexity:.2f} | {found.mean_sparsity:.1%} |"
            f" {min(found.sparsity):.1%}, {max(found.sparsity):.1%} |"
        )
    tokens = result.info.provenance["tokens"]
    click.echo(f"threshold {result.info.threshold:g}; {tokens:,} tokens in {result.seconds / 60:.1f} minutes")
    click.echo(f"saved in {result.run}; next: prosparse-pipe export --gguf {result.run}")
