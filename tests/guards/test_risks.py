"""Every swallowed error, process, file write and way to the network in the package has a written reason.

The reasons are in justified.py. What needs none: an ``except`` for named errors that raises another error or
tells the one it caught, and an ``assert`` that only narrows a type (``is not None``, ``isinstance``).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guards.justified import ASSERTS, BROAD, NETWORK, PROCESSES, SWALLOWED, WRITERS

ROOT = Path(__file__).parents[2] / "nsa_convert"

NETWORK_MODULES = {
    "huggingface_hub",
    "requests",
    "httpx",
    "httpx2",
    "urllib",
    "http",
    "socket",
    "ftplib",
    "aiohttp",
}
PROCESS_CALLS = {"fork", "kill", "_exit", "Popen", "system", "popen", "execv", "spawn"}
WRITE_CALLS = {
    "write_text",
    "write_bytes",
    "save_file",
    "save_pretrained",
    "savefig",
    "mkdir",
    "rmdir",
    "rename",
    "unlink",
    "rmtree",
    "copyfile",
    "copyfileobj",
    "link",
    "symlink_to",
    "touch",
    "chmod",
    "NamedTemporaryFile",
    "TemporaryDirectory",
}


def functions(tree: ast.AST, name: str = "") -> Iterator[tuple[ast.AST, str]]:
    """Yield every node with the dotted name of the function or class it is in."""
    for node in ast.iter_child_nodes(tree):
        inner = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        place = f"{name}.{node.name}".lstrip(".") if inner else name
        yield node, place
        yield from functions(node, place)


def risks(text: str) -> Iterator[tuple[str, str, int]]:
    """Yield ``(kind, function, line)`` of everything that needs a reason."""
    for node, place in functions(ast.parse(text)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            if caught in {"everything", "Exception", "BaseException"}:
                yield "broad", place, line
            elif not any(isinstance(inner, ast.Raise) or uses(inner, node.name) for inner in ast.walk(node)):
                yield "swallowed", place, line
        elif isinstance(node, ast.Assert) and not narrows(node.test):
            yield "assert", place, line
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if NETWORK_MODULES & {name.split(".")[0] for name in names}:
                yield "network", place, line
        elif isinstance(node, ast.Call):
            yield from ((kind, place, line) for kind in kinds_of_call(node))


def uses(node: ast.AST, name: str | None) -> bool:
    return name is not None and isinstance(node, ast.Name) and node.id == name


def kinds_of_call(node: ast.Call) -> Iterator[str]:
    called = ast.unparse(node.func)
    name = called.rpartition(".")[2]
    if called.startswith("subprocess.") or (called.startswith("os.") and name in PROCESS_CALLS):
        yield "process"
    if name == "suppress":
        yield "swallowed"
    if (
        name in WRITE_CALLS
        or (name == "save" and called.startswith("torch."))
        or opens_for_writing(node, name)
    ):
        yield "write"


def opens_for_writing(node: ast.Call, name: str) -> bool:
    if name != "open":
        return False
    words = [a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
    return any(isinstance(word, str) and len(word) < 4 and set(word) & set("wax+") for word in words)


def narrows(test: ast.expr) -> bool:
    """Return whether an assertion only tells a type checker what is known."""
    if isinstance(test, ast.Compare):
        return isinstance(test.ops[0], ast.IsNot) and ast.unparse(test.comparators[0]) == "None"
    return isinstance(test, ast.Call) and ast.unparse(test.func) == "isinstance"


def found() -> dict[str, dict[str, int]]:
    """Return kind -> ``path::function`` (for writes, the path) -> line."""
    places: dict[str, dict[str, int]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        for kind, place, line in risks(path.read_text()):
            key = name if kind in {"write", "network"} else f"{name}::{place}"
            places.setdefault(kind, {}).setdefault(key, line)
    return places


TABLES = {
    "swallowed": SWALLOWED,
    "broad": BROAD,
    "assert": ASSERTS,
    "process": PROCESSES,
    "write": WRITERS,
    "network": NETWORK,
}


@pytest.mark.parametrize("kind", TABLES)
def test_everything_has_a_reason(kind):
    places, table = found().get(kind, {}), TABLES[kind]
    assert [f"{place} (line {line})" for place, line in places.items() if place not in table] == []
    assert sorted(table.keys() - places.keys()) == [], "these are gone: take them out of justified.py"
    assert [place for place, reason in table.items() if len(reason.split()) < 4] == []


FORBIDDEN = {
    "eval": "runs text",
    "exec": "runs text",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "pickle.load": "can run code",
    "pickle.loads": "can run code",
    "yaml.unsafe_load": "can run code",
    "tempfile.mktemp": "races",
}


def forbidden(text: str) -> list[str]:
    """Return what a package that handles strangers' files never does."""
    problems = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg}
        if called in FORBIDDEN:
            problems.append(f"{node.lineno}: {called} {FORBIDDEN[called]}")
        if called == "torch.load" and words.get("weights_only") != "True":
            problems.append(f"{node.lineno}: torch.load without weights_only=True")
        for word in ("shell", "trust_remote_code", "allow_pickle"):
            if words.get(word) == "True":
                problems.append(f"{node.lineno}: {word}=True")
    return problems


def test_nothing_of_a_stranger_is_run():
    files = {path.relative_to(ROOT): forbidden(path.read_text()) for path in ROOT.rglob("*.py")}
    assert {path: problems for path, problems in files.items() if problems} == {}


def kinds(text: str) -> list[str]:
    return [kind for kind, _, _ in risks(text)]


def test_guard_can_fail():
    assert kinds("try:\n    f()\nexcept OSError:\n    pass") == ["swallowed"]
    assert kinds("try:\n    f()\nexcept OSError as e:\n    raise X from e") == []
    assert kinds("try:\n    f()\nexcept OSError as e:\n    told.append(e)") == []
    assert kinds("try:\n    f()\nexcept Exception as e:\n    raise X from e") == ["broad"]
    assert kinds("with contextlib.suppress(OSError):\n    f()") == ["swallowed"]
    assert kinds("assert x is not None\nassert isinstance(x, int)\nassert x == 3") == ["assert"]
    assert kinds("import socket\nfrom huggingface_hub import HfApi") == ["network", "network"]
    assert kinds("subprocess.run(['x'])\nos.fork()") == ["process", "process"]
    assert kinds("path.write_text('x')\nopen(p, 'w')\np.open('rb')\ntorch.save(x, p)") == ["write"] * 3
    assert len(forbidden("eval(x)\ntorch.load(p)\nf(shell=True)\ntorch.load(p, weights_only=True)")) == 3
