"""Activation rates against a direct count, coverage, and `profile` on a tiny run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from export_models import CORPUS, tiny_run
from transformers import AutoModelForCausalLM

from prosparse_pipe.checkpoint import SparseInfo, load_activation_rates
from prosparse_pipe.commands.profile import command
from prosparse_pipe.profile import Profile, batches, measure, save_profile
from prosparse_pipe.relu import find_ffns, substitute_relu
from prosparse_pipe.sparsity import ActivationRecorder, coverage, sparsity_of


def direct_count(model: torch.nn.Module, ids: torch.Tensor) -> list[np.ndarray]:
    """Share of positions with x1 != 0, from the FFN's own formula, layer by layer."""
    inputs: dict[int, torch.Tensor] = {}
    ffns = find_ffns(model)
    handles = [
        ffn.module.register_forward_pre_hook(lambda _m, args, il=ffn.layer: inputs.__setitem__(il, args[0]))
        for ffn in ffns
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    rates = []
    for ffn in ffns:
        x = inputs[ffn.layer]
        gate = x @ ffn.gate.weight.T
        active = torch.where(gate >= 0.2, gate.clamp_min(0), torch.zeros(())) * (x @ ffn.up.weight.T) != 0
        rates.append(active.double().mean(dim=(0, 1)).numpy())
    return rates


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_rates_equal_a_direct_count(family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_run(tmp_path / "run", family))
    substitute_relu(model, 0.2)
    blocks = list(np.random.default_rng(0).integers(0, 300, (7, 16)))
    seen: list[int] = []
    recorder = measure(model, iter(blocks), 3, seen.append)
    assert seen == [48, 48, 16]
    assert recorder.tokens == [112, 112]
    expected = direct_count(model, torch.from_numpy(np.stack(blocks)))
    for rate, wanted, sparsity in zip(recorder.rates(), expected, recorder.sparsity(), strict=True):
        np.testing.assert_allclose(rate, wanted, atol=1.5 / 112)  # a value at the threshold may fall to either side
        assert 0.05 < sparsity < 0.95
        assert sparsity == pytest.approx(1 - wanted.mean(), abs=1e-3)
    assert recorder.sparsity() == pytest.approx(sparsity_of(recorder.rates()), abs=1e-6)


def test_padding_is_not_counted(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_run(tmp_path / "run", "llama"))
    substitute_relu(model)
    ids = torch.randint(0, 300, (2, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 4:] = False
    with torch.no_grad(), ActivationRecorder(model, mask) as masked:
        model(ids)
    with torch.no_grad(), ActivationRecorder(model) as single:
        model(ids[:1])
        model(ids[1:, :4])
    assert masked.tokens == [14, 14]
    for left, right in zip(masked.counts, single.counts, strict=True):
        assert (left - right).abs().max() <= 1
    with torch.no_grad():
        model(ids)
    assert masked.tokens == [14, 14]  # closed: nothing is counted any more


def test_coverage() -> None:
    rate = np.array([0.1, 0.4, 0.0, 0.2, 0.3] * 2)
    assert coverage(rate, (0.0, 0.2, 0.5, 1.0)) == pytest.approx([0, 0.4, 0.8, 1])
    assert coverage(np.zeros(8), (0.1, 0.5)) == [1.0, 1.0]


def test_batches_keep_every_block() -> None:
    blocks = [np.full(4, i) for i in range(5)]
    assert [batch[:, 0].tolist() for batch in batches(iter(blocks), 2)] == [[0, 1], [2, 3], [4]]


def test_profile_is_saved_with_a_plot(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", "llama", rates=False)
    rates = [np.linspace(0, 1, 160, dtype=np.float32), np.zeros(160, np.float32)]
    save_profile(run, Profile(rates, [0.5, 1.0], [[0.2] * 4] * 2, 100, ["text"]), SparseInfo.load(run))
    assert SparseInfo.load(run).sparsity == [0.5, 1.0]
    assert all((a == b).all() for a, b in zip(load_activation_rates(run), rates, strict=True))
    assert (run / "activation_rates.png").read_bytes().startswith(b"\x89PNG")


def test_command_prints_json_and_a_table(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", "llama", rates=False)
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i}. {CORPUS[i % 3]}" for i in range(200)))
    arguments = [str(run), "--data", str(tmp_path / "text.txt"), "--split", "train", "--seq-len", "32"]
    result = CliRunner().invoke(command, [*arguments, "--tokens", "640", "--json"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert 0 < values["tokens"] <= 640
    assert values["sparsity"] == SparseInfo.load(run).sparsity
    assert len(values["coverage"]) == 2
    table = CliRunner().invoke(command, [*arguments, "--tokens", "640"])
    assert "sparsity" in table.stdout
    assert "hottest 20%" in table.stdout


def test_without_text_the_error_says_so(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(tiny_run(tmp_path / "run", "llama"))])
    assert result.exit_code == 1
    assert "does not say what it was trained on" in result.output
