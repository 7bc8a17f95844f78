"""Predictors: disk streaming, recall and rank on a tiny model, and the command."""

import json
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from export_models import CORPUS, tiny_run
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from prosparse_pipe.checkpoint import PREDICTORS_NAME
from prosparse_pipe.commands.predictor import command
from prosparse_pipe.errors import ProsparseError
from prosparse_pipe.predictor import PARTIAL_NAME, ActivationStore, PredictorSettings, train_layer, weights_read
from prosparse_pipe.profile import batches
from prosparse_pipe.relu import find_ffns, substitute_relu
from prosparse_pipe.sparsity import ActivationRecorder


def sparse_model(run: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(run).eval()
    substitute_relu(model, 0.5)
    return model


@pytest.mark.parametrize("kind", ["post_norm", "pre_norm"])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_store_holds_what_the_layers_see(kind: str, family: str, tmp_path: Path) -> None:
    model = sparse_model(tiny_run(tmp_path / "run", family))
    ffns = find_ffns(model)
    store = ActivationStore(tmp_path, ffns, kind)
    blocks = list(np.random.default_rng(0).integers(0, 300, (5, 16)))
    store.write(model, batches(blocks, 2))
    assert store.tokens == 80
    inputs, active = store.read(ffns[1])
    assert inputs.shape == (80, 64)
    assert isinstance(inputs, np.memmap)
    with torch.no_grad(), ActivationRecorder(model) as recorder:
        model(torch.from_numpy(np.stack(blocks)))
    counts = np.unpackbits(np.asarray(active), axis=1, count=160).sum(axis=0)
    assert np.abs(counts - recorder.counts[1].numpy()).max() <= 1
    # the gate on the recorded inputs is the gate of the model
    gate = torch.from_numpy(inputs.astype(np.float32)) @ store.gate(ffns[1]).T
    predicted = (gate >= 0.5).float().mean()
    assert float(predicted) == pytest.approx(counts.mean() / 80, abs=0.005)
    assert store.bytes_per_token() == 2 * (2 * 64 + 20)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.bin")) == 80 * store.bytes_per_token()


def low_rank_layer(folder: Path, tokens: int) -> tuple[tuple[np.ndarray, np.ndarray], torch.Tensor]:
    """A layer whose gate has rank 6, on disk: activity is gate x > 1."""
    rng = np.random.default_rng(1)
    gate = (rng.normal(size=(160, 6)) @ rng.normal(size=(6, 64)) / 6).astype(np.float32)
    x = rng.normal(size=(tokens, 64)).astype(np.float16)
    bits = np.packbits(x.astype(np.float32) @ gate.T > 1, axis=1)
    for name, values in (("x", x), ("bits", bits)):
        values.tofile(folder / name)
    data = (
        np.memmap(folder / "x", np.float16, "r", shape=x.shape),
        np.memmap(folder / "bits", np.uint8, "r", shape=bits.shape),
    )
    return data, torch.from_numpy(gate)


def test_recall_target_is_met_and_little_else_is_predicted(tmp_path: Path) -> None:
    data, gate = low_rank_layer(tmp_path, 12_000)
    found = train_layer(data, gate, PredictorSettings(ranks=(16,), recall_target=0.95))
    assert found.recall == pytest.approx(0.95, abs=0.01)
    assert found.sparsity > 0.6
    assert found.predicted_sparsity > found.sparsity - 0.03
    # the stored weights give just these figures on fresh tokens
    x = np.random.default_rng(9).normal(size=(4000, 64)).astype(np.float32)
    active = x @ gate.numpy().T > 1
    logits = np.maximum(x @ found.fc1.T.astype(np.float32), 0) @ found.fc2.T.astype(np.float32)
    predicted = logits > found.threshold
    assert (predicted & active).sum() / active.sum() == pytest.approx(found.recall, abs=0.01)
    assert 1 - predicted.mean() == pytest.approx(found.predicted_sparsity, abs=0.01)


def test_rank_is_the_one_that_reads_the_fewest_weights(tmp_path: Path) -> None:
    data, gate = low_rank_layer(tmp_path, 6_000)
    every = {rank: train_layer(data, gate, PredictorSettings(ranks=(rank,), epochs=1)) for rank in (4, 12, 48)}
    chosen = train_layer(data, gate, PredictorSettings(ranks=(4, 12, 48), epochs=1))
    costs = {rank: weights_read(layer, 64, 160) for rank, layer in every.items()}
    assert chosen.rank == min(costs, key=costs.__getitem__)
    assert every[12].predicted_sparsity > every[4].predicted_sparsity


def test_training_reads_from_disk_in_pieces(tmp_path: Path) -> None:
    data, gate = low_rank_layer(tmp_path, 60_000)
    tracemalloc.start()  # sees numpy's allocations: a copy of the inputs in f32 would be 15 MB, the bits unpacked 9 MB
    train_layer(data, gate, PredictorSettings(ranks=(8,), epochs=1, validation_share=0.02))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6


def test_too_few_tokens_are_an_error(tmp_path: Path) -> None:
    data, gate = low_rank_layer(tmp_path, 100)
    with pytest.raises(ProsparseError, match="100 tokens are too few"):
        train_layer(data, gate, PredictorSettings())


def test_command_trains_saves_and_cleans_up(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", "llama", threshold=0.5)
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i}. {CORPUS[i % 3]}" for i in range(600)))
    before = {path.name for path in run.iterdir()}
    arguments = [str(run), "--data", str(tmp_path / "text.txt"), "--seq-len", "64", "--tokens", "4096"]
    result = CliRunner().invoke(command, [*arguments, "--ranks", "8,16", "--epochs", "1", "--json"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["recall"] > 0.9
    assert {path.name for path in run.iterdir()} == before | {PREDICTORS_NAME}
    tensors = load_file(run / PREDICTORS_NAME)
    for il, layer in enumerate(values["layers"]):
        assert tensors[f"layers.{il}.fc1.weight"].shape == (layer["rank"], 64)
        assert tensors[f"layers.{il}.fc2.weight"].shape == (160, layer["rank"])
    assert values["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    bad = CliRunner().invoke(command, [*arguments, "--ranks", "many"])
    assert bad.exit_code == 2
    assert "not a comma list of numbers" in bad.output


def test_interrupted_training_keeps_finished_layers_and_no_activations(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", "llama", threshold=0.5, num_hidden_layers=12)
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i}. {CORPUS[i % 3]}" for i in range(600)))
    before = {path.name for path in run.iterdir()}
    arguments = [str(run), "--data", str(tmp_path / "text.txt"), "--seq-len", "64", "--tokens", "4096"]
    arguments += ["--ranks", "8,16,32", "--epochs", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "prosparse_pipe", "predictor", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (run / PARTIAL_NAME / "1.safetensors").is_file():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, log = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in log
    assert {path.name for path in run.iterdir()} == before | {PARTIAL_NAME}
    kept = len(list((run / PARTIAL_NAME).iterdir()))
    assert 2 <= kept < 12
    again = CliRunner().invoke(command, arguments)
    assert again.exit_code == 0, again.output
    assert again.output.count("recall 0.") + again.output.count("recall 1.") == 12 - kept  # only the others are trained
    assert {path.name for path in run.iterdir()} == before | {PREDICTORS_NAME}
    assert len(load_file(run / PREDICTORS_NAME)) == 24
