"""Runs of the command line and of tiny recipes, for tests that break them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from nsa_convert.cli import main
from nsa_convert.errors import NsaConvertError
from nsa_convert.training.run.resume import RUN_FILE
from nsa_convert.training.run.runner import train_recipe
from tests.checkpoints import tree_hash
from tests.training.recipes import losses, recipe, recipe_values, run, same_weights

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Done:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


def call(*words: object) -> Done:
    """Run ``nsa-convert WORDS`` in this process."""
    result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    return Done(result.exit_code, result.stdout, result.stderr)


def refused(*words: object, says: tuple[str, ...] | str, code: str, status: int = 3) -> Done:
    """Run a command that must fail with a code, a status and these words."""
    done = call(*words, "--json")
    assert done.code == status, done.out + done.err
    found = done.json
    assert found["ok"] is False
    assert (found["code"], found["exit"]) == (code, status), found["message"]
    for text in (says,) if isinstance(says, str) else says:
        assert text in found["message"] + " " + (found["hint"] or ""), found
    assert "Traceback" not in done.err
    return done


def write_yaml(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def write_tiny(folder: Path, *args: Any, **changes: Any) -> Path:
    """Write a recipe for a model of a few thousand weights; ``out`` is ``folder/run``."""
    return write_yaml(folder / "recipe.yaml", recipe_values(folder / "run", *args, **changes))


def train(out: Path, *args: Any, resume: bool = False, say: Any = None, base: Path = ROOT, **changes: Any):
    """Train a tiny recipe in this process."""
    options = {} if say is None else {"say": say}
    options |= {"allow": changes.pop("allow")} if "allow" in changes else {}
    return train_recipe(recipe(out, *args, **changes), None, base=base, resume=resume, **options)


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    recipe = to / RUN_FILE
    recipe.write_text(recipe.read_text().replace(str(run), str(to)))
    return to


def checkpoint(out: Path, step: int = 4) -> Path:
    return out / "pretrain" / f"checkpoint-{step}"


def goes_on(out: Path, whole: Path, **options) -> list[str]:
    """Resume; the end must be that of the uninterrupted run. Return what was said."""
    said: list[str] = []
    run(out, "dense", resume=True, say=said.append, **options)
    assert losses(out) == losses(whole)
    assert same_weights(out / "pretrain", whole / "pretrain")
    return said


def refuses(out: Path, error: type[NsaConvertError], code: str, *says: str, **options) -> NsaConvertError:
    """Resume; it must fail and leave everything as it was."""
    before = tree_hash(out)
    with pytest.raises(error) as caught:
        run(out, "dense", resume=True, **options)
    assert caught.value.code == code
    for text in says:
        assert text in f"{caught.value.message} {caught.value.hint}"
    after = tree_hash(out)
    assert {name: after.get(name) for name in before} == before
    return caught.value
