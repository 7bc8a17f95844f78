"""Two CPU processes, replicated and sharded, against one process with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import FAST, dense_model, text  # noqa: F401  (text is a fixture)
from transformers import AutoModelForCausalLM

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

# The same means summed in another order in f32: 1e-7 a term, a little more after each AdamW step.
TOLERANCE = 1e-4


def run_training(
    launcher: list[str], model: str, source: str, out: Path, batch_size: int, more: dict[str, str]
) -> list[dict]:
    settings = FAST | {"batch_size": batch_size, "heldout_tokens": 64} | more
    command = [*launcher, "-m", "prosparse_pipe", "train", "--model", model, "--data", source, "--out", str(out)]
    command += ["--steps", "4", "--threshold", "0", "--distill", "0.5"]
    command += [f"--set={name}={value}" for name, value in settings.items()]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "penalty",
    [
        {"schedule": "[[0.5, 0.5], [2.0, 1.0]]"},
        {"regularizer": "count", "target_sparsity": "0.9", "target_ramp": "[0, 0.5]"},
    ],
    ids=["staged", "steered"],
)
def test_two_replicas_equal_one_process(tmp_path, text, penalty):  # noqa: F811
    model = dense_model(tmp_path / "dense")
    one = run_training([sys.executable], model, text, tmp_path / "one", 4, penalty)
    two = run_training(TORCHRUN, model, text, tmp_path / "two", 2, penalty)
    steered = "target_sparsity" in penalty  # lambda follows a measured share: of few neurons, one may change sides
    assert one[-1]["lambda"] > 0
    assert [record["step"] for record in two] == [1, 2, 3, 4]
    for a, b in zip(one, two, strict=True):
        assert a["tokens"] == b["tokens"]
        assert b["lambda"] == (pytest.approx(a["lambda"], rel=2e-3) if steered else a["lambda"])
        for key in ("ce", "kl", "penalty", "loss"):
            assert b[key] == pytest.approx(a[key], rel=TOLERANCE, abs=1e-6), (key, a["step"])
        assert b["sparsity"] == pytest.approx(a["sparsity"], abs=1e-3)
    expected, actual = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    assert expected.keys() == actual.keys()
    for name, weight in expected.items():
        # AdamW moves a weight by up to lr a step, however small its gradient: a sign may differ, a shape must not
        assert (weight - actual[name]).abs().max() < 2 * 4 * FAST["lr"], name
        assert torch.isfinite(actual[name]).all()


def test_two_shards_equal_one_process(tmp_path):
    model = dense_model(tmp_path / "dense")
    worker = str(Path(__file__).parent / "fsdp_worker.py")
    found = []
    for launcher in ([sys.executable], TORCHRUN):
        result = subprocess.run(
            [*launcher, worker, model], env=ENVIRONMENT, capture_output=True, text=True, timeout=200
        )
        assert result.returncode == 0, result.stderr[-3000:]
        found.append(json.loads(result.stdout.splitlines()[-1]))
    one, two = found
    assert one["sharded"] == 0
    assert two["sharded"] > 10  # every parameter is a DTensor
    for step, (a, b) in enumerate(zip(one["figures"], two["figures"], strict=True)):
        assert b == pytest.approx(a, rel=TOLERANCE, abs=1e-6), step
