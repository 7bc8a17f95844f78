"""Settings of a training run: defaults, then a YAML file, then the command line."""

import dataclasses
import difflib
import math
import types
import typing
from pathlib import Path
from typing import Any

from prosparse_pipe.checkpoint import DEFAULT_BASE
from prosparse_pipe.errors import ProsparseError
from prosparse_pipe.schedule import PUBLISHED, SparsityController, StagedSchedule, from_fractions, preset


class ConfigError(ProsparseError):
    """A setting is unknown, of the wrong type, or contradicts another."""


@dataclasses.dataclass
class TrainConfig:
    """All settings of `prosparse-pipe train`."""

    model: str = DEFAULT_BASE
    """Base model: folder, hub name, .gguf file, or smollm2-135m-instruct (extra `demo`)."""
    data: list[str] = dataclasses.field(default_factory=lambda: ["chitchat"])
    """Sources of text, see prosparse_pipe/data.py."""
    out: str = ""
    """Run folder; default runs/MODEL."""
    steps: int = 1000
    """Optimizer steps."""
    seq_len: int = 1024
    """Tokens of a packed block."""
    batch_size: int = 4
    """Blocks in a forward pass of one process."""
    grad_accum: int = 1
    """Forward passes before an optimizer step."""
    optimizer: str = "adamw"
    """`adamw`, or `muon`: for runs whose trainable weights are matrices, ffn and lora; lr means the same."""
    lr: float = 3e-5
    """Peak learning rate, cosine."""
    lr_min_ratio: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.1
    """Of the optimizer, decoupled."""
    adam_beta2: float = 0.95
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    init: str = ""
    """Weights to start from: a run folder, or a GGUF of FFN weights (`export --ffn-only`); default those of model."""
    regularizer: str = "l1"
    """Penalty on activations: `l1` of x1, as published, or `count`, a smooth count of the active neurons."""
    count_tau: float = 0.1
    """Gate value that counts as half a neuron in regularizer count."""
    target_sparsity: float = 0.0
    """Sparsity at the end, 0 to 1, reached by steering lambda; 0: lambda follows the schedule."""
    target_ramp: list[float] = dataclasses.field(default_factory=lambda: [0.12, 0.8])
    """Shares of the run between which the sparsity rises to target_sparsity."""
    train_threshold: float = 0.0
    """FATReLU threshold in the training itself, from train_threshold_start on; the searched one is no less."""
    train_threshold_start: float = 0.5
    """Share of the run at which train_threshold begins."""
    schedule: str | list[list[float]] = "prosparse"
    """Published schedule (prosparse, which is 7b; 13b, 1b), stretched to the run, or stages as [lambda, end share]."""
    schedule_scale: float = 1.0
    """Factor on every lambda of the schedule."""
    ce_weight: float = 1.0
    """Weight of the next-token cross entropy."""
    distill: float = 0.0
    """Weight of the KL divergence to the frozen dense model."""
    distill_hidden: float = 0.0
    """Weight of the distance between the inputs of the FFNs and the dense model's."""
    trainable: str = "all"
    """`all` weights; `ffn`: only gate, up and down; `lora`: adapters on all matrices, merged at the end."""
    lora_rank: int = 16
    """Rank of the adapters."""
    threshold: float | str = "search"
    """FATReLU threshold set at the end: a number, or `search`: the largest that costs threshold_tolerance."""
    threshold_tolerance: float = 0.01
    """Largest relative rise of held-out perplexity that the searched threshold may cost."""
    layout: str = "relu"
    """config.json of the result: `relu` (plain transformers) or `fatrelu` (the released ProSparse models; vLLM)."""
    heldout_tokens: int = 65536
    """Tokens on which perplexity and sparsity are measured; never trained on."""
    bf16: str = "auto"
    """`on`, `off`, or `auto`: where the hardware multiplies bf16 natively."""
    compile: str = "auto"
    """Compile the decoder layers (torch.compile): `on`, `off`, or `auto`: on a GPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, a third more time."""
    seed: int = 0
    """Of the order of the data and everything random."""
    log_steps: int = 10
    """Optimizer steps between records in training.jsonl."""
    save_steps: int = 500
    """Optimizer steps between checkpoints; a multiple of log_steps."""
    save_total_limit: int = 2
    """Checkpoints kept while training."""
    report_to: list[str] = dataclasses.field(default_factory=list)
    """Trackers of transformers: tensorboard, wandb, trackio ..."""
    push_to_hub: str = ""
    """Hub name (user/model) that the result is uploaded to."""

    def __post_init__(self) -> None:
        """Rejects settings that are out of range or contradict each other.

        Raises:
            ConfigError: naming the settings.
        """
        for name in ("steps", "seq_len", "batch_size", "grad_accum", "log_steps", "save_steps", "heldout_tokens"):
            self._require(getattr(self, name) >= 1, f"{name} must be at least 1", f"it is {getattr(self, name)}")
        self._require(self.seq_len >= 2, "seq_len must be at least 2", "a block of one token has nothing to predict")
        self._require(self.lr > 0, "lr must be above 0", f"it is {self.lr}")
        for name, known in CHOICES.items():
            value = getattr(self, name)
            self._require(value in known, f"{name} must be {', '.join(known[:-1])} or {known[-1]}", f"it is {value}")
        self._require(0 <= self.target_sparsity < 1, "target_sparsity must be from 0 to 1", "e.g. 0.89")
        ramp = self.target_ramp
        self._require(
            len(ramp) == 2 and 0 <= ramp[0] <= ramp[1] <= 1,
            "target_ramp must be two shares of the run, the first the smaller",
            "e.g. [0.12, 0.8]",
        )
        self._require(
            not (self.compile == "on" and self.gradient_checkpointing),
            "compile: on does not go with gradient_checkpointing",
            "turn one of them off",
        )
        self._require(
            self.optimizer == "adamw" or self.trainable != "all",
            "optimizer: muon is for matrices, not for all weights",
            "use it with trainable: ffn or lora",
        )
        self._require(self.count_tau > 0, "count_tau must be above 0", f"it is {self.count_tau}")
        self._require(self.train_threshold >= 0, "train_threshold must not be negative", "0 is plain ReLU")
        self._require(self.lora_rank >= 1, "lora_rank must be at least 1", f"it is {self.lora_rank}")
        self._require(bool(self.data), "data is empty", "give at least one source of text")
        for name in ("ce_weight", "distill", "distill_hidden"):
            self._require(getattr(self, name) >= 0, f"{name} must not be negative", "0 leaves it out")
        learnt = self.ce_weight + self.distill + self.distill_hidden
        self._require(learnt > 0, "ce_weight, distill and distill_hidden are all 0", "nothing would be learnt")
        if self.save_steps % self.log_steps:
            raise ConfigError(
                f"save_steps ({self.save_steps}) is not a multiple of log_steps ({self.log_steps})",
                "a resumed run could not continue its log; choose a multiple",
            )
        if isinstance(self.threshold, str) and self.threshold != "search":
            raise ConfigError(f"threshold must be a number or `search`, not {self.threshold}", "e.g. 0.01")
        if not isinstance(self.threshold, str) and not (self.threshold >= 0 and math.isfinite(self.threshold)):
            raise ConfigError(f"threshold must not be negative, it is {self.threshold}", "0 is plain ReLU")
        if isinstance(self.schedule, str) and self.schedule not in PUBLISHED:
            raise ConfigError(
                f"unknown schedule {self.schedule}", f"known: {', '.join(PUBLISHED)}, or a list of stages"
            )
        self.staged_schedule()

    @staticmethod
    def _require(condition: bool, message: str, hint: str) -> None:
        if not condition:
            raise ConfigError(message, hint)

    def coefficients(self) -> StagedSchedule | SparsityController:
        """What sets lambda in each step."""
        if self.target_sparsity:
            return SparsityController(self.target_sparsity, self.steps, *self.target_ramp)
        return self.staged_schedule()

    def staged_schedule(self) -> StagedSchedule:
        if isinstance(self.schedule, str):
            return preset(self.schedule, self.steps, self.schedule_scale)
        return from_fractions([(c * self.schedule_scale, end) for c, end in self.schedule], self.steps)


CHOICES = {
    "optimizer": ("adamw", "muon"),
    "trainable": ("all", "ffn", "lora"),
    "layout": ("relu", "fatrelu"),
    "bf16": ("auto", "on", "off"),
    "compile": ("auto", "on", "off"),
    "regularizer": ("l1", "count"),
}
FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def load_config(path: Path | None, overrides: dict[str, Any]) -> TrainConfig:
    """Settings from a YAML file, then `overrides` by name (text is read as YAML).

    Raises:
        ConfigError: the file is missing or not YAML; a name is unknown (the nearest known one is told), a value has the
            wrong type, or two settings contradict each other.
    """
    import yaml

    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text())
        except OSError as error:
            raise ConfigError(f"config {path} cannot be read: {error.strerror}", "give a YAML file") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"config {path} is not valid YAML: {' '.join(str(error).split())}", "repair it") from None
        if not isinstance(loaded, dict):
            raise ConfigError(f"config {path} does not hold settings", "one `name: value` a line")
        values.update(loaded)
    for name, value in overrides.items():
        try:
            values[name] = yaml.safe_load(value) if isinstance(value, str) else value
        except yaml.YAMLError:
            values[name] = value
    for name in values:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, 1)
            raise ConfigError(
                f"unknown setting {name}", f"did you mean {near[0]}?" if near else f"known: {', '.join(FIELDS)}"
            )
    hints = typing.get_type_hints(TrainConfig)
    return TrainConfig(**{name: _convert(name, value, hints[name]) for name, value in values.items()})


def _convert(name: str, value: Any, kind: Any) -> Any:
    """The value as the field's type; YAML gives 3e-5 as text, and a flag may give a single source for a list."""
    if kind in (float, int):
        if isinstance(value, bool):
            raise ConfigError(f"{name} must be a number, not {value}")
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ConfigError(f"{name} must be a number, not {value!r}") from None
        if kind is int and number != int(number):
            raise ConfigError(f"{name} must be a whole number, not {value}")
        return kind(number)
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be true or false, not {value!r}")
        return value
    if kind is str:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else str(value)
    if kind == list[float]:
        items = value if isinstance(value, list | tuple) else [value]
        return [_convert(name, item, float) for item in items]
    if typing.get_origin(kind) is list:
        return [str(item) for item in (value if isinstance(value, list | tuple) else [value])]
    if isinstance(kind, types.UnionType) and float in kind.__args__:  # threshold
        try:
            return float(value)
        except (TypeError, ValueError):
            return value
    if isinstance(value, list):  # schedule
        try:
            return [[float(coefficient), float(end)] for coefficient, end in value]
        except (TypeError, ValueError):
            raise ConfigError(
                f"{name} must be a list of [lambda, end as a share of the run]", "e.g. [[0, 0.2], [0.1, 1]]"
            ) from None
    return value
