"""Every recipe runs as published: two steps of every stage, each stopped and resumed; the result is used.

The commands are those in the recipe's head. What it names on the Hub is found in the current folder, as tiny
stand-ins of the same names (:mod:`tests.published.bases`); lengths, budgets and tokens are made small by
``--set`` (:mod:`tests.published.scaling`), and nothing else is changed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import time
from pathlib import Path
from typing import Any

import pytest

from nsa_convert.config import FULL
from nsa_convert.families import FAMILIES, geometry_of
from nsa_convert.methods.parts.registry import METHODS
from nsa_convert.plan import resolve_plan
from nsa_convert.training.recipe.library import known_recipes
from nsa_convert.training.recipe.schema import Recipe, read_recipe
from nsa_convert.training.recipe.sections import FreshModel
from nsa_convert.training.run.control import CONTROL, shared_stages
from nsa_convert.training.run.models import fresh_tokenizer, load_first, read_start
from tests.published.bases import BASES, DATA, Base, write_base, write_data
from tests.published.jobs import Job, work, work_all
from tests.published.scaling import (
    DIVISORS,
    LENGTHS,
    SHRINK,
    STEPS,
    changes,
    is_long,
    layers_of,
    processes_of,
    set_words,
)
from tests.published.summary import PROPERTY, WITHOUT

FILES = known_recipes()
RECIPES = {name: read_recipe(path) for name, path in FILES.items()}


def family_of(recipe: Recipe) -> str:
    if isinstance(recipe.model, FreshModel):
        return recipe.model.family
    return BASES[recipe.model].family if recipe.model in BASES else family_of(maker_of(recipe.model))


def maker_of(model: str) -> Recipe:
    """Return the recipe that writes the model another one begins with."""
    return next(recipe for recipe in RECIPES.values() if model.startswith(f"{recipe.out}/"))


def stages_of(recipe: Recipe) -> list[str]:
    """Return the names of the stages of a recipe, and of its control's."""
    names = [stage.name for stage in recipe.stages]
    return names + [f"{CONTROL}/{stage.name}" for stage in shared_stages(recipe) if recipe.control]


def methods_of(recipe: Recipe) -> set[str]:
    if recipe.plan is None:
        return set()
    return {rule.method for rule in (recipe.plan.default, *recipe.plan.rules)} - {FULL}


def features(recipe: Recipe) -> set[str]:
    """Return what a recipe is an example of."""
    return {f"method {name}" for name in methods_of(recipe)} | {f"family {family_of(recipe)}"}


def without_recipe() -> list[str]:
    """Return the trainable methods and the families that no recipe is an example of."""
    wanted = [f"method {name}" for name, method in METHODS.items() if method.spec.trainable]
    wanted += [f"family {name}" for name in FAMILIES]
    return [each for each in wanted if each not in set().union(*map(features, RECIPES.values()))]


def examples() -> set[str]:
    """Return names of few recipes that are examples of every method and family together."""
    picked, left = [], set().union(*map(features, RECIPES.values()))
    # One process before two, real models before tiny ones.
    order = sorted(RECIPES, key=lambda name: (processes_of(RECIPES[name]), name.startswith("tiny/"), name))
    while left:
        best = max(order, key=lambda name: len(features(RECIPES[name]) & left))
        picked.append(best)
        left -= features(RECIPES[best])
    return set(picked)


def write_stand_ins(recipe: Recipe, folder: Path) -> None:
    """Write what a recipe names, under the same names."""
    for name in {source.path for stage in recipe.stages for source in stage.data if source.kind == "hub"}:
        write_data(folder / name, name)
    if isinstance(recipe.model, FreshModel):
        return
    if recipe.model in BASES:
        write_base(folder / recipe.model, BASES[recipe.model].small(SHRINK, layers_of(recipe)))
        return
    maker = maker_of(recipe.model)
    load_first(maker, read_start(maker, None)).save_pretrained(folder / recipe.model)
    fresh_tokenizer(maker, folder).save_pretrained(folder / recipe.model)


def header(name: str) -> list[list[str]]:
    """Return the commands in the head of a recipe, each as the words behind ``nsa-convert``."""
    found = []
    for line in FILES[name].read_text().splitlines():
        if not line.startswith("#"):
            break
        words = shlex.split(line[1:], comments=True) if line.startswith("#   ") else []
        if words:
            if words[0] != "nsa-convert":
                count = max(RECIPES[name].fsdp, RECIPES[name].tensor, RECIPES[name].context)
                assert words[:5] == ["torchrun", "--nproc-per-node", str(count), "-m", "nsa_convert.cli"], (
                    line
                )
                words = words[4:]
            found.append(words[1:])
    return found


def jobs_of(name: str) -> list[tuple[Job, int]]:
    """Return the commands in the head of a recipe as jobs that train little, with their exit statuses.

    Each stage is stopped in its first step, and goes on with the command that resumes. The line that shows
    other keys is planned, not run, where its budget is not small.
    """
    recipe = RECIPES[name]
    first, *later = stages_of(recipe)
    small, jobs = set_words(changes(recipe)), []
    for words in header(name):
        made = Job([words[0], words[1], *small, *words[2:]])
        if words == ["train", name]:
            jobs.append((dataclasses.replace(made, stop_in=first), 143))
        if words == ["train", name] or words[2:] == ["--resume"]:
            resume = made if "--resume" in words else Job([*made.words, "--resume"])
            jobs += [(dataclasses.replace(resume, stop_in=stage), 143) for stage in later]
            jobs.append((resume, 0))
            later = []
        elif words[0] == "train":
            plans = is_long(recipe) and "--dry-run" not in words
            jobs.append((Job([*made.words, "--dry-run"]) if plans else made, 0))
    return jobs


FAST = examples()


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_recipe_runs_as_published(name, tmp_path, monkeypatch, record_property):
    begin = time.perf_counter()
    recipe = RECIPES[name]
    monkeypatch.chdir(tmp_path)
    write_stand_ins(recipe, tmp_path)
    jobs = jobs_of(name)
    done = work_all([job for job, _ in jobs], tmp_path, processes_of(recipe))
    for (job, status), each in zip(jobs, done, strict=True):
        assert each.status == status, f"{' '.join(job.words)}\n{each.output}"
        if status:
            words = ["nsa-convert", *(word for word in job.words if word != "--resume"), "--resume"]
            line = " the same command, and --resume" if processes_of(recipe) > 1 else f": {shlex.join(words)}"
            assert f"go on with{line}\n" in each.output
    losses = [loss for each in done for loss in each.losses]
    assert losses
    assert all(math.isfinite(loss) for _, _, loss in losses)
    steps = {(stage, step) for stage in stages_of(recipe) for step in range(STEPS)}
    assert {(stage, step) for stage, step, _ in losses} >= steps
    check_result(name, Path(recipe.out) / recipe.stages[-1].name / "model")
    record_property(PROPERTY, json.dumps([name, time.perf_counter() - begin]))
    record_property(WITHOUT, json.dumps(without_recipe()))


def check_result(name: str, out: Path) -> None:
    """Use the trained model as its user would: what its recipe says, check it, let it write."""
    commands = [words for words in header(name) if words[0] == "eval"]
    assert all(words[1] == str(out) for words in commands)
    if RECIPES[name].plan is not None:
        commands.append(["verify", str(out)])
    commands.append(["generate", str(out), "--prompt", "set aB cD", "--max-new-tokens", "8"])
    rope, config = RECIPES[name].stages[-1].rope, json.loads((out / "config.json").read_text())
    if rope is not None:
        shrink = SHRINK if is_long(RECIPES[name]) else 1
        assert config["rope_parameters"]["rope_type"] == rope.type
        assert config["max_position_embeddings"] == rope.original // shrink * rope.factor
    for words in commands:
        done = work(Job(words))
        assert done.status == 0, f"{' '.join(words)}\n{done.output}"


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_but_sizes_is_changed(name):
    """A test runs the published recipe but for lengths, budgets, tokens and the number of processes."""
    small = read_recipe(FILES[name], changes(RECIPES[name])).to_dict()
    allowed = {
        "seq_len",
        "tokens",
        "batch_tokens",
        "original",
        *DIVISORS,
        "fsdp",
        "tensor",
        "context",
        *LENGTHS,
        "hold_out",
        "eval_rows",
    }
    different = {place.rpartition(".")[2] for place in differences(RECIPES[name].to_dict(), small)}
    assert different <= (allowed if is_long(RECIPES[name]) else {"tokens", "batch_tokens", "eval_rows"})


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
        return [found for key in keys for found in differences(a.get(key), b.get(key), f"{place}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [found for i in range(len(a)) for found in differences(a[i], b[i], f"{place}.{i}")]
    return [] if a == b else [place]


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if is_long(recipe)])
def test_a_small_recipe_sees_the_same_share_of_its_rows(name):
    base = BASES[RECIPES[name].model]

    def budgets(recipe: Recipe, base: Base) -> set[float]:
        geometry = geometry_of({"model_type": base.family, **base.config()})
        reaches = [method.reach() for method in resolve_plan(recipe.plan, base.layers, geometry)]
        limited = [reach for reach in reaches if reach.decode_keys is not None]
        return {reach.visible_budget / recipe.stages[0].seq_len for reach in limited}

    recipe = RECIPES[name]
    small = read_recipe(FILES[name], changes(recipe))
    (found,), (wanted,) = budgets(small, base.small(SHRINK, layers_of(recipe))), budgets(recipe, base)
    assert found == pytest.approx(wanted, rel=0.05)


def test_outs_differ_and_every_hub_name_has_a_stand_in():
    outs = [recipe.out for recipe in RECIPES.values()]
    assert len(outs) == len(set(outs))
    for recipe in RECIPES.values():
        family_of(recipe)
        for source in (source for stage in recipe.stages for source in stage.data if source.kind == "hub"):
            assert source.config in (None, DATA[source.path][0])
            assert source.column in DATA[source.path][1]


def test_the_fast_examples_cover_every_method_and_family_with_a_recipe():
    covered = set().union(*(features(RECIPES[name]) for name in FAST))
    wanted = {f"method {name}" for name in METHODS} | {f"family {name}" for name in FAMILIES}
    assert covered <= wanted
    # What no recipe is an example of is told in the summary of the run, not hidden.
    trainable = {f"method {name}" for name, method in METHODS.items() if method.spec.trainable}
    assert trainable <= covered | set(without_recipe())
