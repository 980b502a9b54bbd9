"""What the package imports is declared, and what is declared is pinned to a version that fits."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Mapping
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import nsa_convert
from nsa_convert import extras
from nsa_convert.hub import DEMO_PACKAGE
from nsa_convert.training.recipe.library import known_recipes
from nsa_convert.training.recipe.schema import Recipe

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Not pinned: a CUDA build of torch demands its own triton, see constraints.txt.
UNPINNED = {"triton"}
# Not tried at the lower bound: a CPU build of torch that old is on no index, and lm-eval is not installed.
UNTRIED = {"torch", "lm-eval"}
# Declared without being imported: transformers uses them.
INDIRECT = {"accelerate", "jinja2", "gguf"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(lines: list[str]) -> dict[str, Requirement]:
    parsed = [Requirement(line) for line in lines]
    return {canonical(item.name): item for item in parsed if canonical(item.name) != "nsa-convert"}


def pins(file: str = "constraints.txt") -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
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


@functools.cache
def installed() -> Mapping[str, list[str]]:
    """Return module -> distributions that bring it, read once: there are some hundred."""
    return packages_distributions()


def undeclared(source: str, name: str = "") -> list[str]:
    """Return imports that are in no dependency list, or that every user needs but only an extra declares."""
    # Imported by name, on machines that have triton: nothing that every user imports reaches them.
    on_demand = {"triton"} if name.startswith("triton") or name == "toolchain.py" else set()
    distributions = installed()
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
    distributions = installed()
    used = {canonical(name) for module in used for name in distributions.get(module, [module])}
    assert CORE.keys() - used - INDIRECT == set()


@pytest.mark.parametrize("name", sorted(ALL.keys() - UNPINNED))
def test_pin_exists_and_fits_the_bound(name):
    assert name in pins(), f"constraints.txt does not pin {name}"
    assert ALL[name].specifier.contains(pins()[name])


@pytest.mark.parametrize("name", sorted(ALL.keys() - UNPINNED - UNTRIED))
def test_the_oldest_pin_is_the_lower_bound(name):
    (bound,) = [Version(part.version) for part in ALL[name].specifier if part.operator == ">="]
    assert Version(pins("constraints-oldest.txt")[name]) == bound


def test_every_recipe_is_in_the_wheel():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = [name for names in tools["data-files"].values() for name in names]
    packed = {path for name in patterns for path in ROOT.glob(name)}
    there = {path for path in (ROOT / "recipes").rglob("*") if path.is_file() and path.name[0] != "."}
    assert sorted(there - packed) == []
    assert all(f"share/nsa_convert/{names[0]}" == f"{key}/*" for key, names in tools["data-files"].items())


def test_types_are_told_to_who_installs_it():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "py.typed" in tools["package-data"]["nsa_convert"]
    assert (ROOT / "nsa_convert" / "py.typed").read_bytes() == b""


def test_the_table_of_extras_is_that_of_the_project():
    listed = {name: set(packages) for name, packages in extras.EXTRAS.items()}
    assert listed == {name: set(packages) for name, packages in EXTRAS.items() if name != "dev"}
    assert {canonical(name) for name in extras.NEEDED} == CORE.keys()


REPORTERS = set(get_args(get_type_hints(Recipe)["report_to"])) - {"auto", "none"}
FILLED_IN = {
    "{choice}": "training/run/stages.py: a name of report_to",
    "{package}": "extras.py: of a table that this file checks",
    "{name}": "doctor.py: of the same table",
    "{' '.join(EXTRAS[extra])}": "extras.py: the same",
    "{DEMO_PACKAGE}=={DEMO_VERSION}": "hub.py: the demo's package",
}
"""Names in a hint that the program fills in -> where, and from what."""


def pip_lines(text: str) -> list[str]:
    """Return what stands behind each ``pip install``, to the end of the command."""
    ends = r"`|\"$|\"[),}]|;|\.\.\.|$"
    found = re.findall(rf"pip install (?=[-'\w.{{])(.*?)(?:{ends})", text, re.MULTILINE)
    return [line.split("  #")[0].strip() for line in found]


def hint_problems(line: str) -> list[str]:
    """Return what a reader of ``pip install LINE`` would ask an index for that is not ours to name.

    Our own name is asked of the index too, unless it is a path: ``.[extra]`` of a checkout, or a file.
    """
    allowed = ALL.keys() | {canonical(name) for name in REPORTERS} | {canonical(DEMO_PACKAGE)}
    rest, problems = line, []
    for known in FILLED_IN:
        rest = rest.replace(known, "")
    words = shlex.split(rest)
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith("-") or before in ("-c", "-r"):
            continue
        if word[0] in "./":
            named = re.search(r"\[(.*)\]", word)
            lacking = set(named.group(1).split(",") if named else ()) - EXTRAS.keys()
            problems += [f"pyproject.toml has no extra {name}" for name in sorted(lacking)]
        elif canonical(Requirement(word).name) not in allowed:
            problems.append(f"{word} is in no dependency list of pyproject.toml")
    return problems


def test_install_hints_name_what_can_be_installed():
    """In the package, its templates, README, docs, recipes: a checkout's extras, or packages we depend on."""
    folders = ("nsa_convert", "docs", "recipes", "benchmarks", "model_cards")
    places = [path for name in folders for path in (ROOT / name).rglob("*") if path.is_file()]
    places += [ROOT / name for name in ("README.md", "Makefile", "constraints.txt", "CHANGELOG.md")]
    hints = [
        (path, line)
        for path in places
        if path.suffix not in (".png", ".pyc")
        for line in pip_lines(path.read_text(errors="replace"))
    ]
    assert len(hints) >= 8
    told = [(path, line, problem) for path, line in hints for problem in hint_problems(line)]
    assert not told, "\n".join(f"{path.relative_to(ROOT)}: {line}: {problem}" for path, line, problem in told)
    assert [name for name in FILLED_IN if not any(name in line for _, line in hints)] == []


def copy_project(place: Path) -> Path:
    """Copy what a wheel is made from."""
    place.mkdir()
    for name in ("nsa_convert", "recipes"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    return place


@pytest.mark.slow
def test_the_published_line_installs_a_checkout_and_the_hints_hold_there(tmp_path):
    """In an environment of its own that sees the packages of this one; no index is asked."""
    source, place = copy_project(tmp_path / "source"), tmp_path / "venv"
    venv.create(place)
    (site,) = place.glob("lib/python*/site-packages")
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (line,) = (words for words in pip_lines((ROOT / "README.md").read_text()) if "-e" in words)
    hints = [extras.pip_line(name) for name, packages in EXTRAS.items() if name in extras.EXTRAS]
    here = [hint for hint in hints if all(find_spec(name) for name in hint.split()[2:])]
    assert len(here) >= 3
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    for words in (f"pip install {line}", *here, "nsa-convert doctor", "nsa-convert recipes"):
        program, *rest = shlex.split(words)
        # The pip of this environment, which takes the place of the one it is run for.
        start = [place / "bin" / "python", "-m", "pip"] if program == "pip" else [place / "bin" / program]
        command = [*map(str, start), *rest]
        done = subprocess.run(command, env=env, cwd=source, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    seen = [str(place / "bin" / "python"), "-c", "import nsa_convert; print(nsa_convert.__file__)"]
    done = subprocess.run(seen, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(source)


@pytest.mark.slow
def test_recipes_and_types_are_found_where_the_wheel_is_installed(tmp_path):
    source, wheels, place = copy_project(tmp_path / "source"), tmp_path / "wheels", tmp_path / "place"
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
    assert (place / "nsa_convert" / "py.typed").is_file()


def test_version_is_told_once():
    assert "version" in PROJECT["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", nsa_convert.__version__)


def test_guards_can_fail():
    assert undeclared("import requests_html") == ["requests_html is not declared in pyproject.toml"]
    assert pip_lines("see `pip install 'a[b]' c`") == ["'a[b]' c"]
    for line in ("nsa-convert", "'nsa-convert[train]'", "somebodys-package", "-e '.[trian]'"):
        assert len(hint_problems(line)) == 1, line
    assert "only an extra declares it" in undeclared("import matplotlib")[0]
    assert "only an extra declares it" in undeclared("import triton", "fetch.py")[0]
    assert undeclared("import triton", "triton_fetch.py") == []
    assert undeclared("def plot():\n    import matplotlib") == []
    assert undeclared("try:\n    import matplotlib\nexcept ImportError:\n    pass") == []
    assert undeclared("import json\nimport torch.nn") == []
