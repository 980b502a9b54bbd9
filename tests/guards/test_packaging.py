"""What the package imports is declared, and what is declared is pinned to a version that fits."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import nsa_convert
from nsa_convert.cli.training import known_recipes

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Not pinned: a CUDA build of torch demands its own triton, see constraints.txt.
UNPINNED = {"triton"}
# Declared without being imported: transformers uses them.
INDIRECT = {"accelerate", "jinja2", "gguf"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(lines: list[str]) -> dict[str, Requirement]:
    parsed = [Requirement(line) for line in lines]
    return {canonical(item.name): item for item in parsed if canonical(item.name) != "nsa-convert"}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    parts = [line.partition("==") for line in lines if not line.startswith("#")]
    return {canonical(name): version for name, _, version in parts}


CORE = requirements(PROJECT["dependencies"])
EXTRAS = {name: requirements(lines) for name, lines in PROJECT["optional-dependencies"].items()}
ALL = CORE | {name: item for extra in EXTRAS.values() for name, item in extra.items()}


def third_party(source: str) -> set[tuple[str, bool]]:
    """Return ``(top-level module, whether importing the file imports it)`` for modules of other people."""
    tree = ast.parse(source)
    guarded = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    eager = {id(node) for node in tree.body} - guarded
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        found |= {(name.split(".")[0], id(node) in eager) for name in names}
    own = set(sys.stdlib_module_names) | {"nsa_convert"}
    return {(name, is_eager) for name, is_eager in found if name not in own}


def undeclared(source: str, name: str = "") -> list[str]:
    """Return imports that are in no dependency list, or that every user needs but only an extra declares."""
    # Imported by name, on machines that have triton: nothing that every user imports reaches them.
    on_demand = {"triton"} if name.startswith("triton_") or name == "toolchain.py" else set()
    distributions = packages_distributions()
    problems = []
    for module, is_eager in sorted(third_party(source)):
        names = {canonical(name) for name in distributions.get(module, [module])}
        if not names & ALL.keys():
            problems.append(f"{module} is not declared in pyproject.toml")
        elif is_eager and not names & (CORE.keys() | on_demand):
            problems.append(f"{module} is imported at import time, but only an extra declares it")
    return problems


def test_imports_are_declared():
    files = sorted((ROOT / "nsa_convert").rglob("*.py"))
    told = [(path, problem) for path in files for problem in undeclared(path.read_text(), path.name)]
    problems = [f"{path.relative_to(ROOT)}: {problem}" for path, problem in told]
    assert not problems, "\n" + "\n".join(problems)


def test_core_dependencies_are_used():
    files = sorted((ROOT / "nsa_convert").rglob("*.py"))
    used = {module for path in files for module, _ in third_party(path.read_text())}
    distributions = packages_distributions()
    used = {canonical(name) for module in used for name in distributions.get(module, [module])}
    assert CORE.keys() - used - INDIRECT == set()


@pytest.mark.parametrize("name", sorted(ALL.keys() - UNPINNED))
def test_pin_exists_and_fits_the_bound(name):
    assert name in pins(), f"constraints.txt does not pin {name}"
    assert ALL[name].specifier.contains(pins()[name])


def test_every_recipe_is_in_the_wheel():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = [name for names in tools["data-files"].values() for name in names]
    packed = {path for name in patterns for path in ROOT.glob(name)}
    there = {path for path in (ROOT / "recipes").rglob("*") if path.is_file() and path.name[0] != "."}
    assert sorted(there - packed) == []
    assert all(f"share/nsa_convert/{names[0]}" == f"{key}/*" for key, names in tools["data-files"].items())


@pytest.mark.slow
def test_recipes_are_found_where_the_wheel_is_installed(tmp_path):
    source, wheels, place = tmp_path / "source", tmp_path / "wheels", tmp_path / "place"
    source.mkdir()
    for name in ("nsa_convert", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(wheels), str(source)]
    subprocess.run([*pip, *build], check=True, timeout=300)
    (wheel,) = wheels.glob("*.whl")
    install = ["install", "--no-deps", "--no-index", "--target", str(place), str(wheel)]
    subprocess.run([*pip, *install], check=True, timeout=300)
    env = {**os.environ, "PYTHONPATH": str(place)}
    command = [sys.executable, "-m", "nsa_convert.cli", "recipes", "--json"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recipes"].keys() == known_recipes().keys()


def test_version_is_told_once():
    assert "version" in PROJECT["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", nsa_convert.__version__)


def test_guards_can_fail():
    assert undeclared("import requests_html") == ["requests_html is not declared in pyproject.toml"]
    assert "only an extra declares it" in undeclared("import matplotlib")[0]
    assert "only an extra declares it" in undeclared("import triton", "fetch.py")[0]
    assert undeclared("import triton", "triton_fetch.py") == []
    assert undeclared("def plot():\n    import matplotlib") == []
    assert undeclared("try:\n    import matplotlib\nexcept ImportError:\n    pass") == []
    assert undeclared("import json\nimport torch.nn") == []
