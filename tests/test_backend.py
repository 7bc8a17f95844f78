"""The sparse backend against stock llama.cpp on the same file, and against a float64 reference."""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from gguf_models import (
    Shape,
    TinyModel,
    Type,
    greedy,
    llama_arguments,
    load_stock,
    logits,
    random_tokens,
    reference_logits,
    relative_l2,
    write_lora,
    write_model,
)

import prosparse_pipe
from prosparse_pipe import backend, runtime
from prosparse_pipe.errors import BackendError, GGUFError, ProsparseError

TOKENS = random_tokens(40)

# Types whose down matrix is transposed, and some that keep their layout.
TRANSPOSED = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
TRANSPOSED += ["IQ4_NL", "IQ4_XS"]
KEPT = ["IQ2_XXS", "IQ3_XXS", "TQ1_0", "TQ2_0", "MXFP4"]


@pytest.fixture(scope="module")
def f32(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_model(tmp_path_factory.mktemp("f32") / "tiny-F32.gguf")


@pytest.fixture(scope="module")
def q8_0(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_model(tmp_path_factory.mktemp("q8_0") / "tiny-Q8_0.gguf", ffn_type=Type.Q8_0)


@contextlib.contextmanager
def sparse(model: TinyModel, **changes: Any) -> Iterator[llama_cpp.Llama]:
    llama = runtime.load(model.path, **llama_arguments(**changes))
    assert runtime.activation_stats(llama) is not None
    try:
        yield llama
    finally:
        llama.close()


@contextlib.contextmanager
def stock(model: TinyModel, **changes: Any) -> Iterator[llama_cpp.Llama]:
    llama = load_stock(model.path, **changes)
    try:
        yield llama
    finally:
        llama.close()


@contextlib.contextmanager
def context_parameters(**values: Any) -> Iterator[None]:
    """Llama() made inside gets context parameters that it has no argument for."""
    module = llama_cpp.llama_cpp
    original = module.llama_context_default_params

    def changed() -> Any:
        params = original()
        for name, value in values.items():
            setattr(params, name, value)
        return params

    module.llama_context_default_params = changed
    try:
        yield
    finally:
        module.llama_context_default_params = original


def run_python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter; `code` finds `arguments` in sys.argv[1:]."""
    here = str(Path(__file__).parent)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "2", **environment},
    )


# ---- the numbers


@pytest.mark.parametrize(("name", "limit"), [("F32", 1e-4), ("F16", 2e-3)])
def test_float_weights_match_stock(tmp_path: Path, name: str, limit: float) -> None:
    model = write_model(tmp_path / "tiny.gguf", ffn_type=Type[name])
    with stock(model) as dense, sparse(model) as llama:
        for batch in (None, 1):
            assert relative_l2(logits(llama, TOKENS, batch), logits(dense, TOKENS, batch)) <= limit
        assert greedy(llama, TOKENS[:8], 48) == greedy(dense, TOKENS[:8], 48)


@pytest.mark.parametrize("name", TRANSPOSED + KEPT)
def test_every_type_is_as_close_to_the_reference_as_stock(tmp_path: Path, name: str) -> None:
    """Stock rounds h to 8 bits before the down product; ours keeps it in f32, where the matrix is transposed."""
    errors: dict[str, list[float]] = {"stock": [], "decode": [], "prefill": []}
    model = write_model(tmp_path / "tiny.gguf", ffn_type=Type[name], seed=5)
    with stock(model) as dense, sparse(model) as llama:
        for seed in range(3):
            tokens = random_tokens(24, seed)
            reference = reference_logits(model, tokens)
            errors["stock"].append(relative_l2(logits(dense, tokens, 1), reference))
            errors["decode"].append(relative_l2(logits(llama, tokens, 1), reference))
            errors["prefill"].append(relative_l2(logits(llama, tokens), reference))
    limit = np.mean(errors["stock"]) * 1.02
    assert np.mean(errors["decode"]) <= limit
    assert np.mean(errors["prefill"]) <= limit
    assert max(errors["decode"]) < 0.1, "the reference itself does not fit the file"


@pytest.mark.parametrize(("ffn", "down"), [("Q4_K", "Q6_K"), ("Q8_0", "F16"), ("F32", "Q4_0"), ("Q4_0", "IQ3_S")])
def test_down_of_another_type(tmp_path: Path, ffn: str, down: str) -> None:
    """As in Q4_K_M files."""
    model = write_model(tmp_path / "tiny.gguf", ffn_type=Type[ffn], down_type=Type[down])
    reference = reference_logits(model, TOKENS)
    with stock(model) as dense, sparse(model) as llama:
        limit = relative_l2(logits(dense, TOKENS, 1), reference) * 1.02
        assert relative_l2(logits(llama, TOKENS, 1), reference) <= limit
        assert relative_l2(logits(llama, TOKENS), reference) <= limit


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 8, 9, 16, 17, 31, None])
def test_prefill_in_pieces(f32: TinyModel, batch: int | None) -> None:
    with sparse(f32) as llama:
        assert relative_l2(logits(llama, TOKENS, batch), reference_logits(f32, TOKENS)) <= 1e-5


def test_only_the_last_token_has_logits(f32: TinyModel) -> None:
    """llama.cpp then computes the last layer's FFN for one token of many."""
    with sparse(f32, logits_all=False) as llama:
        llama.eval(TOKENS)
        last = np.array(llama._ctx.get_logits_ith(-1)[: f32.shape.n_vocab], np.float64)
    assert relative_l2(last, reference_logits(f32, TOKENS)[-1]) <= 1e-5


@pytest.mark.parametrize(
    "shape", [Shape(n_embd=96, n_ff=352, n_head=3, n_head_kv=1), Shape(n_embd=72, n_ff=33, n_head=2)]
)
def test_odd_sizes(tmp_path: Path, shape: Shape) -> None:
    """Embeddings that are no multiple of the kernels' chunks, and few neurons."""
    model = write_model(tmp_path / "tiny.gguf", shape=shape)
    with sparse(model) as llama:
        for batch in (1, 5, None):
            assert relative_l2(logits(llama, TOKENS, batch), reference_logits(model, TOKENS)) <= 1e-5


@pytest.mark.parametrize("n_threads", [2, 3, 5])
def test_number_of_threads(tmp_path: Path, n_threads: int) -> None:
    """The same sums in the same order, whatever the number of threads."""
    model = write_model(tmp_path / "tiny.gguf", ffn_type=Type.Q4_K, down_type=Type.Q6_K)
    tokens = TOKENS[:20]
    with sparse(model) as one, sparse(model, n_threads=n_threads, n_threads_batch=n_threads) as many:
        for batch in (1, 5, None):
            assert relative_l2(logits(many, tokens, batch), logits(one, tokens, batch)) <= 1e-6


# ---- what llama.cpp can do besides


def test_quantized_cache_and_flash_attention(f32: TinyModel) -> None:
    changes = {"type_k": llama_cpp.GGML_TYPE_Q8_0, "type_v": llama_cpp.GGML_TYPE_Q8_0, "flash_attn": True}
    with stock(f32, **changes) as dense, sparse(f32, **changes) as llama:
        assert relative_l2(logits(llama, TOKENS, 1), logits(dense, TOKENS, 1)) <= 1e-3
        assert relative_l2(logits(llama, TOKENS), logits(dense, TOKENS)) <= 1e-3


def test_parallel_sequences(f32: TinyModel) -> None:
    """Four sequences, one token of each in every batch."""
    sequences = [random_tokens(12, seed) for seed in range(4)]
    with context_parameters(n_seq_max=4, kv_unified=True), sparse(f32) as llama:
        batch = llama_cpp.llama_batch_init(4, 0, 1)
        for position in range(12):
            batch.n_tokens = 4
            for i, tokens in enumerate(sequences):
                batch.token[i] = tokens[position]
                batch.pos[i] = position
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = i
                batch.logits[i] = True
            assert llama_cpp.llama_decode(llama.ctx, batch) == 0
        found = [
            np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, i), (f32.shape.n_vocab,)).astype(np.float64)
            for i in range(4)
        ]
        llama_cpp.llama_batch_free(batch)
    for got, tokens in zip(found, sequences, strict=True):
        assert relative_l2(got, reference_logits(f32, tokens)[-1]) <= 1e-5


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_lora(tmp_path: Path, threshold: float) -> None:
    """Stock knows no threshold, so with one the adapter is folded into the reference's weights."""
    model = write_model(tmp_path / "tiny.gguf", threshold=threshold)
    lora = write_lora(tmp_path / "lora.gguf", model.shape)
    plain = reference_logits(model, TOKENS)
    for name, delta in lora.deltas.items():
        model.weights[name] = model.weights[name] + delta
    expected = reference_logits(model, TOKENS)
    assert relative_l2(expected, plain) > 0.05
    with sparse(model, lora_path=str(lora.path)) as llama:
        for batch in (1, 5, None):
            assert relative_l2(logits(llama, TOKENS, batch), expected) <= 1e-4


@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q4_K"])
def test_threshold(tmp_path: Path, name: str) -> None:
    model = write_model(tmp_path / "tiny.gguf", ffn_type=Type[name], threshold=0.4)
    reference = reference_logits(model, TOKENS)
    with stock(model) as dense:
        without = relative_l2(logits(dense, TOKENS), reference)
    assert without > 0.1, "the threshold changes nothing here"
    limit = 1e-5 if name == "F32" else without / 2  # rounding moves a few gates over the threshold
    with sparse(model) as llama:
        for batch in (1, 5, None):
            assert relative_l2(logits(llama, TOKENS, batch), reference) <= limit


@pytest.mark.parametrize("threshold", [0.0, 0.4])
@pytest.mark.parametrize("watched", ["", "ffn_gate", "ffn_up", "ffn_swiglu", "ffn_out"])
def test_eval_callback(tmp_path: Path, watched: str, threshold: float) -> None:
    """Asking for a tensor ends the split there, so parts of the FFN arrive alone. '' asks for every one."""
    model = write_model(tmp_path / "tiny.gguf", threshold=threshold)
    seen = set()

    def callback(tensor: int, ask: bool, user_data: int) -> bool:
        name = ctypes.string_at(get_name(tensor)).decode()
        if not ask:
            seen.add(name)
        return name.startswith(watched) if ask else True

    get_name = llama_cpp.llama_cpp._lib.ggml_get_name
    get_name.restype, get_name.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    keep_alive = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(callback)
    with context_parameters(cb_eval=keep_alive), sparse(model) as llama:
        for batch in (1, None):
            assert relative_l2(logits(llama, TOKENS, batch), reference_logits(model, TOKENS)) <= 1e-5
    assert any(name.startswith(watched) for name in seen)


def test_two_models_at_once(f32: TinyModel, q8_0: TinyModel) -> None:
    with sparse(f32) as first, sparse(q8_0) as second:
        alone = logits(first, TOKENS, 1), logits(second, TOKENS, 1)
        for position in range(0, 40, 8):  # by turns
            for llama in (first, second):
                if position == 0:
                    llama.reset()
                llama.eval(TOKENS[position : position + 1])
        found: dict[int, np.ndarray] = {}

        def run(i: int, llama: llama_cpp.Llama) -> None:
            found[i] = logits(llama, TOKENS, 1)

        threads = [threading.Thread(target=run, args=pair) for pair in enumerate((first, second))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in (0, 1):
            assert relative_l2(found[i], alone[i]) <= 1e-6


def test_sparse_and_stock_at_once(f32: TinyModel) -> None:
    with stock(f32) as dense, sparse(f32) as llama:
        assert relative_l2(logits(llama, TOKENS, 1), logits(dense, TOKENS, 1)) <= 1e-5


def test_reload(q8_0: TinyModel) -> None:
    outputs = []
    for _ in range(4):
        with sparse(q8_0) as llama:
            outputs.append(greedy(llama, TOKENS[:4], 8))
    assert outputs.count(outputs[0]) == 4


def test_text_completion(f32: TinyModel) -> None:
    with sparse(f32) as llama:
        answer = llama("abc", max_tokens=5, temperature=0.0)
    assert answer["usage"]["completion_tokens"] > 0


# ---- what was active


def test_activation_stats_are_exact(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny.gguf", shape=Shape(n_layer=1), threshold=0.2)
    with sparse(model) as llama:
        for batch in (1, 5, None):
            logits(llama, TOKENS, batch)
            stats = runtime.activation_stats(llama, reset=True)
            assert stats is not None
            assert stats.tokens == 40
            assert stats.total == 40 * 512
            assert stats.layer_rates == [stats.activation_rate]
            if batch == 1:
                active = stats.active
            assert stats.active == active
            assert 0.05 < stats.activation_rate < 0.5
            assert stats.sparsity == pytest.approx(1 - stats.activation_rate)
        empty = runtime.activation_stats(llama)
        assert empty is not None and (empty.tokens, empty.active, empty.activation_rate) == (0, 0, 0.0)


def test_set_sparse(f32: TinyModel) -> None:
    with sparse(f32) as llama:
        expected = logits(llama, TOKENS, 1)
        runtime.set_sparse(llama, False)
        assert relative_l2(logits(llama, TOKENS, 1), expected) <= 1e-6
        runtime.set_sparse(llama, True)
        assert relative_l2(logits(llama, TOKENS, 1), expected) == 0


# ---- files that are not sparse models, or broken


def test_dense_file_is_not_touched(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "dense.gguf", without_keys=True)
    llama = prosparse_pipe.load(model.path, **llama_arguments())
    assert "dense" in capfd.readouterr().err
    assert runtime.activation_stats(llama) is None
    with pytest.raises(ProsparseError, match="dense"):
        runtime.set_sparse(llama, False)
    with stock(model) as dense:
        np.testing.assert_array_equal(logits(llama, TOKENS, 1), logits(dense, TOKENS, 1))
    llama.close()


def test_sparse_false_runs_stock(f32: TinyModel) -> None:
    llama = runtime.load(f32.path, sparse=False, **llama_arguments())
    assert runtime.activation_stats(llama) is None
    llama.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": {"prosparse.version": 2}}, "update prosparse-pipe"),
        ({"keys": {"prosparse.version": "1"}}, "prosparse.version"),
        ({"keys": {"prosparse.activation": "gelu"}}, "gelu"),
        ({"keys": {"prosparse.activation": None}}, "prosparse.activation"),
        ({"keys": {"prosparse.threshold": -1.0}}, "prosparse.threshold"),
        ({"keys": {"prosparse.threshold": float("nan")}}, "prosparse.threshold"),
        ({"without": ["blk.1.ffn_gate.scale"]}, "blk.1.ffn_gate.scale"),
        ({"without": ["blk.0.ffn_up.scale"]}, "blk.0.ffn_up.scale"),
        ({"without": ["blk.0.ffn_down.weight"]}, "blk.0.ffn_down.weight"),
        ({"replace": {"blk.1.ffn_down.weight": np.zeros((256, 480))}}, "layer 1"),
        ({"replace": {"blk.1.ffn_up.weight": np.zeros((480, 256))}}, "layer 1"),
        ({"replace": {"blk.1.ffn_up.scale": np.ones(2)}}, "blk.1.ffn_up.scale"),
    ],
)
def test_refused_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    model = write_model(tmp_path / "bad.gguf", **changes)
    with pytest.raises(GGUFError, match=message) as error:
        runtime.load(model.path, **llama_arguments())
    assert "bad.gguf" in error.value.message
    assert "\n" not in error.value.message


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 100, 3000, -1000])
def test_truncated_file(f32: TinyModel, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(f32.path.read_bytes()[:keep])
    with pytest.raises(GGUFError, match=r"cut\.gguf") as error:
        runtime.load(path, **llama_arguments())
    assert "\n" not in error.value.message


def test_missing_file_and_other_files(tmp_path: Path) -> None:
    other = tmp_path / "text.gguf"
    other.write_text("not a model")
    for path in (tmp_path / "none.gguf", other, tmp_path):
        with pytest.raises(GGUFError, match=path.name):
            runtime.load(path)


def test_a_failed_load_leaves_nothing_behind(f32: TinyModel, tmp_path: Path) -> None:
    """llama.cpp refuses the file after our part accepted it; the next load must not see our overrides."""
    module = llama_cpp.llama_cpp
    original = module.llama_model_default_params
    model = write_model(tmp_path / "bad.gguf", without=["output_norm.weight"])
    with pytest.raises(GGUFError, match=r"bad\.gguf"):
        runtime.load(model.path, **llama_arguments())
    assert module.llama_model_default_params is original
    with sparse(f32) as llama:
        assert relative_l2(logits(llama, TOKENS, 1), reference_logits(f32, TOKENS)) <= 1e-5


# ---- the library


def test_refuses_another_ggml(tmp_path: Path, f32: TinyModel) -> None:
    """A library whose recorded version differs, as if built for another release."""
    version = backend.load_backend().prosparse_built_for_ggml()
    other = tmp_path / "libggml-prosparse.so"
    content = backend.find_library().read_bytes()
    assert version in content
    other.write_bytes(content.replace(version, version[:-1] + (b"0" if version[-1:] != b"0" else b"1")))
    result = run_python(
        "import sys\n"
        "from prosparse_pipe import runtime\n"
        "from prosparse_pipe.errors import BackendError\n"
        "try:\n"
        "    runtime.load(sys.argv[1])\n"
        "except BackendError as error:\n"
        "    print(error)\n",
        f32.path,
        PROSPARSE_LIBRARY=str(other),
    )
    assert result.returncode == 0, result.stderr
    assert version.decode() in result.stdout and "pip install" in result.stdout
    result = run_python(  # whoever loads it without our Python gets a null registry and one line
        "import ctypes, sys\n"
        "import llama_cpp\n"
        "load = llama_cpp.llama_cpp._lib.ggml_backend_load\n"
        "load.restype, load.argtypes = ctypes.c_void_p, [ctypes.c_char_p]\n"
        "assert load(sys.argv[1].encode()) is None\n",
        other,
    )
    assert result.returncode == 0, result.stderr
    assert "reinstall prosparse-pipe" in result.stderr


def test_missing_or_damaged_library(tmp_path: Path, f32: TinyModel) -> None:
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"\x7fELF nothing")
    wrong = Path(shutil.which("true") or "/bin/true")
    code = (
        "import sys\n"
        "from prosparse_pipe import runtime\n"
        "from prosparse_pipe.errors import BackendError\n"
        "try:\n"
        "    runtime.load(sys.argv[1])\n"
        "except BackendError as error:\n"
        "    print(error.message)\n"
    )
    for library in (tmp_path / "none.so", damaged, wrong):
        result = run_python(code, f32.path, PROSPARSE_LIBRARY=str(library))
        assert result.returncode == 0, result.stderr
        assert str(library) in result.stdout and result.stdout.count("\n") == 1


def test_python_refuses_another_ggml_before_loading(monkeypatch: pytest.MonkeyPatch, f32: TinyModel) -> None:
    backend.load_backend.cache_clear()
    monkeypatch.setenv("PROSPARSE_LIBRARY", str(f32.path.parent / "none.so"))
    with pytest.raises(BackendError, match=r"none\.so"):
        runtime.load(f32.path)
    monkeypatch.undo()
    backend.load_backend.cache_clear()
    assert backend.load_backend().prosparse_kernels()


def test_clean_exit_without_closing(f32: TinyModel, q8_0: TinyModel) -> None:
    result = run_python(
        "import sys\n"
        "from prosparse_pipe import runtime\n"
        "models = [runtime.load(path, n_ctx=64, n_threads=2) for path in sys.argv[1:]]\n"
        "for model in models:\n"
        "    model('abc', max_tokens=4)\n"
        "print('done')\n",
        f32.path,
        q8_0.path,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


def test_interrupt_stops_the_answer_only(f32: TinyModel) -> None:
    result = run_python(
        "import os, signal, sys\n"
        "from prosparse_pipe import runtime\n"
        "model = runtime.load(sys.argv[1], n_ctx=64, n_threads=2)\n"
        "try:\n"
        "    for i, _ in enumerate(model('abc', max_tokens=30, stream=True, temperature=0.0)):\n"
        "        if i == 3:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt:\n"
        "    print('stopped')\n"
        "print(len(list(model('abc', max_tokens=5, stream=True, temperature=0.0))) > 0)\n",
        f32.path,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "stopped\nTrue\n", "")
