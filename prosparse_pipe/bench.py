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
from collections.abc import Iterable, Iterator, Sequence
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
PARALLEL_STEPS = 32  # tokens of each of several parallel sequences


@dataclasses.dataclass
class Workload:
    """Tokens to time, int32, after an untimed prompt: (n,) decoded one by one (tg) or prefilled at once (pp), or
    (n, n_seq), a step of n_seq parallel sequences at a time (par)."""

    kind: str
    prompt: np.ndarray
    tokens: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.kind}{self.tokens.shape[-1]}"

    def steps(self) -> list[np.ndarray]:
        """The tokens as they are fed: all at once, or one (of each sequence) at a time."""
        return [self.tokens] if self.kind == "pp" else np.split(self.tokens, len(self.tokens))


class Side:
    """One of the two models compared, stock or sparse, driven through llama_decode: no Python work between tokens.

    Args:
        n_seq: sequences that are decoded in parallel; more than one share a context of their own.
    """

    def __init__(self, path: Path, sparse: bool, n_seq: int = 1, **llama_kwargs: Any) -> None:
        self.llama = load(path, sparse=sparse, **llama_kwargs)
        self.context = self.llama._ctx.ctx
        self.n_vocab = self.llama.n_vocab()
        self.n_batch = llama_kwargs["n_batch"]
        self.n_seq = n_seq
        self.position = 0
        if n_seq > 1:
            params = self.llama.context_params
            params.n_seq_max, params.kv_unified = n_seq, True
            params.n_ctx *= n_seq
            self.context = llama_cpp.llama_init_from_model(self.llama._model.model, params)
            self.batch = llama_cpp.llama_batch_init(n_seq, 0, 1)

    def close(self) -> None:
        if self.n_seq > 1:
            llama_cpp.llama_batch_free(self.batch)
            llama_cpp.llama_free(self.context)
        self.llama.close()

    def clear(self) -> None:
        """Empties the KV cache."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self.position = 0

    def decode(self, tokens: np.ndarray) -> None:
        """Evaluates int32 tokens after what the KV cache holds: (n,) in batches of n_batch, (n, n_seq) step by step."""
        if tokens.ndim == 2:
            for row in tokens:
                self._decode_step(row)
            return
        for i in range(0, len(tokens), self.n_batch):
            part = tokens[i : i + self.n_batch]
            pointer = part.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            self._run(llama_cpp.llama_batch_get_one(pointer, len(part)))

    def _decode_step(self, tokens: np.ndarray) -> None:
        """One token of each sequence, int32 (n_seq,)."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens.tolist()):
            batch.token[i], batch.pos[i], batch.logits[i] = token, self.position, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, i
        self.position += 1
        self._run(batch)

    def _run(self, batch: Any) -> None:
        if llama_cpp.llama_decode(self.context, batch) != 0:
            raise ProsparseError("llama.cpp could not decode the batch", "use a smaller test")

    def logits(self) -> np.ndarray:
        """Logits of the last token of each sequence, f32 (n_seq, n_vocab)."""
        places = range(self.n_seq) if self.n_seq > 1 else [-1]
        rows = [llama_cpp.llama_get_logits_ith(self.context, i) for i in places]
        return np.stack([np.ctypeslib.as_array(row, (self.n_vocab,)) for row in rows])

    def greedy(self, prompt: np.ndarray, n: int) -> np.ndarray:
        """The model's own continuation of a prompt (n_prompt,) or (n_prompt, n_seq); int32 (n,) or (n, n_seq)."""
        self.clear()
        self.decode(prompt)
        tokens = np.empty((n, *prompt.shape[1:]), np.int32)
        for i in range(n):
            tokens[i] = self.logits().argmax(-1).reshape(prompt.shape[1:])
            self.decode(tokens[i : i + 1])
        return tokens

    def measure(self, test: Workload) -> float:
        """Seconds that the test's tokens take."""
        self.clear()
        self.decode(test.prompt)
        llama_cpp.llama_synchronize(self.context)
        start = time.perf_counter()
        for tokens in test.steps():
            self.decode(tokens)
        llama_cpp.llama_synchronize(self.context)
        return time.perf_counter() - start


def compare_logits(stock: Side, sparse: Side, test: Workload) -> float:
    """Largest |sparse - stock| / |stock| (L2 over the vocabulary) of the logits, both sides fed the same tokens.

    After every step of a tg or par test, after the last token of a pp test.
    """
    worst = 0.0
    for side in (stock, sparse):
        side.clear()
        side.decode(test.prompt)
    for part in test.steps():
        for side in (stock, sparse):
            side.decode(part)
        expected = stock.logits()
        apart = np.linalg.norm(sparse.logits() - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        worst = max(worst, float(apart.max()))
    return worst


def interleave(stock: Side, sparse: Side, test: Workload, repetitions: int) -> tuple[list[float], list[float]]:
    """Tokens/s of each run of stock and of sparse, in turn; who is first changes, so that a drift hits both."""
    speeds: dict[Side, list[float]] = {stock: [], sparse: []}
    for repetition in range(repetitions):
        for side in (stock, sparse) if repetition % 2 == 0 else (sparse, stock):
            speeds[side].append(test.tokens.size / side.measure(test))
    return speeds[stock], speeds[sparse]


def run_bench(
    path: Path,
    prompt_sizes: list[int],
    generate_sizes: list[int],
    threads: list[int],
    repetitions: int,
    llama_kwargs: dict[str, Any],
    prompt_text: str | None = None,
    parallel_sizes: Sequence[int] = (),
) -> Iterator[dict[str, Any]]:
    """Yields one row per test and thread count.

    Args:
        prompt_sizes: tokens of each pp test, e.g. [512].
        generate_sizes: tokens of each tg test, e.g. [128].
        parallel_sizes: sequences of each par test, e.g. [8]; each decodes PARALLEL_STEPS tokens.
        llama_kwargs: of `llama_cpp.Llama`, the same for both sides; n_ctx is raised to what the tests need.
        prompt_text: text that is evaluated and continued; default: a passage that comes with the package.

    Raises:
        ProsparseError: the file is not a sparse model, so there is nothing to compare.
    """
    text = prompt_text or importlib.resources.files("prosparse_pipe").joinpath("bench_prompt.txt").read_text()
    n_ctx = max([PROMPT_TOKENS + PARALLEL_STEPS, *prompt_sizes, *(PROMPT_TOKENS + n for n in generate_sizes)]) + 1
    for n_threads in threads:
        kwargs = {**llama_kwargs, "n_ctx": n_ctx, "n_threads": n_threads, "n_threads_batch": n_threads}
        machine = describe_machine(n_threads)
        for n_seq in dict.fromkeys([1] * bool(prompt_sizes or generate_sizes) + list(parallel_sizes)):
            stock, sparse = (Side(path, sparse, n_seq, **kwargs) for sparse in (False, True))
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
                if n_seq > 1:
                    tests = [_parallel_test(stock, ids, n_seq)]
                else:
                    tests = [Workload("pp", ids[:0], np.resize(ids, n)) for n in prompt_sizes]
                    prompt = ids[:PROMPT_TOKENS]
                    tests += [Workload("tg", prompt, stock.greedy(prompt, n)) for n in generate_sizes]
                for test in tests:
                    yield base | _measure_test(stock, sparse, test, repetitions)
            finally:
                sparse.close()
                stock.close()


def _parallel_test(side: Side, ids: np.ndarray, n_seq: int) -> Workload:
    """Sequences that begin at different places of the text and go on greedily."""
    starts = np.arange(n_seq) * max(1, (len(ids) - PROMPT_TOKENS) // n_seq)
    prompt = np.resize(ids, len(ids) + PROMPT_TOKENS)[starts + np.arange(PROMPT_TOKENS)[:, None]]
    return Workload("par", prompt, side.greedy(prompt, PARALLEL_STEPS))


def _measure_test(stock: Side, sparse: Side, test: Workload, repetitions: int) -> dict[str, Any]:
    """The fields of a row that one test adds."""
    error = compare_logits(stock, sparse, test)
    interleave(stock, sparse, test, 1)  # warm-up: page cache, clocks
    activation_stats(sparse.llama, reset=True)
    peer_speeds, speeds = interleave(stock, sparse, test, repetitions)
    stats = activation_stats(sparse.llama)
    value, peer_value = statistics.median(speeds), statistics.median(peer_speeds)
    return {
        "test": test.name,
        "sparsity": round(stats.sparsity, 4) if stats else None,
        "value": round(value, 2),
        "value_sd": round(statistics.stdev(speeds), 2) if repetitions > 1 else 0.0,
        "peer_value": round(peer_value, 2),
        "ratio": round(value / peer_value, 3),
        "max_logit_rel_l2": float(f"{error:.3g}"),
    }


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
