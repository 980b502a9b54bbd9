"""InfLLM-v2 (Zhao et al. 2025, arXiv 2509.24663; MiniCPM4): max-pooled block scores, one softmax, no weights.

Mean-pooled keys of ``kernel_size`` tokens every ``kernel_stride`` are used for scores only: softmax over the
complete cells, summed over the heads of a group, max-pooled to blocks. The first blocks, the window and the
best blocks are attended to in one softmax with the dense keys and values. Up to ``dense_len`` tokens the
layer is dense.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from nsa_convert.kernels.compressed import block_topk, compressed_attention
from nsa_convert.methods.parts.base import AttentionInputs, MethodSpec, Pool
from nsa_convert.methods.parts.budget import parts_of, widened
from nsa_convert.methods.parts.selection import NO_REUSE, SelectingMethod
from nsa_convert.patterns import BlockSelection, BlockTopK
from nsa_convert.settings import at_least, raise_problems, read_settings, unknown_keys

COARSER = 4
"""The coarse cells are this many times as long and as far apart as those that score."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfLLMv2Settings:
    """Settings of InfLLM-v2, by the names of MiniCPM4's ``sparse_config`` where it has one.

    Attributes:
        kernel_size: Tokens in a pooled cell.
        kernel_stride: Tokens between cells; divides ``kernel_size`` and ``block_size``.
        block_size: Tokens in a block.
        init_blocks: First blocks always selected; they count among ``topk``.
        topk: Blocks chosen by score, the first ones included, the window not.
        window_size: Tokens behind a query that are always selected, in whole blocks, its own block included.
        dense_len: Sequences up to this length run dense; 0 stands for the visible budget. A value above the
            budget makes a prompt that grows past it while decoding differ from one long prefill, as
            published.
        lse: What the softmax over the cells is normalised with: ``"exact"``, or ``"coarse"`` for cells four
            times as long and as far apart (paper section 3.2), which saves a pass over the fine cells on the
            triton backend. It decides how much each head of a group weighs.
        reuse_from: Earlier layer whose selection this one attends to; -1 for its own.
        mode: ``"sparse"``, or ``"full"`` for dense attention with the same weights.
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    init_blocks: int = 1
    topk: int = 64
    window_size: int = 2048
    dense_len: int = 0
    lse: Literal["exact", "coarse"] = "exact"
    mode: Literal["sparse", "full"] = "sparse"
    reuse_from: int = NO_REUSE

    def __post_init__(self) -> None:
        problems = []
        l, d, size = self.kernel_size, self.kernel_stride, self.block_size

        # Cells and blocks.
        if d < 1 or l < d or l % d:
            problems.append(f"kernel_size {l} must be a positive multiple of kernel_stride {d}")
        elif size < 1 or size % d:
            problems.append(f"block_size {size} must be a positive multiple of kernel_stride {d}")

        # What is always selected, and how much is chosen.
        if size >= 1 and (self.window_size < size or self.window_size % size):
            problems.append(
                f"window_size {self.window_size} must be a positive multiple of block_size {size}"
            )
        if self.init_blocks < 0 or self.topk < max(self.init_blocks, 1):
            problems.append(
                "init_blocks must be >= 0 and topk at least init_blocks and 1, "
                f"got {self.init_blocks} and {self.topk}"
            )

        problems += at_least(0, dense_len=self.dense_len)
        raise_problems(problems, code="CF22")

    @property
    def rule(self) -> BlockTopK:
        """The block budget as the kernels take it."""
        local = self.window_size // self.block_size
        return BlockTopK(
            block_size=self.block_size,
            num_blocks=self.topk + local,
            num_sink_blocks=self.init_blocks,
            num_local_blocks=local,
            reduce="max",
        )

    @classmethod
    def at_budget(cls, budget: int) -> dict[str, Any]:
        """Return the settings under which a query sees ``budget`` keys.

        Half of the budget is window, half is chosen.
        """
        half = parts_of(budget, 128)
        return {"block_size": 64, "topk": half, "window_size": 64 * half}


class InfLLMv2(SelectingMethod):
    """Max-pooled block scores, group-shared selection, one softmax."""

    spec = MethodSpec(
        name="infllm_v2",
        title="InfLLM-v2",
        paper="arXiv:2509.24663",
        summary="first blocks, window and max-pooled best blocks in one softmax; no new weights",
        trainable=True,
        phases=("train", "prefill", "decode"),
        granularity="blocks per query token and KV head",
        sources={
            "kernel_size": "MiniCPM4 sparse_config",
            "kernel_stride": "MiniCPM4 sparse_config",
            "block_size": "MiniCPM4 sparse_config",
            "init_blocks": "MiniCPM4 sparse_config",
            "topk": "MiniCPM4 sparse_config",
            "window_size": "MiniCPM4 sparse_config",
            "dense_len": "the visible budget; MiniCPM4 has 8192",
            "lse": "exact; paper section 3.2 has the coarse one",
            "mode": "paper section 3 (dense switch)",
            "reuse_from": "every layer chooses; GLM-5.2 shares an index among 4 layers",
        },
        parallel=("tensor", "context"),
    )
    Settings = InfLLMv2Settings

    def pools(self) -> tuple[Pool, ...]:
        """Return the pooled keys."""
        s, heads = self.settings, range(self.geometry.num_kv_heads)
        factors = {"key": 1, "coarse": COARSER} if s.lse == "coarse" else {"key": 1}
        return tuple(
            Pool(name=name, source="key", heads=heads, width=n * s.kernel_size, stride=n * s.kernel_stride)
            for name, n in factors.items()
        )

    def compress(self, name: str, windows: Tensor) -> Tensor:
        """Return the mean key of each cell."""
        return windows.mean(2)

    def dense_until(self) -> int:
        """Return the tokens of all blocks, or ``dense_len`` where that is longer."""
        return max(self.settings.dense_len, self.budget())

    def choose(self, x: AttentionInputs) -> BlockSelection:
        """Return the best blocks of each query and key/value head."""
        s = self.settings
        return block_topk(
            x.q,
            x.pooled["key"].detach(),
            width=s.kernel_size,
            stride=s.kernel_stride,
            rule=widened(s.rule, self.forced_budget),
            layout=x.layout,
            scale=x.scale,
            lse=self._coarse_lse(x) if s.lse == "coarse" else None,
        )

    def _coarse_lse(self, x: AttentionInputs) -> Tensor:
        """Return the lse over the coarse cells, ``[B, TQ, HQ]``.

        Each stands for four fine cells: log 4 more for every head, which changes no order.
        """
        s, ck = self.settings, x.pooled["coarse"].detach()
        width = COARSER * s.kernel_size
        stride = COARSER * s.kernel_stride

        out = compressed_attention(
            x.q.detach(), ck, ck, width=width, stride=stride, layout=x.layout, scale=x.scale
        )
        assert out.lse is not None
        return out.lse


_OWN_KEYS = {"lse", "mode", "reuse_from"}
_SHARED_KEYS = tuple(f.name for f in dataclasses.fields(InfLLMv2Settings) if f.name not in _OWN_KEYS)


def from_sparse_config(values: Mapping[str, Any]) -> InfLLMv2Settings:
    """Read MiniCPM4's ``sparse_config``.

    Args:
        values: The mapping; ``use_nope`` must be absent or false.

    Raises:
        ConfigError: Unknown keys, ``use_nope: true`` (scores from unrotated keys are not supported), or
            values the settings refuse.
    """
    problems = unknown_keys(values, {*_SHARED_KEYS, "use_nope"}, "sparse_config")
    if values.get("use_nope"):
        problems.append("use_nope true is not supported: scores use rotated keys; convert without it")
    raise_problems(problems, code="CF22")

    shared = {key: values[key] for key in _SHARED_KEYS if key in values}
    return read_settings(InfLLMv2Settings, shared, "sparse_config")


def to_sparse_config(settings: InfLLMv2Settings) -> dict[str, Any]:
    """Return the settings as MiniCPM4's ``sparse_config``, for engines that serve that format.

    Such an engine reads the dense weights under the family's own architecture (``nsa-convert revert`` gives
    that folder), and it must support the model's head counts: MiniCPM4's kernels repeat query heads up to
    groups of 16.
    """
    config = {key: getattr(settings, key) for key in _SHARED_KEYS}
    config["dense_len"] = max(settings.dense_len, settings.rule.budget)
    return {**config, "use_nope": False}
