"""Which tests cover which case, and the line about them at the end of a run (see tests/conftest.py)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults.cases import CASES, ELSEWHERE

ROOT = Path(__file__).parents[2]
IDS = re.compile(r"(?<=_)([a-z]{2}\d{2})(?=_|$)")


def cases_of(test: str) -> set[str]:
    """Return the cases a test function names: ``test_ck33_ck34_leftovers`` -> CK33, CK34."""
    return {name.upper() for name in IDS.findall(test)} & CASES.keys()


def all_tests() -> Iterator[tuple[str, str]]:
    """Yield ``(path, name)`` of every test function under tests/."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield path.relative_to(ROOT).as_posix(), node.name


def report_line(reports: dict[str, list[Any]]) -> str | None:
    """Return how many cases ran, how they ended and how long they took; None when none ran.

    Args:
        reports: Outcome -> pytest's reports, as the terminal reporter keeps them.
    """
    known = {name: {case} for case, name in ELSEWHERE.items()}
    ran: dict[str, set[str]] = {"passed": set(), "failed": set(), "skipped": set()}
    seconds = 0.0
    for outcome, cases in ran.items():
        for report in reports.get(outcome, []):
            node = report.nodeid.split("[")[0]
            found = cases_of(node.rpartition("::")[2]) | known.get(node, set())
            cases |= found
            seconds += report.duration if found else 0.0
    if not any(ran.values()):
        return None
    failed = ran["failed"]
    passed, skipped = ran["passed"] - failed, ran["skipped"] - ran["passed"] - failed
    parts = [f"{len(passed)} of {len(CASES)} fault cases passed"]
    parts += [
        f"{len(cases)} {word}: {', '.join(sorted(cases))}"
        for word, cases in (("failed", failed), ("skipped", skipped))
        if cases
    ]
    return f"{'; '.join(parts)} ({seconds:.0f} s)"
