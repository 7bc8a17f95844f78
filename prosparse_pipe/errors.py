"""Errors that a user can do something about: one clear line, and a hint that says what to do.

Exit codes of the command line: 0 done, 1 a `ProsparseError`, 2 wrong usage (click), 130 interrupted.
"""

import click


class ProsparseError(click.ClickException):
    """An error shown to the user as one line, without a traceback.

    Args:
        message: what is wrong, naming the file, key or tensor.
        hint: what to do about it; printed on a second line.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def show(self, file=None) -> None:
        click.secho(f"error: {self.message}", fg="red", err=True)
        if self.hint:
            click.echo(f"hint: {self.hint}", err=True)


class UnsupportedModelError(ProsparseError):
    """The model has no gated feed-forward network that can be made sparse, or an activation we do not know."""


class CheckpointError(ProsparseError):
    """A checkpoint, run folder or file beside it is missing, truncated or does not belong to this model."""


class GGUFError(ProsparseError):
    """A GGUF file is missing, truncated, not ours or not what the command needs."""


class BackendError(ProsparseError):
    """The native backend is missing, was built for another ggml, or refuses the file."""


class MissingExtraError(ProsparseError):
    """A command needs packages of an extra that is not installed."""

    def __init__(self, extra: str, cause: ImportError) -> None:
        super().__init__(
            f"this command needs the package {cause.name!r}, which is not installed",
            f"pip install 'prosparse-pipe[{extra}]'",
        )
