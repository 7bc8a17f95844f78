"""The command line as a user meets it: help, exit codes, one line per error. Each call is a real process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prosparse_pipe.cli import LazyGroup

COMMANDS = list(LazyGroup.commands_by_name)


def run_cli(*args: str, cwd: Path, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "prosparse_pipe", *args],
        cwd=cwd,
        input=stdin,
        env={**os.environ, "PROSPARSE_RUNS": str(cwd / "runs"), "HF_HUB_OFFLINE": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_one_line_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 1, nothing on stdout, an `error:` line and at most a `hint:` line, with all the words in them."""
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert "Traceback" not in result.stderr
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2
    assert all(line.startswith("hint: ") for line in lines[1:])
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_the_command_without_heavy_imports(command, tmp_path):
    code = (
        "import sys; from prosparse_pipe.cli import main\n"
        f"sys.argv = ['prosparse-pipe', {command!r}, '--help']\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'llama_cpp', 'matplotlib', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"Usage: prosparse-pipe {command}" in result.stdout


def test_help_lists_every_command(tmp_path):
    result = run_cli("--help", cwd=tmp_path)
    assert result.returncode == 0
    for command in COMMANDS:
        assert f"\n  {command} " in result.stdout


def test_version(tmp_path):
    from prosparse_pipe import __version__

    assert run_cli("--version", cwd=tmp_path).stdout.strip() == f"prosparse-pipe, version {__version__}"


def test_wrong_usage_exits_with_2(tmp_path):
    assert run_cli("nonsense", cwd=tmp_path).returncode == 2
    assert run_cli("chat", "--no-such-flag", cwd=tmp_path).returncode == 2
    assert run_cli("bench", "a.gguf", "-p", "many", cwd=tmp_path).returncode == 2
    assert run_cli("bench", "a.gguf", "-p", "0", "-n", "0", cwd=tmp_path).returncode == 2
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    result = run_cli("chat", "a.gguf", "-ctv", "q8_0", "-p", "hi", cwd=tmp_path)
    assert result.returncode == 2
    assert "--flash-attn" in result.stderr
    empty = run_cli("chat", "a.gguf", stdin="  \n", cwd=tmp_path)
    assert empty.returncode == 2
    assert "standard input is empty" in empty.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["chat", "-p", "hi"], ["no GGUF", "export"]),
        (["bench"], ["no GGUF", "export"]),
        (["chat", "missing.gguf", "-p", "hi"], ["missing.gguf", "does not exist"]),
        (["bench", "missing.gguf"], ["missing.gguf"]),
        (["export", "--gguf"], ["no finished run", "train"]),
        (["profile"], ["no finished run", "train"]),
        (["predictor"], ["no finished run", "train"]),
        (["export", "--gguf", "not-a-run"], ["not-a-run"]),
        (["train", "--model", "missing.gguf", "--out", "runs/x"], ["missing.gguf", "does not exist"]),
        (["train", "--config", "missing.yaml"], ["missing.yaml"]),
    ],
)
def test_missing_things_are_named_with_what_to_do(args, words, tmp_path):
    assert_one_line_error(run_cli(*args, cwd=tmp_path), *words)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all" * 100])
@pytest.mark.parametrize("command", [["chat", "-p", "hi"], ["bench"]])
def test_files_that_are_no_models(content, command, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(content)
    assert_one_line_error(run_cli(command[0], "broken.gguf", *command[1:], cwd=tmp_path), "broken.gguf")


def test_the_newest_export_is_the_default(tmp_path, monkeypatch):
    from prosparse_pipe.checkpoint import resolve_gguf

    for age, name in ((300, "old/gguf/old.gguf"), (200, "new/gguf/new.gguf"), (100, "new/gguf/new.predictor.gguf")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    monkeypatch.setenv("PROSPARSE_RUNS", str(tmp_path))
    assert resolve_gguf(None).name == "new.gguf"
    assert resolve_gguf(tmp_path / "old").name == "old.gguf"


def test_an_interrupt_that_a_library_turns_into_its_own_error_still_exits_130(tmp_path: Path) -> None:
    script = (
        "import os, signal\n"
        "from prosparse_pipe import cli\n"
        "def run():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        signal.sigtimedwait([signal.SIGUSR1], 10)\n"
        "    except KeyboardInterrupt:\n"
        "        raise ValueError('could not determine the shape') from None\n"
        "cli._run = run\n"
        "cli.main()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 130
    assert result.stderr == "interrupted\n"
