"""Sparse beside stock llama.cpp on one file: interleaved runs, medians, and the error of the logits.

    prosparse-pipe bench model.gguf -p 512 -n 128 -r 5 -o md

The tokens are real: sparsity is a property of text, so a test on random tokens would measure another model. `tg`
decodes the model's own greedy continuation of a prompt, the same tokens on both sides.
"""

import csv
import ctypes
import dataclasses
import datetime
import importlib.resources
import io
import json
import statistics
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import llama_cpp
import numpy as np

from prosparse_pipe import __version__
from prosparse_pipe.errors import ProsparseError
from prosparse_pipe.hardware import describe_machine
from prosparse_pipe.runtime import activation_stats, load

PROMPT_TOKENS = 32  # context before the first decoded token, so that attention is not empty


@dataclasses.dataclass
class Workload:
    """Tokens to time, int32 (n,): decoded one by one after an untimed prompt (tg), or prefilled at once (pp)."""

    kind: str
    prompt: np.ndarray
    tokens: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.kind}{len(self.tokens)}"


class Side:
    """One of the two models compared, stock or sparse, driven through llama_decode: no Python work between tokens."""

    def __init__(self, path: Path, sparse: bool, **llama_kwargs: Any) -> None:
        self.llama = load(path, sparse=sparse, **llama_kwargs)
        self.context = self.llama._ctx.ctx
        self.n_vocab = self.llama.n_vocab()
        self.n_batch = llama_kwargs["n_batch"]

    def clear(self) -> None:
        """Empties the KV cache."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def decode(self, tokens: np.ndarray) -> None:
        """Evaluates int32 tokens (n,), in batches of n_batch, after what the KV cache holds."""
        for i in range(0, len(tokens), self.n_batch):
            part = tokens[i : i + self.n_batch]
            pointer = part.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(pointer, len(part))) != 0:
                raise ProsparseError("llama.cpp could not decode the batch", "use a smaller test")

    def logits(self) -> np.ndarray:
        """Logits of the last token, f32 (n_vocab,)."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (self.n_vocab,)).copy()

    def greedy(self, prompt: np.ndarray, n: int) -> np.ndarray:
        """The model's own continuation of prompt, int32 (n,)."""
        self.clear()
        self.decode(prompt)
        tokens = np.empty(n, np.int32)
        for i in range(n):
            tokens[i] = self.logits().argmax()
            self.decode(tokens[i : i + 1])
        return tokens

    def measure(self, test: Workload) -> float:
        """Seconds that the test's tokens take."""
        self.clear()
        self.decode(test.prompt)
        llama_cpp.llama_synchronize(self.context)
        start = time.perf_counter()
        if test.kind == "pp":
            self.decode(test.tokens)
        else:
            for i in range(len(test.tokens)):
                self.decode(test.tokens[i : i + 1])
        llama_cpp.llama_synchronize(self.context)
        return time.perf_counter() - start


def compare_logits(stock: Side, sparse: Side, test: Workload) -> float:
    """Largest |sparse - stock| / |stock| (L2 over the vocabulary) of the logits, both sides fed the same tokens.

    After every token of a tg test, after the last one of a pp test.
    """
    worst = 0.0
    for side in (stock, sparse):
        side.clear()
        side.decode(test.prompt)
    for part in [test.tokens] if test.kind == "pp" else np.split(test.tokens, len(test.tokens)):
        for side in (stock, sparse):
            side.decode(part)
        expected = stock.logits()
        worst = max(worst, float(np.linalg.norm(sparse.logits() - expected) / np.linalg.norm(expected)))
    return worst


def interleave(stock: Side, sparse: Side, test: Workload, repetitions: int) -> tuple[list[float], list[float]]:
    """Tokens/s of each run of stock and of sparse, in turn; who is first changes, so that a drift hits both."""
    speeds: dict[Side, list[float]] = {stock: [], sparse: []}
    for repetition in range(repetitions):
        for side in (stock, sparse) if repetition % 2 == 0 else (sparse, stock):
            speeds[side].append(len(test.tokens) / side.measure(test))
    return speeds[stock], speeds[sparse]


def run_bench(
    path: Path,
    prompt_sizes: list[int],
    generate_sizes: list[int],
    threads: list[int],
    repetitions: int,
    llama_kwargs: dict[str, Any],
    prompt_text: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields one row per test and thread count.

    Args:
        prompt_sizes: tokens of each pp test, e.g. [512].
        generate_sizes: tokens of each tg test, e.g. [128].
        llama_kwargs: of `llama_cpp.Llama`, the same for both sides; n_ctx is raised to what the tests need.
        prompt_text: text that is evaluated and continued; default: a passage that comes with the package.

    Raises:
        ProsparseError: the file is not a sparse model, so there is nothing to compare.
    """
    text = prompt_text or importlib.resources.files("prosparse_pipe").joinpath("bench_prompt.txt").read_text()
    n_ctx = max([*prompt_sizes, *(PROMPT_TOKENS + n for n in generate_sizes)]) + 1
    for n_threads in threads:
        kwargs = {**llama_kwargs, "n_ctx": n_ctx, "n_threads": n_threads, "n_threads_batch": n_threads}
        machine = describe_machine(n_threads)
        stock, sparse = Side(path, False, **kwargs), Side(path, True, **kwargs)
        try:
            if activation_stats(sparse.llama) is None:
                raise ProsparseError(
                    f"{path} is a dense model: it would run the same on both sides", "export a sparse one"
                )
            ids = np.array(stock.llama.tokenize(text.encode(), add_bos=True), np.int32)
            threshold = float(stock.llama.metadata.get("prosparse.threshold", 0))
            if threshold:
                note = f"note: stock llama.cpp does not apply the threshold of {threshold:g}: logits differ by it"
                click.echo(note, err=True)
            base = _describe_run(path, stock, machine, n_threads, repetitions, kwargs)
            tests = [Workload("pp", ids[:0], np.resize(ids, n)) for n in prompt_sizes]
            prompt = ids[:PROMPT_TOKENS]
            tests += [Workload("tg", prompt, stock.greedy(prompt, n)) for n in generate_sizes]
            for test in tests:
                error = compare_logits(stock, sparse, test)
                interleave(stock, sparse, test, 1)  # warm-up: page cache, clocks
                activation_stats(sparse.llama, reset=True)
                peer_speeds, speeds = interleave(stock, sparse, test, repetitions)
                stats = activation_stats(sparse.llama)
                value, peer_value = statistics.median(speeds), statistics.median(peer_speeds)
                yield base | {
                    "test": test.name,
                    "sparsity": round(stats.sparsity, 4) if stats else None,
                    "value": round(value, 2),
                    "value_sd": round(statistics.stdev(speeds), 2) if repetitions > 1 else 0.0,
                    "peer_value": round(peer_value, 2),
                    "ratio": round(value / peer_value, 3),
                    "max_logit_rel_l2": float(f"{error:.3g}"),
                }
        finally:
            sparse.llama.close()
            stock.llama.close()


def _describe_run(
    path: Path, side: Side, machine: dict[str, Any], n_threads: int, repetitions: int, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The fields of a row that all tests of one load share."""
    model = side.llama._model
    metadata = side.llama.metadata
    buffer = ctypes.create_string_buffer(128)
    llama_cpp.llama_model_desc(model.model, buffer, len(buffer))
    description = buffer.value.decode()  # e.g. "llama 135M Q8_0"
    flags = f"-t {n_threads} -b {kwargs['n_batch']} -fa {'on' if kwargs['flash_attn'] else 'off'}"
    return {
        "bench": "prosparse-pipe bench",
        "commit": project_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "shape": metadata.get("general.name", path.stem),
        "file_type": description.split(" ", 2)[-1],
        "n_params": model.n_params(),
        "layers": int(metadata.get(f"{metadata.get('general.architecture')}.block_count", 0)),
        "mode": "exact",
        "threads": n_threads,
        "vram_budget_gib": None,
        "vram_actual_gib": None,
        "peer_vram_gib": None,
        "recall": None,
        "unit": "tok/s",
        "n": repetitions,
        "peer": f"llama.cpp in llama-cpp-python {llama_cpp.__version__}",
        "peer_config": flags,
    }


def project_version() -> str:
    """Git commit of the project if it runs from a checkout, with + if files differ, else its version."""
    here = str(Path(__file__).parent)
    try:
        commit = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
        tracked = subprocess.run(["git", "-C", here, "ls-files", "--error-unmatch", __file__], capture_output=True)
        return commit.stdout.strip() if tracked.returncode == 0 else __version__
    except (OSError, subprocess.CalledProcessError):
        return __version__


MD_COLUMNS = {
    "shape": "model", "file_type": "type", "threads": "threads", "test": "test", "sparsity": "sparsity",
    "value": "sparse tok/s", "peer_value": "stock tok/s", "ratio": "ratio", "max_logit_rel_l2": "logits rel. L2",
}  # fmt: skip


def format_rows(rows: Iterable[dict[str, Any]], output: str) -> Iterator[str]:
    """Lines of text for rows, each as soon as its row is there (`json` only at the end).

    Args:
        output: md, json, jsonl or csv.
    """
    rows = iter(rows)
    if output == "jsonl":
        yield from (json.dumps(row) for row in rows)
    elif output == "json":
        yield json.dumps(list(rows), indent=2)
    elif output == "csv":
        for index, row in enumerate(rows):
            text = io.StringIO()
            writer = csv.DictWriter(text, list(row), lineterminator="\n")
            if index == 0:
                writer.writeheader()
            writer.writerow(row | {"machine": json.dumps(row["machine"])})
            yield text.getvalue().rstrip("\n")
    else:
        for index, row in enumerate(rows):
            if index == 0:
                yield "| " + " | ".join(MD_COLUMNS.values()) + " |"
                yield "|" + " --- |" * len(MD_COLUMNS)
            yield "| " + " | ".join(str(row[key]) for key in MD_COLUMNS) + " |"
