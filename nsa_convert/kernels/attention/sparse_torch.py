"""Pattern attention that reads only the keys of the pattern."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nsa_convert.kernels.common.custom_ops import (
    LAYOUT_SCHEMA,
    differentiable,
    flatten,
    is_opaque,
    like_attention,
    reach,
    restore,
)
from nsa_convert.kernels.common.segments import is_decode
from nsa_convert.kernels.common.tiles import TilePlan
from nsa_convert.kernels.gather.torch_backend import decode_blocks, decode_window
from nsa_convert.kernels.interval.window import attend_window, plan_window
from nsa_convert.kernels.union.torch_backend import attend_blocks, plan_blocks
from nsa_convert.patterns import BlockSelection, Pattern, SequenceLayout, SinkWindow, TokenSelection

FETCH_BYTES = 1 << 26
"""Keys and values that several queries may fetch each for itself; above it they share a union."""


def gathered_pattern(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, layout: SequenceLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`nsa_convert.kernels.attention.sparse_attention`."""
    if isinstance(pattern, TokenSelection):
        pattern = pattern.as_blocks()
    if is_opaque(layout, q, k, v):
        return _operator(q, k, v, *_flatten_pattern(pattern), *flatten(layout), scale)

    decode = is_decode(layout, q, k, v)
    if isinstance(pattern, SinkWindow):
        return (decode_window if decode else attend_window)(q, k, v, pattern, layout, scale)

    if decode and (isinstance(layout.offset, Tensor) or _fetch_bytes(q, k, pattern) <= FETCH_BYTES):
        return decode_blocks(q, k, v, pattern, layout, scale)
    return attend_blocks(q, k, v, pattern, layout, scale)


def _fetch_bytes(q: Tensor, k: Tensor, pattern: BlockSelection) -> int:
    if q.shape[1] == 1:
        return 0
    lists = max(k.shape[2], pattern.block_indices.shape[1])
    return 2 * q.shape[0] * q.shape[1] * lists * pattern.budget * k.shape[3] * k.element_size()


def _flatten_pattern(pattern: SinkWindow | BlockSelection) -> tuple[Tensor | None, int, int]:
    """Return ``(lists, block size, queries of a list)``, or ``(None, window size, sinks)`` of a window."""
    if isinstance(pattern, SinkWindow):
        return None, pattern.window_size, pattern.num_sinks
    return pattern.block_indices, pattern.block_size, pattern.query_block


def _restore(
    q: Tensor, k: Tensor, lists: Tensor | None, size: int, other: int, *flat: Any
) -> tuple[SinkWindow | BlockSelection, SequenceLayout, int, float]:
    """Return the pattern, the layout, how many keys the queries reach, and the factor on the scores."""
    layout = restore(flat[:-1])
    pattern: SinkWindow | BlockSelection = SinkWindow(window_size=size, num_sinks=other)
    if lists is not None:
        pattern = BlockSelection(block_indices=lists, block_size=size, query_block=other)
    return pattern, layout, reach(layout, q, k), flat[-1]


def _run(q: Tensor, k: Tensor, v: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    pattern, layout, end, scale = _restore(q, k, *flat)
    o, lse = gathered_pattern(q, k[:, :end], v[:, :end], pattern, layout, scale)
    return o.contiguous(), lse.contiguous()


def _plan(q: Tensor, k: Tensor, v: Tensor, *flat: Any) -> tuple[TilePlan, int, float]:
    pattern, layout, end, scale = _restore(q, k, *flat)
    if isinstance(pattern, SinkWindow):
        return plan_window(q, k[:, :end], pattern, layout), end, scale
    return plan_blocks(q, k[:, :end], pattern, layout), end, scale


_operator = differentiable(
    "pattern_tiles",
    f"Tensor q, Tensor k, Tensor v, Tensor? lists, SymInt size, SymInt other, {LAYOUT_SCHEMA}, float scale",
    "(Tensor, Tensor)",
    _run,
    lambda q, k, v, *_: like_attention(q, v),
    _plan,
)
