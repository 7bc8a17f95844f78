"""Makes a ProSparse model of a dense one (arXiv 2402.13516): ReLU for the activation, staged L1, FATReLU threshold.

prosparse-pipe train --model MODEL --data TEXT --out runs/mine
accelerate launch --use_fsdp --num_processes 8 -m prosparse_pipe train --config recipes/llama2-7b.yaml
"""

import copy
import dataclasses
import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch.utils.data import SequentialSampler
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from prosparse_pipe import __version__
from prosparse_pipe.atomic import atomic_path
from prosparse_pipe.checkpoint import INFO_NAME, SparseInfo, resolve_base_model, runs_folder, save_activation_rates
from prosparse_pipe.data import PackedBlocks, load_blocks
from prosparse_pipe.errors import CheckpointError, ProsparseError
from prosparse_pipe.evaluate import Evaluation, evaluate, search_threshold
from prosparse_pipe.ffn_weights import load_ffn_weights
from prosparse_pipe.model_card import write_model_card
from prosparse_pipe.objective import ActivationPenalty, FFNInputs, hidden_loss, token_loss
from prosparse_pipe.plots import plot_training
from prosparse_pipe.relu import GatedFFN, find_ffns, load_model, set_threshold, substitute_relu
from prosparse_pipe.schedule import SparsityController
from prosparse_pipe.train_config import TrainConfig

log = logging.getLogger(__name__)

FULL_BYTES = 16 << 20  # a disk with less than this is why a write failed
COMPLETE = "complete"  # marker of a whole checkpoint: written last
CONTROLLER = "sparsity_controller.json"
RECORDS = "training.jsonl"
PLOT = "training.png"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the checkpoint has been saved."""


class SparseTrainer(Trainer):
    """Trainer with the sparse objective: records of every `log_steps` steps, data in a fixed order.

    Args:
        penalty: hooks on the model's FFNs.
        inputs: likewise, of the model and of the teacher; None if nothing is learnt from them.
        teacher: the frozen dense model, or None.
        config: of the run.
        bf16: compute in bf16.
    """

    def __init__(
        self,
        *args: Any,
        penalty: ActivationPenalty,
        inputs: tuple[FFNInputs, FFNInputs] | None,
        teacher: Any,
        config: TrainConfig,
        bf16: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.coefficients = config.coefficients()
        self.penalty = penalty
        self.inputs = inputs
        self.teacher = teacher
        self.config = config
        self.loss_is_scaled_for_ga = False  # ours is a mean; Trainer divides by grad_accum
        self.model_accepts_loss_kwargs = False
        self.sums: torch.Tensor | None = None  # (4 + n_layer,): ce, kl, hidden, penalty, rates; and forward passes
        self.passes = 0
        self.step_sums: list[torch.Tensor] = []  # activation rates of the step's forward passes, mean over layers
        self.compiled = False
        self.hidden_loss: Callable[..., torch.Tensor] = hidden_loss
        # accelerate's autocast would make f32 of the logits, the largest tensor by far; with FSDP it is what casts
        self.autocast = bf16 and not self.args.bf16

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        assert isinstance(self.train_dataset, PackedBlocks)
        return SequentialSampler(self.train_dataset)  # it is shuffled already

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.config.optimizer == "adamw" or self.optimizer is not None:
            return super().create_optimizer(model)
        trained: Any = self.model if model is None else model
        weights = [p for p in trained.parameters() if p.requires_grad]
        if self.is_fsdp_enabled or any(p.ndim != 2 for p in weights):
            raise ProsparseError("muon needs whole matrices: no FSDP, no biases", "use --set optimizer=adamw")
        self.optimizer = torch.optim.Muon(
            weights, lr=self.config.lr, weight_decay=self.config.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids = inputs["input_ids"]
        ours, theirs = (inputs.collect() for inputs in self.inputs) if self.inputs else (nullcontext(), nullcontext())
        with self.penalty.collect(), ours, torch.autocast(ids.device.type, torch.bfloat16, enabled=self.autocast):
            logits = model(input_ids=ids, use_cache=False).logits
        penalty, rates = self.penalty.take()
        teacher_logits = None
        if self.teacher is not None:
            with torch.no_grad(), theirs:
                teacher_logits = self.teacher(input_ids=ids, use_cache=False).logits
        hidden = penalty.new_zeros(())
        if self.inputs is not None:
            hidden = self.hidden_loss(*(inputs.take() for inputs in self.inputs))
        chunk = 4096 if ids.device.type == "cuda" else 128
        token, ce, kl = token_loss(
            logits, teacher_logits, ids, self.config.ce_weight, self.config.distill, chunk, self.compiled
        )
        coefficient = self.coefficients.value(self.state.global_step)
        if model.training:
            figures = torch.cat([torch.stack([ce, kl, hidden.detach(), penalty.detach()]), rates])
            self.sums = figures if self.sums is None else self.sums + figures
            self.passes += 1
            self.step_sums.append(rates.mean())
        loss = token + self.config.distill_hidden * hidden + coefficient * penalty
        return (loss, {"logits": logits}) if return_outputs else loss

    def steer(self) -> None:
        """After an optimizer step: tells a controller the step's sparsity, over forward passes and processes."""
        step_sums, self.step_sums = self.step_sums, []
        if isinstance(self.coefficients, SparsityController):
            rate = self.accelerator.reduce(torch.stack(step_sums).mean(), "mean").item()
            self.coefficients.observe(self.state.global_step - 1, 1.0 - rate)

    def take_figures(self) -> dict[str, Any]:
        """Means since the last call, over forward passes and processes."""
        if self.sums is None:
            raise RuntimeError("no forward pass since the last record")
        means = self.accelerator.reduce(self.sums / self.passes, "mean").tolist()
        self.sums, self.passes = None, 0
        sparsity = [1.0 - rate for rate in means[4:]]
        return {
            "ce": means[0],
            "kl": means[1],
            "hidden": means[2],
            "penalty": means[3],
            "sparsity": sum(sparsity) / len(sparsity),
            "sparsity_per_layer": [round(s, 5) for s in sparsity],
        }


class RunCallback(TrainerCallback):
    """Records, progress bar, checkpoint markers, and Ctrl-C."""

    def __init__(self, run: Path, config: TrainConfig, ffns: list[GatedFFN], tokens_per_step: int) -> None:
        self.run = run
        self.config = config
        self.ffns = ffns
        self.tokens_per_step = tokens_per_step
        self.trainer: SparseTrainer | None = None
        self.bar: tqdm | None = None
        self.interrupted = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._set_threshold(state)
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        if self.bar is not None:
            self.bar.update(1)
        coefficient = self.trainer.coefficients.value(state.global_step - 1)
        self.trainer.steer()
        self._set_threshold(state)
        if state.global_step % self.config.log_steps == 0 or state.global_step == state.max_steps:
            figures = self.trainer.take_figures()
            if not math.isfinite(figures["ce"] + figures["kl"] + figures["hidden"] + figures["penalty"]):
                raise ProsparseError(
                    f"the loss is not a number any more at step {state.global_step}", "lower --lr or the penalty"
                )
            if state.is_world_process_zero:
                self._record(state, coefficient, figures)
            self.trainer.log({"lambda": coefficient, **{k: v for k, v in figures.items() if isinstance(v, float)}})
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def _set_threshold(self, state: Any) -> None:
        if self.config.train_threshold and state.global_step >= self.config.train_threshold_start * state.max_steps:
            set_threshold(self.ffns, self.config.train_threshold)

    def _record(self, state: Any, coefficient: float, figures: dict[str, Any]) -> None:
        assert self.trainer is not None
        c = self.config
        loss = c.ce_weight * figures["ce"] + c.distill * figures["kl"] + c.distill_hidden * figures["hidden"]
        loss += coefficient * figures["penalty"]
        rate = self.trainer.optimizer.param_groups[0]["lr"] if self.trainer.optimizer else 0.0
        record = {"step": state.global_step, "loss": loss, **figures, "lambda": coefficient, "lr": rate}
        record["tokens"] = state.global_step * self.tokens_per_step
        with open(self.run / RECORDS, "a") as file:
            file.write(json.dumps(record) + "\n")
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.3f}", lam=f"{coefficient:.3g}", sparsity=f"{figures['sparsity']:.1%}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if isinstance(self.trainer.coefficients, SparsityController):
                (folder / CONTROLLER).write_text(json.dumps(self.trainer.coefficients.state_dict()))
            (folder / COMPLETE).touch()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def choose_bf16(setting: str) -> tuple[bool, str]:
    """Whether to compute in bf16, and why."""
    if setting != "auto":
        return setting == "on", f"bf16 {setting}"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(), "the GPU " + (
            "has" if torch.cuda.is_bf16_supported() else "has no"
        ) + " bf16"
    native = bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return native, "the CPU multiplies bf16 natively" if native else "this CPU has no native bf16"


def find_checkpoint(run: Path) -> Path | None:
    """The last whole checkpoint of a run; what a kill left half-written is removed."""
    found = []
    for folder in (run / "checkpoints").glob("checkpoint-*"):
        if (folder / COMPLETE).is_file():
            found.append((int(folder.name.split("-")[1]), folder))
        elif is_main_process():
            shutil.rmtree(folder, ignore_errors=True)
    return max(found)[1] if found else None


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def open_run(config: TrainConfig, resume: bool, overwrite: bool) -> tuple[Path, Path | None]:
    """The run folder, made, and the checkpoint to go on from.

    Raises:
        CheckpointError: the folder holds another run and neither resume nor overwrite was asked for.
    """
    run = Path(config.out) if config.out else runs_folder() / Path(config.model.rstrip("/")).stem
    checkpoint = find_checkpoint(run) if resume else None
    occupied = (run / INFO_NAME).exists() or (run / "checkpoints").exists()
    if occupied and not resume and not overwrite:
        raise CheckpointError(f"{run} holds a run already", "--resume goes on with it, --overwrite starts anew")
    if is_main_process():
        if overwrite and not resume:
            for name in ("checkpoints", INFO_NAME, RECORDS):
                shutil.rmtree(run / name, ignore_errors=True) if (run / name).is_dir() else (run / name).unlink(True)
        run.mkdir(parents=True, exist_ok=True)
        _trim_records(run / RECORDS, int(checkpoint.name.split("-")[1]) if checkpoint else 0)
    return run, checkpoint


def _trim_records(path: Path, step: int) -> None:
    """Drops records after `step`: the resumed run writes them again."""
    if path.exists():
        kept = []
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # cut off by a kill
                break
            if record["step"] <= step:
                kept.append(line)
        with atomic_path(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))


def training_arguments(config: TrainConfig, run: Path, bf16: bool) -> TrainingArguments:
    recompute: dict[str, Any] = {}
    if config.gradient_checkpointing:
        recompute = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(run / "checkpoints"),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.grad_accum,
        learning_rate=config.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.lr_min_ratio},
        warmup_steps=round(config.warmup * config.steps),
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        bf16=bf16 and os.environ.get("ACCELERATE_USE_FSDP", "false") == "true",  # else SparseTrainer casts itself
        logging_strategy="no",  # RunCallback logs
        logging_nan_inf_filter=False,  # it waits for the GPU after every forward pass
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        seed=config.seed,
        report_to=config.report_to or "none",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        **recompute,
    )


@dataclasses.dataclass
class Result:
    """What a run gave: evaluations on the same held-out blocks, and where it is."""

    run: Path
    dense: Evaluation
    substituted: Evaluation
    sparse: Evaluation
    info: SparseInfo
    seconds: float


def train(config: TrainConfig, resume: bool = False, overwrite: bool = False) -> Result | None:
    """Trains, evaluates and saves a sparse model.

    Args:
        resume: go on from the last whole checkpoint of the run folder; start if there is none.
        overwrite: start anew in a folder that holds a run.

    Returns:
        The figures; None in processes other than the first, and for a run that is finished already.

    Raises:
        UnsupportedModelError: the model has no gated FFN.
        CheckpointError, ConfigError, DataError: see there.
        Interrupted: Ctrl-C; a checkpoint has been saved.
    """
    start = time.monotonic()
    run, checkpoint = open_run(config, resume, overwrite)
    if resume and (run / INFO_NAME).exists():
        return None
    path = resolve_base_model(config.model)
    bf16, reason = choose_bf16(config.bf16)
    arguments = training_arguments(config, run, bf16)
    device = arguments.device
    if is_main_process():
        log.info("computing in %s: %s", "bf16" if bf16 else "f32", reason)
    model, tokenizer = load_model(path)
    find_ffns(model)
    model.to(device)
    samples_per_step = config.batch_size * config.grad_accum * arguments.world_size
    n_samples = config.steps * samples_per_step
    blocks, heldout = _load_text(config, tokenizer, n_samples)

    dense = substituted = None
    if is_main_process():
        dense = evaluate(model, heldout, config.batch_size, bf16)
    teacher = None
    if config.distill > 0 or config.distill_hidden > 0:
        teacher = copy.deepcopy(model).eval().requires_grad_(False).to(torch.bfloat16 if bf16 else torch.float32)
    ffns = substitute_relu(model)
    if config.init:
        load_ffn_weights(ffns, Path(config.init))
    if is_main_process():
        substituted = evaluate(model, heldout, config.batch_size, bf16)
        assert dense is not None
        log.info("held-out perplexity: dense %.2f, with ReLU untrained %.2f", dense.perplexity, substituted.perplexity)
    choose_trainable(model, ffns, config)
    penalty = ActivationPenalty(ffns, config.regularizer, config.count_tau)
    inputs = None
    if teacher is not None and config.distill_hidden > 0:
        inputs = FFNInputs(ffns), FFNInputs(find_ffns(teacher))
    callback = RunCallback(run, config, ffns, samples_per_step * config.seq_len)
    trainer = SparseTrainer(
        model=model,
        args=arguments,
        train_dataset=PackedBlocks(blocks, n_samples, config.seed),
        callbacks=[callback],
        penalty=penalty,
        inputs=inputs,
        teacher=teacher,
        config=config,
        bf16=bf16,
    )
    callback.trainer = trainer
    compiled = compile_layers(config, device, [model, teacher], ffns)
    trainer.compiled = bool(compiled)
    if compiled:
        trainer.hidden_loss = torch.compile(hidden_loss, dynamic=False)
    if is_main_process() and arguments.world_size > 1:
        kind = trainer.accelerator.distributed_type.value
        log.info("%d processes: %s", arguments.world_size, kind)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    with explain_full_disk(run):
        _run_trainer(trainer, callback, checkpoint, run)
        for hooks in (penalty, *(inputs or ())):
            hooks.close()
        for layer in compiled:
            layer._compiled_call_impl = None
        if config.trainable == "lora":
            merge_adapters(model)
        _save_weights(trainer, run)
    if not is_main_process():
        return None
    assert dense is not None and substituted is not None
    if trainer.is_fsdp_enabled:  # sharded in place: evaluate what was saved
        model, _ = load_model(str(run))
        ffns = substitute_relu(model.to(device))
    result = _finish(config, run, model, tokenizer, ffns, heldout, dense, substituted, bf16, samples_per_step, start)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return result


def choose_trainable(model: Any, ffns: list[GatedFFN], config: TrainConfig) -> None:
    """Freezes what is not trained; `lora` puts adapters on every matrix but the embedding and the head."""
    if config.trainable == "ffn":
        model.requires_grad_(False)
        for ffn in ffns:
            for linear in (ffn.gate, ffn.up, ffn.down):
                linear.requires_grad_(True)
    elif config.trainable == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        model.requires_grad_(False)
        head = model.get_output_embeddings()
        names = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head]
        adapters = LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules=names)
        inject_adapter_in_model(adapters, model)


def merge_adapters(model: Any) -> None:
    """Adds what `lora` learnt to the matrices and removes the adapters."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.get_base_layer())


def compile_layers(config: TrainConfig, device: torch.device, models: list[Any], ffns: list[GatedFFN]) -> list[Any]:
    """Compiles the decoder layers of the models, each kind of layer once; returns the layers, none if it is off."""
    automatic = device.type == "cuda" and not config.gradient_checkpointing
    if not (config.compile == "on" or (config.compile == "auto" and automatic)):
        return []
    names = [ffn.name.rpartition(".")[0] for ffn in ffns]
    layers = [model.get_submodule(name) for model in models if model is not None for name in names]
    for layer in layers:
        layer.compile(dynamic=False)
    return layers


def _load_text(config: TrainConfig, tokenizer: Any, n_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks to train on, no more than the run needs, and held-out blocks; int32 (n, seq_len)."""
    heldout = load_blocks(tokenizer, config.data, config.seq_len, "heldout", config.heldout_tokens, config.seed)
    limit = n_samples * config.seq_len
    return load_blocks(tokenizer, config.data, config.seq_len, "train", limit, config.seed), heldout


@contextmanager
def explain_full_disk(run: Path) -> Iterator[None]:
    """One line for a full disk: torch and safetensors report it as different errors, or as a short write."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ProsparseError) or shutil.disk_usage(run).free > FULL_BYTES:
            raise
        hint = "free some disk space, then go on with --resume"
        raise ProsparseError(f"no space left while saving a checkpoint in {run}", hint) from error


def _run_trainer(trainer: SparseTrainer, callback: RunCallback, checkpoint: Path | None, run: Path) -> None:
    def on_interrupt(signum: int, frame: Any) -> None:
        if callback.interrupted:
            raise KeyboardInterrupt
        callback.interrupted = True
        log.warning("stopping after this step, with a checkpoint; Ctrl-C again stops at once")

    if checkpoint is not None and isinstance(trainer.coefficients, SparsityController):
        trainer.coefficients.load_state_dict(json.loads((checkpoint / CONTROLLER).read_text()))
    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        signal.signal(signal.SIGINT, previous)
    if callback.interrupted and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"stopped at step {trainer.state.global_step}; go on with: --resume --out {run}")


def _save_weights(trainer: SparseTrainer, run: Path) -> None:
    """The whole model in `run`, gathered from all processes, moved there when it is whole."""
    partial = run / "checkpoints" / "final"
    trainer.save_model(str(partial))
    if is_main_process():
        for file in partial.iterdir():
            if file.suffix in (".safetensors", ".json"):
                os.replace(file, run / file.name)


def _finish(
    config: TrainConfig,
    run: Path,
    model: Any,
    tokenizer: Any,
    ffns: list[GatedFFN],
    heldout: np.ndarray,
    dense: Evaluation,
    substituted: Evaluation,
    bf16: bool,
    samples_per_step: int,
    start: float,
) -> Result:
    """Threshold, figures, config, tokenizer, plot and card; prosparse.json comes last: with it the run is finished."""
    threshold = config.train_threshold
    set_threshold(ffns, threshold)
    sparse = evaluate(model, heldout, config.batch_size, bf16)
    if config.threshold == "search":
        threshold, sparse = search_threshold(
            model, ffns, heldout, sparse, config.threshold_tolerance, config.batch_size, bf16, threshold
        )
    elif float(config.threshold) != threshold:
        threshold = float(config.threshold)
        set_threshold(ffns, threshold)
        sparse = evaluate(model, heldout, config.batch_size, bf16)

    model.config.hidden_act_param = threshold
    if config.layout == "fatrelu":
        model.config.hidden_act = "fatrelu"
    model.config.save_pretrained(run)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(run)
    tokenizer.save_pretrained(run)
    base = Path(resolve_base_model(config.model))
    tokens = config.steps * samples_per_step * config.seq_len
    figures = {"tokens": str(sparse.tokens), "text": ", ".join(config.data), "threshold": str(threshold)}
    save_activation_rates(run, sparse.rates, figures)
    info = SparseInfo(
        activation="fatrelu" if threshold else "relu",
        threshold=threshold,
        sparsity=sparse.sparsity,
        evaluation={
            "perplexity_dense": dense.perplexity,
            "perplexity_substituted": substituted.perplexity,
            "perplexity": sparse.perplexity,
            "sparsity_substituted": substituted.mean_sparsity,
            "tokens": sparse.tokens,
            "text": f"held-out part of {', '.join(config.data)}",
        },
        provenance={
            "base_model": _base_name(base, model),
            "data": ", ".join(config.data),
            "tokens": tokens,
            "version": __version__,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "config": dataclasses.asdict(config),
        },
    )
    records = [json.loads(line) for line in (run / RECORDS).read_text().splitlines()]
    plot_training(records, run / PLOT, f"{info.provenance['base_model']}, {tokens / 1e6:.1f} M tokens")
    write_model_card(run, info)
    info.save(run)
    if config.push_to_hub:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(config.push_to_hub, exist_ok=True)
        api.upload_folder(repo_id=config.push_to_hub, folder_path=run, ignore_patterns=["checkpoints/*", "gguf/*"])
    return Result(run, dense, substituted, sparse, info, time.monotonic() - start)


def _base_name(base: Path, model: Any) -> str:
    """`SmolLM2-135M-Instruct` of a path like .../SmolLM2-135M-Instruct.Q4_1.gguf."""
    name = base.stem if base.suffix == ".gguf" else base.name
    stem, _, quantization = name.rpartition(".")
    is_type = quantization.upper().startswith(("Q", "F16", "F32", "BF16", "IQ"))
    return stem if stem and is_type else name
