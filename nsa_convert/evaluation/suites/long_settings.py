"""Settings of the long and the full suite."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nsa_convert.evaluation.metrics.mass import NUM_QUERIES
from nsa_convert.evaluation.models import Dtype, ModelFacts
from nsa_convert.evaluation.suites.quick_settings import (
    Device,
    Haystack,
    outside_shares,
    read_suite_settings,
)
from nsa_convert.evaluation.tasks.ruler import RULER_TASKS
from nsa_convert.settings import at_least, raise_problems

RECALL = "recall"
TASKS = (*RULER_TASKS, RECALL)
DEFAULT_BUDGET = 1024
"""Stands for the visible budget where no layer is sparse."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongSettings:
    """Settings of the long and the full suite (``--set key=value``).

    Attributes:
        lengths: Prompt lengths of the needle grid; by default 2, 4 and 8 visible budgets (``full``: up to
            32) as far as the model has positions.
        task_lengths: Prompt lengths of the tasks; the two shortest of ``lengths`` (``full``: all).
        tasks: Which of the tasks; all by default.
        depths: Of the needle grid.
        samples: Prompts per task and length; 1 (``full``: 5).
        qa_file: JSON lines with ``question``, ``context`` and ``answers``; adds the task ``qa``.
        haystack: Of the needle grid: ``"noise"`` or ``"prose"``.
        dtype: Of weights and activations.
        device: ``"auto"`` takes CUDA when there is one.
        num_queries: Queries per layer and text that the mass is measured on.
        beyond_positions: Allow lengths up to four times the model's positions.
        times: Report times and memory; turn it off on a machine that others use.
        seed: Of all prompts.
    """

    lengths: tuple[int, ...] = ()
    task_lengths: tuple[int, ...] = ()
    tasks: tuple[str, ...] = TASKS
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    samples: int = 1
    qa_file: str | None = None
    haystack: Haystack = "noise"
    dtype: Dtype = "float32"
    device: Device = "auto"
    num_queries: int = NUM_QUERIES
    beyond_positions: bool = False
    times: bool = True
    seed: int = 0

    @classmethod
    def read(cls, values: Mapping[str, Any], suite: str, model: ModelFacts) -> LongSettings:
        """Return checked settings with the defaults of a suite for a model.

        Raises:
            ConfigError: Unknown keys and bad values, all in one message.
        """
        full = suite == "full"
        chosen = read_suite_settings(cls, {"samples": 5 if full else 1, **values})

        # Lengths that nobody gave are multiples of the visible budget.
        budget = model.visible_budget or DEFAULT_BUDGET
        limit = model.max_positions or budget * 32
        lengths = chosen.lengths or tuple(
            budget * factor
            for factor in ((2, 4, 8, 16, 32) if full else (2, 4, 8))
            if budget * factor <= limit
        )
        lengths = lengths or (limit,)
        return dataclasses.replace(
            chosen, lengths=lengths, task_lengths=chosen.task_lengths or (lengths if full else lengths[:2])
        )

    def __post_init__(self) -> None:
        problems = at_least(1, samples=self.samples, num_queries=self.num_queries)
        problems += at_least(0, seed=self.seed) + outside_shares("depths", self.depths)
        problems += [
            f"there is no task {name!r} (tasks: {', '.join(TASKS)})"
            for name in self.tasks
            if name not in TASKS
        ]
        raise_problems(problems, code="RC10")
