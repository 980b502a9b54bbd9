"""SSA, Sparse Sparse Attention (arXiv 2511.20102): one softmax over the best blocks, switchable to full.

A block's key is the mean of its token keys; blocks are scored by softmax over the complete blocks, summed
over the query heads of a group, and the best are attended to with the query's own block. The paper's code
forces only the query's own block; a dense model also needs its first block (the attention sink), so here
that one is forced too. The same weights run ``mode = "full"`` as ordinary dense attention.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from torch import Tensor

from nsa_convert.config import AttentionGeometry
from nsa_convert.kernels.attention import dense_attention, sparse_attention
from nsa_convert.kernels.compressed import block_topk
from nsa_convert.kernels.compressed.cells import CellGrid
from nsa_convert.methods.parts.base import (
    AttentionInputs,
    CacheNeeds,
    MethodSpec,
    Pool,
    Reach,
    SparseMethod,
    TrainingSpec,
    dense_model_output,
    is_within_budget,
    record,
)
from nsa_convert.methods.parts.budget import BlockBudget, widened
from nsa_convert.methods.parts.compressors import Compressor, build_compressor, has_weights
from nsa_convert.methods.parts.gates import BranchGate
from nsa_convert.methods.parts.losses import bidirectional_alignment, score_kl
from nsa_convert.methods.parts.scores import for_loss, half_variance, scored, with_scores
from nsa_convert.methods.parts.training_mode import TrainingMode
from nsa_convert.patterns import BlockSelection


@dataclasses.dataclass(frozen=True, kw_only=True)
class SSASettings(BlockBudget):
    """Settings of SSA.

    Attributes:
        block_size: Tokens in a block.
        num_blocks: Blocks a query sees, forced ones included.
        num_sink_blocks: First blocks always selected.
        num_local_blocks: Last blocks always selected, the query's own included.
        scorer: ``"first_order"`` scores a block by its mean key; ``"second_order"`` adds the spread of its
            keys, see :mod:`nsa_convert.methods.parts.scores`.
        key_compressor: How the keys of a block become the one that scores it. All but ``"mean"`` have
            weights, which ``score_kl`` teaches.
        gate: ``"none"``, ``"signed"`` (``2 sigma(W x)``, starts at exactly 1) or the paper's ``"sigmoid"``
            (starts at sigma(4) = 0.982), on the output of each head.
        mode: ``"sparse"``, or ``"full"`` for dense attention with the same weights.
    """

    block_size: int = 16
    num_blocks: int = 64
    num_sink_blocks: int = 1
    num_local_blocks: int = 1
    scorer: Literal["first_order", "second_order"] = "first_order"
    key_compressor: Compressor = "mean"
    gate: Literal["none", "signed", "sigmoid"] = "none"
    mode: Literal["sparse", "full"] = "sparse"
    compared_block = 16


class SSA(SparseMethod):
    """Mean-pooled block selection with one softmax, and an optional output gate."""

    spec = MethodSpec(
        name="ssa",
        title="SSA",
        paper="arXiv:2511.20102",
        summary="one softmax over the best mean-pooled blocks; the same weights also run dense",
        trainable=True,
        phases=("train", "prefill", "decode"),
        granularity="blocks per query token and KV head",
        sources={
            "block_size": "paper section 4 (receptive field 1024)",
            "num_blocks": "paper section 4 (receptive field 1024)",
            "num_sink_blocks": "added for conversion: a dense model needs its attention sink",
            "num_local_blocks": "the paper's code forces the current block",
            "scorer": "paper section 3 (mean-pooled keys)",
            "key_compressor": "paper section 3 (mean-pooled keys)",
            "gate": "starts at the dense model; the paper gates every model it trains",
            "mode": "paper section 3 (inference mode)",
        },
        parallel=("tensor", "context"),
    )
    Settings = SSASettings
    training_spec = TrainingSpec(
        stage_losses={
            "align": {"output_error": 1.0},
            "pretrain": {"alignment": 10.0, "score_kl": 0.0},
            "extend": {"alignment": 10.0},
            "sft": {"alignment": 10.0},
        },
        dual_stream=True,
    )

    def __init__(self, settings: SSASettings, geometry: AttentionGeometry, layer_index: int) -> None:
        super().__init__(settings, geometry, layer_index)
        self.mode = settings.mode

        # The key compressor; score_kl trains one with weights.
        sizes = geometry.num_kv_heads, settings.block_size, geometry.head_dim
        self.compress_key = build_compressor(settings.key_compressor, *sizes)
        if has_weights(self.compress_key):
            self.training_spec = with_scores(self.training_spec)

        self.gate = None
        if settings.gate != "none":
            self.gate = BranchGate(
                geometry.hidden_size, geometry.num_query_heads, open_branches=(True,), kind=settings.gate
            )

    def cache_needs(self) -> CacheNeeds:
        """Return the block keys, and the spread of the keys where the scorer wants it."""
        size = self.settings.block_size
        sizes = {"source": "key", "heads": range(self.geometry.num_kv_heads), "width": size, "stride": size}
        names = ("key",) if self.settings.scorer == "first_order" else ("key", "half_variance")
        return CacheNeeds(pools=tuple(Pool(name=name, **sizes) for name in names))

    def reach(self) -> Reach:
        """A query reads num_blocks * block_size keys, or all of them in full mode."""
        budget = self.settings.rule.budget
        keys = None if self.mode == "full" else budget
        return Reach(visible_budget=budget, decode_keys=keys, prompt_keys=keys)

    def compress(self, name: str, windows: Tensor) -> Tensor:
        """Return the key of each block, or half the variance of its keys.

        A choice of blocks has no gradient; a loss on the scores teaches a compressor with weights alone.
        """
        if name != "key":
            return half_variance(windows)
        return self.compress_key(windows.detach() if has_weights(self.compress_key) else windows)

    def forward(self, x: AttentionInputs) -> Tensor:
        """Attend to the selected blocks, or to everything in full mode; returns ``[B, TQ, HQ, D]``."""
        gates = None if self.gate is None else self.gate(x.hidden)  # [B, TQ, HQ, 1]

        # Choose blocks, unless everything is visible anyway.
        in_full_mode = self.mode == "full" and self.forced_budget is None
        if in_full_mode or is_within_budget(self, x, self.settings.rule.budget):
            o = dense_attention(x.q, x.k, x.v, layout=x.layout, scale=x.scale)
            record(self, x, x.k, {}, gates)
        else:
            selection = self._choose(x)
            o, _ = sparse_attention(x.q, x.k, x.v, selection, layout=x.layout, scale=x.scale)
            record(self, x, x.k, {"selected": selection}, gates)

        return o if gates is None else o * gates.to(o.dtype)

    def train_forward(self, x: AttentionInputs, mode: TrainingMode) -> tuple[Tensor, dict[str, Tensor]]:
        """Attend both ways over the same inputs; one output goes on, the other serves the losses.

        The alignment compares the outputs before the gate (the paper's Alg. 1), so that closing the gate
        cannot lower it.
        """
        gate = 1.0 if self.gate is None else self.gate(x.hidden).to(x.q.dtype)  # [B, TQ, HQ, 1]

        stream = mode.stream
        if stream == "ordinary":
            stream = "full" if self.mode == "full" and self.forced_budget is None else "sparse"

        # Both attentions are computed only where the step needs them; within the budget they are the same.
        fits = is_within_budget(self, x, self.settings.rule.budget)
        compared = not {"output_error", "alignment"}.isdisjoint(mode.losses)
        full = dense_model_output(self, x) if fits or compared or stream != "sparse" else None
        sparse = full
        if not fits and (compared or stream == "sparse"):
            sparse, _ = sparse_attention(x.q, x.k, x.v, self._choose(x), layout=x.layout, scale=x.scale)

        gated = None if sparse is None else sparse * gate
        losses = self.auxiliary_losses(x, gated, full, mode)
        if "alignment" in mode.losses:
            assert full is not None
            assert sparse is not None
            losses["alignment"] = bidirectional_alignment(full, sparse, mode.total)

        # The output of the residual stream; the other one served the losses alone.
        if stream == "sparse":
            assert gated is not None
            return gated, losses
        assert full is not None
        return (full.detach() if stream == "teacher" else full * gate), losses

    def auxiliary_losses(
        self, x: AttentionInputs, sparse: Tensor | None, dense: Tensor | None, mode: TrainingMode
    ) -> dict[str, Tensor]:
        """Add ``score_kl``, which the paper does not have: it teaches blocks to be found.

        It teaches the key compressor alone; ``mean`` has nothing to learn, there it moves queries and keys.
        """
        losses = super().auxiliary_losses(x, sparse, dense, mode)

        if "score_kl" in mode.losses:
            rule = self.settings.rule
            size = self.settings.block_size
            grid = CellGrid(width=size, stride=size)

            alone = has_weights(self.compress_key)
            pair = scored(for_loss(x, "key", alone=alone), self.settings.scorer)
            losses["score_kl"] = score_kl(x, x.k, pair, grid, rule, mode.draw, mode.total)

        return losses

    def _choose(self, x: AttentionInputs) -> BlockSelection:
        size = self.settings.block_size
        rule = widened(self.settings.rule, self.forced_budget)
        pair = scored(x, self.settings.scorer)
        return block_topk(*pair, width=size, stride=size, rule=rule, layout=x.layout, scale=x.scale)
