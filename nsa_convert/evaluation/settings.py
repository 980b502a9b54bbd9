"""Settings of the quick suite."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nsa_convert.config import raise_problems, unknown_keys
from nsa_convert.evaluation.mass import NUM_QUERIES
from nsa_convert.evaluation.models import DTYPES
from nsa_convert.evaluation.needle import DEPTHS

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
        problems: list[str] = []
        for name, kind in (("needle_lengths", int), ("needle_depths", float)):
            try:
                object.__setattr__(self, name, numbers(getattr(self, name), kind))
            except (TypeError, ValueError):
                problems.append(f"{name} must be a list of numbers, got {getattr(self, name)!r}")
        for name, allowed in (("dtype", tuple(DTYPES)), ("device", DEVICES), ("needle_haystack", HAYSTACKS)):
            if getattr(self, name) not in allowed:
                problems.append(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, least in (("num_queries", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                problems.append(f"{name} must be a whole number >= {least}, got {value!r}")
        if not isinstance(self.needle_chat, bool):
            problems.append(f"needle_chat must be true or false, got {self.needle_chat!r}")
        if not problems and not all(0 <= depth <= 1 for depth in self.needle_depths):
            problems.append(f"needle_depths must be between 0 and 1, got {list(self.needle_depths)}")
        if not problems and self.needle_lengths and not self.needle_depths:
            problems.append("needle_depths is empty: leave it out for the default depths")
        raise_problems(problems, code="RC10")


def numbers(value: Any, kind: type) -> tuple[Any, ...]:
    """Read a number, a list of numbers, or ``"1024,2048"``."""
    if isinstance(value, str):
        value = [part for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        value = [value]
    return tuple(kind(part) for part in value)
