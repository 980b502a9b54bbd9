"""What README.md and docs/ say is true of the code: commands, snippets, tables, the file tree.

Their blocks are run in tests/published/; here every command is only parsed, those in the text too.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch

from nsa_convert.cli import main
from nsa_convert.config import AttentionGeometry
from nsa_convert.errors import UsageError
from nsa_convert.kernels import dense_attention, sparse_attention, use_backend
from nsa_convert.methods.parts.base import AttentionInputs
from nsa_convert.patterns import DENSE_LAYOUT, SinkWindow
from tests.guards.reference import anchor
from tests.published.pages import command_lines

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
README = ROOT / "README.md"
TREE_PAGE = ROOT / "docs" / "develop" / "architecture.md"
METHOD_GUIDE = ROOT / "docs" / "develop" / "add_a_method.md"

# Traces of one machine or one way of working; the project speaks of itself alone.
FOREIGN = re.compile(
    r"/work/|/tmp/dev|/root/|/home/\w|/opt/pypi|pypi-more|CONTRACT\.md|DESIGN\.md|STYLE\.md|faults\.md"
    r"|methods_trainable|spikes/|\b(?:this|the|a|my) session\b(?! fixture)|\bsub-?agents?\b|\bworker [A-Z]\b",
    re.IGNORECASE,
)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str, *languages: str) -> Iterator[str]:
    """Yield the fenced code blocks in one of the languages."""
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language in languages:
            yield body


def inline_commands(text: str) -> Iterator[str]:
    """Yield the ``nsa-convert`` and ``make`` commands that stand in the text; COMMAND is any of them.

    A command without arguments only names itself there.
    """
    for body in re.findall(r"(?<!`)`((?:nsa-convert|make) [^`]+)`(?!`)", text):
        if "COMMAND" not in body:
            yield body if len(body.split()) > 2 or body.startswith("make") else f"{body} --help"


def commands(block: str) -> Iterator[list[str]]:
    """Yield the words of each command line of a shell block, without ``VAR=x`` before the command."""
    for line, _ in command_lines(block):
        words = shlex.split(line)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def command_problem(words: list[str]) -> str | None:
    """Return what is wrong with an ``nsa-convert`` or ``make`` command line, or None."""
    if words[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        wanted = [word for word in words[1:] if "=" not in word]
        return next((f"no make target '{word}'" for word in wanted if word not in targets), None)
    if words[0] != "nsa-convert":
        return None
    try:
        with click.Context(main) as context:
            if words[1:] in ([], ["--help"], ["--version"]):
                return None
            name, command, rest = main.resolve_command(context, words[1:])
            if "--help" in rest:
                return None
            command.make_context(name, list(rest), parent=context)
            return None
    except click.UsageError as error:
        return error.format_message()
    except UsageError as error:
        return error.message


def python_problems(block: str) -> list[str]:
    """Return syntax errors and imports from nsa_convert that fail."""
    problems = []
    try:
        tree = ast.parse(block)
    except SyntaxError as error:
        return [f"syntax error: {error}"]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nsa_convert"):
            module = importlib.import_module(node.module)
            absent = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            problems += [f"{node.module} has no {name}" for name in absent]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("nsa_convert"):
                    importlib.import_module(alias.name)
    return problems


def marked(text: str, name: str) -> str:
    """Return the text between ``<!-- name -->`` and ``<!-- /name -->``."""
    found = re.search(rf"<!-- {re.escape(name)} -->\n(.*?)<!-- /{re.escape(name)} -->", text, re.DOTALL)
    assert found, f"the page has no <!-- {name} --> section"
    return found.group(1).strip()


def anchors(page: Path) -> set[str]:
    """Return what may follow ``#`` in a link to a page: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {anchor(heading) for heading in headings}


def leads_somewhere(page: Path, target: str) -> bool:
    """Return whether a link of a page has its file, and the heading in it."""
    if "://" in target:
        return True
    name, _, heading = target.partition("#")
    file = page.parent / name if name else page
    return file.exists() and (not heading or heading in anchors(file))


def tree_entries(text: str) -> list[str]:
    """Return the paths of the file tree, read from its indentation (two spaces a level)."""
    entries, stack = [], []
    for line in marked(text, "tree").strip("`").strip().splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        stack[depth:] = [name.rstrip("/")]
        entries.append("/".join(stack))
    return entries


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_snippets_are_valid(page):
    text = page.read_text()
    problems = [
        f"{' '.join(words)}: {problem}"
        for block in blocks(text, "bash", "sh", "console")
        for words in commands(block)
        if (problem := command_problem(words))
    ]
    problems += [
        f"{line}: {problem}"
        for line in inline_commands(text)
        for words in commands(line.replace("\n", " "))
        if (problem := command_problem(words))
    ]
    problems += [problem for block in blocks(text, "python") for problem in python_problems(block)]
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)", page.read_text())
    assert [target for target in targets if not leads_somewhere(page, target)] == []


def test_pages_named_in_files_exist():
    """Hints, recipes, templates of issues: a page that is named ``docs/...`` is there."""
    lost = [
        f"{path.relative_to(ROOT)}: {named}"
        for path in text_files()
        if path != Path(__file__) and path.name not in ("CHANGELOG.md", "log.md")
        for named in re.findall(r"(?<![\w/])docs/[\w/]+\.md", path.read_text(errors="replace"))
        if not (ROOT / named).is_file()
    ]
    assert not lost, "\n".join(lost)


def test_file_tree_is_complete_and_exists():
    entries = tree_entries(TREE_PAGE.read_text())
    assert [entry for entry in entries if not (ROOT / entry).exists()] == []
    modules = {path.name for path in (ROOT / "nsa_convert").iterdir() if not path.name.startswith("_")}
    listed = {entry.split("/")[1] for entry in entries if entry.startswith("nsa_convert/")}
    assert modules - listed == set(), "the tree lacks these"


def text_files() -> Iterator[Path]:
    folders = ("nsa_convert", "tests", "benchmarks", "docs", "examples")
    folders += (".ci", ".github", "recipes", "model_cards")
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.name != ".git")
    for folder in folders:
        yield from (path for path in (ROOT / folder).rglob("*") if path.is_file())


def test_no_foreign_words():
    found = []
    for path in text_files():
        if path == Path(__file__) or path.suffix in {".png", ".pyc", ".safetensors", ".gguf", ".log"}:
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if match := FOREIGN.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert not found, "\n" + "\n".join(found)


def test_the_method_of_add_a_method_works():
    code = next(blocks(METHOD_GUIDE.read_text(), "python"))
    names: dict = {"__name__": "nsa_convert.methods.parts.base"}  # dataclasses look their module up
    exec(compile(code, "add_a_method.md", "exec"), names)
    geometry = AttentionGeometry(hidden_size=32, num_query_heads=4, num_kv_heads=2, head_dim=8)
    method = names["Band"](names["BandSettings"](num_sinks=2, window_size=5), geometry, 0)
    assert set(method.spec.sources) == {field.name for field in dataclasses.fields(method.Settings)}
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 20, heads, 8, generator=generator) for heads in (4, 2, 2))
    hidden = torch.zeros(1, 20, 32)
    inputs = AttentionInputs(q=q, k=k, v=v, hidden=hidden, pooled={}, layout=DENSE_LAYOUT, scale=0.3)
    with use_backend("reference"):
        banded, _ = sparse_attention(q, k, v, SinkWindow(num_sinks=2, window_size=5), scale=0.3)
        dense = dense_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(method(inputs), banded)
    method.forced_budget = 20
    torch.testing.assert_close(method(inputs), dense)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("nsa-convert convret a b", "no command 'convret'"),
        ("nsa-convert convert a b --methd nsa", "No such option"),
        ("nsa-convert convert a", "Missing argument 'OUT'"),
        ("make no-such-target", "no make target"),
        ("PYTHON=x make test JOBS=4", None),
        ("nsa-convert --help", None),
        ("pip install nsa-convert", None),
    ],
)
def test_command_guard_can_fail(line, complaint):
    (words,) = commands(line)
    problem = command_problem(words)
    assert (problem is None) if complaint is None else (complaint in (problem or ""))


def test_snippet_and_word_guards_can_fail():
    assert "syntax error" in python_problems("def")[0]
    assert python_problems("from nsa_convert.errors import Nothing") == ["nsa_convert.errors has no Nothing"]
    assert FOREIGN.search("see /tmp" + "/dev/x")
    assert not FOREIGN.search('@pytest.fixture(scope="session")')
    assert leads_somewhere(README, "docs/develop/kernels.md#triton-kernels")
    assert not leads_somewhere(README, "docs/develop/kernels.md#no-such-heading")
    assert not leads_somewhere(README, "docs/no_such_page.md")
    assert list(inline_commands("see `make x` and `nsa-convert COMMAND --help`")) == ["make x"]
    assert list(commands("A=1 make x \\\n  y # note")) == [["make", "x", "y"]]
    assert list(commands("$ make x\nIt's done\n$ make y")) == [["make", "x"], ["make", "y"]]
    tree = "a/ x\n  b.py y\nc z\n"
    assert tree_entries(f"<!-- tree -->\n```\n{tree}```\n<!-- /tree -->") == ["a", "a/b.py", "c"]
