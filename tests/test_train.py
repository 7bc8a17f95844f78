"""Training end to end on tiny random models: what is saved, resuming, thresholds, and what is refused."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from export_models import BASE, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from prosparse_pipe.checkpoint import SparseInfo, load_activation_rates
from prosparse_pipe.errors import CheckpointError, UnsupportedModelError
from prosparse_pipe.relu import load_sparse_model
from prosparse_pipe.train import train
from prosparse_pipe.train_config import ConfigError, TrainConfig, load_config

FAST = {
    "seq_len": 32,
    "batch_size": 2,
    "heldout_tokens": 128,
    "bf16": "off",
    "lr": 1e-3,
    "log_steps": 1,
    "save_steps": 2,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = ["river", "mill", "bridge", "stone", "winter", "otter", "heron", "meadow"]
    rows = [{"text": " ".join(words[(i * 7 + k * k) % 8] for k in range(40)) + f" {i}"} for i in range(400)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def dense_model(folder: Path, family: str = "llama", **changes) -> str:
    torch.manual_seed(3)
    settings = {**BASE, **changes} | ({"head_dim": 16} if family in ("gemma", "qwen3") else {})
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_the_result_loads_in_plain_transformers(family, tmp_path, text):
    model = dense_model(tmp_path / "dense", family, tie_word_embeddings=family in ("gemma", "llama"))
    config = TrainConfig(
        model=model, data=[text], out=str(tmp_path / "run"), steps=2, threshold=0.0, distill=1.0, **FAST
    )
    result = train(config)
    saved = json.loads((result.run / "config.json").read_text())
    assert "relu" in (saved["hidden_act"], saved.get("hidden_activation"))
    assert "quantization_config" not in saved
    plain = AutoModelForCausalLM.from_pretrained(result.run).eval()
    sparse, tokenizer, info = load_sparse_model(result.run)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, sparse(ids).logits, rtol=0, atol=0)
    tied = plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert tied == saved["tie_word_embeddings"]
    assert tokenizer.chat_template
    assert info.sparsity == result.sparse.sparsity
    assert [rates.shape for rates in load_activation_rates(result.run)] == [(160,)] * 2


def test_what_a_run_leaves_behind(tmp_path, text):
    schedule = [[0, 0.25], [0.1, 0.5], [0.4, 1.0]]
    model = dense_model(tmp_path / "Tiny-1M")
    config = TrainConfig(model=model, data=[text], out=str(tmp_path / "run"), steps=8, schedule=schedule, **FAST)
    result = train(config)
    records = [json.loads(line) for line in (result.run / "training.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 9))
    staged = config.staged_schedule()
    for record in records:
        assert record["lambda"] == staged.value(record["step"] - 1)
        assert record["loss"] == pytest.approx(record["ce"] + record["lambda"] * record["penalty"])
        assert len(record["sparsity_per_layer"]) == 2
        assert record["tokens"] == record["step"] * 2 * 32
    assert records[-1]["ce"] < records[0]["ce"]
    for name in ("training.png", "README.md", "prosparse.json", "activation_rates.safetensors", "tokenizer.json"):
        assert (result.run / name).stat().st_size > 0
    card = (result.run / "README.md").read_text()
    assert f"{result.sparse.perplexity:.2f}" in card
    info = SparseInfo.load(result.run)
    assert info.provenance["base_model"] == "Tiny-1M"
    assert info.provenance["tokens"] == 8 * 2 * 32
    assert not (result.run / "checkpoints").exists()


def test_the_penalty_makes_it_sparser(tmp_path, text):
    model = dense_model(tmp_path / "dense")
    sparsity = {}
    settings = FAST | {"lr": 3e-3, "save_steps": 1000}
    for strength in (0.0, 20.0):
        config = TrainConfig(model=model, data=[text], out=str(tmp_path / f"run{strength}"), steps=30, threshold=0.0,
                             schedule=[[0, 0.1], [strength, 1.0]], **settings)  # fmt: skip
        sparsity[strength] = train(config).sparse.mean_sparsity
    assert sparsity[20.0] > sparsity[0.0] + 0.05


def test_thresholds(tmp_path, text):
    model = dense_model(tmp_path / "dense")
    given = train(TrainConfig(model=model, data=[text], out=str(tmp_path / "a"), steps=2, threshold=0.05, **FAST))
    assert given.info.threshold == 0.05
    assert json.loads((given.run / "config.json").read_text())["hidden_act_param"] == 0.05
    plain = train(TrainConfig(model=model, data=[text], out=str(tmp_path / "b"), steps=2, threshold=0.0, **FAST))
    found = train(TrainConfig(model=model, data=[text], out=str(tmp_path / "c"), steps=2, **FAST))
    assert found.sparse.perplexity <= plain.sparse.perplexity * 1.01
    assert found.info.threshold > 0  # a random tiny model does not mind small activations
    assert found.sparse.mean_sparsity >= plain.sparse.mean_sparsity


def test_released_layout(tmp_path, text):
    model = dense_model(tmp_path / "dense")
    run = train(
        TrainConfig(
            model=model, data=[text], out=str(tmp_path / "run"), steps=2, threshold=0.02, layout="fatrelu", **FAST
        )
    ).run
    saved = json.loads((run / "config.json").read_text())
    assert (saved["hidden_act"], saved["hidden_act_param"]) == ("fatrelu", 0.02)
    sparse, _, info = load_sparse_model(run)
    assert info.activation == "fatrelu"
    activation = sparse.model.layers[0].mlp.act_fn
    assert activation(torch.tensor([-1.0, 0.01, 0.02, 1.0])).tolist() == pytest.approx([0.0, 0.0, 0.02, 1.0])


def test_accumulation_and_recomputing_change_nothing(tmp_path, text):
    model = dense_model(tmp_path / "dense")
    records = []
    for batch, accumulation, recompute in ((4, 1, False), (1, 4, False), (4, 1, True)):
        settings = FAST | {"batch_size": batch, "grad_accum": accumulation, "schedule": [[0.5, 0.5], [2.0, 1.0]]}
        settings["gradient_checkpointing"] = recompute
        out = tmp_path / f"{batch}{recompute}"
        run = train(TrainConfig(model=model, data=[text], out=str(out), steps=4, **settings)).run
        records.append([json.loads(line) for line in (run / "training.jsonl").read_text().splitlines()])
    for a, *others in zip(*records, strict=True):
        for key in ("ce", "penalty", "loss"):  # the same sums in another order, f32
            assert [other[key] for other in others] == pytest.approx([a[key]] * 2, rel=2e-5)


def command(model: str, text: str, out: Path, *more: str) -> list[str]:
    flags = [f"--set={name}={value}" for name, value in FAST.items()]
    base = [
        "--model",
        model,
        "--data",
        text,
        "--out",
        str(out),
        "--steps",
        "12",
        "--distill",
        "0.5",
        "--threshold",
        "0",
    ]
    return [sys.executable, "-m", "prosparse_pipe", "train", *base, *flags, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize(
    "more", [[], ["--set", "target_sparsity=0.9", "--set", "regularizer=count"]], ids=["staged", "steered"]
)
def test_resume_after_kill_is_exact(tmp_path, text, more):
    model = dense_model(tmp_path / "dense")
    subprocess.run(command(model, text, tmp_path / "whole", *more), env=environment(), check=True, capture_output=True)

    killed = tmp_path / "killed"
    process = subprocess.Popen(command(model, text, killed, *more), env=environment(), stderr=subprocess.PIPE)
    wait_for(killed / "checkpoints" / "checkpoint-4" / "complete", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "prosparse.json").exists()
    (killed / "checkpoints" / "checkpoint-10").mkdir(exist_ok=True)  # half-written: must be ignored
    with open(killed / "training.jsonl", "a") as file:
        file.write('{"step": 11, "lo')  # likewise
    refused = subprocess.run(command(model, text, killed, *more), env=environment(), capture_output=True, text=True)
    assert refused.returncode == 1
    assert "--resume" in refused.stderr
    resume = command(model, text, killed, *more, "--resume")
    subprocess.run(resume, env=environment(), check=True, capture_output=True)

    assert (killed / "training.jsonl").read_text() == (tmp_path / "whole" / "training.jsonl").read_text()
    expected, actual = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "killed")
    )
    for name, weight in expected.items():
        assert torch.equal(weight, actual[name]), name
    again = subprocess.run(resume, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0
    assert "finished already" in again.stderr


def test_interrupt_saves_and_says_how_to_go_on(tmp_path, text):
    model = dense_model(tmp_path / "dense")
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(model, text, out, "--steps", "5000"), env=environment(), stderr=subprocess.PIPE, text=True
    )
    wait_for(out / "checkpoints" / "checkpoint-2" / "complete", process)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in messages
    assert "Traceback" not in messages
    assert list(out.glob("checkpoints/*/complete"))
    assert not (out / "prosparse.json").exists()


def test_refusals(tmp_path, text):
    other = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=384)
    )
    other.save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UnsupportedModelError, match="gpt2 model has no FFN"):
        train(TrainConfig(model=str(tmp_path / "gpt2"), data=[text], out=str(tmp_path / "a"), **FAST))
    dense = dense_model(tmp_path / "dense")
    with pytest.raises(UnsupportedModelError, match="not a ReLU model"):
        load_sparse_model(Path(dense))
    weights = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.gate_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks the tensor model"):
        train(TrainConfig(model=dense, data=[text], out=str(tmp_path / "c"), **FAST))
    weights.write_bytes(b"truncated")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        train(TrainConfig(model=dense, data=[text], out=str(tmp_path / "b"), **FAST))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stepz": 5}, "unknown setting stepz.*did you mean steps"),
        ({"steps": "many"}, "steps must be a number"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"save_steps": 15, "log_steps": 10}, "save_steps .15. is not a multiple of log_steps"),
        ({"ce_weight": 0, "distill": 0}, "ce_weight, distill and distill_hidden are all 0"),
        ({"threshold": "high"}, "threshold must be a number or `search`"),
        ({"schedule": "70b"}, "unknown schedule 70b"),
        ({"schedule": [[0, 1], [1, 0.5]]}, "do not end one after the other"),
        ({"trainable": "some"}, "trainable must be all, ffn or lora"),
        ({"optimizer": "muon"}, "is for matrices, not for all weights"),
        ({"distill_hidden": -1}, "distill_hidden must not be negative"),
        ({"regularizer": "l2"}, "regularizer must be l1 or count"),
        ({"compile": "fast"}, "compile must be auto, on or off"),
        ({"compile": True, "gradient_checkpointing": True}, "does not go with gradient_checkpointing"),
        ({"target_sparsity": 89}, "target_sparsity must be from 0 to 1"),
        ({"target_ramp": [0.8, 0.1]}, "target_ramp must be two shares"),
        ({"target_ramp": "soon"}, "target_ramp must be a number"),
        ({"count_tau": 0}, "count_tau must be above 0"),
        ({"train_threshold": -1}, "train_threshold must not be negative"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    from prosparse_pipe.errors import ProsparseError

    with pytest.raises(ProsparseError) as caught:
        load_config(None, settings)
    assert isinstance(caught.value, ConfigError) or "schedule" in settings
    assert re.search(message, str(caught.value))


def test_recipes_are_valid():
    recipes = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        config = load_config(recipe, {})
        assert config.staged_schedule().value(config.steps - 1) > 0
        assert not math.isnan(config.lr)
