"""Which cases of a table run in `make test`; the others run in `make test-all`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Return the values of one case, for the slow run alone."""
    return pytest.param(*values, marks=pytest.mark.slow)


def first_quick(cases: Iterable[Any], quick: int = 1) -> list[Any]:
    """Return the cases, all but the first few for the slow run; a tuple holds the values of one case."""
    return [case if index < quick else _slow(case) for index, case in enumerate(cases)]


def these_quick(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Return the cases, all that are not in ``quick`` for the slow run."""
    return [case if case in quick else _slow(case) for case in cases]


def named(pairs: Iterable[tuple[str, str]], quick: Collection[tuple[str, str]]) -> list[Any]:
    """Return pairs of names as one value each, under both names; all that are not in ``quick`` are slow."""
    return [
        pytest.param(pair, id="-".join(pair), marks=() if pair in quick else pytest.mark.slow)
        for pair in pairs
    ]


def _slow(case: Any) -> Any:
    return slow(*case) if isinstance(case, tuple) else slow(case)
