"""What the package imports is declared, and what is declared is pinned to a version that fits."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import nsa_convert

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
