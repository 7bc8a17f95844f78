"""Export: a run folder becomes GGUF files that stock llama.cpp runs, and the sidecar with its predictors."""

import dataclasses
from pathlib import Path

from prosparse_pipe.atomic import atomic_path
from prosparse_pipe.checkpoint import PREDICTORS_NAME, load_activation_rates, resolve_base_model
from prosparse_pipe.convert.ffn_file import write_ffn
from prosparse_pipe.convert.hf_to_gguf import FLOAT_TYPES, check_written, open_source, write_model
from prosparse_pipe.convert.predictor_to_gguf import write_predictor
from prosparse_pipe.convert.quantize import QUANT_TYPES, quantize, read_imatrix
from prosparse_pipe.errors import CheckpointError, GGUFError, ProsparseError
from prosparse_pipe.progress import ProgressBar

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
                with ProgressBar(f"writing {models[kind].name}") as report:
                    write_model(source, models[kind], kind, report)
        if quantized and lossless not in kinds:
            with ProgressBar(f"writing the {lossless} intermediate") as report:
                write_model(source, intermediate, lossless, report)
        for kind in quantized:
            with ProgressBar(f"writing {models[kind].name}") as report, atomic_path(models[kind]) as path:
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


def export_ffn(
    run: Path, kind: str, base: str | None = None, *, out: Path | None = None, name: str | None = None
) -> Path:
    """Writes NAME.ffn.gguf: the FFN weights alone, sorted hot to cold, for the base model that the run started from.

    Args:
        run: folder written by `train` with trainable ffn.
        kind: one of convert.ffn_file.TYPES.
        base: GGUF of the base, or smollm2-135m-instruct; None: what the run was trained from.
        out, name: as in export_gguf.

    Raises:
        CheckpointError: files are missing, or the run changed more than the FFNs.
        GGUFError: the base is not a GGUF.
        ProsparseError: the disk is full, or the type does not fit.
    """
    source = open_source(run, load_activation_rates(run), name)
    if base is None:
        base = str(source.info.provenance.get("config", {}).get("model", ""))
    path = Path(resolve_base_model(base))
    if path.suffix != ".gguf":
        raise GGUFError(f"the base {base} is not a GGUF", "give the base's GGUF with --base")
    target = (out or run / "gguf") / f"{source.name}.ffn.gguf"
    with ProgressBar(f"writing {target.name}") as report:
        write_ffn(source, path, target, kind.upper(), report)
    return target
