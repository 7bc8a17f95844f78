"""FFN files: a run's FFN weights alone, the whole model put together again, and the embedded model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from export_models import relative_l2, stock_logits, tiny_run
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize

from prosparse_pipe import shipped
from prosparse_pipe.checkpoint import resolve_gguf
from prosparse_pipe.cli import cli
from prosparse_pipe.convert.ffn_file import assemble, base_id, open_gguf, quantize_rows, write_ffn
from prosparse_pipe.convert.hf_to_gguf import open_source
from prosparse_pipe.convert.quantize import quantize
from prosparse_pipe.errors import CheckpointError, GGUFError, ProsparseError
from prosparse_pipe.export import export_ffn
from prosparse_pipe.ffn_weights import load_ffn_weights
from prosparse_pipe.relu import find_ffns, load_sparse_model
from prosparse_pipe.train import train
from prosparse_pipe.train_config import TrainConfig

TOKENS = [5, 77, 210, 9, 300, 41, 41, 8, 120, 33, 250, 19]


def export(run: Path, *arguments: str) -> Path:
    result = CliRunner().invoke(cli, ["export", str(run), *arguments])
    assert result.exit_code == 0, result.output
    return Path(result.stdout.splitlines()[0].rsplit("  ", 1)[0])


def dense_gguf(folder: Path) -> Path:
    """A small dense model as people have it: one GGUF, quantized, without our keys and scales."""
    exported = GGUFReader(export(tiny_run(folder / "origin", "llama"), "-q", "F32"))
    path = folder / "Tiny-Base.F32.gguf"
    writer = GGUFWriter(path, "llama")
    for name, field in exported.fields.items():
        if not name.startswith(("GGUF.", "general.", "prosparse.")):
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    writer.add_name("Tiny Base")
    for tensor in exported.tensors:
        if not tensor.name.endswith(".scale"):
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    quantize(path, folder / "Tiny-Base.Q8_0.gguf", "Q8_0")
    return folder / "Tiny-Base.Q8_0.gguf"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"The dog {i} jumps over the lazy fox. " * 6}) + "\n" for i in range(200))
    )
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return dense_gguf(tmp_path_factory.mktemp("base"))


def trained(folder: Path, base: Path, text: str, **settings) -> Path:
    values = {"steps": 2, "seq_len": 32, "batch_size": 2, "heldout_tokens": 128, "lr": 1e-2, "bf16": "off"}
    config = TrainConfig(model=str(base), data=[text], out=str(folder), threshold=0.02, **values | settings)
    result = train(config)
    assert result is not None
    return result.run


@pytest.fixture(scope="module")
def run(tmp_path_factory, base, text) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "run", base, text, trainable="ffn")


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_the_whole_model_is_the_exported_one(tmp_path, base, run, kind):
    """Other tensors bit for bit the base's; FFN matrices those of a direct export of the same type."""
    ffn = export_ffn(run, "F32", out=tmp_path)
    assemble(ffn, base, tmp_path / "whole.gguf", kind)
    whole, direct = GGUFReader(tmp_path / "whole.gguf"), GGUFReader(export(run, "-q", kind, "-o", str(tmp_path / "d")))
    assert base_id(whole) != base_id(open_gguf(ffn))
    ours = {tensor.name: tensor for tensor in whole.tensors}
    for tensor in GGUFReader(base).tensors:
        if not tensor.name.endswith(("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")):
            assert ours[tensor.name].tensor_type == tensor.tensor_type
            assert np.array_equal(ours[tensor.name].data, tensor.data), tensor.name
    for tensor in direct.tensors:
        if "ffn_" in tensor.name:
            assert ours[tensor.name].tensor_type == tensor.tensor_type
            assert np.array_equal(ours[tensor.name].data, tensor.data), tensor.name
    assert set(ours) == {tensor.name for tensor in direct.tensors}
    for name in (*(n for n in direct.fields if n.startswith("prosparse.")), "tokenizer.chat_template", "general.name"):
        assert whole.get_field(name).contents() == direct.get_field(name).contents(), name
    direct_path = next((tmp_path / "d").glob("*.gguf"))
    # the direct export keeps the dequantized attention in `kind`, the base's bits in the other: 8 bits apart at most
    apart = relative_l2(stock_logits(tmp_path / "whole.gguf", TOKENS, 1), stock_logits(direct_path, TOKENS, 1))
    assert apart < {"F32": 0.05, "F16": 0.05, "Q8_0": 1e-5}[kind]


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q5_0", "F16"])
def test_blocks_over_rows_lose_no_more_than_their_type(tmp_path, run, kind):
    ffn = GGUFReader(export_ffn(run, kind, out=tmp_path))
    model, _, _ = load_sparse_model(run)
    ffns = find_ffns(model)
    source = open_source(run, None)
    error = {"F16": 1e-3, "Q8_0": 0.01, "Q6_K": 0.03, "Q5_K": 0.05, "Q5_0": 0.06, "Q4_K": 0.1}[kind]
    for tensor in ffn.tensors:
        assert tensor.tensor_type.name == kind
        _, il, part, _ = tensor.name.replace("ffn_", "").split(".")
        wanted = source.weights.read(f"model.layers.{il}.mlp.{part}_proj.weight").numpy()
        found = np.sort(dequantize(tensor.data, tensor.tensor_type).ravel())
        assert relative_l2(found, np.sort(wanted.ravel())) < error  # the same numbers in another order
    assert ffn.get_field("prosparse.ffn.base").contents() == "Tiny Base"
    before = [ffn.gate.weight.detach().clone() for ffn in ffns]
    load_ffn_weights(ffns, tmp_path / f"{source.name}.ffn.gguf")
    after = [np.sort(ffn.gate.weight.detach().numpy().sum(1)) for ffn in ffns]
    for old, new in zip(before, after, strict=True):
        assert relative_l2(new, np.sort(old.numpy().sum(1))) < 3 * error


def test_quantize_rows_is_ggmls_quantizer():
    values = np.random.default_rng(0).normal(size=(5, 512)).astype(np.float32)
    for kind, error in ((GGMLQuantizationType.Q6_K, 0.02), (GGMLQuantizationType.Q8_0, 0.006)):
        coded = quantize_rows(values, kind)
        assert coded.shape == (5, {"Q6_K": 420, "Q8_0": 544}[kind.name])
        assert relative_l2(dequantize(coded, kind), values) < error


def test_what_is_refused(tmp_path, base, run, text):
    other = dense_gguf(tmp_path)
    with pytest.raises(CheckpointError, match=r"is not the base model's"):
        everything = trained(tmp_path / "all", base, text, trainable="all")
        export_ffn(everything, "Q6_K", out=tmp_path / "x")
    assert not list((tmp_path / "x").glob("*"))
    ffn = export_ffn(run, "Q8_0", out=tmp_path)
    reader = GGUFReader(other, "r+")
    next(t for t in reader.tensors if t.name == "blk.0.attn_q.weight").data[0, 2] ^= 1
    reader.data.flush()
    with pytest.raises(GGUFError, match=r"is not the base model of"):
        assemble(ffn, other, tmp_path / "whole.gguf")
    assert not (tmp_path / "whole.gguf").exists()
    with pytest.raises(GGUFError, match="is not an FFN file"):
        assemble(base, base, tmp_path / "whole.gguf")
    with pytest.raises(ProsparseError, match="unknown type Q2_X"):
        export_ffn(run, "q2_x", out=tmp_path)
    with pytest.raises(GGUFError, match="is not a GGUF"):
        export_ffn(run, "Q6_K", str(run), out=tmp_path)
    with pytest.raises(GGUFError, match="is not a whole model"):
        resolve_gguf(ffn)
    narrow = tiny_run(tmp_path / "narrow", "llama", intermediate_size=36)
    with pytest.raises(CheckpointError, match=r"ffn|is not the base"):
        write_ffn(open_source(narrow, None), base, tmp_path / "n.gguf")
    truncated = tmp_path / "cut.ffn.gguf"
    truncated.write_bytes(ffn.read_bytes()[:2000])
    with pytest.raises(GGUFError, match="cannot be read"):
        assemble(truncated, base, tmp_path / "whole.gguf")
    for arguments, words in (
        (["--ffn-only", "--unsorted"], "takes one --type"),
        (["--base", "x.gguf"], "goes with --ffn-only"),
    ):
        result = CliRunner().invoke(cli, ["export", str(run), *arguments])
        assert result.exit_code == 2
        assert words in result.output


@pytest.fixture
def embedded(tmp_path, base, run, monkeypatch) -> Path:
    """The tiny run as the embedded model of this installation; returns its FFN file."""
    models = tmp_path / "models"
    ffn = export_ffn(run, "Q6_K", out=models, name=shipped.FFN_NAME.removesuffix(".ffn.gguf"))
    monkeypatch.setattr(shipped, "MODELS", models)
    monkeypatch.setattr(shipped, "DEFAULT_BASE", str(base))
    monkeypatch.setenv("PROSPARSE_CACHE", str(tmp_path / "cache"))
    return ffn


def test_the_embedded_model_is_put_together_once(tmp_path, embedded, base):
    first = shipped.resolve_model(None)
    assert first.parent == tmp_path / "cache"
    stamp = first.stat().st_mtime_ns
    assert shipped.resolve_model(shipped.SHIPPED_NAME) == first
    assert first.stat().st_mtime_ns == stamp
    assert list(first.parent.iterdir()) == [first]
    result = CliRunner().invoke(cli, ["chat", "-p", "The dog", "-n", "4", "--temp", "0", "-c", "256", "-t", "1"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(cli, ["bench", "-p", "8", "-n", "4", "-r", "1", "-t", "1", "-c", "256"])
    assert result.exit_code == 0, result.output
    changed = bytearray(embedded.read_bytes())
    changed[changed.index(b"prosparse.id") + 25] ^= 1  # a digit of the id
    embedded.write_bytes(changed)
    assert shipped.resolve_model(None) != first
    assert shipped.resolve_model(str(base)) == base


def test_an_embedded_model_that_cannot_be_put_together(tmp_path, embedded, monkeypatch):
    monkeypatch.setattr(shipped, "DEFAULT_BASE", str(tmp_path / "missing.gguf"))
    with pytest.raises(CheckpointError, match=r"needs its base.*pip install"):
        shipped.shipped_model()
    origin = next(path for path in embedded.parent.parent.parent.rglob("Tiny-Base.F32.gguf"))
    monkeypatch.setattr(shipped, "DEFAULT_BASE", str(origin))
    with pytest.raises(GGUFError, match=r"is not the base model of.*force-reinstall"):
        shipped.shipped_model()
    assert not list((tmp_path / "cache").glob("*"))
    shutil.rmtree(embedded.parent)
    with pytest.raises(CheckpointError, match="no embedded model"):
        shipped.resolve_model(shipped.SHIPPED_NAME)


def test_a_cache_that_cannot_be_written(tmp_path, embedded, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PROSPARSE_CACHE", str(tmp_path / "file" / "cache"))
    result = CliRunner().invoke(cli, ["chat", "-p", "x"])
    assert result.exit_code == 1
    assert "PROSPARSE_CACHE" in result.output
