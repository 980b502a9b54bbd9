"""What a resumed run must have in common with the run it continues, checked before anything is written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nsa_convert.errors import CheckpointError, NsaConvertError
from nsa_convert.training.losses import mix
from nsa_convert.training.recipe.schema import UNBOUND_KEYS, UNBOUND_STAGE_KEYS, Recipe, read_recipe
from nsa_convert.training.run.checkpoints import COMPLETE, checkpoints, damage
from nsa_convert.training.run.models import Start
from nsa_convert.training.run.parallel import parallel_of
from nsa_convert.training.run.stages import MODEL, stage_folder

RUN_FILE = "resolved_recipe.yaml"
"""The recipe of a run with all its keys, ``--set`` included."""
EARLIER = (
    "in what an earlier version did not have or read otherwise, the order of documents among it; finish the "
    "run with that version, or begin it again in another out"
)
"""Said where a run and its recipe differ in no key that this version finds in both."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allow:
    """What a user may allow explicitly, because it changes the numbers of a run.

    Attributes:
        partial_resume: Continue without optimizer, schedule or random states that are missing or damaged.
        data_change: Continue with other data than the checkpoint's, at the same position.
        eager_fallback: Continue without kernels where one cannot be compiled.
    """

    partial_resume: bool = False
    data_change: bool = False
    eager_fallback: bool = False


def stage_facts(recipe: Recipe, index: int, start: Start) -> dict[str, Any]:
    """Return what a checkpoint of a stage must agree with: recipe and base model.

    How many processes share the work, and how, changes no number but by the order of sums. Chats are the
    exception: TRL's rows are dealt to processes anew in every pass, so as many have to read as before.
    """
    facts: dict[str, Any] = {"recipe": recipe.fingerprint(index), "base": _base_facts(start)}
    if recipe.stages[index].kind == "sft":
        facts["reading processes"] = parallel_of(recipe).data
    return facts


def check_resume(recipe: Recipe, start: Start) -> None:
    """Compare a recipe with what the finished stages and checkpoints in its ``out`` recorded.

    Raises:
        CheckpointError: They belong to another recipe or model, or chats to another number of processes;
            every difference is named (TR12).
    """
    for index in range(len(recipe.stages)):
        place = stage_folder(recipe, index)
        expected = stage_facts(recipe, index, start)

        # A finished stage may have been trained with other processes: only recipe and base model count.
        done = place / MODEL / "stage.json"
        if done.is_file():
            _compare(recipe, done.parent, json.loads(done.read_text())["facts"], expected, ("recipe", "base"))
            continue

        # The first stage that is not finished: its newest checkpoint must agree in everything.
        whole = next((folder for folder in checkpoints(place) if COMPLETE not in damage(folder)), None)
        if whole is not None:
            _compare(recipe, whole, json.loads((whole / COMPLETE).read_text()), expected, tuple(expected))

        return


def _compare(
    recipe: Recipe, folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any], keys: tuple[str, ...]
) -> None:
    """Raise CheckpointError where recorded and expected facts differ; the recipe is compared key by key."""
    problems = [
        f"{key} is {found.get(key)!r} there and {expected[key]!r} now"
        for key in keys
        if key != "recipe" and found.get(key) != expected[key]
    ]

    if found.get("recipe") != expected["recipe"]:
        problems.insert(0, f"the recipe differs: {'; '.join(_changes(recipe)) or EARLIER}")

    if problems:
        raise CheckpointError(
            f"{folder} belongs to another run: {'; '.join(problems)}",
            code="TR12",
            where=str(folder),
            hint="resume with the recipe and settings of the run, or choose another out",
        )


def _changes(recipe: Recipe) -> Iterator[str]:
    """Yield the keys of the recipe that have changed since the run began, with both values."""
    try:
        before = read_recipe(Path(recipe.out) / RUN_FILE).to_dict()
    except NsaConvertError:  # why: without the old recipe the message cannot name the changed keys
        return

    # Keys that a resumed run may change do not count.
    now = recipe.to_dict()
    for values in (before, now):
        for key in UNBOUND_KEYS:
            values.pop(key)
        for row in values["stages"]:
            for key in UNBOUND_STAGE_KEYS:
                row.pop(key)

    yield from _differences(before, now, "")


def _differences(before: Any, now: Any, where: str) -> Iterator[str]:
    """Yield ``path was X and is Y`` for every leaf of two nested values that differs."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            yield from _differences(before.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, pair in enumerate(zip(before, now, strict=True)):
            yield from _differences(*pair, f"{where}[{index}]")
    elif before != now:
        yield f"{where} was {before!r} and is {now!r}"


def _base_facts(start: Start) -> str:
    """Return what identifies the base model: its config and the sizes of its weight files."""
    # A hash of the weights would take minutes; their sizes tell most other models apart.
    sizes = (
        [] if start.folder is None else [p.stat().st_size for p in sorted(start.folder.glob("*.safetensors"))]
    )

    config = {key: value for key, value in start.config.items() if key != "transformers_version"}
    return f"{mix(json.dumps(config, sort_keys=True, default=str), *sizes):x}"
