"""Collect every problem of a checkpoint and raise them as one error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from nsa_convert.errors import CheckpointError, NsaConvertError


class Problems:
    """Bad-input errors found so far.

    Example:
        >>> problems = Problems("my-model")
        >>> with problems.collect():
        ...     raise CheckpointError("one thing is wrong", code="CK01")
        >>> len(problems.found)
        1
    """

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.found: list[NsaConvertError] = []

    def add(self, message: str, **details: str | None) -> None:
        """Note one problem; the keywords are those of :class:`NsaConvertError`."""
        self.found.append(CheckpointError(message, **details))

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Note a bad-input error raised inside the block; other errors pass through."""
        try:
            yield
        except NsaConvertError as error:
            if error.exit_status != CheckpointError.exit_status:
                raise
            self.found.extend(error.problems or [error])

    def raise_found(self) -> None:
        """Raise the one problem as it is, several as one error that lists them; return when there is none."""
        if len(self.found) == 1:
            raise self.found[0]

        # The details of the first problem stand for all.
        if self.found:
            first = self.found[0]
            lines = "".join(f"\n  [{problem.code}] {problem.message}" for problem in self.found)
            error = CheckpointError(
                f"{self.subject} has {len(self.found)} problems:{lines}",
                code=first.code,
                where=first.where,
                expected=first.expected,
                found=first.found,
                hint=first.hint,
            )
            error.problems = tuple(self.found)
            raise error
