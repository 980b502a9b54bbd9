"""Quest (Tang et al. 2024, arXiv 2406.10774): pages by an upper bound of their best product, untrained.

A page keeps the least and the largest value of each key coordinate, ``m`` and ``M``; the product of a query
with any key of the page is at most ``sum_c max(q_c m_c, q_c M_c)`` (section 3.3). Each query head attends to
the pages with the largest bound and to the last one. The prompt is attended to densely.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from nsa_convert.kernels.compressed import block_topk
from nsa_convert.methods.parts.base import AttentionInputs, MethodSpec, Pool, Reach, TrainingSpec
from nsa_convert.methods.parts.budget import HeadBudget, widened
from nsa_convert.methods.parts.prefill import STEP_TOKENS
from nsa_convert.methods.parts.selection import NO_REUSE, SelectingMethod
from nsa_convert.patterns import BlockSelection


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestSettings(HeadBudget):
    """Settings of Quest.

    Attributes:
        block_size: Tokens in a page.
        num_blocks: Pages a query sees, forced ones included.
        num_sink_blocks: First pages always selected.
        num_local_blocks: Last pages always selected, the query's own included.
        share: ``"none"`` lets every query head choose (the paper); ``"group"`` sums the scores of the heads
            that share a key head.
        prefill: ``"dense"`` attends to the whole prompt (the paper); ``"sparse"`` selects there too.
        mode: ``"sparse"``, or ``"full"`` for dense attention with the same weights.
        reuse_from: Earlier layer whose selection this one attends to; -1 for its own.
    """

    block_size: int = 16
    num_blocks: int = 64
    num_sink_blocks: int = 0
    num_local_blocks: int = 1
    prefill: Literal["dense", "sparse"] = "dense"
    mode: Literal["sparse", "full"] = "sparse"
    reuse_from: int = NO_REUSE
    compared_block = 16


class Quest(SelectingMethod):
    """Page selection by elementwise bounds, while decoding."""

    spec = MethodSpec(
        name="quest",
        title="Quest",
        paper="arXiv:2406.10774",
        summary="decoding reads the pages with the largest upper bound; no training",
        trainable=False,
        phases=("decode",),
        granularity="pages per query token and query head",
        sources={
            "block_size": "paper section 4.1 (page of 16)",
            "num_blocks": "paper section 4.2 (budget of 1024 tokens)",
            "num_sink_blocks": "paper: no page is forced but the last",
            "num_local_blocks": "paper section 3.3 (the last page)",
            "share": "the paper's code selects per query head",
            "prefill": "paper section 3.4 (dense prompt)",
            "mode": "dense where the budget covers the context",
            "reuse_from": "every layer chooses",
        },
    )
    Settings = QuestSettings
    training_spec = TrainingSpec(stage_losses={}, has_dense_mode=True)

    def pools(self) -> tuple[Pool, ...]:
        """Return the smallest and largest key coordinates of each page."""
        size = self.settings.block_size
        heads = range(self.geometry.num_kv_heads)
        return tuple(
            Pool(name=name, source="key", heads=heads, width=size, stride=size) for name in ("min", "max")
        )

    def compress(self, name: str, windows: Tensor) -> Tensor:
        """Return the extreme of each coordinate over the page."""
        return windows.amin(2) if name == "min" else windows.amax(2)

    def is_dense(self, x: AttentionInputs) -> bool:
        """Return whether this call attends to everything: a prompt does."""
        is_prompt = x.q.shape[1] > STEP_TOKENS and self.forced_budget is None
        return (is_prompt and self.settings.prefill == "dense") or super().is_dense(x)

    def reach(self) -> Reach:
        """A prompt is read densely, unless it selects too."""
        reach = super().reach()
        if self.settings.prefill == "sparse":
            return reach
        return dataclasses.replace(reach, prompt_keys=None)

    def choose(self, x: AttentionInputs) -> BlockSelection:
        """Return the pages with the largest bound, which is one product with ``[M, m]``.

        ``max(q m, q M) = relu(q) M - relu(-q) m``, so a page has one key of 2 D numbers. The ranking by
        softmax over the pages is the ranking by bound while heads choose alone.
        """
        q = torch.cat([x.q.relu(), -(-x.q).relu()], -1)
        bounds = (x.pooled["max"], x.pooled["min"])
        size = self.settings.block_size

        rule = widened(self.settings.rule, self.forced_budget)
        return block_topk(q, bounds, width=size, stride=size, rule=rule, layout=x.layout, scale=x.scale)
