"""Rows of `prosparse-pipe bench` on a tiny model: what is in them, and how they are written. Speeds are not judged."""

import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from gguf_models import write_model

from prosparse_pipe.bench import Side, Workload, compare_logits, format_rows, interleave, run_bench
from prosparse_pipe.errors import ProsparseError

KWARGS = {"n_batch": 64, "flash_attn": False}
KEYS = {
    "bench", "commit", "date", "machine", "shape", "file_type", "n_params", "layers", "test", "mode", "threads",
    "vram_budget_gib", "vram_actual_gib", "peer_vram_gib", "sparsity", "recall", "value", "unit", "value_sd", "n",
    "peer", "peer_config", "peer_value", "ratio", "max_logit_rel_l2",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("bench") / "tiny.gguf").path


@pytest.fixture(scope="module")
def rows(model):
    return list(run_bench(model, [48], [8], [1], 3, KWARGS, "a text of some length " * 20, [3]))


def test_rows_have_every_field(rows):
    assert [row["test"] for row in rows] == ["pp48", "tg8", "par3"]
    for row in rows:
        assert set(row) == KEYS
        assert row["machine"]["cpu"]
        assert row["machine"]["memory_gb_s"] > 0
        assert row["ratio"] == pytest.approx(row["value"] / row["peer_value"], rel=0.02)
        assert 0.5 < row["sparsity"] < 1
        assert row["max_logit_rel_l2"] < 1e-4
        assert (row["n"], row["threads"], row["layers"]) == (3, 1, 2)


def test_both_sides_see_the_same_tokens_in_turn(model):
    kwargs = {**KWARGS, "n_ctx": 128, "n_threads": 1, "n_threads_batch": 1}
    stock, sparse = Side(model, False, **kwargs), Side(model, True, **kwargs)
    prompt = np.arange(5, 20, dtype=np.int32)
    tokens = stock.greedy(prompt, 6)
    assert np.array_equal(tokens, sparse.greedy(prompt, 6))
    test = Workload("tg", prompt, tokens)
    assert compare_logits(stock, sparse, test) < 1e-4
    peers, speeds = interleave(stock, sparse, test, 4)
    assert len(peers) == len(speeds) == 4
    assert min(peers + speeds) > 0
    stock.close()
    sparse.close()


def test_parallel_sequences_are_those_of_one_at_a_time(model):
    kwargs = {**KWARGS, "n_ctx": 64, "n_threads": 1, "n_threads_batch": 1}
    prompt = np.arange(5, 35, dtype=np.int32).reshape(10, 3)
    together, alone = Side(model, True, 3, **kwargs), Side(model, False, **kwargs)
    tokens = together.greedy(prompt, 6)
    assert tokens.shape == (6, 3)
    for i in range(3):
        assert tokens[:, i].tolist() == alone.greedy(np.ascontiguousarray(prompt[:, i]), 6).tolist()
    together.close()
    alone.close()


def test_output_formats(rows):
    assert [json.loads(line) for line in format_rows(rows, "jsonl")] == rows
    assert json.loads("\n".join(format_rows(rows, "json"))) == rows
    table = list(csv.DictReader(io.StringIO("\n".join(format_rows(rows, "csv")))))
    assert [row["test"] for row in table] == ["pp48", "tg8", "par3"]
    assert json.loads(table[0]["machine"]) == rows[0]["machine"]
    lines = list(format_rows(rows, "md"))
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1


def test_a_dense_model_is_refused(tmp_path):
    dense = write_model(tmp_path / "dense.gguf", without_keys=True).path
    with pytest.raises(ProsparseError, match="is a dense model"):
        list(run_bench(dense, [], [4], [1], 1, KWARGS, "some text " * 20))


def test_command_writes_rows_to_stdout_only(model):
    command = [
        sys.executable,
        "-m",
        "prosparse_pipe",
        "bench",
        str(model),
        "-p",
        "0",
        "-n",
        "4",
        "-r",
        "1",
        "-t",
        "1",
        "-o",
        "jsonl",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["test"] for line in result.stdout.splitlines()] == ["tg4"]
