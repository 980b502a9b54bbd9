"""Train one stage on transformers' Trainer: auxiliary losses, complete checkpoints, alarms."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import SaveStrategy

from nsa_convert.checkpoint.staging import free_bytes, gigabytes, machine_errors
from nsa_convert.errors import CheckFailedError, MachineError
from nsa_convert.notices import Say
from nsa_convert.training.data.loader import RowLoader
from nsa_convert.training.data.rows import PackedRows, check_same_data
from nsa_convert.training.losses import StageLosses
from nsa_convert.training.recipe.schema import Stage
from nsa_convert.training.run.alarms import GateMeter, Watch
from nsa_convert.training.run.callbacks import EvaluateEvery, guarded
from nsa_convert.training.run.checkpoints import SAVING, checkpoints, publish, seal, step_of
from nsa_convert.training.run.distributed import (
    gather_lanes,
    row_mesh,
    share_tokens,
    split_tokens,
)
from nsa_convert.training.run.held_out import PREFIX, HeldOut, best_step, evaluations, start_was_better
from nsa_convert.training.run.logs import progress_line, read_log
from nsa_convert.training.run.lora import load_adapters
from nsa_convert.training.run.optimizer import MasterAdamW, parameter_groups, rate
from nsa_convert.training.run.optimizer_states import (
    OPTIMIZER,
    is_optimizer,
    load_optimizer,
    load_weights,
    save_optimizer,
)
from nsa_convert.training.run.parallel import Parallel
from nsa_convert.training.run.trainer_states import SCHEDULER, forward_schedule, load_state, state_bytes


class StageTrainer(Trainer):
    """Trains one stage.

    Args:
        stage: The stage.
        parallel: How the processes share the work.
        losses: The losses it minimises and their weights.
        sparse: Whether the model is a converted one, whose layers return auxiliary losses.
        facts: What a resumed run must agree with; written into every checkpoint.
        say: Called with progress lines.
        log_file: Receives one JSON line per log entry.
        alarms: ``stop`` ends the run at an alarm, ``warn`` prints it and continues.
        lost: State files of the checkpoint that are missing or damaged and are not loaded.
        open_held_out: Opens what the stage is judged by, with the ``rank``, number of ``processes`` and
            context-parallel ``group`` that share it; None for no evaluations.
        data_fingerprint: Hash that identifies the data, where they are not :class:`PackedRows`.
        workers: Most processes that read rows for this one, where the data are :class:`PackedRows`.
        flops_per_token: FLOPs of a token forward and backward, for MFU.
        peak_flops: FLOPs per second of the device; None where they are unknown: MFU is not logged then.
        **kwargs: Arguments of transformers' Trainer.
    """

    optimizer: Any
    lr_scheduler: Any
    control: Any

    def __init__(
        self,
        *,
        stage: Stage,
        parallel: Parallel,
        losses: StageLosses,
        sparse: bool,
        facts: Mapping[str, Any],
        say: Say,
        log_file: Path,
        alarms: str = "stop",
        lost: frozenset[str] = frozenset(),
        open_held_out: Callable[..., HeldOut] | None = None,
        data_fingerprint: str = "",
        workers: int = 0,
        flops_per_token: float = 0.0,
        peak_flops: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.parallel = parallel  # read by get_cp_size, which the Trainer's constructor may call

        # transformers refuses to save a model sharded at load time, because it cannot save such an optimizer;
        # this class can, see below.
        args = kwargs["args"]
        strategy = args.save_strategy
        args.save_strategy = SaveStrategy.NO
        super().__init__(**kwargs)
        args.save_strategy = strategy
        self.remove_callback(PrinterCallback)

        # Processes that share a row must be known to accelerate's data loader, and to the layers.
        self.accelerator.state.device_mesh = mesh = row_mesh(parallel)
        self.context_group = mesh.get_group("cp") if parallel.context > 1 else None
        if self.context_group is not None:
            share_tokens(self.model, self.context_group)

        self.held_out: HeldOut | None = None
        if open_held_out is not None:
            rank = self.args.process_index * parallel.data // parallel.processes
            self.held_out = open_held_out(rank=rank, processes=parallel.data, group=self.context_group)
            self.add_callback(EvaluateEvery(stage.eval_every, self.evaluate))

        self.stage = stage
        self.losses = losses
        self.sparse = sparse
        self.facts = dict(facts)
        self.say = say
        self.log_file = log_file
        self.alarms = alarms
        self.lost = lost
        self.data_fingerprint = data_fingerprint
        self.workers = workers

        # Alarms are raised from log lines; a resumed run first reads those that were written before.
        config = self.accelerator.unwrap_model(self.model).config
        self.watch = Watch(config.vocab_size, stage.steps, math.ceil(stage.warmup * stage.steps))
        log = read_log(log_file, stage.name)
        self.watch.replay(log)
        self.evaluated = evaluations(log)
        self.gates = GateMeter(self.model)
        self._guard_callbacks()

        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        # compute_loss returns a micro-batch's part of the step's loss: the Trainer must not divide it again.
        self.loss_is_scaled_for_ga = True
        self.sharded = bool(getattr(self, "is_distributed_loading_by_transformers", False))
        self.adapts = stage.train == "lora"  # adapters are whole in every process, even of a sharded model

        # State of a save and of a log interval: sums of the losses, start time and step, last micro-batch.
        self._place: Path | None = None
        self._sums: dict[str, list[float]] = {}
        self._clock = (time.perf_counter(), 0)
        self._batch: dict[str, Tensor] = {}
        # The optimizer step, and how many of its micro-batches this process has begun after the first.
        self._drawn = (-1, 0)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Hide the tensor parallel size from accelerate, which does not need it and refuses it on CPUs.

        Autocast keeps no copies: it would hold one of every weight to the end of the forward pass, 16 GB of a
        model of 8e9 weights that FSDP2 or checkpointing have just released.
        """
        from accelerate.utils import AutocastKwargs

        args = super()._build_accelerator_args(**kwargs) | {"parallelism_config": None}
        args["kwargs_handlers"] = [*args.get("kwargs_handlers", ()), AutocastKwargs(cache_enabled=False)]
        return args

    def get_cp_size(self) -> int:
        """Return how many processes read the same row, each a part of its tokens."""
        return self.parallel.context

    def _guard_callbacks(self) -> None:
        """Wrap the callbacks of tracking services, so that their errors do not end the run."""

        def report_error(name: str, error: Exception) -> None:
            text = str(error).strip().splitlines() or ["no message"]
            self.say(f"warning [TR18]: {name} failed ({type(error).__name__}: {text[0]}); training goes on")
            self._write_log({"error": f"{name}: {type(error).__name__}: {text[0]}"})

        def is_service(callback: Any) -> bool:
            return type(callback).__module__.startswith("transformers.integrations")

        handler = self.callback_handler
        handler.callbacks = [
            guarded(one, report_error) if is_service(one) else one for one in handler.callbacks
        ]

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of one micro-batch; a step minimises the sum over its micro-batches."""
        self._batch = inputs

        # Gradients are averaged over the processes; tensor-parallel ones compute one loss and count once.
        devices = self.parallel.processes // self.parallel.tensor
        items = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}

        # A dense model: the next-token loss alone.
        if not self.sparse:
            out = model(**inputs, **items, use_cache=False)
            loss = out.loss * devices
            self._note({"cross_entropy": out.loss * devices}, None)
            return (loss, out) if return_outputs else loss

        # A converted model: the layers return auxiliary losses, which count as a mean over the micro-batches.
        if self.context_group is not None:
            inputs = split_tokens(inputs, self.context_group)
        share = 1 / max(1, self.current_gradient_accumulation_steps)
        step = int(self.state.global_step)
        mode = self.losses.mode(step, draw=self._draw(step), share=share, processes=devices)
        out = self.losses.run(model, inputs | items, mode)

        # Log each loss without its weight.
        values = dict(zip(self.losses.names, self.losses.means(out.auxiliary) * share, strict=True))
        for name in ("cross_entropy", "teacher_kl"):
            value = getattr(out, name)
            if value is not None:
                values[name] = value * devices
        self._note(values, mode.stream)
        return (out.loss, out) if return_outputs else out.loss

    def _draw(self, step: int) -> int:
        """Return the number of this micro-batch among those of the stage, over all processes.

        Every micro-batch samples other queries, and the same ones however many processes share the step.
        """
        done = self._drawn[1] + 1 if self._drawn[0] == step else 0
        self._drawn = (step, done)

        each = self.stage.rows_per_step // self.stage.micro_batch
        process = self.args.process_index // (self.parallel.tensor * self.parallel.context)
        return step * each + done * self.parallel.data + process

    def _note(self, values: Mapping[str, Tensor], stream: str | None) -> None:
        """Add losses to the sums of the log interval; with two streams cross entropy is kept for each."""
        for name, value in values.items():
            key = f"{name}/{stream}" if name == "cross_entropy" and self.losses.dual_stream else name
            total = self._sums.setdefault(key, [0.0, 0.0])
            total[0] += value.detach().float().item()
            total[1] += 1 / max(1, self.current_gradient_accumulation_steps)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Raise before a loss that is not finite can reach the weights."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            self._stop("the loss", loss.item())
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Raise before a gradient that is not finite can reach the weights."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        value = norm.item() if isinstance(norm, Tensor) else norm
        if value is not None and not math.isfinite(value):
            self._stop("the norm of the gradient", value)
        return norm

    def _stop(self, what: str, value: float) -> None:
        """Write the micro-batch to a file and raise CheckFailedError (TR09)."""
        step = self.state.global_step
        note = Path(self.args.output_dir) / f"bad-batch-step-{step}-rank-{self.args.process_index}.json"
        rows = {key: x.tolist() for key, x in self._batch.items() if isinstance(x, Tensor)}

        # why: the batch of an alarm, for whoever looks for its cause
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
        """Return AdamW with the learning rates of the stage; half precision gets float32 masters."""
        if self.optimizer is None:
            groups = parameter_groups(model or self.model, self.stage)
            first, second = self.stage.betas
            wide = all(p.dtype.itemsize >= 4 for group in groups for p in group["params"])
            kind = torch.optim.AdamW if wide else MasterAdamW
            self.optimizer = kind(groups, betas=(first, second), eps=1e-8)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the learning rate schedule of the stage."""
        if self.lr_scheduler is None:
            stage = self.stage
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: rate(stage, step)
            )
            # Lets the Trainer drop it when `train` is called again.
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each loss, the gap between the streams, gates, speed and MFU; write, then check for alarms."""
        if "loss" in logs:
            logs |= self._readings()
        super().log(logs, start_time)
        if self.is_world_process_zero() and "loss" in logs:
            self._write_log(logs)
            self.say(progress_line(self.stage, self.state.global_step, logs))
        if "loss" in logs:
            self._raise_alarms(logs)

    def _write_log(self, values: Mapping[str, Any]) -> None:
        """Append one JSON line to the log of the run."""
        row = {"stage": self.stage.name, "step": self.state.global_step, **values}
        with self.log_file.open("a") as file:  # why: one line of the run's log
            file.write(json.dumps(row) + "\n")

    def _raise_alarms(self, logs: Mapping[str, float]) -> None:
        """Raise CheckFailedError at the first alarm of a log line, or only print the alarms."""
        for alarm in self.watch.alarms(self.state.global_step, logs):
            if self.alarms == "stop":
                raise CheckFailedError(
                    f"stage {self.stage.name}, {alarm.message}",
                    code=alarm.code,
                    where=str(self.log_file),
                    hint=alarm.hint,
                )
            self.say(f"warning [{alarm.code}]: {alarm.message}; {alarm.hint}")

    def _readings(self) -> dict[str, float]:
        """Return the means of the log interval over all processes, and start the next interval."""
        steps = self.state.global_step - self._clock[1]
        seconds = max(time.perf_counter() - self._clock[0], 1e-9)
        self._clock = (time.perf_counter(), self.state.global_step)
        # Losses are divided by the steps they were seen in: a stream is not drawn in every step.
        means = {key: total / max(count, 1e-9) for key, (total, count) in self._sums.items()}
        means |= self.gates.take()

        if self.args.world_size > 1 and means:
            values = torch.tensor(list(means.values()), device=self.args.device)
            torch.distributed.all_reduce(values)
            means = dict(zip(means, (values / self.args.world_size).tolist(), strict=True))

        self._sums = {}
        out = {key.replace("/", "_"): value for key, value in means.items()}
        if {"cross_entropy/sparse", "cross_entropy/full"} <= means.keys():
            out["gap"] = means["cross_entropy/sparse"] - means["cross_entropy/full"]

        # Speed over all processes; MFU is the share of the devices' peak.
        out["tokens_per_second"] = steps * self.stage.batch_tokens / seconds
        if self.peak_flops:
            work = out["tokens_per_second"] * self.flops_per_token
            out["mfu"] = work / (self.peak_flops * self.args.world_size)

        return out

    # ---- evaluations ----

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Read the held-out rows and needles; log their figures, mean over all processes."""
        assert self.held_out is not None
        found = self.held_out.figures(self.model, self.losses, sparse=self.sparse)
        if self.args.world_size > 1:
            values = torch.tensor(list(found.values()), device=self.args.device)
            torch.distributed.all_reduce(values)
            found = dict(zip(found, (values / self.args.world_size).tolist(), strict=True))

        figures = {f"{PREFIX}{name}": value for name, value in found.items()}
        self.log(dict(figures))
        if self.is_world_process_zero():
            self._write_log(figures)
            shown = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
            self.say(f"{self.stage.name} {self.state.global_step}/{self.stage.steps}  held out: {shown}")

        # A better model is saved; a stage that gets no better ends, and is saved as it is.
        self.evaluated.append({"step": self.state.global_step, **figures})
        if self.stage.keep_best and self.state.global_step:
            best = best_step(self.evaluated, self.stage.keep_best)[0]
            self.control.should_training_stop |= self.is_exhausted
            self.control.should_save |= best == self.state.global_step or self.is_exhausted

        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    @property
    def is_exhausted(self) -> bool:
        """Whether as many evaluations as the stage has patience for brought nothing better."""
        if not self.stage.patience or not self.stage.keep_best:
            return False
        return best_step(self.evaluated, self.stage.keep_best)[1] >= self.stage.patience

    def load_best(self) -> int:
        """Load the weights of the best evaluation, where the stage asks for them; return their step."""
        last = int(self.state.global_step)
        if self.stage.keep_best is None:
            return last

        worse = start_was_better(self.evaluated, self.stage.keep_best)
        if worse is not None:
            self.say(
                f"warning: {self.stage.name} made the model no better: {worse}; lower the learning rates"
            )

        best = best_step(self.evaluated, self.stage.keep_best)[0] or last
        if best != last:
            self._load_weights(Path(self.args.output_dir) / f"checkpoint-{best}")
            self.say(f"{self.stage.name}: the weights of step {best}, whose {self.stage.keep_best} was best")
        return best

    # ---- data ----

    def get_train_dataloader(self) -> Any:
        """Return the micro-batches of this process; packed rows are dealt to processes and their workers."""
        if not isinstance(self.train_dataset, PackedRows):
            return super().get_train_dataloader()

        # Neighbours that share a row, by its tokens or by the heads of a layer, read the same.
        return RowLoader(
            self.train_dataset,
            self.args.per_device_train_batch_size,
            process=self.args.process_index // (self.parallel.tensor * self.parallel.context),
            processes=self.parallel.data,
            workers=self.workers,
            say=self.say,
        )

    # ---- checkpoints ----

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the end of the stage, from a checkpoint or from the start.

        A checkpoint of the last step is only loaded: transformers would train one more step.
        """
        if checkpoint is None or (step_of(checkpoint) < self.stage.steps and not self.is_exhausted):
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            return
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def restore_data(self, checkpoint: Path, *, allow_change: bool) -> None:
        """Set the data to the position at which a checkpoint was written.

        Raises:
            ConfigError: The data have changed, and ``allow_change`` is not given (DA08).
        """
        state = json.loads((checkpoint / "data_state.json").read_text())
        if isinstance(self.train_dataset, PackedRows):
            self.train_dataset.restore(state, allow_change=allow_change, say=self.say)
        else:  # the Trainer itself skips to the row
            check_same_data(
                state["fingerprint"], self.data_fingerprint, allow_change=allow_change, say=self.say
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load weights; a sharded model already has them, it was created from the checkpoint."""
        if not self.sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_weights(self, checkpoint: Path) -> None:
        """Load the weights of a checkpoint into the model as it is, sharded or whole."""
        model = self.accelerator.unwrap_model(self.model)
        if not self.sharded:
            self._load_from_checkpoint(str(checkpoint))
        elif self.adapts:
            load_adapters(model, checkpoint)
        else:
            load_weights(model, checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save optimizer and schedule; every process writes its part of the optimizer's state."""
        folder = Path(output_dir)
        save_optimizer(self.model, self.optimizer, folder / OPTIMIZER)
        if self.args.should_save:
            # why: a state of a checkpoint that is sealed when it is whole
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load optimizer and schedule, except lost ones; each process reads its part."""
        if checkpoint is None:
            return

        folder = Path(checkpoint)
        # Without its state the optimizer starts from zero moments.
        if not any(is_optimizer(name) for name in self.lost):
            load_optimizer(self.model, self.optimizer, folder / OPTIMIZER)

        # A lost schedule is computed from the step of the checkpoint.
        if SCHEDULER not in self.lost:
            self.lr_scheduler.load_state_dict(load_state(folder / SCHEDULER))
        else:
            forward_schedule(self.lr_scheduler, step_of(folder))

        # The rates of the next step.
        for group, value in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = value

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the random states of as many processes as there are now, unless they are lost.

        Only dropout draws from them. Those of another number of processes are left: their masks would differ
        in any case.
        """
        if checkpoint is None or any(name.startswith("rng_state") for name in self.lost):
            return

        found = len(list(Path(checkpoint).glob("rng_state*.pth")))
        if found == self.args.world_size:
            super()._load_rng_state(checkpoint)
        elif self.is_world_process_zero() and _drops(self.model):
            self.say(
                f"warning [TR06]: dropout draws other masks with {self.args.world_size} processes than with "
                f"the {found} of the checkpoint: this is not the same run"
            )

    def _get_output_dir(self, trial: Any) -> str:
        # While a checkpoint is written: its temporary folder.
        return super()._get_output_dir(trial) if self._place is None else str(self._place)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint to a temporary folder, seal it, and rename it: it is complete or absent."""
        place = Path(self.args.output_dir) / SAVING
        if self.is_world_process_zero():
            # why: the folder of an unfinished checkpoint, emptied for this one
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)

        self.accelerator.wait_for_everyone()
        # transformers writes into this folder, see _get_output_dir.
        self._place = place

        try:
            with machine_errors():
                super()._save_checkpoint(model, trial)
                if isinstance(self.train_dataset, PackedRows):
                    gather_lanes(self.train_dataset)
                self.accelerator.wait_for_everyone()
                if self.is_world_process_zero():
                    self._finish_checkpoint(place)
        except MachineError as error:
            raise self._not_saved(error, place) from error
        finally:
            self._place = None
        self.accelerator.wait_for_everyone()

    def _finish_checkpoint(self, place: Path) -> None:
        """Add the position in the data, seal the folder and move it to its place."""
        folder = place / f"checkpoint-{self.state.global_step}"

        # why: a pickle of all arguments, which nothing reads; a token of the Hub would stand in it
        (folder / "training_args.bin").unlink(missing_ok=True)

        # TRL's data have no position of their own: the Trainer skips to the row.
        rows = self.state.global_step * self.stage.rows_per_step
        packed = isinstance(self.train_dataset, PackedRows)
        other = {"rows": rows, "fingerprint": self.data_fingerprint}
        state = self.train_dataset.state() if packed else other

        # why: where the data stand, before the checkpoint is sealed
        (folder / "data_state.json").write_text(json.dumps(state))

        seal(folder, self.facts)

        # While an alarm is near, all checkpoints are kept: the last good one may be an old one.
        # The weights of the best evaluation are kept beside the newest.
        stage = place.parent
        keep = len(checkpoints(stage)) + 1 if self.watch.suspicious else self.stage.keep
        best = best_step(self.evaluated, self.stage.keep_best)[0] if self.stage.keep_best else 0
        publish(folder, stage, keep, spared=best)
        place.rmdir()  # why: the checkpoint has left it for its final place

    def _not_saved(self, error: MachineError, place: Path) -> MachineError:
        """Remove what there is of a checkpoint that could not be written; return the error to raise."""
        # why: half a checkpoint is of no use, and the disk may be full
        shutil.rmtree(place, ignore_errors=True)

        # Tell how much space is missing, and what a resumed run can start from.
        stage = place.parent
        step = self.state.global_step
        kept = next((path.name for path in checkpoints(stage)), None)
        last = f"{kept} is whole" if kept else "there is none before it"

        return MachineError(
            f"checkpoint-{step} of stage {self.stage.name} could not be written: {error.message}; it needs "
            f"about {gigabytes(state_bytes(self.model))}, {gigabytes(free_bytes(stage))} are free; {last}",
            code="TR04",
            where=str(stage),
            hint="free some space (or set a smaller keep), then --resume",
        )


def _drops(model: nn.Module) -> bool:
    """Return whether anything of a model is dropped at random in training."""
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    return max([*rates, getattr(model.config, "attention_dropout", 0.0) or 0.0]) > 0
