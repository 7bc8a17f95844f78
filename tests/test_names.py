"""Tensor names, the table of architectures, and tokenizers compared with llama.cpp's."""

import json
from pathlib import Path
from typing import Any

import pytest
from export_models import CORPUS, tiny_run, tiny_tokenizer
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prosparse_pipe.convert import vocab as vocab_module
from prosparse_pipe.convert.hf_to_gguf import open_source, write_model
from prosparse_pipe.convert.names import ARCHITECTURES, TensorNames, architecture_of, rope_parameters
from prosparse_pipe.convert.vocab import pre_tokenizer_name, read_vocab, restore_pre_tokenizer
from prosparse_pipe.errors import UnsupportedModelError


def test_names_of_a_layer() -> None:
    names = TensorNames(ARCHITECTURES["qwen2"], 2)
    for hf, ggml in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
        "model.layers.1.input_layernorm.weight": "blk.1.attn_norm.weight",
        "model.layers.1.self_attn.k_proj.bias": "blk.1.attn_k.bias",
        "model.layers.1.post_attention_layernorm.weight": "blk.1.ffn_norm.weight",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
    }.items():
        assert names.to_ggml(hf) == ggml
    assert names.to_ggml("model.layers.0.self_attn.rotary_emb.inv_freq") is None
    for foreign in (
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.lora_A.weight",
        "model.layers.0.input_layernorm.bias",
        "lm_head.bias",
    ):
        with pytest.raises(UnsupportedModelError, match="has no place for the tensor"):
            names.to_ggml(foreign)
    with pytest.raises(UnsupportedModelError, match=r"qwen3 graph has no place .*o_proj.bias"):
        TensorNames(ARCHITECTURES["qwen3"], 1).to_ggml("model.layers.0.self_attn.o_proj.bias")


def test_unknown_and_known_wrong_architectures_are_refused() -> None:
    for kind, reason in (
        ("gemma3_text", "GELU"),
        ("phi3", "fused"),
        ("olmo2", "ignores the scale"),
        ("opt", "no gated FFN"),
        ("mixtral", "not known to apply ReLU"),
    ):
        with pytest.raises(UnsupportedModelError, match=f"a {kind} model cannot be exported.*{reason}"):
            architecture_of({"model_type": kind, "hidden_act": "relu"})
    with pytest.raises(UnsupportedModelError, match="partial rotary"):
        architecture_of({"model_type": "llama", "hidden_act": "relu", "partial_rotary_factor": 0.5})
    assert architecture_of({"model_type": "qwen2", "hidden_act": "fatrelu"}).gguf_arch == "llama"


def test_rope_settings_of_old_and_new_configs() -> None:
    old = rope_parameters({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}})
    new = rope_parameters({"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}})
    for values in (old, new):
        assert (values["rope_theta"], values["rope_type"], values["factor"]) == (5e5, "linear", 2.0)


def splitting(*steps: str) -> Any:
    parts = [pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize(
    ("pre", "ignore_merges", "expected"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
        (None, False, "smollm"),
        (splitting(vocab_module._QWEN2), False, "qwen2"),
        (splitting(vocab_module._LLAMA3), True, "llama-bpe"),
        (splitting(vocab_module._LLAMA3), False, "smaug-bpe"),
        (splitting(vocab_module._TEKKEN), True, "tekken"),
        (splitting(vocab_module._GPT4O), False, "gpt-4o"),
    ],
)
def test_every_named_pre_tokenizer_splits_as_llama_cpp_does(
    pre: Any, ignore_merges: bool, expected: str, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer(pre)
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition["model"]["ignore_merges"] = ignore_merges
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)), bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    run = tiny_run(tmp_path / "run", "llama", tokenizer=fast)
    write_model(open_source(run, None), tmp_path / "m.gguf", "F16")  # compares all of CHECK_STRINGS
    assert GGUFReader(tmp_path / "m.gguf").get_field("tokenizer.ggml.pre").contents() == expected


def test_unknown_pre_tokenizer_is_refused_by_name() -> None:
    definition = json.loads(tiny_tokenizer(splitting(r"\d{7}")).backend_tokenizer.to_str())
    with pytest.raises(UnsupportedModelError, match=r"known to split like this one: \\d\{7\}"):
        pre_tokenizer_name(definition)


def test_wordpiece_and_short_embeddings_are_refused() -> None:
    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(UnsupportedModelError, match="a WordPiece tokenizer cannot be exported"):
        read_vocab(PreTrainedTokenizerFast(tokenizer_object=wordpiece), 10)
    with pytest.raises(UnsupportedModelError, match="the tokenizer has 320 tokens, the model's embedding only 300"):
        read_vocab(tiny_tokenizer(), 300)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A converted Llama tokenizer: BPE over characters with ▁ for spaces, byte fallback, <s> first."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    words.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    trained = json.loads(words.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    model = models.BPE(
        {piece: index for index, piece in enumerate(dict.fromkeys(pieces))},
        [tuple(pair) for pair in trained["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def test_sentencepiece_tokenizer_gives_the_same_tokens(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", "llama", tokenizer=sentencepiece_like(), vocab_size=420)
    source = open_source(run, None)
    assert source.vocab.model == "llama"
    assert source.vocab.flags["add_space_prefix"] is True
    assert source.vocab.types[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    assert source.vocab.types[-1] == TokenType.UNUSED
    write_model(source, tmp_path / "m.gguf", "F16")  # compares all of CHECK_STRINGS, with emoji and Chinese as bytes


def test_tokenizer_rebuilt_from_a_gguf_gets_its_pre_tokenizer_back(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", "llama")
    write_model(open_source(run, None), tmp_path / "m.gguf", "F16")
    rebuilt = tiny_tokenizer()
    rebuilt.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # as transformers does
    assert read_vocab(rebuilt, 384).pre == "gpt-2"
    restore_pre_tokenizer(rebuilt, tmp_path / "m.gguf")
    assert read_vocab(rebuilt, 384).pre == "smollm"


def test_stop_token_of_the_chat_template_is_kept() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    assert read_vocab(tokenizer, 384, [0, 2]).special["eot"] == 2
