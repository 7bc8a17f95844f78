"""Text into blocks: formats, packing, the held-out split, order, and what is said of bad input."""

import json

import numpy as np
import pytest
from export_models import tiny_tokenizer

from prosparse_pipe.data import (
    DataError,
    PackedBlocks,
    interleave,
    load_blocks,
    read_documents,
    read_source,
    render,
    token_blocks,
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def documents(n):
    return [
        {"text": f"Document {i} speaks of {['rivers', 'mills', 'bridges'][i % 3]} and the number {i * 7}."}
        for i in range(n)
    ]


def test_chat_forms_render_alike(tokenizer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    assert render({"messages": messages}, tokenizer) == expected
    sharegpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    assert render({"conversations": sharegpt}, tokenizer) == expected
    assert render({"instruction": "Hi", "input": "", "output": "Hello"}, tokenizer) == expected
    assert "a\n\nb" in render({"instruction": "a", "input": "b", "output": "c"}, tokenizer)
    assert render({"text": "plain"}, tokenizer) == "plain"
    with pytest.raises(DataError, match="it has: title"):
        render({"title": "x"}, tokenizer)
    for broken in ([{"role": "user"}], ["Hi"], [{"role": "user", "content": None}]):
        with pytest.raises(DataError, match="chat cannot be read"):
            render({"messages": broken}, tokenizer)


def test_sources_take_turns(tmp_path, tokenizer):
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": f"first {i}"} for i in range(50)])
    second = write_jsonl(tmp_path / "b.jsonl", [{"text": f"second {i}"} for i in range(20)])
    rows = [row["text"].split()[0] for row in interleave([read_source(first), read_source(second)])]
    assert rows[:40] == ["first", "second"] * 20
    assert rows[40:] == ["first"] * 30


def test_text_without_blank_lines_is_cut_as_well(tmp_path):
    lines = [f"line {i} of a file that has no blank lines" for i in range(500)]
    (tmp_path / "log.txt").write_text("\n".join(lines))
    found = [row["text"] for row in read_source(str(tmp_path / "log.txt"))]
    assert len(found) > 4
    assert "\n".join(found).splitlines() == lines


def test_formats_hold_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = documents(20)
    jsonl = write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    for source in (jsonl, tmp_path / "b.json", tmp_path / "c.parquet"):
        assert list(read_source(str(source))) == rows
    assert len(list(read_source(str(tmp_path)))) == 60
    assert len(list(read_source(str(tmp_path / "*.json*")))) == 40


def test_plain_text_keeps_every_paragraph(tmp_path):
    paragraphs = [f"Paragraph {i} " + "word " * 60 for i in range(40)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    found = [row["text"] for row in read_source(str(tmp_path / "book.txt"))]
    assert len(found) > 3
    assert [p.strip() for text in found for p in text.split("\n\n")] == [p.strip() for p in paragraphs]


def test_chitchat_alternates_speakers(tokenizer):
    row = next(read_source("chitchat"))
    assert [m["role"] for m in row["messages"][:4]] == ["user", "assistant"] * 2


def test_split_is_disjoint_complete_and_free_of_duplicates(tmp_path, tokenizer):
    rows = documents(600)
    source = write_jsonl(tmp_path / "d.jsonl", rows + rows[:100])
    train = list(read_documents(tokenizer, [source], "train", 0))
    heldout = list(read_documents(tokenizer, [source], "heldout", 0))
    assert sorted(train + heldout) == sorted(row["text"] for row in rows)
    assert 1 <= len(heldout) <= 40
    reordered = write_jsonl(tmp_path / "e.jsonl", rows[::-1])
    assert set(read_documents(tokenizer, [reordered], "heldout", 5)) == set(heldout)


def test_blocks_hold_the_documents_in_order(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "d.jsonl", documents(100))
    blocks = load_blocks(tokenizer, [source], 32, "train", None, seed=3)
    text = tokenizer.decode(blocks.reshape(-1))
    expected = tokenizer.eos_token.join(read_documents(tokenizer, [source], "train", 3))
    assert blocks.shape[1] == 32
    assert expected.startswith(text[: len(text) - 40])
    again = load_blocks(tokenizer, [source], 32, "train", None, seed=3)
    other = load_blocks(tokenizer, [source], 32, "train", None, seed=4)
    assert np.array_equal(blocks, again)
    assert not np.array_equal(blocks, other)
    assert sum(1 for _ in token_blocks(tokenizer, [source], 32, limit_tokens=64)) == 2


def test_passes_are_shuffled_and_complete():
    blocks = np.arange(40, dtype=np.int32).reshape(10, 4)
    order = PackedBlocks(blocks, n_samples=30, seed=1)
    first = [int(order[i]["input_ids"][0]) for i in range(30)]
    assert len(order) == 30
    assert sorted(first[:10]) == sorted(first[10:20]) == list(range(0, 40, 4))
    assert first[:10] != first[10:20]
    assert [int(order[i]["input_ids"][0]) for i in (25, 3, 14)] == [first[25], first[3], first[14]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "line 2 is not valid JSON"),
        ("a.json", '{"text": 1}', "does not hold a list"),
        ("a.jsonl", '{"title": "x"}\n', "neither `text` nor a chat"),
        ("a.csv", "x", "unknown format .csv"),
        ("a.parquet", "x", "not a readable parquet"),
        ("a.txt", "", "0 tokens, fewer than one block"),
        ("a.txt", "short", "fewer than one block of 64"),
    ],
)
def test_bad_input_is_named(name, content, message, tmp_path, tokenizer):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        list(token_blocks(tokenizer, [str(tmp_path / name)], 64))


def test_missing_sources_are_named(tokenizer):
    for source in ("missing.txt", "./nowhere", "no-such-name"):
        with pytest.raises(DataError, match="does not exist"):
            list(token_blocks(tokenizer, [source], 64))
