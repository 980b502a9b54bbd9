"""Dense attention inside a converted model, for layers that a rule keeps full."""

from __future__ import annotations

import dataclasses
import sys

from torch import Tensor

from nsa_convert.kernels.attention import dense_attention
from nsa_convert.methods.parts.base import (
    AttentionInputs,
    MethodSpec,
    Reach,
    SparseMethod,
    TrainingSpec,
    record,
)
from nsa_convert.methods.parts.training_mode import TrainingMode


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullSettings:
    """Dense attention has no settings."""


class FullAttention(SparseMethod):
    """Every earlier key is visible."""

    spec = MethodSpec(
        name="full",
        title="full",
        paper="arXiv:1706.03762",
        summary="dense attention, for layers that stay as they were",
        trainable=True,
        phases=("train", "prefill", "decode"),
        granularity="every key",
        sources={},
        parallel=("tensor", "context"),
    )
    Settings = FullSettings
    training_spec = TrainingSpec(stage_losses={})

    def reach(self) -> Reach:
        """Every query reads every earlier key, at any context."""
        return Reach(visible_budget=sys.maxsize, decode_keys=None, prompt_keys=None)

    def forward(self, x: AttentionInputs) -> Tensor:
        """Attend densely; returns ``[B, TQ, HQ, D]``."""
        record(self, x, x.k, {})
        return dense_attention(x.q, x.k, x.v, layout=x.layout, scale=x.scale)

    def train_forward(self, x: AttentionInputs, mode: TrainingMode) -> tuple[Tensor, dict[str, Tensor]]:
        """Attend densely in every mode; there is nothing to compare."""
        return self(x), {}
