"""The command line: `prosparse-pipe COMMAND`. Commands live in prosparse_pipe/commands and are imported when used."""

import importlib
import signal
import sys
from types import FrameType
from typing import ClassVar

import click

from prosparse_pipe import __version__
from prosparse_pipe.errors import MissingExtraError


class LazyGroup(click.Group):
    """A click group that imports a command's module only when that command (or the help) needs it."""

    commands_by_name: ClassVar[dict[str, str]] = {
        "generate-data": "prosparse_pipe.commands.generate_data",
        "tokenize": "prosparse_pipe.commands.tokenize",
        "train": "prosparse_pipe.commands.train",
        "profile": "prosparse_pipe.commands.profile",
        "predictor": "prosparse_pipe.commands.predictor",
        "export": "prosparse_pipe.commands.export",
        "chat": "prosparse_pipe.commands.chat",
        "bench": "prosparse_pipe.commands.bench",
        "eval": "prosparse_pipe.commands.eval",
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands_by_name)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands_by_name:
            return None
        return importlib.import_module(self.commands_by_name[cmd_name]).command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="prosparse-pipe")
def cli() -> None:
    """Make language models sparse (ProSparse) and run them fast in stock llama.cpp.

    \b
    generate-data  text that the dense model writes, to distill on
    tokenize   text as files of tokens
    train      dense checkpoint -> ReLU-sparse checkpoint
    profile    activation rate of every neuron
    predictor  low-rank activation predictors
    export     GGUF that every llama.cpp runs, neurons sorted hot to cold
    chat       talk to a model through the sparse backend
    bench      sparse beside stock llama.cpp on the same file
    eval       perplexity, sparsity and accuracy, beside the dense model
    """


def main() -> None:
    """Entry point: turns a missing extra into one line and Ctrl-C into exit code 130.

    A library may turn the KeyboardInterrupt it is hit by into an error of its own (torch's tensor constructor makes it
    a ValueError), so what counts is that the signal came, not which exception arrives here.
    """
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell's `&` has set it to ignore
        signal.signal(signal.SIGINT, interrupt)
    try:
        _run()
    except Exception:
        if not interrupted:
            raise
        click.echo("interrupted", err=True)
        sys.exit(130)


def _run() -> None:
    try:
        status = cli(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _TRAIN_MODULES:
            raise
        missing = MissingExtraError("train", error)
        missing.show()
        sys.exit(missing.exit_code)
    except BrokenPipeError:  # `prosparse-pipe bench | head`
        sys.stderr.close()
        sys.exit(0)
    sys.exit(status if isinstance(status, int) else 0)


_TRAIN_MODULES = {
    "accelerate",
    "datasets",
    "matplotlib",
    "peft",
    "pyarrow",
    "safetensors",
    "torch",
    "transformers",
    "yaml",
}
