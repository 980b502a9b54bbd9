"""NSA, Native Sparse Attention (Yuan et al. 2025, arXiv 2502.11089).

Three branches read the same past and are joined by per-head gates (eq. 5): *compressed* attends to one
vector per l tokens, *selected* to the n raw blocks that the compressed attention favours, *window* to the
last w tokens. Converted from a dense model it starts with gates (0, 1, 0): the selected branch alone, which
is dense attention as long as the context has at most n blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from nsa_convert.config import AttentionGeometry
from nsa_convert.kernels.attention import dense_attention, sparse_attention
from nsa_convert.kernels.compressed import CompressedOutput, block_topk, compressed_attention
from nsa_convert.kernels.compressed.cells import CellGrid
from nsa_convert.kernels.gates import gated_sum
from nsa_convert.methods.parts.base import (
    AttentionInputs,
    CacheNeeds,
    DenseCopy,
    MethodSpec,
    Pool,
    Projection,
    Reach,
    SparseMethod,
    TrainingSpec,
    copy_of,
    is_within_budget,
    record,
)
from nsa_convert.methods.parts.budget import BlockBudget, widened
from nsa_convert.methods.parts.compressors import Compressor, build_compressor, has_weights
from nsa_convert.methods.parts.gates import BranchGate
from nsa_convert.methods.parts.losses import score_kl
from nsa_convert.methods.parts.scores import for_loss, half_variance, scored, with_scores
from nsa_convert.methods.parts.training_mode import TrainingMode
from nsa_convert.patterns import BlockTopK, Pattern, SinkWindow
from nsa_convert.settings import at_least

TAUGHT = "taught key"
"""Pool of compressed keys that pass no gradient on to the keys."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NSASettings(BlockBudget):
    """Settings of NSA.

    Attributes:
        compression_block: l, tokens in a compressed cell.
        compression_stride: d, tokens between cells; divides l and l'.
        block_size: l', tokens in a selected block.
        num_blocks: n, blocks a query sees, forced ones included.
        num_sink_blocks: First blocks always selected.
        num_local_blocks: Last blocks always selected, the query's own included.
        window_size: w, tokens of the sliding window, the query's own included.
        block_score: How cells become block scores: ``"sum"`` is eq. 9, ``"max"`` InfLLM-v2's max-pooling.
        scorer: ``"first_order"`` scores blocks by the compressed attention itself (eq. 8); ``"second_order"``
            adds the spread of the keys in each cell, see :mod:`nsa_convert.methods.parts.scores`.
        key_compressor: How keys are compressed.
        value_compressor: How values are compressed.
        compress_rope: Compress keys ``"after"`` or ``"before"`` RoPE.
        branch_kv: One set of keys and values ``"shared"`` by the branches, or the paper's ``"independent"``
            sets, which start as copies of the dense one and triple the cache.
        gate: ``"signed"`` starts exactly at the dense model; ``"sigmoid"`` is the paper's range [0, 1].
    """

    compression_block: int = 32
    compression_stride: int = 16
    block_size: int = 64
    num_blocks: int = 16
    num_sink_blocks: int = 1
    num_local_blocks: int = 2
    window_size: int = 512
    block_score: Literal["sum", "max"] = "sum"
    scorer: Literal["first_order", "second_order"] = "first_order"
    key_compressor: Compressor = "mean"
    value_compressor: Compressor = "mean"
    compress_rope: Literal["after", "before"] = "after"
    branch_kv: Literal["shared", "independent"] = "shared"
    gate: Literal["signed", "sigmoid"] = "signed"

    def problems(self) -> list[str]:
        """Return what is wrong with the cells and the window."""
        problems = []
        l, d = self.compression_block, self.compression_stride

        if d < 1 or l < d or l % d:
            problems.append(f"compression_block {l} must be a positive multiple of compression_stride {d}")
        elif self.block_size % d:
            problems.append(f"block_size {self.block_size} must be a multiple of compression_stride {d}")

        return problems + at_least(1, window_size=self.window_size)

    @property
    def rule(self) -> BlockTopK:
        """The block budget as the kernels take it."""
        return self.rule_with(self.block_score)

    @classmethod
    def at_budget(cls, budget: int) -> dict[str, Any]:
        """Return the settings under which a query sees ``budget`` keys.

        A window is dense attention's equal only after training: it is kept at its least.
        """
        return {**super().at_budget(budget), "window_size": cls.compared_block}


class NSA(SparseMethod):
    """Compressed, selected and window branches joined by gates."""

    spec = MethodSpec(
        name="nsa",
        title="NSA",
        paper="arXiv:2502.11089",
        summary="compressed, selected and sliding-window branches joined by per-head gates",
        trainable=True,
        phases=("train", "prefill", "decode"),
        granularity="blocks per query token and KV head",
        sources={
            "compression_block": "paper section 4.1",
            "compression_stride": "paper section 4.1",
            "block_size": "paper section 4.1",
            "num_blocks": "paper section 4.1",
            "num_sink_blocks": "paper section 4.1",
            "num_local_blocks": "paper section 4.1",
            "window_size": "paper section 4.1",
            "block_score": "paper eq. 9",
            "scorer": "paper eq. 8",
            "key_compressor": "starts at the dense model",
            "value_compressor": "starts at the dense model",
            "compress_rope": "keys as the dense model caches them",
            "branch_kv": "starts at the dense model",
            "gate": "starts at the dense model",
        },
        parallel=("tensor", "context"),
    )
    Settings = NSASettings
    training_spec = TrainingSpec(stage_losses={"align": {"output_error": 1.0, "score_kl": 0.1}})

    def __init__(self, settings: NSASettings, geometry: AttentionGeometry, layer_index: int) -> None:
        super().__init__(settings, geometry, layer_index)

        # Compressors of keys and values; score_kl trains a key compressor with weights.
        heads = geometry.num_kv_heads
        dim = geometry.head_dim
        width = settings.compression_block
        self.compress_key = build_compressor(settings.key_compressor, heads, width, dim)
        if has_weights(self.compress_key):
            self.training_spec = with_scores(self.training_spec)
        self.compress_value = build_compressor(settings.value_compressor, heads, width, dim)

        # Gates: at the start the selected branch alone is open.
        self.gate = BranchGate(
            geometry.hidden_size,
            geometry.num_query_heads,
            open_branches=(False, True, False),
            kind=settings.gate,
        )

        # Further keys and values for branches that share none.
        self.branch_k_proj = self.branch_v_proj = None
        if settings.branch_kv == "independent":
            # The compressed branch's heads come first, the window's after them.
            size = 2 * heads * dim
            bias = geometry.qkv_bias
            self.branch_k_proj = nn.Linear(geometry.hidden_size, size, bias=bias)
            self.branch_v_proj = nn.Linear(geometry.hidden_size, size, bias=bias)

    def cache_needs(self) -> CacheNeeds:
        """Return the compressed keys and values, and the two further sets of independent branches."""
        s, heads = self.settings, self.geometry.num_kv_heads
        span = range(heads) if s.branch_kv == "shared" else range(heads, 2 * heads)
        sizes = {"heads": span, "width": s.compression_block, "stride": s.compression_stride}

        key = Pool(name="key", source="key", rope=s.compress_rope, **sizes)
        pools = [key, Pool(name="value", source="value", **sizes)]
        if s.scorer == "second_order":
            pools.append(Pool(name="half_variance", source="key", **sizes))

        # The keys once more, for a loss that teaches the compressor alone.
        taught = (dataclasses.replace(key, name=TAUGHT),) if has_weights(self.compress_key) else ()
        return CacheNeeds(
            pools=tuple(pools),
            loss_pools=taught,
            extra_head_sets=0 if self.branch_k_proj is None else 2,
        )

    def reach(self) -> Reach:
        """Up to n * l' tokens the selected branch is dense attention; a query reads n * l' + w."""
        budget = self.settings.rule.budget
        keys = budget + self.settings.window_size
        return Reach(visible_budget=budget, decode_keys=keys, prompt_keys=keys)

    def project(self, hidden: Tensor, rotate: Callable[[Tensor], Tensor]) -> Projection:
        """Return the compressed and window branches' own keys and values, ``[B, T, 2 H, D]``."""
        if self.branch_k_proj is None or self.branch_v_proj is None:
            return Projection()
        shape = (2 * self.geometry.num_kv_heads, self.geometry.head_dim)
        k, v = (branch(hidden).unflatten(-1, shape) for branch in (self.branch_k_proj, self.branch_v_proj))
        return Projection(k=k, v=v)

    def compress(self, name: str, windows: Tensor) -> Tensor:
        """See the base class."""
        if name == TAUGHT:
            return self.compress_key(windows.detach())

        compressors: dict[str, Callable[[Tensor], Tensor]] = {"half_variance": half_variance}
        compressors |= {"key": self.compress_key, "value": self.compress_value}
        return compressors[name](windows)

    def dense_copies(self) -> dict[str, DenseCopy]:
        """Return which dense projection each own projection repeats."""
        if self.branch_k_proj is None or self.branch_v_proj is None:
            return {}

        copies = {}
        for kind, branch in (("k", self.branch_k_proj), ("v", self.branch_v_proj)):
            for part, parameter in branch.named_parameters():
                dense = f"{kind}_proj.{part}"
                copies[f"branch_{dense}"] = copy_of(dense, parameter, self.geometry.head_dim)

        return copies

    def forward(self, x: AttentionInputs) -> Tensor:
        """Attend through the three branches; returns ``[B, TQ, HQ, D]``."""
        s, heads = self.settings, self.geometry.num_kv_heads

        # The dense heads come first, the window branch's last; shared branches read the same ones.
        k = x.k[:, :, :heads]
        v = x.v[:, :, :heads]
        window_k = x.k[:, :, -heads:]
        window_v = x.v[:, :, -heads:]

        # Compressed branch, which also chooses the blocks.
        compressed = self._compressed(x, choose=not is_within_budget(self, x, s.rule.budget))

        # Sliding window.
        window = SinkWindow(window_size=s.window_size)
        windowed, _ = sparse_attention(x.q, window_k, window_v, window, layout=x.layout, scale=x.scale)

        # Selected blocks.
        patterns: dict[str, Pattern] = {}
        if compressed.selection is None:  # everything is visible
            selected = dense_attention(x.q, k, v, layout=x.layout, scale=x.scale)
        else:
            selected, _ = sparse_attention(x.q, k, v, compressed.selection, layout=x.layout, scale=x.scale)
            patterns = {"selected": compressed.selection, "window": window}

        # Join the branches.
        assert compressed.o is not None
        gates = self.gate(x.hidden)  # [B, TQ, HQ, 3]
        record(self, x, k, patterns, gates)
        return gated_sum((compressed.o, selected, windowed), gates)

    def auxiliary_losses(
        self, x: AttentionInputs, sparse: Tensor | None, dense: Tensor | None, mode: TrainingMode
    ) -> dict[str, Tensor]:
        """Add ``score_kl``: KL of the block scores (eqs. 8-10) to the dense attention mass of the blocks.

        It teaches the key compressor alone, so that its weight costs the model nothing. ``mean`` has nothing
        to learn: there it moves queries and keys.
        """
        losses = super().auxiliary_losses(x, sparse, dense, mode)

        if "score_kl" in mode.losses:
            s, heads = self.settings, self.geometry.num_kv_heads

            grid = CellGrid(width=s.compression_block, stride=s.compression_stride)
            alone = TAUGHT in x.pooled
            pair = scored(for_loss(x, TAUGHT if alone else "key", alone=alone), s.scorer)
            losses["score_kl"] = score_kl(x, x.k[:, :, :heads], pair, grid, s.rule, mode.draw, mode.total)

        return losses

    def _compressed(self, x: AttentionInputs, *, choose: bool) -> CompressedOutput:
        """Attend to the compressed cells and, unless everything is visible anyway, choose blocks."""
        s = self.settings
        ck = x.pooled["key"]
        sizes = {"width": s.compression_block, "stride": s.compression_stride}
        rule = widened(self.settings.rule, self.forced_budget) if choose else None
        first_order = rule if s.scorer == "first_order" else None

        out = compressed_attention(
            x.q, ck, x.pooled["value"], rule=first_order, layout=x.layout, scale=x.scale, **sizes
        )
        if rule is None or first_order is not None:
            return out

        # The scores of the second order need a pass of their own.
        selection = block_topk(*scored(x, s.scorer), rule=rule, layout=x.layout, scale=x.scale, **sizes)
        return dataclasses.replace(out, selection=selection)
