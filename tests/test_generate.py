"""Text that a dense model writes, and files of tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from export_models import BASE, tiny_tokenizer
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from prosparse_pipe.cli import cli
from prosparse_pipe.data import load_blocks, token_blocks
from prosparse_pipe.errors import ProsparseError
from prosparse_pipe.generate import GenerateConfig, generate_data, sample
from prosparse_pipe.token_file import read_tokens, tokenize, write_tokens


def tiny_dense(family: str = "llama"):
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **BASE)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # a distribution that is far from uniform
    return model


@pytest.fixture
def text(tmp_path: Path) -> str:
    rows = [{"text": f"the river and the mill number {i} " + "stone bridge winter " * (i % 7 + 1)} for i in range(300)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_samples_follow_the_models_distribution(family):
    """The third token of many rows against the probabilities that the model gives after the two before."""
    model = tiny_dense(family)
    rows = sample(model, np.tile([7, 9], (6000, 1)), 4, 0.7, seed=1)
    assert rows.shape == (6000, 4)
    assert (rows[:, :2] == [7, 9]).all()
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([[7, 9]])).logits[0, -1] / 0.7, -1).numpy()
        first = int(np.bincount(rows[:, 2]).argmax())
        after = torch.softmax(model(torch.tensor([[7, 9, first]])).logits[0, -1] / 0.7, -1).numpy()
    for tokens, p in ((rows[:, 2], expected), (rows[rows[:, 2] == first, 3], after)):
        share = np.bincount(tokens, minlength=p.size) / len(tokens)
        assert len(tokens) > 100
        assert np.abs(share - p).max() < 4.5 * np.sqrt(0.25 / len(tokens))
        assert p.max() > 3 / p.size


def test_the_same_seed_gives_the_same_rows_and_low_temperature_the_likeliest():
    model = tiny_dense()
    start = np.array([[3], [4]])
    assert (sample(model, start, 12, 1.0, 7) == sample(model, start, 12, 1.0, 7)).all()
    assert (sample(model, start, 12, 1.0, 7) != sample(model, start, 12, 1.0, 8)).any()
    greedy = sample(model, start, 12, 1e-4, 7)
    ids = torch.tensor(start)
    with torch.no_grad():
        for _ in range(11):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert (greedy == ids.numpy()).all()


def test_files_starts_and_going_on(tmp_path, text):
    model, tokenizer = tiny_dense(), tiny_tokenizer()
    config = GenerateConfig(
        tokens=6 * 4 * 24,
        length=24,
        batch_size=4,
        starts={"free": 2, "chat": 1, "text": 1},
        seed_data=[text],
        seed_tokens=6,
    )
    seen = []
    files = generate_data(model, tokenizer, config, tmp_path / "a", lambda done, total: seen.append((done, total)))
    kinds = [file.stem.partition("-")[2] for file in files]
    assert kinds == ["free", "chat", "text", "free", "free", "chat"]
    assert seen[-1] == (6 * 4 * 24, 6 * 4 * 24)
    rows = {file: np.stack(list(read_tokens(file))) for file in files}
    assert all(found.shape == (4, 24) for found in rows.values())
    chat = tokenizer.decode(rows[files[1]][0])
    template = tokenizer.apply_chat_template([{"role": "user", "content": "X"}], tokenize=False)
    assert chat.startswith(template.partition("X")[0])
    documents = Path(text).read_text()
    assert all(tokenizer.decode(row[:6]).strip() in documents for row in rows[files[2]])

    for file in files[2:5]:
        file.unlink()
    kept = files[5].stat().st_mtime_ns
    again = generate_data(model, tokenizer, config, tmp_path / "a")
    assert again == files
    assert files[5].stat().st_mtime_ns == kept
    for file in files:
        assert (np.stack(list(read_tokens(file))) == rows[file]).all()


def test_tokens_train_like_the_text_they_came_from(tmp_path, text):
    tokenizer = tiny_tokenizer()
    written = list(tokenize(tokenizer, [text], "train", tmp_path / "tokens", None, 2000, seed=0))
    assert len(written) > 1
    assert sum(n for _, n in written) == sum(len(ids) for path, _ in written for ids in read_tokens(path))
    from_tokens = sorted(tuple(ids) for path, _ in written for ids in read_tokens(path))
    blocks = list(token_blocks(tokenizer, [text], 16, split="train"))
    assert sum(map(len, from_tokens)) + len(from_tokens) == pytest.approx(16 * len(blocks), abs=16)
    heldout = load_blocks(tokenizer, [str(tmp_path / "tokens")], 8, "heldout", None, 0)
    train = load_blocks(tokenizer, [str(tmp_path / "tokens")], 8, "train", None, 0)
    assert len(train) > 20 * len(heldout) > 0


def test_bad_token_files_and_settings(tmp_path, text):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(ProsparseError, match="not a file of tokens"):
        list(read_tokens(path))
    write_tokens(path, [np.arange(1000)], 2**17)
    assert next(read_tokens(path)).dtype == np.int32
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ProsparseError, match="cannot be read"):
        list(read_tokens(path))
    for settings, words in (
        ({"starts": {"poem": 1}}, "unknown start poem"),
        ({"starts": {"text": 1}}, "need real text"),
        ({"length": 10}, "length must be above"),
        ({"temperature": 0}, "must be above 0"),
    ):
        with pytest.raises(ProsparseError, match=words):
            GenerateConfig(**settings)
    plain = tiny_tokenizer()
    plain.chat_template = None
    with pytest.raises(ProsparseError, match="no chat template"):
        generate_data(tiny_dense(), plain, GenerateConfig(tokens=64, length=20, batch_size=2), tmp_path / "out")


def test_the_commands(tmp_path, text):
    tiny_dense().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    runner = CliRunner()
    arguments = ["generate-data", str(tmp_path / "dense"), "-o", str(tmp_path / "own"), "-n", "200", "--length", "20"]
    result = runner.invoke(cli, [*arguments, "-b", "5", "--starts", "free,chat:1", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "2 files, 200 tokens" in result.output
    result = runner.invoke(cli, ["tokenize", str(tmp_path / "dense"), "--data", text, "-o", str(tmp_path / "t")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "t" / "00000.safetensors").exists()
