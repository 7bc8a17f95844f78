"""The predictor sidecar NAME.predictor.gguf: low-rank activation predictors and activation rates, in the file's order.

The runtime sees the FFN's input, which is the norm's output. A predictor trained before the norm is converted: with
y = w * h / rms(h), fc1 (h / rms(h)) = (fc1 / w) y. It was trained on h / rms(h), since a positive factor does not
change the sign of fc2 relu(fc1 h).
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter

from prosparse_pipe.atomic import atomic_path
from prosparse_pipe.checkpoint import PREDICTORS_NAME
from prosparse_pipe.convert.hf_to_gguf import ModelSource, short_write_is_disk_full
from prosparse_pipe.convert.weights import fingerprint
from prosparse_pipe.errors import CheckpointError, GGUFError

ARCHITECTURE = "prosparse-predictor"


def write_predictor(source: ModelSource, rates: list[np.ndarray], target: Path) -> None:
    """Writes the sidecar of an export from the run's predictors.

    Args:
        source: the exported checkpoint.
        rates: activation rates per layer, in the checkpoint's order, f32 (n_ff,).

    Raises:
        CheckpointError: predictors.safetensors is missing, damaged or was trained for other weights.
    """
    from safetensors import SafetensorError, safe_open

    path, retry = source.run / PREDICTORS_NAME, f"run `prosparse-pipe predictor {source.run}` again"
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        layers = json.loads(metadata["layers"])
        pairs = [
            (tensors[f"layers.{il}.fc1.weight"], tensors[f"layers.{il}.fc2.weight"]) for il in range(source.n_layer)
        ]
    except FileNotFoundError:
        raise CheckpointError(f"{source.run} has no {PREDICTORS_NAME}", retry) from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", retry) from None
    if metadata.get("fingerprint") != fingerprint(source.run) or len(layers) != source.n_layer:
        raise CheckpointError(f"{path} was trained for other weights", retry)

    with atomic_path(target) as temporary:
        writer = GGUFWriter(temporary, ARCHITECTURE)
        try:
            writer.add_type("predictor")
            writer.add_name(f"{source.name} predictor")
            writer.add_uint32("prosparse.version", 1)
            writer.add_string("prosparse.id", source.id)
            writer.add_string("prosparse.predictor.input", "post_norm")
            writer.add_array("prosparse.predictor.rank", [int(fc1.shape[0]) for fc1, _ in pairs])
            writer.add_array("prosparse.predictor.recall", [float(layer["recall"]) for layer in layers])
            scales = [1.0] * source.n_layer
            if metadata["input"] == "pre_norm":
                scales = [_fold_scale(source, il, fc1) for il, (fc1, _) in enumerate(pairs)]
            thresholds = [float(layer["threshold"]) / scale for layer, scale in zip(layers, scales, strict=True)]
            writer.add_array("prosparse.predictor.threshold", thresholds)
            for il, (fc1, fc2) in enumerate(pairs):
                order = source.orders[il] if source.orders is not None else slice(None)
                if metadata["input"] == "pre_norm":
                    fc1 = fc1.astype(np.float32) / (_norm_weight(source, il) * scales[il])
                writer.add_tensor(f"blk.{il}.ffn_predictor.fc1.weight", np.ascontiguousarray(fc1, np.float16))
                writer.add_tensor(f"blk.{il}.ffn_predictor.fc2.weight", np.ascontiguousarray(fc2[order], np.float16))
                rate = np.ascontiguousarray(rates[il][order], np.float32)
                writer.add_tensor(f"blk.{il}.ffn_activation_rate", rate)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            with short_write_is_disk_full():
                writer.write_tensors_to_file()
        finally:
            writer.close()


def _norm_weight(source: ModelSource, il: int) -> np.ndarray:
    weight = source.weights.read(f"model.layers.{il}.post_attention_layernorm.weight").float().numpy()
    if np.abs(weight).min() < 1e-4:
        raise CheckpointError(
            f"the predictor of layer {il} reads the stream before a norm that has zero weights",
            "train it after the norm: prosparse-pipe predictor --input post_norm",
        )
    return weight


def _fold_scale(source: ModelSource, il: int, fc1: np.ndarray) -> float:
    """What a layer's logits are divided by so that fc1 / w stays within F16; its threshold is divided too."""
    return max(1.0, float(np.abs(fc1.astype(np.float32) / _norm_weight(source, il)).max()) / 1024)


@dataclasses.dataclass
class Predictor:
    """What a sidecar holds; neurons in the model file's order.

    Attributes:
        input: what fc1 reads: `post_norm`, the FFN's input.
        rank, recall, threshold: per layer; a neuron is predicted active if its logit fc2 relu(fc1 x) > threshold.
        fc1: per layer, f16 (rank, n_embd).
        fc2: per layer, f16 (n_ff, rank).
        activation_rate: per layer, f32 (n_ff,).
    """

    input: str
    rank: list[int]
    recall: list[float]
    threshold: list[float]
    fc1: list[np.ndarray]
    fc2: list[np.ndarray]
    activation_rate: list[np.ndarray]


def load_predictor(path: Path, model_path: Path) -> Predictor:
    """Reads a sidecar and checks that it belongs to a model file.

    Raises:
        GGUFError: a file is missing, truncated or not ours, or the sidecar is of another model.
    """
    sidecar, model = _open(path), _open(model_path)
    if _value(sidecar, "general.architecture") != ARCHITECTURE:
        raise GGUFError(
            f"{path} is not a predictor sidecar", "give the .predictor.gguf that export wrote beside the model"
        )
    wanted = _value(model, "prosparse.id")
    arch = _value(model, "general.architecture")
    if wanted is None or arch == ARCHITECTURE:
        raise GGUFError(
            f"{model_path} is not a sparse model of prosparse-pipe", "export it with `prosparse-pipe export`"
        )
    if _value(sidecar, "prosparse.id") != wanted or _value(sidecar, "prosparse.version") != 1:
        raise GGUFError(f"{path} belongs to another model than {model_path}", "use the sidecar of the same export")
    tensors = {tensor.name: tensor.data for tensor in sidecar.tensors}
    n_layer, n_embd, n_ff = (
        int(_value(model, f"{arch}.{key}")) for key in ("block_count", "embedding_length", "feed_forward_length")
    )
    rank = [int(value) for value in _value(sidecar, "prosparse.predictor.rank") or []]
    names = ("ffn_predictor.fc1.weight", "ffn_predictor.fc2.weight", "ffn_activation_rate")
    for il in range(n_layer):
        shapes = [getattr(tensors.get(f"blk.{il}.{name}"), "shape", None) for name in names]
        if len(rank) != n_layer or shapes != [(rank[il], n_embd), (n_ff, rank[il]), (n_ff,)]:
            raise GGUFError(f"{path}: layer {il} does not have the shape of {model_path}", "export again")
    fc1, fc2, activation_rate = ([tensors[f"blk.{il}.{name}"] for il in range(n_layer)] for name in names)
    return Predictor(
        input=str(_value(sidecar, "prosparse.predictor.input")),
        rank=rank,
        recall=list(_value(sidecar, "prosparse.predictor.recall")),
        threshold=list(_value(sidecar, "prosparse.predictor.threshold")),
        fc1=fc1,
        fc2=fc2,
        activation_rate=activation_rate,
    )


def _open(path: Path) -> GGUFReader:
    try:
        reader = GGUFReader(path)
    except FileNotFoundError:
        raise GGUFError(f"{path} does not exist", "export writes it beside the model") from None
    except Exception as error:  # gguf raises whatever a damaged file leads to: ValueError, IndexError, KeyError ...
        raise GGUFError(f"{path} cannot be read as GGUF: {error}", "the file is damaged: export again") from None
    end = max((tensor.data_offset + tensor.n_bytes for tensor in reader.tensors), default=0)
    if end > path.stat().st_size:
        raise GGUFError(f"{path} is truncated", "export again")
    return reader


def _value(reader: GGUFReader, key: str):
    field = reader.get_field(key)
    return None if field is None else field.contents()
