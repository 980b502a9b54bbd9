"""What README.md and docs/ print to be run, in order: commands, Python, YAML; what is not run, and why."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
PROGRAMS = ("nsa-convert", "torchrun", "accelerate", "axolotl", "swift", "python", "pip", "make", "git", "hf")
SHELLS = ("bash", "sh", "console")
SHOWN = ("", "text")
"""Fences that are not run: files, formulas, the form of a command."""

NOT_RUN = {
    ("README.md", "git clone REPOSITORY nsa-convert"): "needs the address of the repository",
    ("README.md", "cd nsa-convert"): "the test stands in a folder of its own",
    (
        "README.md",
        "pip install --index-url=https://download.pytorch.org/whl/cpu -c constraints.txt torch",
    ): "asks a package index; large",
    ("README.md", "pip install -c constraints.txt -e '.[gguf,eval]'"): "guards/test_packaging.py runs it",
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

STAND_INS = {"demo": "MODEL", "SmolLM2-135M-Instruct (dequantised from Q4_1)": "MODEL"}
"""Word of a command, name in what it prints -> the folder that stands for it: what it names is fetched."""

ELSEWHERE = {"docs/howto/other_trainers.md": {"axolotl": "axolotl", "ms-swift": "swift"}}
"""Page -> heading of a section -> the package it needs; test_foreign_trainers.py runs these sections."""

TINY_STEPS = "--set stages.align.tokens=1024 --set stages.pretrain.tokens=1024"
RAZOR = "nsa-convert inspect MODEL --measure razor.safetensors --set kind=razor"
DUO = "nsa-convert inspect MODEL --measure duo.safetensors --set kind=duo"
SMALLER = {
    **dict.fromkeys(
        (("docs/reference/methods.md", DUO), ("docs/reference/evaluation.md", DUO)),
        "--set steps=2 --set min_length=800 --set max_length=1000",
    ),
    **dict.fromkeys(
        (("docs/quickstart.md", RAZOR), ("docs/howto/choose_a_method.md", RAZOR)), "--set period=200"
    ),
    **dict.fromkeys(
        (("README.md", "nsa-convert train tiny/nsa"), ("docs/quickstart.md", "nsa-convert train tiny/nsa")),
        TINY_STEPS,
    ),
    ("docs/quickstart.md", "nsa-convert inspect MODEL --measure heads.safetensors"): "--set length=1024",
    ("docs/quickstart.md", "nsa-convert bench --device cpu"): "--lengths 1024",
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
        "docs/howto/choose_a_method.md",
        "nsa-convert eval MODEL --suite compare --set methods=ssa,nsa,msa --set budgets=512 "
        "--set lengths=2048 --out DIR",
    ): "--set lengths=[1024] --set needle_lengths=[1024] --set depths=[0.5]",
    (
        "docs/quickstart.md",
        "nsa-convert eval MODEL --suite compare --set methods=nsa,ssa,moba --out DIR",
    ): "--set lengths=[1024] --set needle_lengths=[1024] --set depths=[0.5]",
    (
        "docs/quickstart.md",
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
        printed: Lines that the page shows below a command; what a model says is its own.
    """

    page: str
    language: str
    text: str
    printed: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """Return the words of a command line."""
        return shlex.split(self.text)


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield language and body of the fenced blocks, indented ones too."""
    for indent, language, body in re.findall(r"^( *)```(\w*)\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL):
        yield language, re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)


def section(page: str, heading: str) -> str:
    """Return what a page says below a heading, up to the next one of its level."""
    return PAGES[page].read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def command_lines(block: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the command lines of a shell block, each with what stands below it.

    A backslash joins lines, comments and prompts are dropped. Where lines have prompts, the others are what
    was printed; else every line is a command.
    """
    lines = block.replace("\\\n", " ").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    ends = [*starts[1:], len(lines)]
    if not starts:
        starts, ends = list(range(len(lines))), list(range(1, len(lines) + 1))
    for start, end in zip(starts, ends, strict=True):
        words = shlex.split(lines[start].removeprefix("$ "), comments=True)
        if words:
            yield shlex.join(words), tuple(line for line in lines[start + 1 : end] if line.strip())


def pieces(page: str) -> list[Piece]:
    """Return what a page prints to be run, in its order, without what runs ELSEWHERE."""
    found, text = [], PAGES[page].read_text()
    for heading in ELSEWHERE.get(page, ()):
        text = text.replace(section(page, heading), "")
    for language, body in blocks(text):
        if language in SHELLS:
            found += [Piece(page, "bash", line, printed) for line, printed in command_lines(body)]
        elif language not in SHOWN:
            found.append(Piece(page, language, body))
    return found


def shape(line: str) -> str:
    """Return a printed line with its numbers, sizes and model names taken out: what every model prints."""
    for word, folder in STAND_INS.items():
        line = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", folder, line)
    line = re.sub(r"\d[\d,.]*(?:e[+-]?\d+)?( (?:kB|MB|GB|s))?", "N", line)
    return " ".join(line.split())


def not_printed(shown: Iterable[str], output: str) -> list[str]:
    """Return the lines a page shows that a command did not print; `` ...`` at an end leaves the rest out."""
    there = {shape(line) for line in output.splitlines()}
    return [
        line
        for line in shown
        if not any(
            one.startswith(shape(line[:-4])) if line.endswith(" ...") else one == shape(line) for one in there
        )
    ]


def unmarked(page: str) -> list[str]:
    """Return command lines in fences that are not run, where only the form of a command may stand."""
    lines = [
        line.split()
        for language, body in blocks(PAGES[page].read_text())
        if language in SHOWN
        for line in body.splitlines()
    ]
    return [" ".join(words) for words in lines if words and words[0] in PROGRAMS and not is_form(words)]


def is_form(words: list[str]) -> bool:
    """Return whether a command line says what may stand in it, and is not meant to be run as it is."""
    return any(word.startswith("[--") or word == "[OPTIONS]" for word in words)
