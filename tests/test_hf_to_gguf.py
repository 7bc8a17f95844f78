"""Exported tiny models of each family, run by stock llama.cpp beside transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from export_models import relative_l2, stock_greedy, stock_logits, tiny_run, tiny_tokenizer, torch_greedy, torch_logits
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st

from prosparse_pipe.checkpoint import load_activation_rates
from prosparse_pipe.convert.hf_to_gguf import (
    check_written,
    context_length,
    hot_to_cold,
    open_source,
    permute_rope,
    write_model,
)
from prosparse_pipe.errors import CheckpointError, GGUFError, UnsupportedModelError

TOKENS = [5, 77, 210, 9, 300, 41, 41, 8, 120, 33, 250, 19]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
FAMILIES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama no gqa, wide heads": ("llama", {"num_key_value_heads": 4, "head_dim": 32}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "llama linear": ("llama", {"rope_parameters": LINEAR}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 tied, wide heads": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}


def export(run: Path, target: Path, dtype: str = "F32") -> Path:
    write_model(open_source(run, load_activation_rates(run)), target, dtype)
    return target


@pytest.mark.parametrize("case", FAMILIES)
def test_stock_llama_cpp_computes_what_transformers_does(case: str, tmp_path: Path) -> None:
    family, changes = FAMILIES[case]
    run = tiny_run(tmp_path / "run", family, **changes)
    f32 = export(run, tmp_path / "f32.gguf")
    expected = torch_logits(run, TOKENS)
    assert np.linalg.norm(expected) > 1
    assert relative_l2(stock_logits(f32, TOKENS), expected) < 1e-4
    greedy = torch_greedy(run, TOKENS, 48)
    assert len(set(greedy)) > 5
    assert stock_greedy(f32, TOKENS, 48) == greedy


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_f16_weights_give_the_same_greedy_tokens(family: str, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", family)
    # F16 values in the checkpoint itself, so that both sides compute with the same weights
    model_path = run / "model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({k: v.half() for k, v in load_file(model_path).items()}, model_path, {"format": "pt"})
    f16 = export(run, tmp_path / "f16.gguf", "F16")
    assert relative_l2(stock_logits(f16, TOKENS), torch_logits(run, TOKENS)) < 2e-3
    assert stock_greedy(f16, TOKENS, 48) == torch_greedy(run, TOKENS, 48)


def test_without_the_scales_the_same_file_would_be_wrong(tmp_path: Path) -> None:
    """The scale tensors are what makes the difference: a SiLU reading of the same weights is far off."""
    run = tiny_run(tmp_path / "run", "llama")
    expected = torch_logits(run, TOKENS)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "hidden_act": "silu"}))
    assert relative_l2(torch_logits(run, TOKENS), expected) > 0.05


def test_keys_and_tensors(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", "llama", threshold=0.25)
    source = open_source(run, load_activation_rates(run))
    write_model(source, tmp_path / "m.gguf", "BF16")
    check_written(tmp_path / "m.gguf", source)
    reader = GGUFReader(tmp_path / "m.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["general.name"] == "Tiny-1K-ProSparse"
    assert values["prosparse.activation"] == "fatrelu"
    assert values["prosparse.threshold"] == 0.25
    assert values["prosparse.sorted"] is True
    assert values["prosparse.sparsity"] == [0.5, 0.5]
    assert values["prosparse.provenance.base_model"] == "Tiny-1K"
    assert values["prosparse.provenance.tokens"] == 1000
    assert values["tokenizer.ggml.pre"] == "smollm"
    assert "im_start" in values["tokenizer.chat_template"]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_up.weight"] == "BF16"
    assert kinds["blk.1.ffn_norm.weight"] == "F32"
    assert kinds["blk.1.ffn_gate.scale"] == "F32"


def test_neurons_are_sorted_hot_to_cold(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", "llama")
    path = export(run, tmp_path / "m.gguf")
    from safetensors.numpy import load_file

    weights, rates = load_file(run / "model.safetensors"), load_activation_rates(run)
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    for il in range(2):
        order = np.argsort(-rates[il], kind="stable")
        assert (tensors[f"blk.{il}.ffn_gate.weight"] == weights[f"model.layers.{il}.mlp.gate_proj.weight"][order]).all()
        assert (tensors[f"blk.{il}.ffn_up.weight"] == weights[f"model.layers.{il}.mlp.up_proj.weight"][order]).all()
        down = weights[f"model.layers.{il}.mlp.down_proj.weight"]
        assert (tensors[f"blk.{il}.ffn_down.weight"] == down[:, order]).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40), st.integers(0, 2**31))
def test_permuting_neurons_keeps_the_ffn(rates: list[float], seed: int) -> None:
    order = hot_to_cold(np.array(rates, np.float32))
    assert sorted(order.tolist()) == list(range(len(rates)))
    hot = np.array(rates, np.float32)[order]
    assert (np.diff(hot) <= 0).all()
    rng = np.random.default_rng(seed)
    gate, up, down = (
        rng.normal(size=(len(rates), 5)),
        rng.normal(size=(len(rates), 5)),
        rng.normal(size=(5, len(rates))),
    )
    x = rng.normal(size=5)
    before = down @ (np.maximum(gate @ x, 0) * (up @ x))
    after = down[:, order] @ (np.maximum(gate[order] @ x, 0) * (up[order] @ x))
    np.testing.assert_allclose(after, before, rtol=1e-12, atol=1e-12)


def test_permute_rope_interleaves_the_halves_of_each_head() -> None:
    weight = torch.arange(8).reshape(8, 1)  # 2 heads of 4 rows
    assert permute_rope(weight, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_id_depends_on_weights_and_order_only(tmp_path: Path) -> None:
    first = tiny_run(tmp_path / "a", "llama")
    rates = load_activation_rates(first)
    source = open_source(first, rates)
    assert source.id == open_source(first, rates).id
    assert source.id != open_source(first, None).id
    assert source.id != open_source(first, [1 - rate for rate in rates]).id
    other = tiny_run(tmp_path / "b", "llama", rms_norm_eps=1e-3, num_hidden_layers=3)
    assert source.id != open_source(other, None).id


def test_sharded_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = tiny_run(tmp_path / "run", "llama")
    expected = torch_logits(run, TOKENS)
    AutoModelForCausalLM.from_pretrained(run).save_pretrained(run, max_shard_size="200KB")
    (run / "model.safetensors").unlink(missing_ok=True)
    assert len(list(run.glob("model-*.safetensors"))) > 1
    assert relative_l2(stock_logits(export(run, tmp_path / "m.gguf"), TOKENS), expected) < 1e-4


def test_context_stops_at_a_sliding_window() -> None:
    base = {"max_position_embeddings": 32768, "sliding_window": 4096}
    assert context_length({**base, "model_type": "mistral"}) == 4096
    assert context_length({**base, "model_type": "qwen2", "use_sliding_window": False}) == 32768
    assert context_length({**base, "model_type": "qwen2", "use_sliding_window": True}) == 4096


def refused(run: Path, error: type[Exception], words: str, rates: bool = True) -> None:
    with pytest.raises(error, match=words) as info:
        open_source(run, load_activation_rates(run) if rates else None)
    assert "\n" not in str(info.value)


def test_gemma_is_refused(tmp_path: Path) -> None:
    refused(tiny_run(tmp_path / "run", "gemma"), UnsupportedModelError, "gemma model cannot be exported.*GELU")


def test_silu_model_is_refused(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", "llama")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "hidden_act": "silu"}))
    refused(run, UnsupportedModelError, "computes silu, not ReLU")


def test_rates_of_another_model_are_refused(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", "llama")
    with pytest.raises(CheckpointError, match="rates are of another model: 2 x 8 neurons instead of 2 x 160"):
        open_source(run, [np.ones(8, np.float32)] * 2)


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", "llama")
    weights = run / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    refused(run, CheckpointError, "model.safetensors cannot be read")
    weights.unlink()
    refused(run, CheckpointError, "model.safetensors does not exist")
    from safetensors.torch import load, save_file

    tensors = load(data)
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.up" not in k}, weights)
    refused(run, CheckpointError, "lacks the tensor model.layers.1.mlp.up_proj.weight")
    (run / "config.json").write_text("{")
    refused(run, CheckpointError, "config.json is not valid JSON")


def test_values_that_f16_cannot_hold_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run = tiny_run(tmp_path / "run", "llama")
    tensors = load_file(run / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, run / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"mlp.up_proj.weight does not fit into F16"):
        export(run, tmp_path / "out" / "m.gguf", "F16")
    assert list((tmp_path / "out").iterdir()) == []
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, run / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        export(run, tmp_path / "out" / "m.gguf", "F32")


def test_tokenizer_that_llama_cpp_splits_differently_is_an_error_naming_the_string(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", "llama")
    source = open_source(run, None)
    source.vocab.pre = "gpt-2"  # as if the pre-tokenizer had been misjudged: the digits are split otherwise
    source.vocab.merges.insert(0, "1 2")
    with pytest.raises(GGUFError, match=r"llama.cpp splits '.*' into"):
        write_model(source, tmp_path / "out" / "m.gguf", "F32")
    assert list((tmp_path / "out").iterdir()) == []


def test_gpt2_split_is_named_gpt2(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    run = tiny_run(
        tmp_path / "run", "llama", tokenizer=tiny_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    )
    assert open_source(run, None).vocab.pre == "gpt-2"
    export(run, tmp_path / "m.gguf")
