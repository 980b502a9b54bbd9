"""StreamingLLM (Xiao et al. 2023, arXiv 2309.17453): the first tokens and a sliding window.

Keys keep their absolute positions (the published eviction code renumbers them inside the cache). It selects,
it does not evict: the cache keeps all tokens.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from nsa_convert.config import raise_problems
from nsa_convert.kernels.dense import dense_attention
from nsa_convert.kernels.selected import sparse_attention
from nsa_convert.methods.base import AttentionInputs, MethodSpec, SparseMethod
from nsa_convert.patterns import SinkWindow


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingSettings:
    """Settings of streaming heads.

    Attributes:
        num_sinks: Leading tokens every query sees.
        window_size: Trailing tokens every query sees, its own included.
    """

    num_sinks: int = 4
    window_size: int = 1020

    def __post_init__(self) -> None:
        problems = []
        if self.num_sinks < 0:
            problems.append(f"num_sinks must be >= 0, got {self.num_sinks}")
        if self.window_size < 1:
            problems.append(f"window_size must be >= 1, got {self.window_size}")
        raise_problems(problems, code="CF22")


class Streaming(SparseMethod):
    """A static band: sinks and a window."""

    spec = MethodSpec(
        name="streaming",
        title="StreamingLLM",
        paper="arXiv:2309.17453",
        summary="the first tokens and a sliding window; for layers and heads that need no retrieval",
        trainable=True,
        phases=("train", "prefill", "decode"),
        granularity="tokens, the same for every head",
        sources={"num_sinks": "paper section 3.2", "window_size": "paper section 4 (cache of 1024)"},
    )
    Settings = StreamingSettings

    def visible_budget(self) -> int:
        """Return num_sinks + window_size."""
        return self.settings.num_sinks + self.settings.window_size

    def keys_per_query(self) -> int | None:
        """Return num_sinks + window_size."""
        return self.visible_budget()

    def forward(self, x: AttentionInputs) -> Tensor:
        """Attend to the band; returns ``[B, TQ, HQ, D]``."""
        s = self.settings
        if self.fits(x, self.visible_budget()):
            self.record(x, x.k, {})
            return dense_attention(x.q, x.k, x.v, layout=x.layout, scale=x.scale)
        band = SinkWindow(num_sinks=s.num_sinks, window_size=max(s.window_size, self.cover or 0))
        self.record(x, x.k, {"window": band})
        return sparse_attention(x.q, x.k, x.v, band, layout=x.layout, scale=x.scale)[0]
