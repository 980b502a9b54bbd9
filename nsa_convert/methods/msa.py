"""MSA, MiniMax Sparse Attention (arXiv 2606.13392): blocks by a learned index, one index head per KV head.

A block scores as its best visible token does, ``max q_index . k_index``. The index learns by KL to the mean
attention of its group: over all tokens with the model frozen and dense (``mode: full``), then over the
selected blocks while the model trains sparse.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from nsa_convert.config import AttentionGeometry
from nsa_convert.kernels.indexed import block_max_topk
from nsa_convert.methods.parts.base import AttentionInputs, MethodSpec
from nsa_convert.methods.parts.budget import BlockBudget, widened
from nsa_convert.methods.parts.index import INDEX_TRAINING, Index, IndexKey
from nsa_convert.methods.parts.selection import NO_REUSE, SelectingMethod
from nsa_convert.patterns import BlockSelection


@dataclasses.dataclass(frozen=True, kw_only=True)
class MSASettings(BlockBudget):
    """Settings of MSA.

    Attributes:
        block_size: Tokens in a block.
        num_blocks: Blocks a query sees, forced ones included.
        num_sink_blocks: First blocks always selected.
        num_local_blocks: Last blocks always selected, the query's own included.
        index_key: ``"cached"`` scores with the layer's own keys and adds nothing to the cache; ``"shared"``
            has the published single key head, one more cached vector per token.
        reuse_from: Earlier layer whose selection this one attends to; -1 for its own.
        mode: ``"sparse"``, or ``"full"`` for dense attention with the same weights (warm-up).
    """

    block_size: int = 128
    num_blocks: int = 16
    num_sink_blocks: int = 1
    num_local_blocks: int = 1
    index_key: IndexKey = "cached"
    mode: Literal["sparse", "full"] = "sparse"
    reuse_from: int = NO_REUSE


class MSA(SelectingMethod):
    """A block-level learned index with one head per key/value head."""

    spec = MethodSpec(
        name="msa",
        title="MSA",
        paper="arXiv:2606.13392",
        summary="a learned index picks blocks by their best token",
        trainable=True,
        phases=("train", "prefill", "decode"),
        granularity="blocks per query token and KV head",
        sources={
            "block_size": "paper (k = 16, B = 128)",
            "num_blocks": "paper (k = 16, B = 128)",
            "num_sink_blocks": "added for conversion: a dense model needs its attention sink",
            "num_local_blocks": "paper (the local block)",
            "index_key": "starts near the dense model; the paper has a shared key",
            "mode": "paper (dense warm-up)",
            "reuse_from": "every layer chooses; GLM-5.2 shares an index among 4 layers",
        },
        parallel=("context",),
    )
    Settings = MSASettings
    training_spec = INDEX_TRAINING

    def __init__(self, settings: MSASettings, geometry: AttentionGeometry, layer_index: int) -> None:
        super().__init__(settings, geometry, layer_index)
        if not self.reuses:
            self.index = Index(geometry, geometry.num_kv_heads, settings.index_key)

    def choose(self, x: AttentionInputs) -> BlockSelection:
        """Return the best blocks of each query and key/value head."""
        index = self.own_index()
        q = index.queries(x)
        k = index.keys(x)

        rule = widened(self.settings.rule, self.forced_budget)
        return block_max_topk(q, k, rule=rule, layout=x.layout, scale=x.scale)

    def index_scores(self, x: AttentionInputs, queries: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``[B, H, NQ, TK]``: a list for each key/value head."""
        return self.own_index().products(x, queries, dtype)
