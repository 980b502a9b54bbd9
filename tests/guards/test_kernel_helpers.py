"""Helpers of triton kernels have short signatures, and the step of a running softmax is written once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2] / "nsa_convert" / "kernels"
MOST = 12
"""Parameters of a helper: what travels together goes as one tuple. A kernel takes what a launch has."""


def helpers(source: str) -> Iterator[ast.FunctionDef]:
    """Yield the functions that kernels call: those under ``@triton.jit``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list):
            yield node


def too_long(source: str) -> list[str]:
    """Return the helpers of a file with more than MOST parameters."""
    return [f"{x.name}: {len(x.args.args)}" for x in helpers(source) if len(x.args.args) > MOST]


def softmax_steps(source: str) -> list[str]:
    """Return the functions that raise a maximum by that of a tile and take exponentials below it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        calls = [(ast.unparse(x.func), x.args) for x in ast.walk(node) if isinstance(x, ast.Call)]
        raised = [x for name, x in calls if name == "tl.maximum" and "tl.max(" in map(first_name, x)]
        if raised and any(name == "tl.exp2" for name, _ in calls):
            found.append(node.name)
    return found


def first_name(node: ast.expr) -> str:
    """Return the name of the function that an expression calls, with its bracket, or nothing."""
    return f"{ast.unparse(node.func)}(" if isinstance(node, ast.Call) else ""


def files() -> dict[str, str]:
    """Return the sources of the package's kernels by path."""
    return {p.relative_to(ROOT).as_posix(): p.read_text() for p in sorted(ROOT.rglob("*.py"))}


def test_helpers_have_few_parameters():
    sources = files()
    assert sum(len(list(helpers(source))) for source in sources.values()) > 30
    assert [f"{path} {name}" for path, source in sources.items() for name in too_long(source)] == []


def test_the_step_of_a_running_softmax_is_written_once():
    found = [f"{path} {name}" for path, source in files().items() for name in softmax_steps(source)]
    assert found == ["common/triton_flash.py weigh"]


def test_faults_are_found():
    names = ", ".join(f"x{i}" for i in range(MOST))
    assert too_long(f"@triton.jit\ndef f({names}): ...") == []
    assert too_long(f"@triton.jit\ndef f({names}, one_more): ...") == [f"f: {MOST + 1}"]
    assert too_long(f"@declare(cases=())\ndef f({names}, one_more): ...") == []

    step = "def f(m, s):\n    top = tl.maximum(m, tl.max(s, 1))\n    return tl.exp2(s - top[:, None])"
    assert softmax_steps(step) == ["f"]
    assert softmax_steps(step.replace("exp2", "sum")) == []
    assert softmax_steps(step.replace("tl.max(s, 1)", "s")) == []
