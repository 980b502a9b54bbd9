"""Who may import whom, how imports are written, and how big things may get."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "nsa_convert"

# A module may import from its own layer's neighbours only where BESIDE says so, and from every layer below.
LAYERS = (
    (
        "errors",
        "error_codes",
        "redaction",
        "notices",
        "settings",
        "config",
        "strict_files",
        "extras",
        "families",
    ),
    ("patterns",),
    ("kernels",),
    ("methods",),
    ("plan", "estimate", "heads", "chat"),
    ("checkpoint", "patch"),
    ("loading", "equivalence"),
    ("convert", "verification", "inspection", "doctor", "evaluation", "generation", "bench"),
    ("training",),
    ("card", "hub"),
    ("push",),
    ("cli",),
)
BESIDE = set(LAYERS[0])
FILES = LAYERS.index(("checkpoint", "patch"))
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Third-party package -> parts of the package that may import it.
FENCES = {
    "triton": {"kernels"},
    "transformers": {name for names in LAYERS[FILES:] for name in names},
    "safetensors": {"heads"} | {name for names in LAYERS[FILES:] for name in names},
    "tokenizers": {name for names in LAYERS[FILES:] for name in names},
    "peft": {"training", "evaluation"},
    "trl": {"training", "evaluation"},
    "datasets": {"training", "evaluation"},
    "huggingface_hub": {"hub", "card", "push"},
    "click": {"cli"},
}

# What a converted checkpoint carries is written out of these; names are followed through one form of import.
BUNDLED = {"errors", "settings", "config", "families", "patterns", "kernels", "methods", "plan", "patch"}

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = {"kernels": 120}  # elsewhere 80
DEFAULT_FUNCTION_LINES = 80


def part_of(path: str) -> str:
    """Return the top-level part of a file: ``nsa_convert/kernels/x.py`` and ``nsa_convert/cli.py``."""
    return Path(path).parts[1].removesuffix(".py")


def imports_of(tree: ast.AST) -> Iterator[tuple[int, str, list[str]]]:
    """Yield ``(line, module, names)``; names is empty for ``import module``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, []
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or ""), [alias.name for alias in node.names]


def direction_problems(path: str, source: str) -> list[str]:
    part = part_of(path)
    if part == "__init__":
        return []
    if part not in RANK:
        return [f"{path}: '{part}' has no place in LAYERS; give it one"]
    problems = []
    for line, module, names in imports_of(ast.parse(source)):
        root, *rest = module.split(".")
        if root in FENCES and part not in FENCES[root]:
            problems.append(f"{path}:{line}: {root} is imported only in {', '.join(sorted(FENCES[root]))}")
        if root != PACKAGE:
            continue
        for target in rest[:1] or [name for name in names if name in RANK]:
            if target == part:
                continue
            if target not in RANK:
                problems.append(f"{path}:{line}: '{target}' has no place in LAYERS; give it one")
            elif RANK[target] > RANK[part] or (RANK[target] == RANK[part] and part not in BESIDE):
                problems.append(f"{path}:{line}: {part} may not import {target}")
    return problems


def form_problems(path: str, source: str, is_module: Callable[[str], bool]) -> list[str]:
    problems = []
    for line, module, names in imports_of(ast.parse(source)):
        if module.startswith("."):
            problems.append(f"{path}:{line}: relative import; write {PACKAGE}.…")
        if part_of(path) not in BUNDLED or module.split(".")[0] != PACKAGE:
            continue
        if not names:
            problems.append(f"{path}:{line}: 'import {module}' cannot be followed; import names from it")
        for name in names:
            if is_module(f"{module}.{name}"):
                problems.append(f"{path}:{line}: {name} is a module; import names from {module}.{name}")
    return problems


def shadow_problems(path: str, source: str) -> list[str]:
    """Return imports of a package's ``__init__`` that one of its own files hides once it is imported."""
    if Path(path).name != "__init__.py":
        return []
    own = {file.stem for file in (ROOT / path).parent.glob("*.py")}
    return [
        f"{path}:{line}: {module} is hidden by {module}.py beside it"
        for line, module, names in imports_of(ast.parse(source))
        if not names and module in own
    ]


def size_problems(path: str, source: str) -> list[str]:
    problems = []
    lines = source.count("\n")
    if lines > MAX_FILE_LINES:
        problems.append(f"{path}: {lines} lines; a file has at most {MAX_FILE_LINES}")
    part = part_of(path) if path.startswith(PACKAGE) else "tests"
    limit = MAX_FUNCTION_LINES.get(part, DEFAULT_FUNCTION_LINES)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            length = node.end_lineno - body[0].lineno + 1 if body else 0
            if length > limit:
                problems.append(f"{path}:{node.lineno}: {node.name} has {length} lines; at most {limit}")
    return problems


def sources(*folders: str) -> list[tuple[str, str]]:
    files = sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return [(str(file.relative_to(ROOT)), file.read_text()) for file in files]


def is_module(dotted: str) -> bool:
    path = ROOT / Path(*dotted.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def report(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def test_imports_point_down_and_fences_hold():
    report([problem for path, source in sources(PACKAGE) for problem in direction_problems(path, source)])


def test_bundled_files_import_in_the_form_that_can_be_followed():
    report([problem for path, text in sources(PACKAGE) for problem in form_problems(path, text, is_module)])


def test_no_file_of_a_package_hides_what_the_package_imports():
    report([problem for path, text in sources(PACKAGE) for problem in shadow_problems(path, text)])


def test_files_and_functions_stay_small():
    files = sources(PACKAGE, "tests", "benchmarks")
    report([problem for path, source in files for problem in size_problems(path, source)])


@pytest.mark.parametrize(
    ("path", "line", "complaint"),
    [
        ("kernels/x.py", "from nsa_convert.methods.nsa import NSA", "kernels may not import methods"),
        ("convert.py", "from nsa_convert.evaluation.models import r", "convert may not import evaluation"),
        ("convert.py", "def f():\n    from nsa_convert.cli import main", "convert may not import cli"),
        ("config.py", "from nsa_convert import patch", "config may not import patch"),
        ("card.py", "from nsa_convert.hub import push", "card may not import hub"),
        ("methods/x.py", "import transformers", "transformers is imported only in"),
        ("patch/x.py", "from huggingface_hub import HfApi", "huggingface_hub is imported only in card, hub"),
        ("patch/x.py", "import triton.language as tl", "triton is imported only in kernels"),
        ("convert.py", "import click", "click is imported only in cli"),
        ("novelty.py", "", "'novelty' has no place"),
    ],
)
def test_direction_guard_can_fail(path, line, complaint):
    problems = direction_problems(f"{PACKAGE}/{path}", line)
    assert len(problems) == 1
    assert complaint in problems[0]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("errors.py", "from nsa_convert.settings import suggest"),
        ("methods/x.py", "from nsa_convert.methods.parts.base import Pool\nimport torch"),
        ("kernels/x.py", "import torch\nimport triton"),
        ("cli.py", "import click\nfrom nsa_convert.hub import resolve"),
    ],
)
def test_direction_guard_allows(path, line):
    assert direction_problems(f"{PACKAGE}/{path}", line) == []


def test_form_guard_can_fail():
    def check(path: str, line: str) -> list[str]:
        return form_problems(f"{PACKAGE}/{path}", line, is_module)

    assert "cannot be followed" in check("methods/x.py", "import nsa_convert.config")[0]
    assert "is a module" in check("methods/x.py", "from nsa_convert import config")[0]
    assert "is a module" in check("patch/x.py", "from nsa_convert.methods.parts import base")[0]
    assert "relative import" in check("cli.py", "from . import config")[0]
    assert check("methods/x.py", "from nsa_convert.methods.parts.base import Pool") == []


def test_shadow_guard_can_fail():
    path = f"{PACKAGE}/kernels/common/__init__.py"
    assert "merge is hidden by merge.py" in shadow_problems(path, "import merge\nimport torch")[0]
    assert shadow_problems(path, "import torch\nfrom x import merge") == []


def test_size_guard_can_fail():
    assert "lines; a file has at most" in size_problems(f"{PACKAGE}/x.py", "\n" * (MAX_FILE_LINES + 1))[0]
    long = "def f():\n    '''Doc.'''\n" + "    a = 1\n" * (DEFAULT_FUNCTION_LINES + 1)
    assert "f has 81 lines; at most 80" in size_problems(f"{PACKAGE}/x.py", long)[0]
    assert size_problems(f"{PACKAGE}/kernels/x.py", long) == []
