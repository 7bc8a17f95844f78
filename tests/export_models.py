"""Tiny random ReLU checkpoints with a tiny tokenizer, as `train` leaves them, and their logits in stock llama.cpp."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from prosparse_pipe.checkpoint import SparseInfo, save_activation_rates
from prosparse_pipe.relu import substitute_relu

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again; the dog does not mind.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 22))",
    "In 1999 there were 3 people in the house, and 42 in the garden.",
]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BASE = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def tiny_tokenizer(pre: Any = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 320 tokens, ChatML, and SmolLM2's pre-tokenizer unless another is given."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre or pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = TEMPLATE
    return fast


def tiny_run(
    folder: Path, family: str, *, rates: bool = True, threshold: float = 0.0, tokenizer: Any = None, **changes
) -> Path:
    """A run folder with a random ReLU model of a family (model_type), its tokenizer, prosparse.json and rates."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **{**BASE, **changes})
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                weight.normal_(std=0.1)
            else:
                weight.normal_(std=0.12)
    substitute_relu(model, threshold)
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    n_layer, n_ff = config.num_hidden_layers, config.intermediate_size
    SparseInfo(
        activation="fatrelu" if threshold else "relu",
        threshold=threshold,
        sparsity=[0.5] * n_layer,
        provenance={"base_model": "user/Tiny-1K", "tokens": 1000},
    ).save(folder)
    if rates:
        rng = np.random.default_rng(3)
        save_activation_rates(folder, [rng.random(n_ff).astype(np.float32) for _ in range(n_layer)], {"tokens": "1000"})
    return folder


def torch_logits(run: Path, tokens: list[int]) -> np.ndarray:
    """Logits of plain transformers, float64 (len(tokens), n_vocab)."""
    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float64).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].double().numpy()


def torch_greedy(run: Path, tokens: list[int], count: int) -> list[int]:
    """Greedy continuation of plain transformers in float32, without stopping at eos."""
    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32).eval()
    ids = list(tokens)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(tokens) :]


def stock(path: Path, n_batch: int = 256, n_threads: int = 1) -> Any:
    """The file in llama-cpp-python as it comes, without the sparse backend, F32 cache."""
    import llama_cpp

    return llama_cpp.Llama(
        str(path),
        n_ctx=256,
        n_batch=n_batch,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        n_gpu_layers=0,
        logits_all=True,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )


def stock_logits(path: Path, tokens: list[int], n_batch: int = 256) -> np.ndarray:
    """Logits of stock llama.cpp, float64 (len(tokens), n_vocab).

    n_batch 1 reads token by token, as decoding does: builds with GCC 12 crash in the AMX prefill of quantized types.
    """
    llama = stock(path, n_batch)
    llama.eval(tokens)
    logits = np.array(llama.scores[: len(tokens)], np.float64)
    llama.close()
    return logits


def stock_greedy(path: Path, tokens: list[int], count: int) -> list[int]:
    llama = stock(path)
    llama.eval(tokens)
    found = []
    for _ in range(count):
        found.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(found[-1:])
    llama.close()
    return found


def relative_l2(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
