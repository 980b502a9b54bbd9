"""Settings of the quick suite."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nsa_convert.config import raise_problems, unknown_keys
from nsa_convert.evaluation.metrics.mass import NUM_QUERIES
from nsa_convert.evaluation.models import DTYPES
from nsa_convert.evaluation.tasks.needle import DEPTHS

HAYSTACKS = ("noise", "prose")
DEVICES = ("auto", "cpu", "cuda")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickSettings:
    """Settings of the quick suite (``--set key=value``).

    Attributes:
        dtype: Of weights and activations. float32 by default, so that equality within the budget shows.
        device: ``"auto"`` takes CUDA when there is one.
        num_queries: Queries per layer and text that the mass is measured on.
        needle_lengths: Prompt lengths of the needle test, as a list or ``"1024,2048"``; none by default.
        needle_depths: Where the needle stands, 0 to 1.
        needle_haystack: ``"noise"`` (RULER niah_single_1) or ``"prose"``.
        needle_chat: Ask in the tokenizer's chat template. The template is code of the model's author; it
            runs in a child process with limits.
        seed: Of the needles.
    """

    dtype: str = "float32"
    device: str = "auto"
    num_queries: int = NUM_QUERIES
    needle_lengths: tuple[int, ...] = ()
    needle_depths: tuple[float, ...] = DEPTHS
    needle_haystack: str = "noise"
    needle_chat: bool = False
    seed: int = 0

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> QuickSettings:
        """Return checked settings; raises ConfigError that names unknown keys and bad values."""
        known = {field.name for field in dataclasses.fields(cls)}
        raise_problems(unknown_keys(values, known, "eval settings"))
        return cls(**values)

    def __post_init__(self) -> None:
        problems = read_lists(self, needle_lengths=int, needle_depths=float)
        problems += not_allowed(self, dtype=tuple(DTYPES), device=DEVICES, needle_haystack=HAYSTACKS)
        problems += not_counts(self, num_queries=1, seed=0) + not_flags(self, "needle_chat")
        if not problems and not all(0 <= depth <= 1 for depth in self.needle_depths):
            problems.append(f"needle_depths must be between 0 and 1, got {list(self.needle_depths)}")
        if not problems and self.needle_lengths and not self.needle_depths:
            problems.append("needle_depths is empty: leave it out for the default depths")
        raise_problems(problems, code="RC10")


def read_lists(settings: Any, **kinds: type) -> list[str]:
    """Read the named fields of a frozen dataclass as lists; return the problems."""
    problems = []
    for name, kind in kinds.items():
        value = getattr(settings, name)
        try:
            object.__setattr__(settings, name, numbers(value, kind))
        except (TypeError, ValueError):  # why: collected with the value and raised together
            problems.append(f"{name} must be a list{'' if kind is str else ' of numbers'}, got {value!r}")
    return problems


def not_allowed(settings: Any, **allowed: tuple[str, ...]) -> list[str]:
    """Return the problems of fields that take one of a few words."""
    return [
        f"{name} must be one of {', '.join(words)}, got {getattr(settings, name)!r}"
        for name, words in allowed.items()
        if getattr(settings, name) not in words
    ]


def not_counts(settings: Any, **least: int) -> list[str]:
    """Return the problems of fields that are whole numbers from a least one on."""
    given = {name: getattr(settings, name) for name in least}
    return [
        f"{name} must be a whole number >= {least[name]}, got {value!r}"
        for name, value in given.items()
        if isinstance(value, bool) or not isinstance(value, int) or value < least[name]
    ]


def not_flags(settings: Any, *names: str) -> list[str]:
    """Return the problems of fields that are true or false."""
    given = {name: getattr(settings, name) for name in names}
    return [
        f"{name} must be true or false, got {value!r}"
        for name, value in given.items()
        if not isinstance(value, bool)
    ]


def numbers(value: Any, kind: type) -> tuple[Any, ...]:
    """Read a number, a list of numbers, or ``"1024,2048"``."""
    if isinstance(value, str):
        value = [part for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        value = [value]
    return tuple(kind(part) for part in value)
