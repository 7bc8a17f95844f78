"""`eval`: figures against float64 recomputation, checkpoint against GGUF, sparse against stock, and what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from export_models import CORPUS, tiny_run, tiny_tokenizer
from gguf_models import write_model
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from prosparse_pipe.commands.eval import command
from prosparse_pipe.data import DataError
from prosparse_pipe.evaluate import evaluate
from prosparse_pipe.export import export_gguf
from prosparse_pipe.relu import load_sparse_model
from prosparse_pipe.scoring import open_scorer, score_text, text_blocks
from prosparse_pipe.tasks import Question, choice_scores, encode_choice, read_questions

CONTEXT = 48
QUESTIONS = [
    {"question": "The quick brown", "choices": ["fox", "dog in the garden", "house"], "answer": 0},
    {"context": "In 1999 there were", "choices": [" 3 people", " 42"], "answer": 1},
    {"context": "def add(a, b):\n", "question": "return", "choices": ["a", "b", "1", "22"], "answer": 2},
    {"question": "again and again; the dog ", "choices": ["does not mind", "is lazy"], "answer": 0},
    {"question": "", "choices": ["The lazy dog", "def"], "answer": 1},
]


def bos_tokenizer() -> Any:
    """The tiny tokenizer, but it puts BOS in front of text."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]),
        ]
    )
    tokenizer.bos_token = "<|endoftext|>"
    return tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models: sparse and dense checkpoints of the same weights, their GGUFs, one with BOS and a threshold."""
    root = tmp_path_factory.mktemp("models")
    found = {"relu": tiny_run(root / "relu", "llama"), "bos": root / "bos", "dense": root / "dense"}
    tiny_run(found["bos"], "llama", threshold=0.3, tokenizer=bos_tokenizer())
    shutil.copytree(found["relu"], found["dense"])
    config = json.loads((found["dense"] / "config.json").read_text())
    (found["dense"] / "config.json").write_text(json.dumps({**config, "hidden_act": "silu"}))
    for name in ("relu", "bos"):
        found[f"{name}.gguf"] = export_gguf(found[name], ["F32"], name=name).models["F32"]
    return found


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Plain text longer than a training document, chats, and questions."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "plain.txt").write_text("\n\n".join(f"{i}. {CORPUS[i % 3]} naïve 北京 😀" for i in range(60)))
    chats = [
        {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": CORPUS[i % 3]}]}
        for i in range(30)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*chats, chats[0]]))
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in QUESTIONS))
    return {path.stem: str(path) for path in folder.iterdir()}


def run_eval(*arguments: str | Path) -> Result:
    fixed = ("--threads", "1", "--context", str(CONTEXT), "--max-tokens", "960")
    return CliRunner().invoke(command, [*(str(argument) for argument in arguments), *fixed])


def eval_json(*arguments: str | Path) -> dict[str, Any]:
    result = run_eval(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def log_probabilities(folder: Path, ids: Any) -> torch.Tensor:
    """Of plain transformers in float64, (n, tokens, n_vocab)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor(np.asarray(ids, np.int64))).logits, -1)


def blocks_of(model: Path, source: str, split: str = "all") -> np.ndarray:
    scorer = open_scorer(str(model), n_ctx=CONTEXT)
    try:
        return text_blocks(scorer, source, CONTEXT, split, 960)
    finally:
        scorer.close()


# ---- text


@pytest.mark.parametrize("text", ["plain", "chats"])
@pytest.mark.parametrize("name", ["relu", "bos"])
def test_a_checkpoint_and_its_gguf_agree(name: str, text: str, models: dict[str, Path], texts: dict[str, str]) -> None:
    left, right = blocks_of(models[name], texts[text]), blocks_of(models[f"{name}.gguf"], texts[text])
    assert left.shape == (20, CONTEXT)
    assert (left == right).all()
    (expected,), (found,) = (
        eval_json(model, "--text", texts[text])["texts"] for model in (models[name], models[f"{name}.gguf"])
    )
    assert found["tokens"] == expected["tokens"] == 20 * (CONTEXT - 1)
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-3)
    assert found["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=0.02)  # characters cut at a window
    assert found["sparsity_layers"] == pytest.approx(expected["sparsity_layers"], abs=1e-3)
    assert 0.2 < found["sparsity_min"] <= found["sparsity"] <= found["sparsity_max"] < 0.95


def test_perplexity_is_that_of_a_float64_model(models: dict[str, Path], texts: dict[str, str]) -> None:
    blocks = blocks_of(models["relu"], texts["plain"])
    log_p = log_probabilities(models["relu"], blocks)[:, :-1]
    nats = -log_p.gather(-1, torch.tensor(blocks[:, 1:])[..., None]).mean().item()
    (found,) = eval_json(models["relu"], "--text", texts["plain"])["texts"]
    assert found["perplexity"] == pytest.approx(np.exp(nats), rel=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(models["relu"])
    n_bytes = sum(len(tokenizer.decode(block[1:], skip_special_tokens=True).encode()) for block in blocks)
    assert found["bits_per_byte"] == pytest.approx(nats / np.log(2) * blocks[:, 1:].size / n_bytes, rel=1e-5)


def test_perplexity_and_sparsity_are_those_that_train_prints(models: dict[str, Path], texts: dict[str, str]) -> None:
    model, _, info = load_sparse_model(models["bos"])
    assert info.threshold == 0.3
    expected = evaluate(model, blocks_of(models["bos"], texts["plain"]))
    (found,) = eval_json(models["bos"], "--text", texts["plain"])["texts"]
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert found["tokens"] == expected.tokens
    assert found["sparsity"] == pytest.approx(expected.mean_sparsity, abs=1e-4)
    assert found["sparsity_layers"] == pytest.approx(expected.sparsity, abs=1e-4)


@pytest.mark.parametrize("name", ["relu", "relu.gguf"])
def test_distance_to_the_dense_model(name: str, models: dict[str, Path], texts: dict[str, str]) -> None:
    blocks = blocks_of(models["relu"], texts["plain"])
    sparse, dense = (log_probabilities(models[kind], blocks)[:, :-1] for kind in ("relu", "dense"))
    targets = torch.tensor(blocks[:, 1:])[..., None]
    ratio = (dense.gather(-1, targets).mean() - sparse.gather(-1, targets).mean()).exp().item()
    kl = (dense.exp() * (dense - sparse)).sum(-1).mean().item()
    agreement = (dense.argmax(-1) == sparse.argmax(-1)).double().mean().item()
    values = eval_json(models[name], "--text", texts["plain"], "--dense", models["dense"])
    (found,) = values["texts"]
    assert values["dense_runtime"] == "torch"
    assert found["perplexity_ratio"] == pytest.approx(ratio, rel=1e-4)
    assert found["dense_perplexity"] == pytest.approx(found["perplexity"] / ratio, rel=1e-4)
    assert kl > 0.01
    assert found["kl"] == pytest.approx(kl, rel=1e-3)
    assert 0.05 < agreement < 0.98
    assert found["top1_agreement"] == pytest.approx(agreement, abs=2 / targets.numel())


def test_a_model_does_not_differ_from_itself(models: dict[str, Path], texts: dict[str, str]) -> None:
    (found,) = eval_json(models["relu"], "--text", texts["plain"], "--dense", models["relu.gguf"])["texts"]
    assert found["perplexity_ratio"] == pytest.approx(1, abs=1e-4)
    assert abs(found["kl"]) < 1e-5
    assert found["top1_agreement"] > 0.99


def test_the_sparse_backend_and_stock_agree(models: dict[str, Path], texts: dict[str, str]) -> None:
    arguments = ("--text", texts["plain"], "--tasks", texts["questions"])
    sparse, auto, stock = (
        eval_json(models["relu.gguf"], *arguments, "--backend", kind) for kind in ("sparse", "auto", "stock")
    )
    assert sparse == auto
    assert (sparse["runtime"], stock["runtime"]) == ("sparse", "stock")
    assert (sparse["threshold"], stock["threshold"]) == (0, None)
    left, right = sparse["texts"][0], stock["texts"][0]
    assert left["perplexity"] == pytest.approx(right["perplexity"], rel=1e-4)
    assert left["sparsity"] is not None
    assert right["sparsity"] is None
    assert sparse["tasks"] == stock["tasks"]


def test_stock_says_that_it_applies_no_threshold(models: dict[str, Path], texts: dict[str, str]) -> None:
    result = run_eval(models["bos.gguf"], "--text", texts["plain"], "--backend", "stock")
    assert "does not apply the threshold of 0.3" in result.stderr


def test_windows_of_a_model_with_bos_start_with_it(models: dict[str, Path], texts: dict[str, str]) -> None:
    blocks = blocks_of(models["bos.gguf"], texts["plain"])
    assert (blocks[:, 0] == 0).all()
    assert (blocks[:, 1:] != 0).all()  # one document: neither a second BOS nor an end inside
    assert 2 not in blocks
    chats = blocks_of(models["bos.gguf"], texts["chats"])
    assert (chats[:, 0] == 0).all()
    assert (chats[:, 1:] == 0).any()
    text = AutoTokenizer.from_pretrained(models["bos"]).decode(blocks[:, 1:].reshape(-1))
    assert text == Path(texts["plain"]).read_text()[: len(text)]
    assert len(text) > 500


def test_whole_text_keeps_order_and_repeated_rows(models: dict[str, Path], texts: dict[str, str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models["relu"])
    scorer = open_scorer(str(models["relu.gguf"]), n_ctx=CONTEXT)
    blocks = text_blocks(scorer, texts["chats"], 16, "all", 10**6)
    scorer.close()
    text = tokenizer.decode(blocks.reshape(-1))
    assert text.count("Say 0<") == 2
    assert [text.index(f"Say {i}<") for i in range(30)] == sorted(text.index(f"Say {i}<") for i in range(30))
    heldout = blocks_of(models["relu.gguf"], texts["chats"], "train")
    assert not np.array_equal(heldout[:5], blocks_of(models["relu.gguf"], texts["chats"])[:5])


def test_no_more_than_max_tokens(models: dict[str, Path], texts: dict[str, str]) -> None:
    scorer = open_scorer(str(models["relu.gguf"]), n_ctx=CONTEXT)
    for asked, blocks in ((1, 1), (100, 2), (144, 3), (150, 3)):
        assert len(text_blocks(scorer, texts["plain"], CONTEXT, "all", asked)) == blocks
    scorer.close()


def test_blocks_longer_than_a_batch(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", "llama", max_position_embeddings=2048)
    path = export_gguf(run, ["F32"], name="long").models["F32"]
    blocks = np.random.default_rng(0).integers(3, 300, (1, 1100))
    found = []
    for model in (run, path):
        scorer = open_scorer(str(model), n_ctx=1100)
        found.append(
            (score_text(scorer, "random", blocks), np.concatenate([p.copy() for p in scorer.logits(blocks[0])]))
        )
        tail = np.concatenate([piece.copy() for piece in scorer.logits(blocks[0], 700)])
        np.testing.assert_allclose(tail, found[-1][1][700:], atol=1e-3)
        scorer.close()
    (left, left_logits), (right, right_logits) = found
    assert left.perplexity == pytest.approx(right.perplexity, rel=1e-3)
    assert left_logits.shape == (1100, 384)
    np.testing.assert_allclose(left_logits, right_logits, atol=0.01 * np.abs(left_logits).max())


# ---- questions


def expected_scores(folder: Path, row: dict[str, Any]) -> list[float]:
    """Log-probabilities of the choices in float64, by the characters that the tokens cover."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    context = "\n".join(row[key] for key in ("context", "question") if key in row)
    scores = []
    for choice in row["choices"]:
        space = "" if not context or context[-1].isspace() or choice[0].isspace() else " "
        coded = tokenizer(context + space + choice, add_special_tokens=False, return_offsets_mapping=True)
        first = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        lead = [tokenizer.bos_token_id] if first else []
        if not context and not lead:
            lead = [tokenizer.eos_token_id]
        ids = [*lead, *coded["input_ids"]]
        log_p = log_probabilities(folder, [ids])[0]
        # a token is the choice's if it reaches beyond the question (with its spaces: they join what follows)
        own = [i for i, (_, end) in enumerate(coded["offset_mapping"]) if end > len(context.rstrip())]
        scores.append(sum(log_p[len(lead) + i - 1, ids[len(lead) + i]].item() for i in own))
    return scores


@pytest.mark.parametrize("name", ["relu", "relu.gguf", "dense"])
def test_choices_are_scored_as_in_float64(name: str, models: dict[str, Path], texts: dict[str, str]) -> None:
    folder = models[name.removesuffix(".gguf")]
    expected = [expected_scores(folder, row) for row in QUESTIONS]
    scorer = open_scorer(str(models[name]), n_ctx=CONTEXT)
    for question, wanted in zip(read_questions(Path(texts["questions"])), expected, strict=True):
        assert choice_scores(scorer, question, CONTEXT) == pytest.approx(wanted, abs=0.02)
    scorer.close()
    right = [int(np.argmax(scores)) == row["answer"] for scores, row in zip(expected, QUESTIONS, strict=True)]
    per_character = [np.divide(s, [len(c) for c in row["choices"]]) for s, row in zip(expected, QUESTIONS, strict=True)]
    right_norm = [int(np.argmax(s)) == row["answer"] for s, row in zip(per_character, QUESTIONS, strict=True)]
    (found,) = eval_json(models[name], "--tasks", texts["questions"])["tasks"]
    assert found["questions"] == 5
    assert found["acc"] == pytest.approx(np.mean(right))
    assert found["acc_norm"] == pytest.approx(np.mean(right_norm))
    assert found["acc_norm_stderr"] == pytest.approx(np.sqrt(np.mean(right_norm) * (1 - np.mean(right_norm)) / 4))


def test_accuracy_beside_the_dense_model(models: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"question": f"{CORPUS[i % 3][: i % 40]}", "choices": ["dog", "a + b", "1999"], "answer": i % 3}
            for i in range(1, 25)]  # fmt: skip
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    alone = [eval_json(models[kind], "--tasks", tmp_path / "q.jsonl")["tasks"][0] for kind in ("relu", "dense")]
    (found,) = eval_json(models["relu"], "--tasks", tmp_path / "q.jsonl", "--dense", models["dense"])["tasks"]
    for kind in ("acc", "acc_norm"):
        assert found[kind] == alone[0][kind]
        assert found[f"dense_{kind}"] == alone[1][kind]
        assert found[f"{kind}_difference"] == pytest.approx(100 * (alone[0][kind] - alone[1][kind]))
        assert found[f"{kind}_difference_stderr"] >= 0


def test_a_long_question_loses_its_beginning(models: dict[str, Path]) -> None:
    for name in ("relu", "bos"):
        tokenizer = AutoTokenizer.from_pretrained(models[name])
        question = Question("word " * 100 + "the", ["lazy dog", "x" * 200], 0, "q.jsonl, line 7")
        ids, start = encode_choice(tokenizer, question, "lazy dog", 24)
        assert len(ids) == 24
        assert (ids[0] == 0) == (name == "bos")
        assert tokenizer.decode(ids[start:]) == " lazy dog"
        with pytest.raises(DataError, match=r"line 7: a choice is longer than the context of 24"):
            encode_choice(tokenizer, question, "x y z " * 100, 24)


# ---- the command


def test_table_and_json(models: dict[str, Path], texts: dict[str, str]) -> None:
    arguments = (models["relu.gguf"], "--text", texts["plain"], "--text", texts["chats"], "--tasks", texts["questions"])
    values = eval_json(*arguments, "--dense", models["dense"])
    assert [row["text"] for row in values["texts"]] == [texts["plain"], texts["chats"]]
    assert (values["context"], values["split"], values["dense"]) == (CONTEXT, "all", str(models["dense"]))
    result = run_eval(*arguments, "--dense", models["dense"])
    lines = result.stdout.splitlines()
    assert len(lines) == 4 + 1 + 3
    assert all(line.count("|") == 11 for line in lines[:4])
    assert lines[2].split(" | ")[2] == f"{values['texts'][0]['perplexity']:.4g}"
    assert "| acc, points |" in lines[5]
    assert "±" in lines[7]
    assert "llama.cpp with the sparse backend" in result.stderr
    plain = run_eval(models["dense"], "--text", texts["plain"]).stdout
    assert plain.splitlines()[0] == "| text | tokens | perplexity | bits/byte |"


def test_gguf_needs_no_torch(models: dict[str, Path], texts: dict[str, str]) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'tokenizers', 'accelerate', 'datasets', 'pyarrow', 'matplotlib',\n"
        "             'safetensors', 'sentencepiece', 'huggingface_hub'): sys.modules[name] = None\n"
        "from prosparse_pipe.cli import main\n"
        "main()"
    )

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, "eval", *map(str, arguments), "--context", "48", "--threads", "1"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    texts_and_tasks = ("--text", texts["plain"], "--text", texts["chats"], "--tasks", texts["questions"])
    done = run(models["bos.gguf"], *texts_and_tasks, "--dense", models["bos.gguf"], "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["texts"]) == 2
    missing = run(models["bos"], *texts_and_tasks)
    assert missing.returncode == 1
    assert missing.stdout == ""
    assert "hint: pip install 'prosparse-pipe[train]'" in missing.stderr


def assert_refused(result: Result, *words: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.lower().splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    for word in words:
        assert word.lower() in result.stderr.lower()


def test_missing_files(models: dict[str, Path], texts: dict[str, str], tmp_path: Path) -> None:
    gguf, plain = models["relu.gguf"], texts["plain"]
    assert_refused(run_eval(gguf, "--text", tmp_path / "none.txt"), "none.txt does not exist")
    assert_refused(run_eval(gguf, "--tasks", tmp_path / "none.jsonl"), "none.jsonl cannot be read: No such file")
    assert_refused(run_eval(tmp_path / "none.gguf", "--text", plain), "none.gguf does not exist")
    assert_refused(run_eval("user/none", "--text", plain), "user/none does not exist", "hf download")
    assert_refused(run_eval(tmp_path, "--text", plain), "has no config.json", "Hugging Face folder")
    assert_refused(run_eval(gguf, "--text", plain, "--dense", tmp_path / "none.gguf"), "none.gguf does not exist")
    assert_refused(run_eval(gguf), "--text, --tasks or both", code=2)


def test_too_little_text(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    for name in ("relu", "relu.gguf"):
        result = run_eval(models[name], "--text", tmp_path / "short.txt")
        assert_refused(result, "short.txt: the text has", f"fewer than one block of {CONTEXT}", "smaller --context")
        assert "held out" not in result.stderr


def test_damaged_models(models: dict[str, Path], texts: dict[str, str], tmp_path: Path) -> None:
    for name, model in (("sparse", models["relu.gguf"]), ("plain", write_model(tmp_path / "d.gguf").path)):
        cut = tmp_path / f"{name}-cut.gguf"
        cut.write_bytes(model.read_bytes()[: model.stat().st_size // 2])
        for backend in ("auto", "stock"):
            assert_refused(run_eval(cut, "--text", texts["plain"], "--backend", backend), f"{name}-cut.gguf", "hint: ")
    (tmp_path / "no.gguf").write_text("this is not a model")
    for backend in ("auto", "sparse", "stock"):
        assert_refused(run_eval(tmp_path / "no.gguf", "--text", texts["plain"], "--backend", backend), "no.gguf")
    run = tmp_path / "run"
    shutil.copytree(models["relu"], run)
    (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-1000])
    assert_refused(run_eval(run, "--text", texts["plain"]), "cannot be loaded")


def test_backends_that_do_not_fit(models: dict[str, Path], texts: dict[str, str], tmp_path: Path) -> None:
    dense = write_model(tmp_path / "dense.gguf", without_keys=True).path
    assert_refused(run_eval(dense, "--text", texts["plain"], "--backend", "sparse"), "dense.gguf", "--backend stock")
    assert_refused(run_eval(models["relu"], "--text", texts["plain"], "--backend", "stock"), "is for GGUF", code=2)
    auto = eval_json(dense, "--text", texts["plain"])
    assert auto["runtime"] == "stock"
    assert auto["threshold"] is auto["texts"][0]["sparsity"] is None


def test_dense_model_of_another_vocabulary(models: dict[str, Path], texts: dict[str, str], tmp_path: Path) -> None:
    narrow = write_model(tmp_path / "narrow.gguf", without_keys=True).path
    result = run_eval(models["relu.gguf"], "--text", texts["plain"], "--dense", narrow)
    assert_refused(result, "narrow.gguf has a vocabulary of 288 tokens", "of 384")
    other = tmp_path / "other"
    shutil.copytree(models["dense"], other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-40]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("relu", "relu.gguf"):
        result = run_eval(models[name], "--text", texts["plain"], "--dense", other)
        assert_refused(result, "has another tokenizer than", "the model that this one was made of")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3 is not valid JSON"),
        ("[]", "line 3 is not an object"),
        ('{"choices": ["a", "b"], "answer": 0}', "line 3 has no `question` or `context`"),
        ('{"question": 1, "choices": ["a", "b"], "answer": 0}', "line 3 has no `question` or `context`"),
        ('{"question": "q", "choices": ["a"], "answer": 0}', "line 3: `choices` is not a list of two or more"),
        ('{"question": "q", "choices": ["a", ""], "answer": 0}', "line 3: `choices` is not"),
        ('{"question": "q", "choices": "ab", "answer": 0}', "line 3: `choices` is not"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "line 3: `answer` is not an index into the 2"),
        ('{"question": "q", "choices": ["a", "b"], "answer": "a"}', "line 3: `answer` is not"),
        ('{"question": "q", "choices": ["a", "b"], "answer": true}', "line 3: `answer` is not"),
        ('{"question": "q", "choices": ["a", "b"]}', "line 3: `answer` is not"),
    ],
)
def test_malformed_questions_are_named(line: str, message: str, models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(f"{json.dumps(QUESTIONS[0])}\n\n{line}\n")
    assert_refused(run_eval(models["relu.gguf"], "--tasks", path), str(path), message)


def test_no_questions(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("\n")
    assert_refused(run_eval(models["relu.gguf"], "--tasks", tmp_path / "q.jsonl"), "holds no questions")


def test_a_context_beyond_the_model_is_noted(models: dict[str, Path], texts: dict[str, str]) -> None:
    arguments = [str(models["relu.gguf"]), "--text", texts["plain"], "--context", "300", "--threads", "1"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert "was trained with 256 tokens of context, fewer than 300" in result.stderr
