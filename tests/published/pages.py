"""What README.md and docs/ print to be run, in order: commands, Python, YAML; what is not run, and why."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
PROGRAMS = ("nsa-convert", "torchrun", "accelerate", "python", "pip", "make", "git", "hf")
SHELLS = ("bash", "sh", "console")

NOT_RUN = {
    ("README.md", "pip install -c constraints.txt -e '.[gguf,eval]'"): "guards/test_packaging.py runs it",
    ("README.md", "make test"): "runs this test",
    ("README.md", "make test-all"): "runs this test",
    ("README.md", "make test-oldest"): "installs an environment, and runs tests for longer than this one",
    ("README.md", "make test-hf"): "fetches transformers' tests, and runs them for longer than this one",
    ("README.md", "make lint"): "pip-audit asks a server",
    ("README.md", "make fuzz"): "has its own time; tests/faults/test_mutations.py tests the same property",
    ("docs/reference/evaluation.md", "pip install lm-eval"): "asks a package index; large",
    (
        "docs/reference/evaluation.md",
        "nsa-convert eval OUT --suite tasks --set tasks=arc_easy,hellaswag --set limit=200 "
        "--out OUT/evaluation/short",
    ): "needs lm-eval, and fetches data sets of the Hub; tests/evaluation/test_lm_eval.py has the adapter",
    (
        "docs/reference/evaluation.md",
        "nsa-convert eval OUT --suite tasks --set tasks=my_task --set include_path=FOLDER",
    ): "needs lm-eval; tests/evaluation/test_lm_eval.py has such a folder",
    (
        "docs/recovery.md",
        "python benchmarks/recovery.py --work runs/recovery --out runs/recovery/results --budget 32",
    ): "trains for half an hour; its four recipes run small in tests/published/test_recipes.py",
}
"""(page, command) -> why no test runs it."""

SMALLER = {
    **dict.fromkeys(
        (
            (
                "docs/reference/methods.md",
                "nsa-convert inspect MODEL --measure duo.safetensors --set kind=duo",
            ),
            (
                "docs/reference/evaluation.md",
                "nsa-convert inspect MODEL --measure duo.safetensors --set kind=duo",
            ),
        ),
        "--set steps=2 --set min_length=800 --set max_length=1000",
    ),
    ("README.md", "nsa-convert inspect MODEL --measure heads.safetensors"): "--set length=1024",
    (
        "README.md",
        "nsa-convert inspect MODEL --measure razor.safetensors --set kind=razor",
    ): "--set period=200",
    ("README.md", "nsa-convert bench --device cpu"): "--lengths 1024",
    (
        "docs/reference/evaluation.md",
        "nsa-convert eval OUT --suite long --set lengths=2048,4096 --set samples=3 --out OUT/evaluation",
    ): "--set lengths=1024 --set samples=1 --set depths=[0.5]",
    (
        "docs/reference/evaluation.md",
        "nsa-convert eval MODEL --suite compare --set methods=nsa,ssa,moba --set budgets=512,1024 "
        "--set lengths=4096 --out DIR",
    ): "--set budgets=256,512 --set lengths=1024 --set needle_lengths=[1024] --set depths=[0.5]",
    (
        "docs/reference/evaluation.md",
        "nsa-convert eval MODEL --suite compare --set budgets=0.25 --set needle_lengths=2048,4096,8192 "
        "--set equal=density --plan outer=benchmarks/plans/nsa_outer_layers_full.yaml "
        "--plan duo=duo.safetensors@0.15 --out DIR",
    ): "--set methods=[nsa] --set needle_lengths=[1024] --set lengths=[1024] --set depths=[0.5]",
    (
        "README.md",
        "nsa-convert eval MODEL --suite compare --set methods=nsa,ssa,moba --out DIR",
    ): "--set lengths=[1024] --set needle_lengths=[1024] --set depths=[0.5]",
    (
        "README.md",
        "nsa-convert eval OUT --suite long --out OUT/evaluation",
    ): "--set lengths=1024 --set samples=1 --set depths=[0.5]",
}
"""(page, command) -> what is added where a tiny model on a CPU needs less: lengths, numbers of steps."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Something to be run.

    Attributes:
        page: Of README.md and docs/.
        language: Of the fence; ``bash`` for a command line.
        text: The block, or the one command line without its comment, words quoted where they must be.
    """

    page: str
    language: str
    text: str

    @property
    def words(self) -> list[str]:
        """Return the words of a command line."""
        return shlex.split(self.text)


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield language and body of the fenced blocks, indented ones too."""
    for indent, language, body in re.findall(r"^( *)```(\w*)\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL):
        yield language, re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)


def command_lines(block: str) -> Iterator[str]:
    """Yield the command lines of a shell block; a backslash joins lines, comments and prompts are dropped."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words:
            yield shlex.join(words)


def pieces(page: str) -> list[Piece]:
    """Return what a page prints to be run, in its order."""
    found = []
    for language, body in blocks(PAGES[page].read_text()):
        if language in SHELLS:
            found += [Piece(page, "bash", line) for line in command_lines(body)]
        elif language:
            found.append(Piece(page, language, body))
    return found


def unmarked(page: str) -> list[str]:
    """Return command lines in fences without a language, where only the form of a command may stand."""
    lines = [
        line
        for language, body in blocks(PAGES[page].read_text())
        if not language
        for line in body.splitlines()
    ]
    return [line for line in lines if line.split()[:1] and line.split()[0] in PROGRAMS and "[--" not in line]
