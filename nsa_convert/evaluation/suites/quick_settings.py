"""Settings of the quick suite."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from nsa_convert.evaluation.metrics.mass import NUM_QUERIES
from nsa_convert.evaluation.models import Dtype
from nsa_convert.evaluation.tasks.needle import DEPTHS
from nsa_convert.settings import at_least, raise_problems, read_settings

T = TypeVar("T")

Haystack = Literal["noise", "prose"]
Device = Literal["auto", "cpu", "cuda"]


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

    dtype: Dtype = "float32"
    device: Device = "auto"
    num_queries: int = NUM_QUERIES
    needle_lengths: tuple[int, ...] = ()
    needle_depths: tuple[float, ...] = DEPTHS
    needle_haystack: Haystack = "noise"
    needle_chat: bool = False
    seed: int = 0

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> QuickSettings:
        """Return checked settings; raises ConfigError that names unknown keys and bad values."""
        return read_suite_settings(cls, values)

    def __post_init__(self) -> None:
        problems = at_least(1, num_queries=self.num_queries) + at_least(0, seed=self.seed)
        problems += outside_shares("needle_depths", self.needle_depths)
        if self.needle_lengths and not self.needle_depths:
            problems.append("needle_depths is empty: leave it out for the default depths")
        raise_problems(problems, code="RC10")


def read_suite_settings(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build the settings of a suite; a list may be written as ``"1024,2048"`` or as its only item.

    Raises:
        ConfigError: Unknown keys, wrong types and bad values, all in one message.
    """
    hints = get_type_hints(cls)
    items = {name: get_args(kind)[0] for name, hint in hints.items() for kind in _tuples(hint)}
    lists = {key: _as_list(value, items[key]) for key, value in values.items() if key in items}
    return read_settings(cls, {**values, **lists}, "eval settings", code="RC10")


def _tuples(hint: Any) -> list[Any]:
    """Return the types of lists that a field may have."""
    return [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is tuple]


def _as_list(value: Any, item: type) -> Any:
    """Return the list that a text or a single value stands for; what is neither, as it is."""
    if isinstance(value, str):
        try:
            return [item(part) for part in value.split(",") if part.strip()]
        except ValueError:  # why: refused where the types are checked
            return value
    return [value] if isinstance(value, item | int) else value


def outside_shares(name: str, values: Sequence[float]) -> list[str]:
    """Return the problem of a list whose values are not all from 0 to 1, if it has one."""
    if all(0 <= value <= 1 for value in values):
        return []
    return [f"{name} must be between 0 and 1, got {list(values)}"]
