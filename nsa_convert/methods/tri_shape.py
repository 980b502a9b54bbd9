"""A-shape and tri-shape (Li et al. 2024, arXiv 2412.10319): a band for the prompt, but not for its end.

The prompt is read by its first tokens and a window (A-shape); its last queries, which usually hold the
question, and every later token see everything (tri-shape). Unlike StreamingLLM nothing is forgotten.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from nsa_convert.kernels.attention import dense_attention, sparse_attention
from nsa_convert.methods.parts.base import AttentionInputs, MethodSpec, Reach, record
from nsa_convert.methods.parts.budget import band_of
from nsa_convert.methods.parts.prefill import PrefillMethod
from nsa_convert.patterns import SequenceLayout, SinkWindow
from nsa_convert.settings import at_least, raise_problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class TriShapeSettings:
    """Settings of A-shape and tri-shape.

    Attributes:
        num_sinks: Leading tokens every query sees.
        window_size: Trailing tokens every query sees, its own included.
        num_last: Last queries of a prompt that see everything; 0 is A-shape.
        chunks: ``"refuse"`` a prompt that arrives in chunks, unless ``num_last`` is 0; ``"own"`` takes the
            last queries of every call.
    """

    num_sinks: int = 128
    window_size: int = 3968
    num_last: int = 100
    chunks: Literal["refuse", "own"] = "refuse"

    def __post_init__(self) -> None:
        problems = at_least(1, window_size=self.window_size)
        problems += at_least(0, num_sinks=self.num_sinks, num_last=self.num_last)
        raise_problems(problems, code="CF22")

    @classmethod
    def at_budget(cls, budget: int) -> dict[str, Any]:
        """Return the settings under which a query sees ``budget`` keys.

        Four first tokens, the rest is window; the last queries see everything.
        """
        return {**band_of(budget), "num_last": 100}


class TriShape(PrefillMethod):
    """Sinks and a window while reading the prompt, its last queries apart."""

    spec = MethodSpec(
        name="tri_shape",
        title="Tri-shape",
        paper="arXiv:2412.10319",
        summary="the prompt is read by first tokens and a window, densely at its end; no training",
        trainable=False,
        phases=("prefill",),
        granularity="tokens, the same for every head",
        sources={
            "num_sinks": "MInference's released code (n_init)",
            "window_size": "MInference's released code (n_local)",
            "num_last": "MInference's released code (n_last)",
            "chunks": "which queries are the last ones is known at the end of the prompt",
        },
        causal_selection=False,
    )
    Settings = TriShapeSettings

    @property
    def needs_prompt_end(self) -> bool:
        """Whether last queries are treated apart."""
        return self.settings.num_last > 0

    def least_budget(self) -> int:
        """Return num_sinks + window_size."""
        return self.settings.num_sinks + self.settings.window_size

    def reach(self) -> Reach:
        """A query of the prompt reads the band; its end decides nothing where no last queries see more."""
        return dataclasses.replace(
            super().reach(),
            prompt_keys=self.least_budget(),
            adapts_to_prompt=False,
            is_causal=not self.needs_prompt_end,
        )

    def attend(self, x: AttentionInputs) -> Tensor:
        """Attend to the band, the last queries to everything; returns ``[B, TQ, HQ, D]``."""
        s = self.settings
        band = SinkWindow(num_sinks=s.num_sinks, window_size=max(s.window_size, self.forced_budget or 0))

        # The first of the last queries, as a query of the call and as a key.
        first = max(0, x.q.shape[1] - s.num_last)
        end = int(x.layout.offset) + first

        parts = []

        # The head of the prompt reads the band.
        if first:
            head = dataclasses.replace(
                x, q=x.q[:, :first], k=x.k[:, :end], v=x.v[:, :end], hidden=x.hidden[:, :first]
            )
            record(self, head, head.k, {"window": band})
            parts.append(sparse_attention(head.q, head.k, head.v, band, layout=head.layout, scale=x.scale)[0])

        # Its last queries read everything.
        if s.num_last:
            tail = dataclasses.replace(
                x, q=x.q[:, first:], hidden=x.hidden[:, first:], layout=SequenceLayout(offset=end)
            )
            record(self, tail, tail.k, {})
            parts.append(dense_attention(tail.q, tail.k, tail.v, layout=tail.layout, scale=x.scale))

        return torch.cat(parts, 1)
