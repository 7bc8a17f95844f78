"""A conversation with a model: streaming answers through the chat template of the GGUF.

prosparse-pipe chat model.gguf                 at a terminal
prosparse-pipe chat model.gguf -p "question"   one answer
"""

import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from prosparse_pipe.errors import ProsparseError
from prosparse_pipe.runtime import activation_stats

HELP = """/help   this text
/reset  forget the conversation
/exit   leave (so does Ctrl-D)
Alt-Enter starts a new line; Ctrl-C stops an answer."""


@dataclasses.dataclass
class AnswerStats:
    """Figures of one answer: tokens generated, tokens/s of decoding (first token to last), share of active neurons."""

    n_tokens: int
    tok_s: float
    first_token_s: float
    activation_rate: float | None
    interrupted: bool

    def __str__(self) -> str:
        rate = "" if self.activation_rate is None else f", {self.activation_rate:.1%} of neurons active"
        stopped = ", stopped" if self.interrupted else ""
        return f"{self.n_tokens} tokens, {self.tok_s:.1f} tok/s, first after {self.first_token_s:.2f} s{rate}{stopped}"


@contextmanager
def interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets a flag instead of raising in the middle of llama.cpp's state changes; a second one raises."""
    pressed = False

    def on_interrupt(signum: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


class Conversation:
    """The turns so far, and how the next answer is sampled.

    Args:
        llama: a `llama_cpp.Llama`.
        system_prompt: first message, or None for the template's own.
        n_predict: most tokens of an answer, -1 for no limit but the context.
        sampling: keyword arguments of `create_chat_completion`.
    """

    def __init__(self, llama: Any, system_prompt: str | None, n_predict: int, sampling: dict[str, Any]) -> None:
        self.llama = llama
        self.n_predict = n_predict
        self.sampling = sampling
        self.system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self.turns: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forgets every turn but the system message."""
        self.turns.clear()

    def answer(self, prompt: str, write: Callable[[str], None]) -> AnswerStats:
        """Adds `prompt`, streams the answer into `write` and keeps both as turns.

        When the conversation outgrows the context, its oldest turns are dropped.

        Raises:
            ProsparseError: the prompt alone does not fit the context.
        """
        self.turns.append({"role": "user", "content": prompt})
        activation_stats(self.llama, reset=True)
        pieces: list[str] = []
        start = time.perf_counter()
        first, last = (start, 0), (start, 0)  # (time, tokens in the context) at the first and the last piece
        with interrupt_flag() as interrupted:
            for piece in self._stream():
                last = (time.perf_counter(), self.llama.n_tokens)
                first = last if not pieces else first
                pieces.append(piece)
                write(piece)
                if interrupted():
                    break
            was_interrupted = interrupted()
        self.turns.append({"role": "assistant", "content": "".join(pieces)})
        stats = activation_stats(self.llama)
        decode_s, n_decoded = last[0] - first[0], last[1] - first[1]
        return AnswerStats(
            n_tokens=n_decoded + 1 if pieces else 0,
            tok_s=n_decoded / decode_s if decode_s else 0.0,
            first_token_s=first[0] - start if pieces else time.perf_counter() - start,
            activation_rate=stats.activation_rate if stats else None,
            interrupted=was_interrupted,
        )

    def _stream(self) -> Iterator[str]:
        while True:
            try:
                chunks = self.llama.create_chat_completion(
                    [*self.system, *self.turns],
                    stream=True,
                    max_tokens=self.n_predict if self.n_predict > 0 else None,
                    **self.sampling,
                )
                for chunk in chunks:
                    text = chunk["choices"][0]["delta"].get("content")
                    if text:
                        yield text
                return
            except ValueError as error:  # "Requested tokens (n) exceed context window of m", before the first token
                if "exceed context window" not in str(error):
                    raise
                if len(self.turns) < 3:
                    self.turns.clear()
                    raise ProsparseError(
                        f"the prompt does not fit the context of {self.llama.n_ctx()} tokens", "use a larger --ctx-size"
                    ) from None
                del self.turns[:2]
                click.secho("the conversation outgrew the context: its oldest turn was dropped", dim=True, err=True)


def converse(conversation: Conversation, prompt: str | None, verbose: bool) -> None:
    """Answers `prompt` and returns, or reads prompts at the terminal until Ctrl-D."""
    if prompt is not None:
        stats = conversation.answer(prompt, _write)
        _write("\n")
        if verbose:
            click.secho(str(stats), dim=True, err=True)
        if stats.interrupted:
            raise KeyboardInterrupt
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    # the prompt goes to stderr: stdout holds answers only
    session: Any = PromptSession(output=create_output(stdout=sys.stderr))
    click.secho("Ask anything. /help lists commands.", dim=True, err=True)
    while True:
        try:
            text = session.prompt("> ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if not text:
            continue
        if text in ("/exit", "/quit", "/bye"):
            return
        if text == "/reset":
            conversation.reset()
            continue
        if text.startswith("/"):
            click.echo(HELP if text == "/help" else f"unknown command {text}; /help lists them", err=True)
            continue
        try:
            stats = conversation.answer(text, _write)
        except ProsparseError as error:
            error.show()
            continue
        _write("\n")
        if verbose:
            click.secho(str(stats), dim=True, err=True)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
