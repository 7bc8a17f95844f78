"""Options that several commands share, named as in llama.cpp."""

from collections.abc import Callable
from typing import Any

import click

from prosparse_pipe.hardware import usable_cores


def runtime_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Context, batch, threads and KV type."""
    options = [
        click.option(
            "-c",
            "--ctx-size",
            type=click.IntRange(0),
            default=4096,
            show_default=True,
            help="context, tokens; 0: the model's",
        ),
        click.option(
            "-b", "--batch-size", type=click.IntRange(1), default=512, show_default=True, help="prefill batch, tokens"
        ),
        click.option(
            "-t",
            "--threads",
            type=click.IntRange(1),
            default=usable_cores(),
            show_default="usable cores",
            help="CPU threads",
        ),
        click.option(
            "-ctk",
            "--cache-type-k",
            type=click.Choice(sorted(KV_TYPES)),
            default="f16",
            show_default=True,
            help="type of cached keys",
        ),
        click.option(
            "-ctv",
            "--cache-type-v",
            type=click.Choice(sorted(KV_TYPES)),
            default="f16",
            show_default=True,
            help="type of cached values; quantized needs -fa",
        ),
        click.option("-fa", "--flash-attn", is_flag=True, help="use flash attention"),
        click.option("-v", "--verbose", count=True, help="figures on stderr; -vv: llama.cpp's log too"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "bf16": 30}


def llama_kwargs(
    ctx_size: int, batch_size: int, threads: int, cache_type_k: str, cache_type_v: str, flash_attn: bool, verbose: int
) -> dict[str, Any]:
    """`runtime_options` as keyword arguments of `llama_cpp.Llama`."""
    if cache_type_v not in ("f32", "f16", "bf16") and not flash_attn:
        raise click.UsageError(f"--cache-type-v {cache_type_v} needs --flash-attn")
    return {
        "n_ctx": ctx_size,
        "n_batch": batch_size,
        "n_threads": threads,
        "n_threads_batch": threads,
        "type_k": KV_TYPES[cache_type_k],
        "type_v": KV_TYPES[cache_type_v],
        "flash_attn": flash_attn,
        "verbose": verbose > 1,
    }
