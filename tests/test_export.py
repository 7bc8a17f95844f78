"""`export` from the command line: quantizing, names, the sidecar, the real default model, and errors of one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from export_models import relative_l2, stock, stock_greedy, stock_logits, tiny_run, torch_greedy, torch_logits
from gguf import GGUFReader
from gguf.quants import dequantize

from prosparse_pipe.checkpoint import PREDICTORS_NAME, SparseInfo, load_activation_rates, resolve_base_model
from prosparse_pipe.commands.export import command
from prosparse_pipe.convert.hf_to_gguf import default_name, open_source
from prosparse_pipe.convert.predictor_to_gguf import load_predictor
from prosparse_pipe.convert.weights import Weights, fingerprint
from prosparse_pipe.errors import GGUFError
from prosparse_pipe.relu import substitute_relu

TOKENS = [5, 77, 210, 9, 300, 41, 41, 8, 120, 33, 250, 19]
WIDE = {"hidden_size": 256, "intermediate_size": 512}  # K-quants need rows of 256


def run_export(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def with_predictors(run: Path, kind: str = "post_norm", rank: int = 8) -> Path:
    """Adds random predictors to a run folder, as `predictor` saves them."""
    from safetensors.numpy import save_file

    config = json.loads((run / "config.json").read_text())
    d, n_ff, n_layer = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    rng = np.random.default_rng(5)
    tensors = {}
    for il in range(n_layer):
        tensors[f"layers.{il}.fc1.weight"] = rng.normal(size=(rank, d)).astype(np.float16)
        tensors[f"layers.{il}.fc2.weight"] = rng.normal(size=(n_ff, rank)).astype(np.float16)
    layers = [{"rank": rank, "recall": 0.96, "threshold": -0.5} for _ in range(n_layer)]
    metadata = {"input": kind, "layers": json.dumps(layers), "fingerprint": fingerprint(run)}
    save_file(tensors, run / PREDICTORS_NAME, metadata)
    return run


def test_quantized_files_load_in_stock_and_stay_close(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "runs" / "a", "llama", **WIDE)
    result = run_export("--gguf", run, "-q", "F32,Q8_0", "-q", "q4_0", "-q", "Q4_K_M", "-q", "BF16")
    assert result.exit_code == 0, result.output
    folder = run / "gguf"
    names = ["F32", "Q8_0", "Q4_0", "Q4_K_M", "BF16"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"Tiny-1K-ProSparse-{name}.gguf" for name in names)
    assert [line.split("-")[-1].split(".")[0] for line in result.stdout.splitlines()] == names
    expected = torch_logits(run, TOKENS)
    exact = {tensor.name: tensor.data for tensor in GGUFReader(folder / "Tiny-1K-ProSparse-F32.gguf").tensors}
    # of the logits, and of each weight: half a step of 8 bits, or of 4 bits in groups of 32
    for name, of_logits, of_weights in (
        ("F32", 1e-4, 0),
        ("BF16", 0.05, 0.004),
        ("Q8_0", 0.15, 0.01),
        ("Q4_K_M", 1, 0.12),
        ("Q4_0", 1, 0.12),
    ):
        path = folder / f"Tiny-1K-ProSparse-{name}.gguf"
        assert relative_l2(stock_logits(path, TOKENS, n_batch=1), expected) < of_logits
        for tensor in GGUFReader(path).tensors:
            weights = dequantize(tensor.data, tensor.tensor_type)
            assert relative_l2(weights, exact[tensor.name].reshape(weights.shape)) <= of_weights
    ids = set()
    for name in names:
        reader = GGUFReader(folder / f"Tiny-1K-ProSparse-{name}.gguf")
        ids.add(reader.get_field("prosparse.id").contents())
        kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        assert kinds["blk.1.ffn_up.scale"] == "F32"
    assert len(ids) == 1


def test_format_flag_and_newest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROSPARSE_RUNS", str(tmp_path / "runs"))
    result = run_export("--gguf")
    assert result.exit_code == 1
    assert "no finished run" in result.output
    for position, name in enumerate(("old", "new")):
        tiny_run(tmp_path / "runs" / name, "llama")
        os.utime(tmp_path / "runs" / name / "prosparse.json", (1e9 + position, 1e9 + position))
    assert run_export("--gguf", "-q", "F16").exit_code == 0
    assert not (tmp_path / "runs" / "old" / "gguf").exists()
    assert (tmp_path / "runs" / "new" / "gguf" / "Tiny-1K-ProSparse-F16.gguf").is_file()
    out = tmp_path / "out"
    assert run_export(tmp_path / "runs" / "old", "--out", out, "--name", "mine").exit_code == 0
    assert [path.name for path in out.iterdir()] == ["mine-Q8_0.gguf"]


def test_errors_are_one_line(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "runs" / "a", "llama", rates=False, **WIDE)
    for arguments, words in (
        ((run,), "no activation_rates.safetensors"),
        ((run, "--unsorted", "-q", "Q9_9"), "unknown type Q9_9"),
        ((run, "--unsorted", "-q", "IQ1_S"), "requires an imatrix"),
        ((run, "--unsorted", "--imatrix", run / "config.json"), "not an importance matrix"),
        ((tmp_path / "nowhere",), "is not a folder"),
    ):
        result = run_export(*arguments)
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        assert words in next(line for line in result.output.splitlines() if line.startswith("error: "))
    assert list((run / "gguf").iterdir()) == []
    assert run_export(run, "--unsorted", "-q", "F16").exit_code == 0
    reader = GGUFReader(run / "gguf" / "Tiny-1K-ProSparse-F16.gguf")
    assert reader.get_field("prosparse.sorted").contents() is False


def test_interrupting_the_export_leaves_nothing(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "runs" / "a", "llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    process = subprocess.Popen(
        [sys.executable, "-m", "prosparse_pipe", "export", str(run), "-q", "IQ4_XS"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list((run / "gguf").glob(".*")):
        time.sleep(0.001)  # the first tensor is being read: torch makes an error of its own of the interrupt there
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, log = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in log
    assert list((run / "gguf").iterdir()) == []


def test_imatrix_reaches_the_quantizer(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    run = tiny_run(tmp_path / "runs" / "a", "llama", **WIDE)
    writer = GGUFWriter(tmp_path / "imatrix.gguf", "imatrix")
    importance = np.linspace(0.001, 100, 256, dtype=np.float32)
    for part in ("gate", "up"):
        for il in range(2):
            writer.add_tensor(f"blk.{il}.ffn_{part}.weight.in_sum2", importance[None] * 10)
            writer.add_tensor(f"blk.{il}.ffn_{part}.weight.counts", np.full((1, 1), 10, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = run_export(run, "-q", "Q4_K_S", "--name", "plain")
    assert result.exit_code == 0, result.output
    result = run_export(run, "-q", "Q4_K_S", "--name", "weighted", "--imatrix", tmp_path / "imatrix.gguf")
    assert result.exit_code == 0, result.output
    gates = {}
    for name in ("plain", "weighted"):
        tensors = {tensor.name: tensor for tensor in GGUFReader(run / "gguf" / f"{name}-Q4_K_S.gguf").tensors}
        gates[name] = bytes(tensors["blk.0.ffn_gate.weight"].data)
    assert gates["plain"] != gates["weighted"]


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("/x/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct-ProSparse"),
        ("Qwen/Qwen2.5-0.5B", "Qwen2.5-0.5B-ProSparse"),
        ("C:\\models\\Tiny Llama", "Tiny-Llama-135K-ProSparse"),
        ("runs/prosparse-7b", "prosparse-7b"),
    ],
)
def test_names_follow_the_ecosystem(base: str, expected: str, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", "llama")
    assert default_name(SparseInfo(provenance={"base_model": base}), run, Weights(run)) == expected


def test_sidecar_is_in_the_order_of_the_file(tmp_path: Path) -> None:
    run = with_predictors(tiny_run(tmp_path / "runs" / "a", "llama"))
    result = run_export(run, "-q", "F32")
    assert result.exit_code == 0, result.output
    model = run / "gguf" / "Tiny-1K-ProSparse-F32.gguf"
    sidecar = run / "gguf" / "Tiny-1K-ProSparse.predictor.gguf"
    assert str(sidecar) in result.stdout
    predictor = load_predictor(sidecar, model)
    assert predictor.input == "post_norm"
    assert predictor.rank == [8, 8]
    assert predictor.threshold == pytest.approx([-0.5, -0.5])
    assert predictor.recall == pytest.approx([0.96, 0.96])
    from safetensors.numpy import load_file

    saved, rates = load_file(run / PREDICTORS_NAME), load_activation_rates(run)
    for il in range(2):
        order = np.argsort(-rates[il], kind="stable")
        assert (predictor.fc1[il] == saved[f"layers.{il}.fc1.weight"]).all()
        assert (predictor.fc2[il] == saved[f"layers.{il}.fc2.weight"][order]).all()
        assert (predictor.activation_rate[il] == rates[il][order]).all()


def test_pre_norm_predictor_gives_the_same_logits_after_the_norm(tmp_path: Path) -> None:
    run = with_predictors(tiny_run(tmp_path / "runs" / "a", "llama"), "pre_norm")
    assert run_export(run, "-q", "F32").exit_code == 0
    model = run / "gguf" / "Tiny-1K-ProSparse-F32.gguf"
    predictor = load_predictor(run / "gguf" / "Tiny-1K-ProSparse.predictor.gguf", model)
    assert predictor.input == "post_norm"
    from safetensors.numpy import load_file

    saved, weights = load_file(run / PREDICTORS_NAME), load_file(run / "model.safetensors")
    source = open_source(run, load_activation_rates(run))
    stream = np.random.default_rng(0).normal(size=64) * 30
    unit = stream / np.sqrt(np.mean(stream**2))
    for il in range(2):
        after = unit * weights[f"model.layers.{il}.post_attention_layernorm.weight"]
        fc1, fc2 = (saved[f"layers.{il}.fc{i}.weight"].astype(np.float64) for i in (1, 2))
        expected = (fc2 @ np.maximum(fc1 @ unit, 0))[source.orders[il]]
        got = predictor.fc2[il].astype(np.float64) @ np.maximum(predictor.fc1[il].astype(np.float64) @ after, 0)
        np.testing.assert_allclose(got, expected, atol=0.02 * np.abs(expected).max())


def test_wrong_sidecars_are_refused(tmp_path: Path) -> None:
    run = with_predictors(tiny_run(tmp_path / "runs" / "a", "llama"))
    other = with_predictors(tiny_run(tmp_path / "runs" / "b", "llama", num_hidden_layers=3))
    for folder in (run, other):
        assert run_export(folder, "-q", "F32").exit_code == 0
    model, sidecar = (run / "gguf" / f"Tiny-1K-ProSparse{end}" for end in ("-F32.gguf", ".predictor.gguf"))
    for first, second, words in (
        (other / "gguf" / sidecar.name, model, "belongs to another model"),
        (model, model, "is not a predictor sidecar"),
        (run / "config.json", model, "cannot be read as GGUF"),
        (run / "nothing.gguf", model, "does not exist"),
        (sidecar, sidecar, "is not a sparse model"),
    ):
        with pytest.raises(GGUFError, match=words) as error:
            load_predictor(first, second)
        assert "\n" not in str(error.value)
    sidecar.write_bytes(sidecar.read_bytes()[:-5000])
    with pytest.raises(GGUFError, match=r"truncated|cannot be read"):
        load_predictor(sidecar, model)


def test_predictors_of_other_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run = with_predictors(tiny_run(tmp_path / "runs" / "a", "llama"))
    weights = load_file(run / "model.safetensors")
    save_file({name: weight * 1.5 for name, weight in weights.items()}, run / "model.safetensors")
    result = run_export(run, "-q", "F32")
    assert result.exit_code == 1
    assert "was trained for other weights" in result.output


PROMPTS = ("What is the capital of France?", "Write one line of Python that adds 2 and  3.")


def test_default_model_gives_transformers_greedy_tokens_in_stock(tmp_path: Path) -> None:
    """SmolLM2 with ReLU (untrained), F16 and F32 files, chat template and tokenizer included."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from prosparse_pipe.convert.vocab import restore_pre_tokenizer

    folder, name = os.path.split(resolve_base_model("smollm2-135m-instruct"))
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    restore_pre_tokenizer(tokenizer, Path(folder) / name)
    ffns = substitute_relu(model)
    run = tmp_path / "run"
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    with torch.no_grad():
        for weight in model.parameters():
            weight.data = weight.data.half().float()  # both files then hold the weights of the checkpoint
        for ffn in ffns:
            ffn.down.weight.mul_(0.25)  # untrained ReLU at full size makes the model babble
            ffn.down.weight.data = ffn.down.weight.data.half().float()
    model.save_pretrained(run)
    tokenizer.save_pretrained(run)
    SparseInfo(provenance={"base_model": name}).save(run)
    result = run_export(run, "--unsorted", "-q", "F32,F16")
    assert result.exit_code == 0, result.output
    asked = []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        answer = model.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        asked.append((text, ids[0].tolist(), answer.tolist()))
    for kind in ("F32", "F16"):
        llama = stock(run / "gguf" / f"SmolLM2-135M-Instruct-ProSparse-{kind}.gguf", n_threads=2)
        assert llama.metadata["tokenizer.ggml.pre"] == "smollm"
        assert llama.metadata["tokenizer.chat_template"] == tokenizer.chat_template
        for text, ids, expected in asked:
            assert llama.tokenize(text.encode(), add_bos=False, special=True) == ids
            llama.reset()
            llama.eval(ids)
            found = []
            for _ in range(24):
                scores = np.array(llama.scores[llama.n_tokens - 1])
                scores[model.generation_config.eos_token_id] = -np.inf  # as min_new_tokens does
                found.append(int(scores.argmax()))
                llama.eval(found[-1:])
            assert found == expected
        llama.close()


def test_greedy_tokens_survive_a_fatrelu_threshold_as_plain_relu(tmp_path: Path) -> None:
    """Stock computes the model before the threshold shift; the threshold is the backend's."""
    run = tiny_run(tmp_path / "run", "llama", threshold=0.5)
    assert run_export(run, "-q", "F32").exit_code == 0
    path = run / "gguf" / "Tiny-1K-ProSparse-F32.gguf"
    assert GGUFReader(path).get_field("prosparse.activation").contents() == "fatrelu"
    assert stock_greedy(path, TOKENS, 24) == torch_greedy(run, TOKENS, 24)  # plain transformers: ReLU too
