"""Run a recipe: stage after stage, each from the trained model of the one before, resumable at any step."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nsa_convert.checkpoint.staging import exclusive, machine_errors, staged
from nsa_convert.checkpoint.trained import seal_trained
from nsa_convert.errors import NsaConvertError, UsageError
from nsa_convert.kernels.common.backend import use_backend
from nsa_convert.notices import Say, silent
from nsa_convert.training.recipe.schema import Recipe
from nsa_convert.training.run.callbacks import Profile, StopOnSignal
from nsa_convert.training.run.checkpoints import newest, release_optimizer, step_of
from nsa_convert.training.run.control import CONTROL, control_of, dense_start
from nsa_convert.training.run.distributed import from_main, join_processes
from nsa_convert.training.run.failures import KernelFailure, explained
from nsa_convert.training.run.forecast import forecast_recipe
from nsa_convert.training.run.held_out import compare_control, compare_ends
from nsa_convert.training.run.logs import trim_log
from nsa_convert.training.run.micro_batches import device_bytes, fit_micro_batches, one_by_one
from nsa_convert.training.run.models import Start, quiet, read_start, save_dtype, save_model
from nsa_convert.training.run.parallel import Parallel, context_problems, parallel_of, world_size
from nsa_convert.training.run.resume import RUN_FILE, Allow, check_resume, stage_facts
from nsa_convert.training.run.stages import (
    MODEL,
    check_data,
    frozen_hash,
    load_base,
    load_stage_model,
    make_trainer,
    stage_folder,
    stage_tokenizer,
)
from nsa_convert.training.run.trainer import StageTrainer

NOTHING = Allow()


class Interrupted(Exception):
    """A signal ended the run after its state was saved.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """What a run did.

    Attributes:
        out: Folder of the run.
        model: Folder of the trained model.
        stages: Stage -> steps, seconds and last log line.
        control: The same of the dense control; None without one.
    """

    out: str
    model: str
    stages: dict[str, dict[str, Any]]
    control: dict[str, dict[str, Any]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """Return the report for people."""
        lines = []
        controls = {f"{CONTROL}/{name}": facts for name, facts in (self.control or {}).items()}
        for name, facts in {**self.stages, **controls}.items():
            last = facts.get("last", {})
            loss = f", last loss {last['loss']:.4f}" if "loss" in last else ""
            lines.append(f"{name}: {facts['steps']} steps{loss}")
            lines += [f"  {line}" for line in (compare_ends(facts.get("evaluations", ())),) if line]
        for name, facts in (self.control or {}).items():
            compared = compare_control(self.stages[name], facts)
            lines += [f"{name} {compared}"] if compared else []
        return "\n".join([*lines, f"the trained model: {self.model}"])


class Signals:
    """Records SIGTERM and SIGINT, so that the run can save and stop; a second one ends it at once."""

    def __init__(self, say: Say) -> None:
        self.number = 0
        self._say = say

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch the signals inside the block; has no effect outside the main thread."""
        try:
            before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # why: outside the main thread there are no signals to catch
            yield
            return

        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, *_: Any) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        self._say("a signal came: saving after this step (once more to stop at once)")


def train_recipe(
    recipe: Recipe,
    folder: Path | None,
    *,
    base: Path,
    resume: bool = False,
    say: Say = silent,
    allow: Allow = NOTHING,
) -> TrainingReport:
    """Run all stages of a recipe.

    Args:
        recipe: The recipe.
        folder: Checkpoint the recipe names; None for a fresh model.
        base: Folder that relative data paths start from.
        resume: Go on with the run in ``recipe.out``.
        say: Called with progress lines.
        allow: What may differ from an exact run.

    Returns:
        The report.

    Raises:
        ConfigError: The recipe cannot run; every reason, before a weight is read.
        UsageError: ``out`` is taken, or another process works there.
        CheckpointError: ``resume`` from another run, or nothing whole to resume from.
        CheckFailedError: A loss or gradient that is no number, or an alarm.
        MachineError: No memory, no space.
        BackendError: A kernel does not compile.
        Interrupted: A signal came; the state is saved.
    """
    # Everything that needs no weights is checked first.
    start = read_start(recipe, folder)
    for line in forecast_recipe(one_by_one(recipe), start, base).warnings:
        say(f"warning: {line}")
    check_data(recipe, start, base)

    out = Path(recipe.out)
    if world_size() > 1:
        join_processes()
    # The main process alone: it writes there as soon as it may, which others must not mistake for an old run.
    from_main(lambda: _check_out(out, resume))
    # Memory that is free differs between processes, the micro-batch must not.
    recipe = from_main(lambda: fit_micro_batches(recipe, start, parallel_of(recipe), device_bytes(), say))
    # From here on this process group is alone in the folder, and a signal ends the run after a step.
    signals = Signals(say)
    with exclusive(out), signals.caught():
        runs = [_Run(recipe, start, base, signals, say, allow)]
        if recipe.control:
            quoted = lambda line: say(f"{CONTROL}: {line}")  # noqa: E731
            runs.append(_Run(control_of(recipe), dense_start(start), base, signals, quoted, allow))
        # All are compared with what is there before anything of one is written.
        for run in runs:
            check_resume(run.recipe, run.start)
        for run in runs if _is_main() else ():
            place = Path(run.recipe.out)
            place.mkdir(exist_ok=True)  # why: the folder of the control, inside the run's own
            write_recipe(run.recipe, place / RUN_FILE)

        try:
            reports = [run.stages() for run in runs]
        except KernelFailure as error:
            if not allow.eager_fallback:
                raise
            say(f"warning [TR20]: {error.message}; going on with plain torch, slower")
            with use_backend("torch"):
                reports = [run.stages() for run in runs]

    final = out / recipe.stages[-1].name / MODEL
    control = reports[1] if recipe.control else None
    return TrainingReport(out=str(out), model=str(final), stages=reports[0], control=control)


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe with all its keys resolved; the file appears complete or not at all."""
    import yaml

    text = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
    aside = path.with_suffix(".tmp")
    with machine_errors():
        aside.write_text(text, encoding="utf-8")  # why: the resolved recipe, renamed into place
        aside.replace(path)


def _check_out(out: Path, resume: bool) -> None:
    """Raise UsageError (TR15) if ``out`` holds anything and the run is not resumed."""
    begun = (out / RUN_FILE).is_file()
    if resume or not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return

    what = "holds a run already" if begun else "exists and holds something else"
    raise UsageError(
        f"{out} {what}",
        code="TR15",
        where=str(out),
        hint="--resume goes on with it; --set out=ANOTHER starts beside it"
        if begun
        else "choose another out",
    )


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


@dataclasses.dataclass(frozen=True)
class _Run:
    """The stages of a run, one after another; called again, it continues where it ended."""

    recipe: Recipe
    start: Start
    base: Path
    signals: Signals
    say: Say
    allow: Allow

    def stages(self) -> dict[str, dict[str, Any]]:
        """Train the stages that are not done yet; return stage name -> report."""
        return {stage.name: self._stage(index) for index, stage in enumerate(self.recipe.stages)}

    def _stage(self, index: int) -> dict[str, Any]:
        """Train one stage and write its model; return its report."""
        recipe, stage, say = self.recipe, self.recipe.stages[index], self.say
        place = stage_folder(recipe, index)
        done = place / MODEL / "stage.json"

        # A stage that has its model is done: `stage.json` is part of the folder, which appears complete.
        if done.is_file():
            if _is_main():
                release_optimizer(place)
            say(f"{stage.name}: done already")
            return json.loads(done.read_text())

        # All processes resume from the same checkpoint, the one that the main process chose.
        checkpoint, lost = from_main(lambda: newest(place, say, partial=self.allow.partial_resume))
        tokenizer = stage_tokenizer(recipe, index, self.start, self.base)

        can_share = not context_problems(self.start.methods())
        with explained(stage, context=recipe.context, shareable=can_share):
            model = load_stage_model(recipe, index, self.start, checkpoint)
            trainer = self._trainer(index, model, tokenizer, checkpoint, lost)
            begin = time.perf_counter()
            frozen = frozen_hash(model)
            with quiet():
                trainer.train_from(checkpoint)

        # The trainer has saved a checkpoint before it stopped.
        if self.signals.number:
            raise Interrupted(self.signals.number)

        # The weights to keep: the last ones, or those of the best evaluation.
        with explained(stage):
            kept = trainer.load_best()

        # A silent change of frozen weights would make the trained model another model than the recipe says.
        if frozen_hash(model) != frozen:
            raise NsaConvertError(f"stage {stage.name}: a weight that is not trained changed", code="TR17")

        report = {
            "facts": trainer.facts,
            "steps": trainer.state.global_step,
            "seconds": round(time.perf_counter() - begin, 2),
            "last": next((row for row in reversed(trainer.state.log_history) if "loss" in row), {}),
        }
        if trainer.evaluated:
            report |= {"weights_of_step": kept, "evaluations": trainer.evaluated}

        # Write the trained model, with what is needed to verify and publish it.
        seal = lambda folder: _seal(folder, recipe, index, self.start, report)  # noqa: E731
        whole = lambda: load_base(recipe, index, self.start, Parallel())  # noqa: E731
        # The next stage begins with the weights as they were trained; those of the last one users load.
        last = index == len(recipe.stages) - 1
        dtype = save_dtype(recipe, self.start) if last else None
        finish_stage(trainer, tokenizer, place, report, seal, whole, dtype)
        if _is_main():
            release_optimizer(place)
        return report

    def _trainer(
        self, index: int, model: Any, tokenizer: Any, checkpoint: Path | None, lost: frozenset[str]
    ) -> StageTrainer:
        """Return the trainer of a stage, its data at the position of the checkpoint."""
        recipe, stage, place = self.recipe, self.recipe.stages[index], stage_folder(self.recipe, index)

        # A resumed run writes the log lines after its checkpoint again.
        if _is_main():
            place.mkdir(parents=True, exist_ok=True)  # why: the folder of the stage, inside the run's own
            step = 0 if checkpoint is None else step_of(checkpoint)
            trim_log(Path(recipe.out) / "log.jsonl", stage.name, step)

        facts = stage_facts(recipe, index, self.start)
        trainer = make_trainer(recipe, index, model, tokenizer, self.base, facts, self.say, lost)
        trainer.add_callback(StopOnSignal(self.signals))
        if recipe.profile:
            trainer.add_callback(Profile(recipe.profile, place))

        if checkpoint is not None:
            trainer.restore_data(checkpoint, allow_change=self.allow.data_change)
            self.say(f"{stage.name}: going on after step {step_of(checkpoint)}")
        return trainer


def _seal(folder: Path, recipe: Recipe, index: int, start: Start, report: dict[str, Any]) -> None:
    """Write the recipe, the training report and the manifest into a trained folder."""
    stage = recipe.stages[index]
    row = {"name": stage.name, "kind": stage.kind, "tokens": report["steps"] * stage.batch_tokens}

    # The source is the folder that the stage was trained from; its public name is that of the recipe's model.
    before = stage_folder(recipe, index - 1) / MODEL if index else start.folder
    named = recipe.model if isinstance(recipe.model, str) else "a fresh model"

    seal_trained(
        folder,
        recipe=recipe.to_dict(),
        stages=[{**row, "steps": report["steps"], "seq_len": stage.seq_len}],
        source=before,
        source_id=named if not Path(named).exists() else Path(named).resolve().name,
        revision=recipe.revision,
    )


def finish_stage(
    trainer: StageTrainer,
    tokenizer: Any,
    place: Path,
    report: dict[str, Any],
    seal: Callable[[Path], None],
    whole: Callable[[], nn.Module],
    dtype: torch.dtype | None = None,
) -> None:
    """Write the trained model; its folder appears when it is complete. Every process calls this.

    Args:
        trainer: Trainer of the stage.
        tokenizer: Tokenizer of the model.
        place: Folder of the stage.
        report: Content of ``stage.json``.
        seal: Writes the recipe, the training report and the manifest into the folder.
        whole: Returns the model the stage began with, unsharded: an adapter is merged into it.
        dtype: Of the written weights; as they were trained when left out. The model in memory is converted.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)

    # Adapters are also kept by themselves, beside the merged model.
    if trainer.adapts:
        from nsa_convert.training.run.lora import save_adapters

        save_adapters(model, place / "adapter", is_main=trainer.is_world_process_zero())
    trainer.accelerator.wait_for_everyone()

    # A sharded model: every process takes part in gathering the weights, the main process writes them.
    if trainer.sharded and not trainer.adapts:
        gathered = place / ".gathered"
        with quiet():
            trainer.model.to(dtype)
            # why: a sharded model is gathered aside, and renamed when it is sealed
            trainer.model.save_pretrained(gathered, is_main_process=trainer.is_world_process_zero())

        if trainer.is_world_process_zero():
            tokenizer.save_pretrained(gathered)  # why: beside the gathered weights, before the seal
            (gathered / "stage.json").write_text(json.dumps(report, indent=1))
            seal(gathered)
            with staged(place / MODEL) as folder:
                folder.rmdir()  # why: the gathered folder takes the place of the empty staging folder
                gathered.rename(folder)
    elif trainer.is_world_process_zero():
        # Otherwise the main process has the whole model, or merges its adapter into one.
        if trainer.adapts:
            from nsa_convert.training.run.lora import merged

            model = merged(model, place / "adapter", whole() if trainer.sharded else None)

        model.to(dtype)
        with staged(place / MODEL) as folder:
            save_model(model, tokenizer, folder)
            # why: the report of the stage, inside the staging folder
            (folder / "stage.json").write_text(json.dumps(report, indent=1))
            seal(folder)
    trainer.accelerator.wait_for_everyone()
