"""The guides are followed in a copy of the repository: what they promise is tested there, faults included."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guards.test_docs import METHOD_GUIDE, ROOT, blocks

pytestmark = pytest.mark.slow


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of what tests need of the repository."""
    for name in ("nsa_convert", "tests", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def insert(path: Path, before: str, text: str) -> None:
    source = path.read_text()
    assert source.count(before) == 1, (path, before)
    path.write_text(source.replace(before, text + before))


def run(folder: Path, *words: str) -> tuple[int, str]:
    """Run tests of the copy; return how many failed, and what was said."""
    env = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words],
        cwd=folder, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.search(r"(\d+) failed", done.stdout)
    assert "passed" in done.stdout or found, done.stdout + done.stderr
    return int(found[1]) if found else 0, done.stdout


def add_method(copy: Path) -> None:
    """Do what docs/develop/add_a_method.md says."""
    page = METHOD_GUIDE.read_text()
    file = next(iter(blocks(page, "python")))
    entry, variant = blocks(page, "text")
    (copy / "nsa_convert/methods/band.py").write_text(file)
    registry = copy / "nsa_convert/methods/parts/registry.py"
    insert(registry, "from nsa_convert.methods.dsa import DSA", "from nsa_convert.methods.band import Band\n")
    insert(registry, '    "ssa": SSA,\n', f"    {entry.strip()}\n")
    insert(copy / "tests/models.py", '    "ssa": SSA,\n', f"    {variant.strip()}\n")


CONFORMANCE = ("tests/guards/test_variants.py", "tests/patch/test_conformance.py")


def test_a_method_added_by_the_guide_passes_and_a_broken_one_fails(copy: Path) -> None:
    add_method(copy)
    failed, said = run(copy, *CONFORMANCE, "-k", "band or every")
    assert failed == 0, said
    assert "passed" in said

    # The mean of all values the query may see: shapes, causality and gradients are right, attention is not.
    path = copy / "nsa_convert/methods/band.py"
    insert(
        path, "        return o\n", "        o = x.v.cumsum(1)[:, -x.q.shape[1] :].repeat_interleave(2, 2)\n"
    )
    failed, said = run(copy, *CONFORMANCE, "-k", "band")
    assert failed >= 2, said
    assert "test_full_budget_is_dense" in said


def test_a_method_without_a_small_plan_is_named(copy: Path) -> None:
    add_method(copy)
    models = copy / "tests/models.py"
    models.write_text(re.sub(r'    "band": .*\n', "", models.read_text()))
    failed, said = run(copy, "tests/guards/test_variants.py")
    assert failed >= 1, said
    assert "band" in said


def test_a_family_whose_row_leaves_out_what_its_attention_does_fails(copy: Path) -> None:
    """GLM rotates half of each head, in another pairing; a row that says nothing of it must not pass."""
    families = copy / "nsa_convert/families.py"
    source = families.read_text()
    row = 'ModelFamily(model_type="glm", title="GLM", class_prefix="Glm", qkv_bias="never")'
    at = re.search(r"\n    ModelFamily\(\n", source) or re.search(r"\n        ModelFamily\(\n", source)
    assert at is not None
    families.write_text(source[: at.start() + 1] + f"    {row},\n" + source[at.start() + 1 :])
    failed, said = run(copy, "tests/patch/test_conformance.py", "-k", "glm", "-m", "not gpu")
    assert failed >= 2, said
