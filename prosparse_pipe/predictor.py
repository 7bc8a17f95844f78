"""Low-rank activation predictors: which neurons of an FFN will be active, from the FFN's input (DejaVu, ProSparse).

    logits = fc2 relu(fc1 x)     fc1 (r, d), fc2 (n_ff, r), no bias; active if the logit > threshold

Inputs and labels of all layers go to disk once, and minibatches are read from there: memory does not grow with the
text. The threshold of each layer is set on held-out tokens so that the recall target is met, and the rank is the one
with which a token then reads the fewest weights.

Training starts from the gate itself, cut to the predictor's rank: with A and B from the singular value decomposition
of W_gate C^(1/2), C the second moment of the inputs, fc1 = [A; -A] and fc2 = [B, -B] give B A x, since
relu(a) - relu(-a) = a. SmolLM2, 12,000 tokens, rank 64, layer 15, recall .95: predicted sparsity .68; from random
weights .16.

Source: DejaVu, arXiv 2310.17157; ProSparse, arXiv 2402.13516, section 4.2 (loss weights, AdamW 1e-3).
"""

import dataclasses
import errno
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn

from prosparse_pipe.checkpoint import PREDICTORS_NAME, save_tensors
from prosparse_pipe.convert.weights import fingerprint
from prosparse_pipe.errors import ProsparseError, UnsupportedModelError
from prosparse_pipe.profile import DTYPES, batches
from prosparse_pipe.relu import GatedFFN, find_ffns

_CHUNK = 128  # tokens read from disk in one piece
PARTIAL_NAME = ".predictors.partial"


@dataclasses.dataclass(frozen=True)
class PredictorSettings:
    """How predictors are trained.

    Attributes:
        input: `post_norm` reads the FFN's input, as the runtime does; `pre_norm` the residual stream before the norm,
            divided by its root mean square (export folds the norm's weight in).
        ranks: candidates for r, rising.
        recall_target: share of the active neurons that must be predicted, 0 to 1.
        tokens: of the text, at most.
        epochs: over the training tokens.
        seq_len, batch_size: of the model's forward pass.
        minibatch: tokens per optimizer step.
        learning_rate: of AdamW.
        validation_share: of the tokens, at least 2,048 or a fifth; one half sets the threshold, the other gives the
            reported recall.
        seed: of weights and order.
    """

    input: str = "post_norm"
    ranks: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    recall_target: float = 0.95
    tokens: int = 400_000
    epochs: int = 2
    seq_len: int = 512
    batch_size: int = 4
    minibatch: int = 512
    learning_rate: float = 1e-3
    validation_share: float = 0.05
    seed: int = 0


@dataclasses.dataclass
class LayerPredictor:
    """One layer's predictor and what it reached on held-out tokens.

    Attributes:
        fc1: f16 (rank, d). fc2: f16 (n_ff, rank).
        threshold: logit.
        recall: share of the active neurons that are predicted.
        predicted_sparsity: share of neurons predicted inactive.
        sparsity: share of neurons that were inactive.
    """

    fc1: np.ndarray
    fc2: np.ndarray
    threshold: float
    recall: float
    predicted_sparsity: float
    sparsity: float

    @property
    def rank(self) -> int:
        return int(self.fc1.shape[0])

    def figures(self) -> dict[str, float]:
        """rank, threshold, recall, predicted_sparsity, sparsity, bytes."""
        return {
            "rank": self.rank,
            "threshold": self.threshold,
            "recall": self.recall,
            "predicted_sparsity": self.predicted_sparsity,
            "sparsity": self.sparsity,
            "bytes": self.fc1.nbytes + self.fc2.nbytes,
        }


class ActivationStore:
    """Inputs (f16) and activity (one bit per neuron) of layers on disk, written in one pass and read in pieces.

    Args:
        folder: must exist; two files per layer.
        ffns: the layers to record.
        kind: `post_norm` or `pre_norm`.
    """

    def __init__(self, folder: Path, ffns: list[GatedFFN], kind: str) -> None:
        self.folder, self.ffns, self.kind = folder, ffns, kind
        self.tokens = 0
        self.norm_weight: dict[int, torch.Tensor] = {}

    def bytes_per_token(self) -> int:
        return sum(2 * ffn.gate.in_features + -(-ffn.down.in_features // 8) for ffn in self.ffns)

    def write(self, model: Any, inputs: Iterable[torch.Tensor], seen: Callable[[int], None] | None = None) -> None:
        """Runs the model over batches and appends what its layers see.

        Args:
            model: sparse decoder that holds `ffns`.
            inputs: token ids (B, T).
            seen: called with the tokens of each batch.

        Raises:
            UnsupportedModelError: pre_norm, and no norm's output is the FFN's input.
        """
        device = next(model.parameters()).device
        with ExitStack() as stack:
            for ffn in self.ffns:
                files = [stack.enter_context(open(self._path(ffn.layer, part), "wb")) for part in ("inputs", "active")]
                for handle in self._hooks(model, ffn, *files):
                    stack.callback(handle.remove)
            with torch.inference_mode():
                for batch in inputs:
                    model.base_model(input_ids=batch.to(device), use_cache=False)
                    self.tokens += batch.numel()
                    if seen is not None:
                        seen(batch.numel())

    def _path(self, layer: int, part: str) -> Path:
        return self.folder / f"{part}-{layer}.bin"

    def _hooks(self, model: nn.Module, ffn: GatedFFN, inputs: IO[bytes], active: IO[bytes]) -> list[Any]:
        norms: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def after_norm(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            norms[id(module)] = (args[0], output)

        def before_ffn(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            if self.kind == "pre_norm":
                stream = next((before for before, after in norms.values() if after is x), None)
                if stream is None:
                    raise UnsupportedModelError(f"no norm feeds {ffn.name} directly", "use --input post_norm")
                wide = stream.float()
                x = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-12)
                if ffn.layer not in self.norm_weight:
                    rows, after = x.flatten(0, -2), args[0].float().flatten(0, -2)
                    self.norm_weight[ffn.layer] = (rows * after).sum(0) / (rows * rows).sum(0).clamp_min(1e-12)
            half = x.float().clamp(-65504, 65504).half()
            inputs.write(half.reshape(-1, half.shape[-1]).cpu().numpy().tobytes())

        def before_down(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            bits = (args[0] != 0).reshape(-1, args[0].shape[-1]).cpu().numpy()
            active.write(np.packbits(bits, axis=1).tobytes())

        handles: list[Any] = [
            ffn.module.register_forward_pre_hook(before_ffn),
            ffn.down.register_forward_pre_hook(before_down),
        ]
        if self.kind == "pre_norm":
            block = model.get_submodule(ffn.name.rpartition(".")[0])
            norm_like = [child for child in block.children() if len(list(child.parameters())) == 1]
            handles += [child.register_forward_hook(after_norm) for child in norm_like]
        return handles

    def gate(self, ffn: GatedFFN) -> torch.Tensor:
        """The gate's weight as it acts on the recorded inputs, f32 (n_ff, d)."""
        weight = ffn.gate.weight.detach().float()
        return weight * self.norm_weight[ffn.layer] if self.kind == "pre_norm" else weight

    def read(self, ffn: GatedFFN) -> tuple[np.ndarray, np.ndarray]:
        """Memory maps of a layer: inputs f16 (tokens, d), activity uint8 (tokens, ceil(n_ff / 8))."""
        d, width = ffn.gate.in_features, -(-ffn.down.in_features // 8)
        inputs = np.memmap(self._path(ffn.layer, "inputs"), np.float16, "r", shape=(self.tokens, d))
        active = np.memmap(self._path(ffn.layer, "active"), np.uint8, "r", shape=(self.tokens, width))
        return inputs, active


def _piece(data: tuple[np.ndarray, np.ndarray], rows: slice, n_ff: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs f32 (rows, d) and activity f32 (rows, n_ff) of some tokens."""
    inputs, active = data
    bits = np.unpackbits(np.asarray(active[rows]), axis=1, count=n_ff)
    return torch.from_numpy(np.asarray(inputs[rows], np.float32)), torch.from_numpy(bits).float()


def train_layer(
    data: tuple[np.ndarray, np.ndarray],
    gate: torch.Tensor,
    settings: PredictorSettings,
    device: str = "cpu",
) -> LayerPredictor:
    """Trains predictors of rising rank for one layer and keeps the one with which a token reads the fewest weights.

    Args:
        data: inputs f16 (tokens, d) and activity uint8 (tokens, ceil(n_ff / 8)), e.g. memory maps.
        gate: f32 (n_ff, d): the gate as it acts on these inputs, from which training starts.

    Raises:
        ProsparseError: fewer than 256 tokens.
    """
    tokens = data[0].shape[0]
    if tokens < 256:
        raise ProsparseError(f"{tokens} tokens are too few to train a predictor", "give at least 256, better 100000")
    held_out = min(max(int(tokens * settings.validation_share), min(2048, tokens // 5)), 16384)
    n_ff = gate.shape[0]
    directions = _gate_directions(data[0], tokens - held_out, gate.to(device))
    best: LayerPredictor | None = None
    best_cost = float("inf")
    for rank in settings.ranks:
        found = max(
            (
                _evaluate(model, data, tokens - held_out, n_ff, settings.recall_target, device)
                for model in _epochs(data, tokens - held_out, directions, rank, settings, device)
            ),
            key=lambda epoch: epoch.predicted_sparsity,
        )
        cost = weights_read(found, data[0].shape[1], n_ff)
        if cost >= best_cost:
            break  # larger ranks cost more and gain less
        best, best_cost = found, cost
    assert best is not None
    return best


def weights_read(predictor: LayerPredictor, d: int, n_ff: int) -> float:
    """Bytes that a token reads of predictor (F16), and of gate and up of the predicted neurons (8 bits)."""
    return 2.0 * predictor.rank * (d + n_ff) + 2.0 * (1.0 - predictor.predicted_sparsity) * n_ff * d


def _gate_directions(inputs: np.ndarray, tokens: int, gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions A (d, d) and weights B (n_ff, d), most important first, with B A x = gate x up to a factor."""
    d = gate.shape[1]
    moment = torch.zeros(d, d, dtype=torch.float64, device=gate.device)
    for start in range(0, min(tokens, 16384), 1024):
        x = torch.from_numpy(np.asarray(inputs[start : min(start + 1024, tokens)], np.float32)).to(gate.device)
        moment += (x.T @ x).double()
    value, vector = torch.linalg.eigh(moment / min(tokens, 16384))
    value = value.clamp_min(value[-1] * 1e-9).sqrt()
    root, inverse = ((vector * factor) @ vector.T for factor in (value, 1 / value))
    weighted = gate.double() @ root
    _, right = torch.linalg.eigh(weighted.T @ weighted)
    right = right.flip(1)
    a, b = right.T @ inverse, weighted @ right
    logit_size = 2.0 / float(b.square().sum(1).mean().sqrt())  # logits of about 2: confident, yet free to move
    return a.float(), (b * logit_size).float()


def _epochs(
    data: tuple[np.ndarray, np.ndarray],
    tokens: int,
    directions: tuple[torch.Tensor, torch.Tensor],
    rank: int,
    settings: PredictorSettings,
    device: str,
) -> Iterator[nn.Sequential]:
    """The predictor as it starts and after every epoch."""
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    a, b = directions
    n_ff, d = b.shape
    fc1, fc2 = nn.Linear(d, rank, bias=False), nn.Linear(rank, n_ff, bias=False)
    model = nn.Sequential(fc1, nn.ReLU(), fc2).to(device)
    half = min(rank // 2, d)
    with torch.no_grad():
        fc1.weight[:half], fc1.weight[half : 2 * half] = a[:half], -a[:half]
        fc2.weight[:, :half], fc2.weight[:, half : 2 * half] = b[:, :half], -b[:, :half]
    starts = np.arange(0, tokens, _CHUNK)
    per_step = max(1, settings.minibatch // _CHUNK)
    steps = settings.epochs * -(-len(starts) // per_step)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    yield model
    for _ in range(settings.epochs):
        order = rng.permutation(starts)
        for i in range(0, len(order), per_step):
            chunks = [slice(start, min(start + _CHUNK, tokens)) for start in order[i : i + per_step]]
            pieces = [_piece(data, chunk, n_ff) for chunk in chunks]
            x, active = (torch.cat(part).to(device) for part in zip(*pieces, strict=True))
            negative = active.mean() + 0.005  # an inactive neuron counts this much, an active one 1
            weight = negative + (1 - negative) * active
            loss = nn.functional.binary_cross_entropy_with_logits(model(x), active, weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        yield model


@torch.inference_mode()
def _evaluate(
    model: nn.Sequential,
    data: tuple[np.ndarray, np.ndarray],
    first: int,
    n_ff: int,
    target: float,
    device: str,
) -> LayerPredictor:
    fc1, fc2 = (weight.half().float() for weight in model.parameters())  # as they will be stored

    def logits(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        x, active = _piece(data, rows, n_ff)
        return torch.relu(x.to(device) @ fc1.T) @ fc2.T, active.to(device) > 0

    tokens = data[0].shape[0]
    pieces = [slice(start, min(start + 64, tokens)) for start in range(first, tokens, 64)]
    of_active = []
    for rows in pieces[0::2]:
        z, active = logits(rows)
        of_active.append(z[active].cpu().numpy())
    threshold = _threshold(np.concatenate(of_active), target)
    hits = actives = predictions = cells = 0
    for rows in pieces[1::2] or pieces:
        z, active = logits(rows)
        cells += z.numel()
        predicted = z > threshold
        predictions += int(predicted.sum())
        actives += int(active.sum())
        hits += int((predicted & active).sum())
    return LayerPredictor(
        fc1=fc1.half().cpu().numpy(),
        fc2=fc2.half().cpu().numpy(),
        threshold=threshold,
        recall=hits / actives if actives else 1.0,
        predicted_sparsity=1 - predictions / cells,
        sparsity=1 - actives / cells,
    )


def _threshold(of_active: np.ndarray, target: float) -> float:
    """The highest logit above which at least `target` of the active neurons lie."""
    if of_active.size == 0:
        return 0.0
    missed = int((1 - target) * of_active.size)
    return float(np.nextafter(np.partition(of_active, missed)[missed], np.float32(-np.inf)))


@dataclasses.dataclass
class TrainedPredictors:
    """The predictors of a model.

    Attributes:
        layers: per layer.
        tokens: seen in all.
        model_bytes: of the model's weights at 16 bits, for the share.
    """

    layers: list[LayerPredictor]
    tokens: int
    model_bytes: int

    @property
    def bytes(self) -> int:
        return sum(layer.fc1.nbytes + layer.fc2.nbytes for layer in self.layers)

    def mean(self, figure: str) -> float:
        return float(np.mean([layer.figures()[figure] for layer in self.layers]))


def train_predictors(
    run: Path,
    sources: list[str],
    settings: PredictorSettings,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    seen: Callable[[int], None] | None = None,
    finished: Callable[[int, int, LayerPredictor], None] | None = None,
) -> TrainedPredictors:
    """Trains a predictor for every layer of a run and writes predictors.safetensors.

    Finished layers are kept when it is interrupted, and used when it is started again with the same settings and text.

    Args:
        run: folder written by `train`.
        sources: text as `train` takes it; its `train` part is used.
        seen: called with the tokens of each batch while activations are recorded.
        finished: called with layer, layers and the layer's predictor.

    Raises:
        CheckpointError: the run cannot be loaded.
        ProsparseError: too little text, or the disk is full.
    """
    from prosparse_pipe.data import token_blocks
    from prosparse_pipe.relu import load_sparse_model

    model, tokenizer, _ = load_sparse_model(run, dtype=DTYPES[dtype], device=device)
    ffns = find_ffns(model)
    key = json.dumps([dataclasses.asdict(settings), sources, dtype, fingerprint(run)])
    partial = run / PARTIAL_NAME
    found: dict[int, tuple[LayerPredictor, int]] = _read_partial(partial, key)
    missing = [ffn for ffn in ffns if ffn.layer not in found]
    tokens = next((count for _, count in found.values()), 0)
    try:
        with tempfile.TemporaryDirectory(prefix=".activations-", dir=run) as folder:
            if missing:
                store = ActivationStore(Path(folder), missing, settings.input)
                _check_space(run, store.bytes_per_token() * settings.tokens)
                blocks = token_blocks(tokenizer, sources, settings.seq_len, split="train", limit_tokens=settings.tokens)
                store.write(model, batches(blocks, settings.batch_size), seen)
                tokens = store.tokens
                if tokens == 0:
                    raise ProsparseError(
                        f"{', '.join(sources)} holds less than one block of {settings.seq_len} tokens", "give more text"
                    )
            model_bytes = 2 * sum(weight.numel() for weight in model.parameters())
            model = None  # its memory is not needed any more
            for ffn in missing:
                layer = train_layer(store.read(ffn), store.gate(ffn), settings, device)
                found[ffn.layer] = (layer, tokens)
                _write_partial(partial, key, ffn.layer, layer, tokens)
                if finished is not None:
                    finished(ffn.layer, len(ffns), layer)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ProsparseError(
                f"no space left for activations in {run}", "free some disk space, or give fewer --tokens"
            ) from error
        raise
    result = TrainedPredictors([found[il][0] for il in range(len(ffns))], tokens, model_bytes)
    _save(run, result, settings)
    shutil.rmtree(partial, ignore_errors=True)
    return result


def _check_space(run: Path, needed: int) -> None:
    free = shutil.disk_usage(run).free
    if needed > free:
        raise ProsparseError(
            f"activations need {needed / 2**30:.1f} GiB in {run}, {free / 2**30:.1f} GiB are free",
            "free some disk space, or give fewer --tokens",
        )


def _write_partial(folder: Path, key: str, il: int, layer: LayerPredictor, tokens: int) -> None:
    metadata = {"key": key, "figures": json.dumps(layer.figures()), "tokens": str(tokens)}
    save_tensors(folder / f"{il}.safetensors", {"fc1": layer.fc1, "fc2": layer.fc2}, metadata)


def _read_partial(folder: Path, key: str) -> dict[int, tuple[LayerPredictor, int]]:
    from safetensors import SafetensorError, safe_open

    found = {}
    for path in folder.glob("[0-9]*.safetensors"):
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata()
                if metadata.get("key") != key:
                    continue
                figures = json.loads(metadata["figures"])
                del figures["rank"], figures["bytes"]
                layer = LayerPredictor(file.get_tensor("fc1"), file.get_tensor("fc2"), **figures)
                found[int(path.stem)] = (layer, int(metadata["tokens"]))
        except (SafetensorError, KeyError, ValueError):
            continue  # half a file from another version: train the layer again
    return found


def _save(run: Path, result: TrainedPredictors, settings: PredictorSettings) -> None:
    tensors = {}
    for il, layer in enumerate(result.layers):
        tensors[f"layers.{il}.fc1.weight"] = np.ascontiguousarray(layer.fc1)
        tensors[f"layers.{il}.fc2.weight"] = np.ascontiguousarray(layer.fc2)
    metadata = {
        "input": settings.input,
        "recall": str(result.mean("recall")),
        "predicted_sparsity": str(result.mean("predicted_sparsity")),
        "layers": json.dumps([layer.figures() for layer in result.layers]),
        "settings": json.dumps(dataclasses.asdict(settings)),
        "tokens": str(result.tokens),
        "fingerprint": fingerprint(run),
    }
    save_tensors(run / PREDICTORS_NAME, tensors, metadata)
