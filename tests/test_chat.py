"""Chat with a tiny random model: one answer, a pipe, a conversation at a real terminal, Ctrl-C."""

import os
import pty
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from gguf_models import Shape, write_model

from prosparse_pipe.chat import Conversation
from prosparse_pipe.errors import ProsparseError
from prosparse_pipe.runtime import load

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
CHAT = [sys.executable, "-m", "prosparse_pipe", "chat"]
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
PROMPT = b"\x1b[0m>"  # as prompt_toolkit draws it
ENDLESS = ["-c", "8192", "-t", "1", "--temp", "0", "--repeat-penalty", "1"]  # greedy runs in circles


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that, taken greedily, says printable characters and never ends its answer."""
    shape = Shape()
    output = np.zeros((shape.n_vocab, shape.n_embd))
    printable = slice(3 + 33, 3 + 127)  # byte tokens start at 3
    output[printable] = np.random.default_rng(0).normal(size=(127 - 33, shape.n_embd))
    path = tmp_path_factory.mktemp("chat") / "tiny.gguf"
    return write_model(
        path, shape=shape, keys={"tokenizer.chat_template": TEMPLATE}, replace={"output.weight": output}
    ).path


def make_conversation(model, n_predict=8, n_ctx=256, system=None):
    llama = load(model, n_ctx=n_ctx, n_threads=1, n_threads_batch=1)
    return Conversation(llama, system, n_predict, {"temperature": 0.0, "seed": 1})


def test_answers_are_kept_as_turns(model):
    conversation = make_conversation(model, system="Be brief.")
    pieces: list[str] = []
    stats = conversation.answer("Hello", pieces.append)
    assert conversation.turns[0] == {"role": "user", "content": "Hello"}
    assert conversation.turns[1] == {"role": "assistant", "content": "".join(pieces)}
    assert 1 <= stats.n_tokens <= 8
    assert 0 < stats.activation_rate < 1
    assert "of neurons active" in str(stats)
    conversation.reset()
    assert conversation.turns == []
    conversation.llama.close()


def test_a_long_conversation_drops_its_oldest_turns(model, capfd):
    conversation = make_conversation(model, n_ctx=256)
    for i in range(16):
        conversation.answer(f"Question number {i}", lambda text: None)
    assert "oldest turn was dropped" in capfd.readouterr().err
    assert 2 <= len(conversation.turns) < 32
    assert conversation.turns[-2]["content"] == "Question number 15"
    with pytest.raises(ProsparseError, match="does not fit the context of 256 tokens"):
        conversation.answer("word " * 300, lambda text: None)
    conversation.llama.close()


def test_one_answer_on_stdout_and_figures_on_stderr(model):
    command = [*CHAT, str(model), "-c", "256", "-t", "1", "-n", "6", "--temp", "0"]
    verbose = subprocess.run([*command, "-p", "Hello", "-v"], env=QUIET, capture_output=True, timeout=60)
    assert verbose.returncode == 0, verbose.stderr
    assert b"tok/s" in verbose.stderr
    assert b"of neurons active" in verbose.stderr
    piped = subprocess.run(command, input=b"Hello\n", env=QUIET, capture_output=True, timeout=60)
    assert piped.stdout == verbose.stdout
    assert piped.stderr == b""
    dense = subprocess.run([*command, "-p", "Hello", "--dense"], env=QUIET, capture_output=True, timeout=60)
    assert dense.stdout == verbose.stdout


class Terminal:
    """`chat` with its standard input and error at a pseudo terminal and its output in a file."""

    def __init__(self, arguments, out):
        self.primary, secondary = pty.openpty()
        self.out = out
        with open(out, "wb") as file:
            self.process = subprocess.Popen(
                [*CHAT, *arguments], stdin=secondary, stderr=secondary, stdout=file, env=QUIET, start_new_session=True
            )
        os.close(secondary)
        os.set_blocking(self.primary, False)
        self.screen = b""

    def wait(self, condition, seconds=60.0):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (self.screen, self.out.read_bytes())
            try:
                self.screen += os.read(self.primary, 65536)
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                assert condition()

    def type(self, text):
        os.write(self.primary, text.encode())


def test_conversation_at_a_terminal(model, tmp_path):
    terminal = Terminal([str(model), "-c", "512", "-t", "1", "-n", "4", "--temp", "0", "-v"], tmp_path / "out")
    terminal.wait(lambda: PROMPT in terminal.screen)
    terminal.type("Hello\r")
    terminal.wait(lambda: b"tok/s" in terminal.screen)
    assert terminal.out.read_bytes().endswith(b"\n")
    terminal.type("/nonsense\r")
    terminal.wait(lambda: b"unknown command /nonsense" in terminal.screen)
    terminal.type("/reset\r/exit\r")
    assert terminal.process.wait(timeout=30) == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(model, tmp_path):
    terminal = Terminal([str(model), *ENDLESS, "-v"], tmp_path / "out")
    terminal.wait(lambda: PROMPT in terminal.screen)
    terminal.type("Hello\r")
    terminal.wait(lambda: terminal.out.stat().st_size > 3)
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait(lambda: b"stopped" in terminal.screen)
    assert terminal.process.poll() is None
    terminal.type("/exit\r")
    assert terminal.process.wait(timeout=30) == 0


def test_ctrl_c_ends_a_single_answer_with_130(model, tmp_path):
    command = [*CHAT, str(model), *ENDLESS, "-p", "Hello"]
    out = tmp_path / "out"
    with open(out, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.PIPE, env=QUIET)
        end = time.monotonic() + 60
        while out.stat().st_size < 4:
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, messages = process.communicate(timeout=60)
    assert process.returncode == 130
    assert messages.decode().strip().endswith("interrupted")
