"""`prosparse-pipe chat`: talk to a model; one answer with -p or a pipe, a conversation at a terminal."""

import random
import sys
from typing import Any

import click

from prosparse_pipe.commands.options import llama_kwargs, runtime_options
from prosparse_pipe.shipped import resolve_model


@click.command("chat")
@click.argument("model", required=False)
@click.option("-m", "--model", "model_option", metavar="MODEL", help="same as the argument")
@click.option("-p", "--prompt", help="answer this and exit; `-` reads it from standard input")
@click.option("-sys", "--system", "system_prompt", help="system message")
@click.option(
    "-n", "--n-predict", type=int, default=-1, show_default=True, help="most tokens of an answer; -1: until it ends"
)
@click.option("--temp", type=click.FloatRange(0), default=0.8, show_default=True, help="temperature; 0: greedy")
@click.option("--top-k", type=int, default=40, show_default=True, help="keep the k likeliest tokens; 0: all")
@click.option("--top-p", type=click.FloatRange(0, 1), default=0.95, show_default=True, help="nucleus; 1: off")
@click.option(
    "--min-p", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="least share of the likeliest; 0: off"
)
@click.option("--repeat-penalty", type=click.FloatRange(0), default=1.1, show_default=True, help="1: off")
@click.option("-s", "--seed", type=int, help="seed of the sampler; default: random")
@click.option("--dense", is_flag=True, help="run stock llama.cpp, without the sparse backend")
@runtime_options
def command(model: str | None, model_option: str | None, prompt: str | None, system_prompt: str | None, n_predict: int,
            temp: float, top_k: int, top_p: float, min_p: float, repeat_penalty: float, seed: int | None, dense: bool,
            verbose: int, **runtime: Any) -> None:  # fmt: skip
    """Talk to MODEL: a GGUF file or a run folder (default: the newest export).

    The answer goes to standard output, everything else to standard error. Ctrl-C stops an answer, Ctrl-D ends.
    """
    from prosparse_pipe.chat import Conversation, converse
    from prosparse_pipe.runtime import load

    if model and model_option:
        raise click.UsageError("give the model once: as the argument or with --model")
    path = resolve_model(model or model_option)
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise click.UsageError("standard input is empty; give a prompt with -p, or run chat at a terminal")
    llama = load(path, sparse=not dense, **llama_kwargs(verbose=verbose, **runtime))
    sampling = {"temperature": temp, "top_k": top_k, "top_p": top_p, "min_p": min_p, "repeat_penalty": repeat_penalty,
                "seed": random.getrandbits(31) if seed is None else seed}  # fmt: skip
    conversation = Conversation(llama, system_prompt, n_predict, sampling)
    try:
        converse(conversation, prompt, verbose > 0)
    finally:
        llama.close()
