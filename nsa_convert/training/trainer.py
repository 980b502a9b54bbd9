"""One stage on transformers' Trainer: losses of the layers, whole checkpoints, a guard against NaN."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from nsa_convert.errors import CheckFailedError
from nsa_convert.patch.staging import machine_errors
from nsa_convert.training.checkpoints import SAVING, publish, seal
from nsa_convert.training.data import PackedRows
from nsa_convert.training.distributed import load_optimizer_state, whole_optimizer_state
from nsa_convert.training.losses import LossPlan
from nsa_convert.training.recipe import Stage

Say = Callable[[str], None]


class StageTrainer(Trainer):
    """Trains one stage.

    Args:
        stage: The stage.
        losses: What it minimises.
        sparse: Whether the model is a converted one, whose layers return losses.
        facts: What a resumed run must agree with; noted in every checkpoint.
        say: Called with progress lines.
        log_file: Gets one JSON line per log.
        flops_per_token: Forward and backward work, for MFU; None where the peak of the device is unknown.
        peak_flops: Of the device.
        **kwargs: Of transformers' Trainer.
    """

    def __init__(
        self,
        *,
        stage: Stage,
        losses: LossPlan,
        sparse: bool,
        facts: Mapping[str, Any],
        say: Say,
        log_file: Path,
        flops_per_token: float = 0.0,
        peak_flops: float | None = None,
        **kwargs: Any,
    ) -> None:
        # transformers refuses to save a model sharded at load time, because it cannot save such an optimizer;
        # this class can, see below.
        args = kwargs["args"]
        strategy, args.save_strategy = args.save_strategy, SaveStrategy.NO
        super().__init__(**kwargs)
        args.save_strategy = strategy
        self.remove_callback(PrinterCallback)
        self.stage = stage
        self.losses = losses
        self.sparse = sparse
        self.facts = dict(facts)
        self.say = say
        self.log_file = log_file
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.loss_is_scaled_for_ga = True
        self.sharded = bool(getattr(self, "is_distributed_loading_by_transformers", False))
        self._place: Path | None = None
        self._sums: dict[str, list[float]] = {}
        self._clock = (time.perf_counter(), 0)
        self._batch: dict[str, Tensor] = {}

    # ---- what is minimised ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of one micro-batch; the sum over those of a step is the loss of the step."""
        self._batch = inputs
        devices = self.args.world_size if self.args.average_tokens_across_devices else 1
        items = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        if not self.sparse:
            out = model(**inputs, **items, use_cache=False)
            loss = out.loss * devices
            self._note({"cross_entropy": out.loss * devices}, None)
            return (loss, out) if return_outputs else loss
        mode = self.losses.mode(self.state.global_step)
        wants_text = self.losses.cross_entropy > 0
        labels = inputs.get("labels") if wants_text else None
        rest = {key: value for key, value in inputs.items() if key != "labels"}
        out = model(**rest, labels=labels, training_mode=mode, **(items if wants_text else {}))
        text = None if out.loss is None else out.loss * devices
        share = 1 / max(1, self.current_gradient_accumulation_steps)
        loss = self.losses.total(text, out.auxiliary, share)
        values = dict(zip(self.losses.names, self.losses.means(out.auxiliary) * share, strict=True))
        self._note(values if text is None else {"cross_entropy": text, **values}, mode.stream)
        return (loss, out) if return_outputs else loss

    def _note(self, values: Mapping[str, Tensor], stream: str | None) -> None:
        for name, value in values.items():
            key = f"{name}/{stream}" if name == "cross_entropy" and self.losses.dual_stream else name
            total = self._sums.setdefault(key, [0.0, 0.0])
            total[0] += value.detach().float().item()
            total[1] += 1 / max(1, self.current_gradient_accumulation_steps)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Stop before a loss that is no number can reach the weights."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            self._stop("the loss", loss.item())
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Stop before a gradient that is no number can reach the weights."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        value = norm.item() if isinstance(norm, Tensor) else norm
        if value is not None and not math.isfinite(value):
            self._stop("the norm of the gradient", value)
        return norm

    def _stop(self, what: str, value: float) -> None:
        step = self.state.global_step
        note = Path(self.args.output_dir) / f"bad-batch-step-{step}-rank-{self.args.process_index}.json"
        rows = {key: x.tolist() for key, x in self._batch.items() if isinstance(x, Tensor)}
        note.write_text(json.dumps({"step": step, "what": what, "value": str(value), "batch": rows}))
        raise CheckFailedError(
            f"stage {self.stage.name}: {what} is {value} in step {step + 1}; nothing was updated with it",
            code="TR09",
            where=str(note),
            hint="the last checkpoint is good: lower the learning rate, look at the batch in the file named "
            "above, then --resume",
        )

    # ---- optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make AdamW with the learning rates of the stage."""
        if self.optimizer is None:
            groups = parameter_groups(model or self.model, self.stage)
            self.optimizer = torch.optim.AdamW(groups, betas=self.stage.betas, eps=1e-8)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule of the stage."""
        if self.lr_scheduler is None:
            stage = self.stage
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: rate(stage, step)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the single losses, the gap between the streams, speed and MFU."""
        if "loss" in logs:
            logs |= self._readings()
        super().log(logs, start_time)
        if self.is_world_process_zero() and "loss" in logs:
            with self.log_file.open("a") as file:
                file.write(
                    json.dumps({"stage": self.stage.name, "step": self.state.global_step, **logs}) + "\n"
                )
            self.say(progress_line(self.stage, self.state.global_step, logs))

    def _readings(self) -> dict[str, float]:
        steps = self.state.global_step - self._clock[1]
        seconds = max(time.perf_counter() - self._clock[0], 1e-9)
        self._clock = (time.perf_counter(), self.state.global_step)
        means = {key: total / max(count, 1e-9) for key, (total, count) in self._sums.items()}
        if self.args.world_size > 1 and means:
            values = torch.tensor(list(means.values()), device=self.args.device)
            torch.distributed.all_reduce(values)
            means = dict(zip(means, (values / self.args.world_size).tolist(), strict=True))
        self._sums = {}
        out = {key.replace("/", "_"): value for key, value in means.items()}
        if {"cross_entropy/sparse", "cross_entropy/full"} <= means.keys():
            out["gap"] = means["cross_entropy/sparse"] - means["cross_entropy/full"]
        out["tokens_per_second"] = steps * self.stage.batch_tokens / seconds
        if self.peak_flops:
            work = out["tokens_per_second"] * self.flops_per_token
            out["mfu"] = work / (self.peak_flops * self.args.world_size)
        return out

    # ---- checkpoints ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load weights; a sharded model was loaded from the checkpoint to begin with."""
        if not self.sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the optimizer; of a sharded model its whole state is gathered first."""
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_optimizer_state(self.model, self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer; of a sharded model each process takes its part."""
        if not self.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        load_optimizer_state(
            self.model, self.optimizer, torch.load(folder / "optimizer.pt", weights_only=True)
        )
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._place is None else str(self._place)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, seal it, and move it to its place: it is whole or absent."""
        stage_folder = Path(self.args.output_dir)
        place = stage_folder / SAVING
        if self.is_world_process_zero():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._place = place
        try:
            with machine_errors():
                super()._save_checkpoint(model, trial)
        finally:
            self._place = None
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            folder = place / f"checkpoint-{self.state.global_step}"
            with machine_errors():
                if isinstance(self.train_dataset, PackedRows):
                    rows = self.state.global_step * self.stage.rows_per_step
                    state = self.train_dataset.state_after(rows)
                else:
                    state = {"rows": self.state.global_step * self.stage.rows_per_step}
                (folder / "data_state.json").write_text(json.dumps(state))
                seal(folder, self.facts)
            publish(folder, stage_folder, self.stage.keep)
            place.rmdir()
        self.accelerator.wait_for_everyone()


class StopOnSignal(TrainerCallback):
    """Saves and ends the stage after the step in which a signal came.

    Args:
        received: Returns the signal's number, or 0.
    """

    def __init__(self, received: Callable[[], int]) -> None:
        self.received = received

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Agree with the other processes on whether a signal came."""
        number = self.received()
        if args.world_size > 1:
            flag = torch.tensor([number], device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            number = int(flag)
        if number:
            control.should_save = control.should_training_stop = True


def parameter_groups(model: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    """Return the optimizer's groups: dense matrices, dense vectors, and new weights with their own rate."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    new = [p for name, p in named if ".sparse." in name]
    old = [p for name, p in named if ".sparse." not in name]
    lr_new = stage.lr if stage.lr_new is None else stage.lr_new
    groups = [
        {"params": [p for p in old if p.dim() > 1], "lr": stage.lr, "weight_decay": stage.weight_decay},
        {"params": [p for p in old if p.dim() < 2], "lr": stage.lr, "weight_decay": 0.0},
        {"params": new, "lr": lr_new, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def rate(stage: Stage, step: int) -> float:
    """Return the learning rate of optimizer step ``step`` (from 0), as a share of the peak."""
    warmup = math.ceil(stage.warmup * stage.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, stage.steps - warmup))
    if stage.schedule == "constant":
        return 1.0
    fall = done if stage.schedule == "linear" else (1 - math.cos(math.pi * done)) / 2
    return 1 - (1 - stage.min_lr) * fall


def progress_line(stage: Stage, step: int, logs: Mapping[str, float]) -> str:
    """Return one line of progress."""
    hidden = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "epoch")
    parts = [f"{stage.name} {step}/{stage.steps}", f"loss {logs['loss']:.4f}"]
    parts += [f"{key} {value:.4f}" for key, value in logs.items() if key not in hidden]
    parts.append(f"lr {logs.get('learning_rate', 0.0):.2e}")
    parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in logs:
        parts.append(f"MFU {100 * logs['mfu']:.1f} %")
    left = (stage.steps - step) * stage.batch_tokens / max(logs["tokens_per_second"], 1e-9)
    parts.append(f"{left / 60:.1f} min left")
    return "  ".join(parts)


def trim_log(log_file: Path, stage: str, step: int) -> None:
    """Drop the lines of a stage after ``step``: a resumed run writes them again."""
    if not log_file.is_file():
        return
    kept = []
    for line in log_file.read_text().splitlines():
        with contextlib.suppress(ValueError):  # a line cut off by a crash
            row = json.loads(line)
            if row["stage"] != stage or row["step"] <= step:
                kept.append(line)
    log_file.write_text("".join(f"{line}\n" for line in kept))
