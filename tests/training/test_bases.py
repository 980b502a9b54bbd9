"""A recipe on a base says only what differs, and is read, shown, planned and kept as if it said all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from nsa_convert.cli import main
from nsa_convert.strict_files import read_mapping
from nsa_convert.training.recipe.bases import _comments, read_recipe_values
from nsa_convert.training.recipe.library import find_recipe, known_bases, known_recipes
from nsa_convert.training.recipe.schema import read_recipe, recipe_from_dict
from tests.training.recipes import NSA, recipe_values, stage

RECIPES = known_recipes()
ON_A_BASE = [name for name, path in RECIPES.items() if "base" in read_mapping(path)]
OWN = """\
# Mine
#
# To be kept.
base: theirs.yaml
out: runs/mine
stages:
  # Half the rows.
  - {name: pretrain, micro_batch: 2, rope: {type: linear, factor: 2}}
  - name: extend
    # Read slowly.
    lr: 1e-4
"""
THEIRS = """\
# Theirs

# A few thousand weights.
model: demo
out: runs/theirs
sparse_attention:
  default:
    method: nsa
    # Few.
    num_blocks: 4
stages:
  # All the rows.
  - name: pretrain
    lr: 1e-3
    micro_batch: 4
    data:
      # Generated.
      - {kind: recall}
  # Longer rows.
  - name: extend
    lr: 1e-3
    betas: [0.9, 0.9]
"""

SHOWN = """\
# Mine
#
# To be kept.
#
# Theirs
# A few thousand weights.
model: demo
out: runs/mine
sparse_attention:
  default: {method: nsa, num_blocks: 4}
stages:
# Half the rows.
- name: pretrain
  lr: 0.001
  micro_batch: 2
  data:
  - {kind: recall}
  rope: {type: linear, factor: 2}
# Longer rows.
- name: extend
  # Read slowly.
  lr: 0.0001
  betas: [0.9, 0.9]
"""


def write(folder: Path, name: str, values: Any) -> Path:
    path = folder / name
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False))
    return path


def same_as_base(base: Any, own: Any, place: str = "") -> list[str]:
    """Return what a recipe says although its base says it too; names of stages say which one is meant."""
    if isinstance(base, dict) and isinstance(own, dict):
        keys = [key for key in own if key in base]
        return [same for key in keys for same in same_as_base(base[key], own[key], f"{place}.{key}")]
    if place == ".stages":
        rows = {row["name"]: row for row in base}
        pairs = [(rows.get(row["name"], {}), {**row, "name": None}) for row in own]
        return [same for row, changes in pairs for same in same_as_base(row, changes, f"{place}[]")]
    return [place] if base == own else []


@pytest.mark.parametrize("name", ON_A_BASE)
def test_a_recipe_on_a_base_says_only_what_differs(name):
    own = read_mapping(RECIPES[name])
    base = read_recipe_values(find_recipe(own["base"], RECIPES[name].parent))
    assert same_as_base(base, own) == []


def test_the_check_for_repeated_values_can_fail():
    base = {"seed": 1, "default": {"a": 1, "b": 2}, "stages": [{"name": "x", "lr": 1, "data": [1]}]}
    own = {"seed": 1, "default": {"a": 3, "b": 2}, "stages": [{"name": "x", "lr": 2, "data": [1]}]}
    assert same_as_base(base, own) == [".seed", ".default.b", ".stages[].data"]


def test_every_base_is_built_on():
    used = {read_mapping(RECIPES[name])["base"] for name in ON_A_BASE}
    assert used == set(known_bases())
    assert not used & set(RECIPES), "what only others build on is not listed as a recipe"


@pytest.mark.parametrize("name", RECIPES)
def test_what_show_prints_runs_by_itself(name, tmp_path):
    done = CliRunner().invoke(main, ["recipes", "show", name])
    assert done.exit_code == 0, done.output
    shown = write(tmp_path, "shown.yaml", done.stdout)
    assert "base" not in read_mapping(shown)
    recipe = read_recipe(RECIPES[name])
    assert read_recipe(shown) == recipe
    prints = [[each.fingerprint(i) for i in range(len(each.stages))] for each in (read_recipe(shown), recipe)]
    assert prints[0] == prints[1]
    if name not in ON_A_BASE:
        assert done.stdout == RECIPES[name].read_text()
        return
    # Commands and comments are those of the files it came from.
    comments = {line.strip() for line in done.stdout.splitlines() if line.lstrip().startswith("#")}
    own, base = RECIPES[name], find_recipe(read_mapping(RECIPES[name])["base"])
    assert done.stdout.startswith(own.read_text().split("\nbase:")[0])
    written = [line.strip() for file in (own, base) for line in file.read_text().splitlines()]
    # A comment of the recipe takes the place of the one that its base has there.
    below, above = _comments(base.read_text()), _comments(own.read_text())
    changed = {line for place in below.keys() & above.keys() for line in below[place]} - comments
    assert {line for line in written if line.startswith("#")} - comments == changed


def test_a_text_keeps_heads_comments_and_order(tmp_path):
    write(tmp_path, "theirs.yaml", THEIRS)
    done = CliRunner().invoke(main, ["recipes", "show", str(write(tmp_path, "mine.yaml", OWN))])
    assert done.stdout == SHOWN


def test_mappings_and_stages_are_merged_and_other_values_replaced(tmp_path):
    base = recipe_values(tmp_path, NSA, stage("align", betas=[0.9, 0.9]), stage(), seed=3)
    (tmp_path / "inner").mkdir()
    write(tmp_path, "base.yaml", base)
    middle = {"base": "../base.yaml", "seed": 4, "sparse_attention": {"default": {"num_blocks": 8}}}
    write(tmp_path / "inner", "middle.yaml", middle)
    data = [{"kind": "python"}]
    changes = [{"name": "pretrain", "data": data}, stage("last"), {"name": "align", "lr": 0.5}]
    own = {"base": "inner/middle.yaml", "model": "demo", "precision": "bf16", "stages": changes}
    read = read_recipe_values(write(tmp_path, "own.yaml", own))
    expected = recipe_values(tmp_path, {**NSA, "num_blocks": 8}, seed=4, model="demo", precision="bf16")
    expected["stages"] = [stage("align", betas=[0.9, 0.9], lr=0.5), stage(data=data), stage("last")]
    assert read == expected
    assert recipe_from_dict(read) == recipe_from_dict(expected)
    none = {"base": "base.yaml", "sparse_attention": None}
    assert read_recipe(write(tmp_path, "dense.yaml", none)).plan is None


def test_a_base_by_name_or_by_path_is_the_same_recipe(tmp_path):
    own = {"out": "runs/mine", "stages": [{"name": "pretrain", "tokens": 1024}]}
    by_name = write(tmp_path, "by_name.yaml", {"base": "tiny/ssa", **own})
    by_path = write(tmp_path, "by_path.yaml", {"base": str(RECIPES["tiny/ssa"]), **own})
    overrides = {"out": "runs/mine", "stages.pretrain.tokens": 1024}
    assert read_recipe(by_name) == read_recipe(by_path) == read_recipe(RECIPES["tiny/ssa"], overrides)
    changed = read_recipe(by_name, {"stages.pretrain.tokens": 2048})
    assert changed.stages[0].tokens == 2048, "the command line wins over both"


def test_a_plan_file_may_be_a_recipe_on_a_base(tmp_path):
    from nsa_convert.cli.options import read_plan_file

    path = RECIPES["qwen3/0.6b_nsa"]
    assert "method" not in str(read_mapping(path)["sparse_attention"]), "the method is the base's"
    assert read_plan_file(path) == read_recipe(path).plan
