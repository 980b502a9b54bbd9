"""Every swallowed error, process, file write and way to the network in the package says why it is there.

The reason is a comment ``# why: ...`` in the line or right above it, or at the beginning of an ``except``'s
body. Lines of one kind that follow each other share the reason of the first. What needs none: an ``except``
for named errors that raises another error or tells the one it caught, and an ``assert`` that only narrows a
type (``is not None``, ``isinstance``).
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

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
    "makedirs",
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


def risks(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield ``(kind, first line, last line)`` of everything that needs a reason.

    The lines are those of the innermost statement; of one that holds others, those of its head.
    """
    tree = ast.parse(text)
    yield from risks_below(tree, (1, 1))


def risks_below(parent: ast.AST, place: tuple[int, int]) -> Iterator[tuple[str, int, int]]:
    for node in ast.iter_child_nodes(parent):
        inner = place
        if isinstance(node, (ast.stmt, ast.ExceptHandler)):
            body = getattr(node, "body", None)
            inner = node.lineno, max(node.lineno, body[0].lineno - 1) if body else node.end_lineno
        yield from ((kind, *inner) for kind in kinds_of(node))
        yield from risks_below(node, inner)


def kinds_of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ExceptHandler):
        caught = ast.unparse(node.type) if node.type else "everything"
        if caught in {"everything", "Exception", "BaseException"}:
            yield "broad"
        elif not any(isinstance(inner, ast.Raise) or uses(inner, node.name) for inner in ast.walk(node)):
            yield "swallowed"
    elif isinstance(node, ast.Assert) and not narrows(node.test):
        yield "assert"
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        if NETWORK_MODULES & {name.split(".")[0] for name in names}:
            yield "network"
    elif isinstance(node, ast.Call):
        yield from kinds_of_call(node)


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


def reasons(text: str) -> dict[int, tuple[str, bool]]:
    """Return line -> reason, and whether it stands alone there.

    One that goes on in further comment lines counts for the last of them.
    """
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string, token.line.lstrip().startswith("#")
    found = {}
    for line, (comment, alone) in comments.items():
        if match := re.match(r"# why: (.+)", comment):
            reason = match[1]
            while alone and comments.get(line + 1, ("", False))[1]:
                line += 1
                reason += comments[line][0].removeprefix("#")
            found[line] = reason, alone
    return found


def problems(text: str) -> list[str]:
    """Return what has no reason, and reasons that stand beside nothing or say too little."""
    there, used, told = reasons(text), set(), []
    served: dict[str, int] = {}  # kind -> the last line of one that has a reason
    for kind, first, last in sorted(set(risks(text)), key=lambda risk: risk[1:]):
        around = {first - 1, *([last + 1] if kind in {"broad", "swallowed"} else [])}
        beside = {line for line, (_, alone) in there.items() if alone and line in around}
        mine = beside | (there.keys() & {*range(first, last + 1)})
        if mine or served.get(kind) == first - 1:
            used |= mine
            served[kind] = last
        else:
            told.append(f"line {first}: {kind} without `# why: ...`")
    told += [f"line {line}: a reason for nothing" for line in sorted(there.keys() - used)]
    return told + [f"line {line}: too short" for line, (text, _) in there.items() if len(text.split()) < 4]


def test_everything_has_a_reason():
    files = {path.relative_to(ROOT).as_posix(): problems(path.read_text()) for path in ROOT.rglob("*.py")}
    assert {path: told for path, told in files.items() if told} == {}


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
    told = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg}
        if called in FORBIDDEN:
            told.append(f"{node.lineno}: {called} {FORBIDDEN[called]}")
        if called == "torch.load" and words.get("weights_only") != "True":
            told.append(f"{node.lineno}: torch.load without weights_only=True")
        for word in ("shell", "trust_remote_code", "allow_pickle"):
            if words.get(word) == "True":
                told.append(f"{node.lineno}: {word}=True")
    return told


def test_nothing_of_a_stranger_is_run():
    files = {path.relative_to(ROOT): forbidden(path.read_text()) for path in ROOT.rglob("*.py")}
    assert {path: told for path, told in files.items() if told} == {}


def kinds(text: str) -> list[str]:
    return [kind for kind, _, _ in risks(text)]


SWALLOWS = "try:\n    f()\nexcept OSError:{}\n    pass"


@pytest.mark.parametrize(
    ("text", "complaints"),
    [
        (SWALLOWS.format(""), ["line 3: swallowed without `# why: ...`"]),
        (SWALLOWS.format("  # why: there is nothing to read"), []),
        (SWALLOWS.format("\n    # why: there is nothing to read"), []),
        (SWALLOWS.format("  # why: nothing there"), ["line 3: too short"]),
        (SWALLOWS.format("\n    x = 1\n    # why: no risk is left here"), ["line 3", "line 5"]),
        ("# why: the folder of the caller\nplace.mkdir()\nplace.touch()", []),
        ("# why: the folder\n# of the caller\nplace.mkdir()", []),
        ("place.mkdir()  # why: the folder of the caller\nf()\nplace.touch()", ["line 3: write"]),
        ("place.mkdir()\nplace.touch()  # why: the file of the caller", ["line 1: write"]),
        ("'# why: in a string it counts for nothing'\nplace.mkdir()", ["line 2: write"]),
        ("place.mkdir()  # why: the folder of the caller\nsubprocess.run(x)", ["line 2: process"]),
        ("done = f(\n    subprocess.run(\n        x\n    )\n)", ["line 1: process"]),
        ("done = f(\n    subprocess.run(x)  # why: the caller asks for it\n)", []),
        ("with f():\n    import socket\n    # why: no risk is left here", ["line 2", "line 3"]),
        ("with open(p, 'w') as f:\n    f.x()\n    # why: no risk is left here", ["line 1", "line 3"]),
    ],
)
def test_the_guard_of_reasons_can_fail(text, complaints):
    told = problems(text)
    assert len(told) == len(complaints), told
    assert all(line.startswith(start) for line, start in zip(told, complaints, strict=True)), told


def test_the_guard_of_risks_can_fail():
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
