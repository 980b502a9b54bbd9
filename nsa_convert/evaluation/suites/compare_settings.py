"""Settings of the suite that compares methods on one dense model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from nsa_convert.config import PAIR, LayerRule, SparseAttentionConfig
from nsa_convert.evaluation.metrics.mass import NUM_QUERIES
from nsa_convert.evaluation.models import Dtype
from nsa_convert.evaluation.suites.quick_settings import (
    Device,
    Haystack,
    outside_shares,
    read_suite_settings,
)
from nsa_convert.evaluation.tasks.text import MIN_TOKENS
from nsa_convert.methods.parts.registry import METHODS
from nsa_convert.settings import at_least, raise_problems, suggest

GRAIN = 128
"""Budgets that are a share of a length are rounded to a multiple of this, which all blocks divide."""
TEXTS = ("code", "prose")
PAIRS = {
    PAIR: SparseAttentionConfig(
        default=LayerRule(method="xattention"), rules=(LayerRule(method="quest", phase="decode"),)
    )
}
"""Rows beside the methods: a method that reads prompts with one that decodes."""
COMPARED = (*METHODS, *PAIRS)
LISTS = ("methods", "budgets", "lengths", "needle_lengths", "depths", "texts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Settings of the suite ``compare`` (``--set key=value``).

    Attributes:
        methods: Names of methods, or ``phases`` for XAttention's prompts with Quest's steps; all by default.
        budgets: Keys a query sees: numbers of tokens, or shares of each length below 1.
        equal: ``"visible"`` gives the sparse heads of a plan the budget as it is; ``"density"`` gives them
            less where others are dense, so that the plan keeps as many pairs as a method for all heads.
        lengths: Tokens of the texts; an empty list for no texts.
        needle_lengths: Prompt lengths of the needles; those of the texts when left out.
        depths: Where the needles stand, 0 to 1.
        texts: ``code``, ``prose`` or both; a ``text_file`` takes the place of both.
        haystack: ``"noise"`` or ``"prose"``.
        dtype: Of weights and activations.
        device: ``"auto"`` takes CUDA when there is one.
        num_queries: Queries per layer and text that the mass is measured on.
        finished: Measure nothing; report the cells that ``--out`` has.
        seed: Of the needles.
    """

    methods: tuple[str, ...] = COMPARED
    budgets: tuple[float, ...] = (0.25,)
    equal: Literal["visible", "density"] = "visible"
    lengths: tuple[int, ...] = (2048,)
    needle_lengths: tuple[int, ...] | None = None
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    texts: tuple[str, ...] = TEXTS
    haystack: Haystack = "noise"
    dtype: Dtype = "float32"
    device: Device = "auto"
    num_queries: int = NUM_QUERIES
    finished: bool = False
    seed: int = 0

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> CompareSettings:
        """Return checked settings.

        Raises:
            ConfigError: Unknown keys, methods and bad values, all in one message.
        """
        return read_suite_settings(cls, values)

    def __post_init__(self) -> None:
        if self.needle_lengths is None:
            object.__setattr__(self, "needle_lengths", self.lengths)
        problems = at_least(1, num_queries=self.num_queries) + at_least(0, seed=self.seed)
        raise_problems([*problems, *self._list_problems()], code="RC10")
        unknown = [name for name in self.methods if name not in COMPARED]
        raise_problems(
            [f"unknown method '{name}'{suggest(name, COMPARED)}" for name in unknown], code="RC02",
            hint="`nsa-convert methods` lists them; mixes of methods come from --plan NAME=FILE",
        )  # fmt: skip

    def _list_problems(self) -> list[str]:
        """Return what is wrong in the lists."""
        for name in LISTS:
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))

        # Texts, depths and lengths.
        unknown = [name for name in self.texts if name not in TEXTS]
        problems = [f"there is no text {name!r} (texts: {', '.join(TEXTS)})" for name in unknown]
        problems += outside_shares("depths", self.depths)
        short = [n for n in self.all_lengths() if n < MIN_TOKENS]
        if short:
            problems.append(f"lengths must be at least {MIN_TOKENS} tokens, got {short}")

        # Budgets below 1 are shares of a length, others numbers of tokens.
        wrong = [x for x in self.budgets if not (0 < x < 1 or (math.isfinite(x) and x >= 1 and x % 1 == 0))]
        if wrong or not self.budgets:
            problems.append(
                "budgets must be numbers of tokens such as 512, or shares of the length such as 0.25, got "
                f"{list(self.budgets)}"
            )

        if not (self.lengths or (self.needle_lengths and self.depths)):
            problems.append("there is nothing to measure: give lengths, or needle_lengths and depths")
        return problems

    def all_lengths(self) -> list[int]:
        """Return the lengths of texts and needles, shortest first."""
        return sorted({*self.lengths, *(self.needle_lengths or ())})


def budget_at(budget: float, length: int) -> int:
    """Return a budget in tokens: as it is, or a share of a length in multiples of 128."""
    return math.floor(budget) if budget >= 1 else GRAIN * round(budget * length / GRAIN)


def budget_label(budget: float) -> str:
    """Return a budget as text."""
    return f"{budget:.0f}" if budget >= 1 else f"{budget:.3%}".rstrip("0%").rstrip(".") + "%"
