"""MSA, MiniMax Sparse Attention (arXiv 2606.13392): blocks by a learned index, one index head per KV head.

A block scores as its best visible token does, ``max q_index . k_index``. The index learns by KL to the mean
attention of its group: over all tokens with the model frozen and dense (``mode: full``), then over the
selected blocks while the model trains sparse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from nsa_convert.config import AttentionGeometry
from nsa_convert.kernels.indexed import block_max_topk
from nsa_convert.methods.base import AttentionInputs, IndexSize, MethodSpec, TrainingMode
from nsa_convert.methods.budget import BlockBudget
from nsa_convert.methods.index_losses import index_kl, listed_tokens, visible_tokens
from nsa_convert.methods.indexer import Index, IndexKey
from nsa_convert.methods.losses import attention_mass, sample_queries
from nsa_convert.methods.selecting import NO_REUSE, SelectingMethod
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
    )
    Settings = MSASettings
    stage_losses = {
        "align": {"index_kl": 1.0}, "pretrain": {"index_kl": 1.0}, "extend": {"index_kl": 1.0},
        "sft": {"index_kl": 1.0},
    }

    def __init__(self, settings: MSASettings, geometry: AttentionGeometry, layer_index: int) -> None:
        super().__init__(settings, geometry, layer_index)
        if not self.reuses:
            self.index = Index(geometry, geometry.num_kv_heads, settings.index_key)

    @property
    def cached_streams(self) -> tuple[str, ...]:
        """Per-token vectors that are cached."""
        return () if self.reuses else self.index.cached_streams

    def streams(self, hidden: Tensor, rotate: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return index queries and keys."""
        return {} if self.reuses else self.index.streams(hidden, rotate)

    def index_size(self) -> IndexSize | None:
        """Return what the index reads of every earlier token."""
        return None if self.reuses else self.index.size()

    def dense_copies(self) -> dict[str, str]:
        """Return where the index starts from."""
        return {} if self.reuses else self.index.dense_copies("index.")

    def choose(self, x: AttentionInputs) -> BlockSelection:
        """Return the best blocks of each query and key/value head."""
        q, k = self.index.queries(x), self.index.keys(x)
        return block_max_topk(q, k, rule=self.block_rule(), layout=x.layout, scale=x.scale)

    def auxiliary_losses(
        self, x: AttentionInputs, sparse: Tensor, dense: Tensor, mode: TrainingMode
    ) -> dict[str, Tensor]:
        """Add ``index_kl``: over all tokens while the stream is dense, else over the selected ones."""
        losses = super().auxiliary_losses(x, sparse, dense, mode)
        if "index_kl" in mode.losses and not self.reuses:
            queries = sample_queries(x.q.shape[1], mode.step, x.q.device)
            mass = attention_mass(x.q, x.k, queries, x.layout, x.scale)
            seen, relative = visible_tokens(queries, x.q.shape[1], x.k.shape[1], x.layout)
            if mode.stream == "sparse":
                lists = self.choose(x).block_indices[:, :, queries]
                seen = seen & listed_tokens(lists, relative, self.settings.block_size)
            q, k = (self.index.queries(x)[:, queries].to(mass.dtype), self.index.keys(x).to(mass.dtype))
            logits = torch.einsum("bnhd,bthd->bhnt", q, k.expand(-1, -1, q.shape[2], -1)) * x.scale
            losses["index_kl"] = index_kl(mass, logits, seen)
        return losses
