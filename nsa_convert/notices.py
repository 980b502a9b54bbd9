"""Callbacks by which long work says what it does."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]
"""Called with one line of text before something slow, or with a warning."""

Progress = Callable[[str, int, int], None]
"""Called with the name of what was done, how many are done, and how many there are."""


def silent(*_: object) -> None:
    """Take a notice and drop it."""
