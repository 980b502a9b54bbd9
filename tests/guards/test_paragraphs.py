"""Code breathes: a function of some length shows its steps by blank lines or comments."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2] / "nsa_convert"
LONG = 12
"""Lines of a function's body, its docstring apart, from which it must show its steps."""
MOST = 0.05
"""Share of such functions that may do without: a single expression or one loop."""


def long_functions(source: str) -> dict[str, bool]:
    """Return the long functions of a module: whether each has a blank line or a comment of its own."""
    lines = source.splitlines()
    found = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        if body and (node.end_lineno or 0) - body[0].lineno + 1 >= LONG:
            own = lines[body[0].lineno - 1 : node.end_lineno]
            found[f"{node.name}:{node.lineno}"] = any(not x.strip() or x.strip()[0] == "#" for x in own)
    return found


def test_long_functions_show_their_steps():
    found = {
        f"{path.relative_to(ROOT).as_posix()} {name}": shown
        for path in sorted(ROOT.rglob("*.py"))
        for name, shown in long_functions(path.read_text()).items()
    }
    bare = [name for name, shown in found.items() if not shown]
    assert len(bare) <= MOST * len(found), bare


def test_a_function_without_a_step_is_found():
    body = ["    x = 1"] * LONG
    for extra, shown in ([], False), (["", "    # The next step."], True):
        text = ['def f():\n    """Say what."""', *body[:4], *extra, *body[4:]]
        assert long_functions("\n".join(text)) == {"f:1": shown}
