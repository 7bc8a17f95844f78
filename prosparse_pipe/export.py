"""Export: a run folder becomes GGUF files that stock llama.cpp runs, and the sidecar with its predictors."""

import dataclasses
from pathlib import Path

from prosparse_pipe.atomic import atomic_path
from prosparse_pipe.checkpoint import PREDICTORS_NAME, load_activation_rates
from prosparse_pipe.convert.hf_to_gguf import FLOAT_TYPES, check_written, open_source, write_model
from prosparse_pipe.convert.predictor_to_gguf import write_predictor
from prosparse_pipe.convert.quantize import QUANT_TYPES, quantize, read_imatrix
from prosparse_pipe.errors import CheckpointError, ProsparseError

TYPES = (*FLOAT_TYPES, *QUANT_TYPES)


@dataclasses.dataclass
class Exported:
    """What an export wrote: model files by type in the order asked for, and the sidecar if there are predictors."""

    models: dict[str, Path]
    sidecar: Path | None


def export_gguf(
    run: Path,
    kinds: list[str],
    *,
    out: Path | None = None,
    name: str | None = None,
    unsorted: bool = False,
    imatrix: Path | None = None,
    threads: int = 0,
    verbose: bool = False,
) -> Exported:
    """Writes NAME-TYPE.gguf for each type, and NAME.predictor.gguf if the run has predictors.

    Quantized types are made by llama.cpp's quantizer from a lossless intermediate, which is removed afterwards.

    Args:
        run: folder written by `train`.
        kinds: names of TYPES.
        out: folder; None: run/gguf.
        name: file and general name; None: from the base model.
        unsorted: keep the checkpoint's neuron order; activation rates are not needed then.
        imatrix: importance matrix for the quantizer.
        threads: of the quantizer; 0: all cores.
        verbose: show the quantizer's log.

    Raises:
        UnsupportedModelError: stock llama.cpp cannot compute this model.
        CheckpointError: files of the run are missing or damaged.
        GGUFError: tokenizers disagree, or the quantizer failed.
        ProsparseError: the disk is full, or a type is unknown.
    """
    kinds = list(dict.fromkeys(kind.upper() for kind in kinds))
    unknown = next((kind for kind in kinds if kind not in TYPES), None)
    if unknown is not None:
        raise ProsparseError(f"unknown type {unknown}", f"one of {' '.join(TYPES)}")
    if imatrix is not None:
        read_imatrix(imatrix)
    try:
        rates = None if unsorted else load_activation_rates(run)
    except CheckpointError as error:
        raise CheckpointError(error.message, f"{error.hint}; or export with --unsorted") from None
    source = open_source(run, rates, name)
    out = out or run / "gguf"
    models = {kind: out / f"{source.name}-{kind}.gguf" for kind in kinds}
    lossless = source.weights.widest_float()
    intermediate = out / f".{source.name}-{lossless}.intermediate.gguf"
    quantized = [kind for kind in kinds if kind in QUANT_TYPES]
    try:
        for kind in kinds:
            if kind in FLOAT_TYPES:
                with _progress(f"writing {models[kind].name}") as report:
                    write_model(source, models[kind], kind, report)
        if quantized and lossless not in kinds:
            with _progress(f"writing the {lossless} intermediate") as report:
                write_model(source, intermediate, lossless, report)
        for kind in quantized:
            with _progress(f"writing {models[kind].name}") as report, atomic_path(models[kind]) as path:
                origin = models.get(lossless, intermediate)
                quantize(origin, path, kind, threads=threads, imatrix=imatrix, progress=report, verbose=verbose)
                check_written(path, source)
    finally:
        intermediate.unlink(missing_ok=True)
    sidecar = None
    if rates is not None and (run / PREDICTORS_NAME).is_file():
        sidecar = out / f"{source.name}.predictor.gguf"
        write_predictor(source, rates, sidecar)
    return Exported(models, sidecar)


class _progress:
    """A progress bar on stderr with the signature of the writers' callbacks: (done, total)."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task(title, total=None)

    def __enter__(self) -> "_progress":
        self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)
