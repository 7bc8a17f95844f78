"""Ways to train: steered to a sparsity, with a threshold, adapters, compiled layers, from other weights."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from test_train import FAST, dense_model, text  # noqa: F401  (text is a fixture)
from transformers import AutoModelForCausalLM

from prosparse_pipe.cli import cli
from prosparse_pipe.errors import CheckpointError, GGUFError, ProsparseError
from prosparse_pipe.ffn_weights import load_ffn_weights
from prosparse_pipe.relu import load_sparse_model, substitute_relu
from prosparse_pipe.train import Result, train
from prosparse_pipe.train_config import TrainConfig

# ruff: noqa: F811  (pytest fixtures are arguments)


def run(folder: Path, source: str, **settings) -> Result:
    """A short run of the tiny dense model in folder/dense, in folder/NAME (setting `name`)."""
    name = settings.pop("name", "run")
    if not (folder / "dense").exists():
        dense_model(folder / "dense")
    values = FAST | {"threshold": 0.0, "steps": 4} | settings
    result = train(TrainConfig(model=str(folder / "dense"), data=[source], out=str(folder / name), **values))
    assert result is not None
    return result


def records(result: Result) -> list[dict]:
    return [json.loads(line) for line in (result.run / "training.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("regularizer", "target"), [("l1", 0.8), ("count", 0.9)])
def test_a_run_is_steered_to_its_target(tmp_path, text, regularizer, target):
    settings = {"steps": 400, "lr": 3e-3, "save_steps": 1000, "target_sparsity": target, "target_ramp": [0.1, 0.6]}
    result = run(tmp_path, text, regularizer=regularizer, **settings)
    found = records(result)
    assert all(record["lambda"] == 0 for record in found[:40])
    assert all(record["lambda"] > 0 for record in found[41:])
    tail = [record["sparsity"] for record in found[-20:]]
    assert sum(tail) / 20 == pytest.approx(target, abs=0.04)
    assert result.sparse.mean_sparsity == pytest.approx(target, abs=0.06)  # on held-out text
    assert result.substituted.mean_sparsity < 0.6


def test_a_threshold_in_training_is_the_results_own(tmp_path, text):
    settings = {"steps": 8, "train_threshold": 0.1, "train_threshold_start": 0.5}
    found = run(tmp_path, text, threshold="search", threshold_tolerance=0.0, **settings)
    sparsity = [record["sparsity"] for record in records(found)]
    assert min(sparsity[4:]) > max(sparsity[:4]) + 0.05  # small activations of a random model die at once
    assert found.info.threshold >= 0.1
    given = run(tmp_path, text, name="given", threshold=0.0, **settings)
    assert given.info.threshold == 0.0
    assert given.sparse.mean_sparsity < found.sparse.mean_sparsity - 0.05


def test_adapters_are_merged_and_of_low_rank(tmp_path, text):
    result = run(tmp_path, text, trainable="lora", lora_rank=3, distill=0.5)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict()
    after = AutoModelForCausalLM.from_pretrained(result.run).state_dict()
    assert before.keys() == after.keys()
    assert set(load_file(result.run / "model.safetensors")) == set(load_file(tmp_path / "dense" / "model.safetensors"))
    for name, weight in before.items():
        change = (after[name] - weight).double()
        singular = torch.linalg.svdvals(change) if change.ndim == 2 else change
        if name.endswith("proj.weight"):
            assert singular[2] > 1e-6, name
            assert singular[3] < 1e-3 * singular[0], name
        else:
            assert not change.any(), name
    sparse, _, _ = load_sparse_model(result.run)
    assert records(result)[-1]["ce"] < records(result)[0]["ce"]
    assert not any("lora" in name for name, _ in sparse.named_modules())


def test_only_the_ffns_change(tmp_path, text):
    result = run(tmp_path, text, trainable="ffn")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict()
    after = AutoModelForCausalLM.from_pretrained(result.run).state_dict()
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) != (".mlp." in name), name


def test_muon_learns_matrices_only(tmp_path, text):
    settings = {"steps": 20, "trainable": "ffn", "schedule": [[0, 1.0]], "lr": 1e-2}
    result = run(tmp_path, text, optimizer="muon", **settings)
    found = records(result)
    assert found[-1]["ce"] < found[0]["ce"] - 0.5
    with pytest.raises(ProsparseError, match="no FSDP, no biases"):
        dense_model(tmp_path / "biases" / "dense", mlp_bias=True)
        run(tmp_path / "biases", text, optimizer="muon", **settings | {"steps": 1})


def test_compiled_layers_learn_the_same(tmp_path, text):
    settings = {
        "regularizer": "count",
        "schedule": [[0.5, 1.0]],
        "distill": 0.5,
        "distill_hidden": 0.3,
        "trainable": "ffn",
    }
    plain = run(tmp_path, text, name="plain", compile="off", **settings)
    compiled = run(tmp_path, text, name="compiled", compile="on", **settings)
    for a, b in zip(records(plain), records(compiled), strict=True):
        for key in ("ce", "kl", "hidden", "penalty", "loss"):  # the same sums in another order, f32
            assert b[key] == pytest.approx(a[key], rel=1e-4), key
    assert compiled.sparse.perplexity == pytest.approx(plain.sparse.perplexity, rel=1e-4)


def test_a_run_starts_from_the_weights_of_another(tmp_path, text):
    first = run(tmp_path, text, name="first", trainable="ffn")
    second = run(tmp_path, text, name="second", trainable="ffn", init=str(first.run), lr=1e-12)
    assert second.substituted.perplexity == pytest.approx(first.sparse.perplexity, rel=1e-6)
    assert records(second)[0]["ce"] < records(first)[0]["ce"]

    exported = CliRunner().invoke(cli, ["export", "--gguf", str(first.run), "--type", "F32"])
    assert exported.exit_code == 0, exported.output
    (gguf,) = first.run.glob("gguf/*F32.gguf")
    third = run(tmp_path, text, name="third", trainable="ffn", init=str(gguf), lr=1e-12)  # neurons in another order
    assert third.substituted.perplexity == pytest.approx(first.sparse.perplexity, rel=1e-5)


def test_weights_that_do_not_fit(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense_model(tmp_path / "dense"))
    ffns = substitute_relu(model)
    with pytest.raises(CheckpointError, match=r"mlp\.gate_proj\.weight has the shape \(64, 48\)"):
        other = dense_model(tmp_path / "other", intermediate_size=64, hidden_size=48, head_dim=12)
        load_ffn_weights(ffns, Path(other))
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.1"):
        load_ffn_weights(ffns, Path(dense_model(tmp_path / "short", num_hidden_layers=1)))
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00")
    with pytest.raises(GGUFError, match="cannot be read"):
        load_ffn_weights(ffns, tmp_path / "x.gguf")


def test_a_loss_that_is_not_a_number_ends_the_run(tmp_path, text):
    with pytest.raises(ProsparseError, match="not a number any more at step") as caught:
        run(tmp_path, text, lr=1e30, steps=20, warmup=0.0, max_grad_norm=1e30)
    assert "lower --lr" in str(caught.value.hint)
    assert not (tmp_path / "run" / "prosparse.json").exists()
