"""Run a recipe: stage after stage, each from the model the one before left, resumable at any point."""

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

from nsa_convert.errors import CheckpointError, UsageError
from nsa_convert.patch.loading import quiet
from nsa_convert.patch.staging import exclusive, machine_errors, staged
from nsa_convert.patch.trained import seal_trained
from nsa_convert.training.checkpoints import check_same_run, newest, step_of
from nsa_convert.training.distributed import join_processes
from nsa_convert.training.losses import mix
from nsa_convert.training.models import Start, read_start, save_model
from nsa_convert.training.plan import plan_recipe
from nsa_convert.training.recipe import Recipe
from nsa_convert.training.stages import (
    MODEL,
    frozen_hash,
    load_stage_model,
    make_trainer,
    stage_folder,
    stage_tokenizer,
)
from nsa_convert.training.trainer import Say, StageTrainer, StopOnSignal, trim_log

RUN_FILE = "resolved_recipe.yaml"
"""The recipe of a run as it was read, ``--set`` included."""


class Interrupted(Exception):
    """A signal ended the run after its state was saved.

    Args:
        number: Of the signal.
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
    """

    out: str
    model: str
    stages: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """Return the report for people."""
        lines = []
        for name, facts in self.stages.items():
            last = facts.get("last", {})
            loss = f", last loss {last['loss']:.4f}" if "loss" in last else ""
            lines.append(f"{name}: {facts['steps']} steps{loss}")
        return "\n".join([*lines, f"the trained model: {self.model}"])


class Signals:
    """Notes SIGTERM and SIGINT instead of dying; a second one ends the process at once."""

    def __init__(self, say: Say) -> None:
        self.number = 0
        self._say = say

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch the signals inside the block; does nothing outside the main thread."""
        try:
            before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:
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
    say: Say = lambda line: None,
) -> TrainingReport:
    """Run all stages of a recipe.

    Args:
        recipe: The recipe.
        folder: Checkpoint the recipe names; None for a fresh model.
        base: Folder that relative data paths start from.
        resume: Go on with the run in ``recipe.out``.
        say: Called with progress lines.

    Returns:
        The report.

    Raises:
        ConfigError: The recipe cannot run; every reason, before a weight is read.
        UsageError: ``out`` is taken, or another process works there.
        CheckpointError: ``resume`` from another run, or nothing whole to resume from.
        CheckFailedError: A loss or gradient that is no number.
        Interrupted: A signal came; the state is saved.
    """
    start = read_start(recipe, folder)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    plan_recipe(recipe, start, base, processes=processes)
    out = Path(recipe.out)
    _check_out(out, resume)
    signals = Signals(say)
    if processes > 1:
        join_processes()
    with exclusive(out), signals.caught():
        if _is_main():
            write_recipe(recipe, out / RUN_FILE)
        report: dict[str, dict[str, Any]] = {}
        for index, stage in enumerate(recipe.stages):
            report[stage.name] = _run_stage(recipe, index, start, base, signals, say)
    final = out / recipe.stages[-1].name / MODEL
    return TrainingReport(out=str(out), model=str(final), stages=report)


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe with every key resolved; the file is whole or absent."""
    import yaml

    text = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
    aside = path.with_suffix(".tmp")
    with machine_errors():
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)


def _check_out(out: Path, resume: bool) -> None:
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


def _run_stage(
    recipe: Recipe, index: int, start: Start, base: Path, signals: Signals, say: Say
) -> dict[str, Any]:
    """Train one stage, or return what is known of it when it is done."""
    stage, place = recipe.stages[index], stage_folder(recipe, index)
    facts = {
        "recipe": recipe.fingerprint(index),
        "base": _base_facts(start),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }
    done = place / MODEL / "stage.json"
    if done.is_file():
        report = json.loads(done.read_text())
        check_same_run_facts(done, report["facts"], facts)
        say(f"{stage.name}: done already")
        return report
    checkpoint = newest(place, say)
    if checkpoint is not None:
        check_same_run(checkpoint, facts)
    tokenizer = stage_tokenizer(recipe, index, start, base)
    model = load_stage_model(recipe, index, start, checkpoint)
    log_file = Path(recipe.out) / "log.jsonl"
    if _is_main():
        place.mkdir(parents=True, exist_ok=True)
        trim_log(log_file, stage.name, 0 if checkpoint is None else step_of(checkpoint))
    trainer = make_trainer(recipe, index, model, tokenizer, base, facts, say)
    trainer.add_callback(StopOnSignal(lambda: signals.number))
    if checkpoint is not None:
        trainer.train_dataset.restore(json.loads((checkpoint / "data_state.json").read_text()))
        say(f"{stage.name}: going on after step {step_of(checkpoint)}")
    begin = time.perf_counter()
    frozen = frozen_hash(model)
    with quiet():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if signals.number:
        raise Interrupted(signals.number)
    assert frozen_hash(model) == frozen, "a frozen weight changed"
    report = {
        "facts": facts,
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - begin, 2),
        "last": next((row for row in reversed(trainer.state.log_history) if "loss" in row), {}),
    }
    seal = lambda folder: _seal(folder, recipe, index, start, report)  # noqa: E731
    finish_stage(trainer, tokenizer, place, report, seal)
    return report


def _seal(folder: Path, recipe: Recipe, index: int, start: Start, report: dict[str, Any]) -> None:
    """Write what the trained folder needs to be verified, described and published."""
    stage = recipe.stages[index]
    row = {"name": stage.name, "kind": stage.kind, "tokens": report["steps"] * stage.batch_tokens}
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


def check_same_run_facts(where: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse a finished stage that another recipe or model produced."""
    keys = [key for key in ("recipe", "base") if found.get(key) != expected[key]]
    if keys:
        raise CheckpointError(
            f"{where.parent} was trained by another {' and '.join(keys)}",
            code="TR12",
            where=str(where),
            hint="resume with the recipe and settings of the run, or choose another out",
        )


def finish_stage(
    trainer: StageTrainer,
    tokenizer: Any,
    place: Path,
    report: dict[str, Any],
    seal: Callable[[Path], None],
) -> None:
    """Write the trained model; the folder appears when it is complete."""
    trainer.accelerator.wait_for_everyone()
    if trainer.sharded:
        # Every process takes part in gathering the weights; the main one writes.
        gathered = place / ".gathered"
        with quiet():
            trainer.model.save_pretrained(gathered, is_main_process=trainer.is_world_process_zero())
        if trainer.is_world_process_zero():
            tokenizer.save_pretrained(gathered)
            (gathered / "stage.json").write_text(json.dumps(report, indent=1))
            seal(gathered)
            with staged(place / MODEL) as folder:
                folder.rmdir()
                gathered.rename(folder)
    elif trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        if hasattr(model, "merge_and_unload"):
            from nsa_convert.training.lora import save_adapters

            model = save_adapters(model, place / "adapter")
        with staged(place / MODEL) as folder:
            save_model(model, tokenizer, folder)
            (folder / "stage.json").write_text(json.dumps(report, indent=1))
            seal(folder)
    trainer.accelerator.wait_for_everyone()


def _base_facts(start: Start) -> str:
    """Return what identifies the base model: its config and the sizes of its weight files."""
    sizes = (
        [] if start.folder is None else [p.stat().st_size for p in sorted(start.folder.glob("*.safetensors"))]
    )
    config = {key: value for key, value in start.config.items() if key != "transformers_version"}
    return f"{mix(json.dumps(config, sort_keys=True, default=str), *sizes):x}"
