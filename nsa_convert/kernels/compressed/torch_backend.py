"""Compressed attention and block choice on the torch backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_convert.kernels.common.custom_ops import (
    LAYOUT_SCHEMA,
    differentiable,
    fit_lists,
    flatten,
    is_opaque,
    like_attention,
    list_size,
    restore,
)
from nsa_convert.kernels.common.segments import is_decode
from nsa_convert.kernels.common.tiles import TilePlan, backward_tiles
from nsa_convert.kernels.compressed.cells import CellGrid, join_parts
from nsa_convert.kernels.compressed.decode import decode_cells
from nsa_convert.kernels.compressed.runs import CompressedRun
from nsa_convert.patterns import BlockTopK, SequenceLayout


def attend_cells(
    q: Tensor, parts: Sequence[Tensor], cv: Tensor | None, grid: CellGrid, rule: BlockTopK | None,
    layout: SequenceLayout, scale: float, normaliser: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """See :func:`nsa_convert.kernels.compressed.decode.decode_cells`."""
    if is_opaque(layout, q, cv):
        return _attend_opaque(q, join_parts(parts), cv, grid, rule, layout, scale, normaliser)

    if is_decode(layout, q, cv):
        return decode_cells(q, parts, cv, grid, rule, layout, scale, normaliser)

    ck, cv = _complete(q, join_parts(parts), cv, grid, layout)
    run = CompressedRun(q, ck, grid, rule, layout, scale)
    if cv is None:
        with torch.no_grad():
            return None, None, run.forward(q, ck, None, normaliser)[2]
    return _CompressedAttention.apply(q, ck, cv, run)


def _complete(
    q: Tensor, ck: Tensor, cv: Tensor | None, grid: CellGrid, layout: SequenceLayout
) -> tuple[Tensor, Tensor | None]:
    """Cut off the cells that no query can see."""
    if layout.cu_seqlens is not None:
        return ck, cv
    complete = grid.count(int(layout.offset) + q.shape[1])
    return ck[:, :complete], None if cv is None else cv[:, :complete]


class _CompressedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, ck: Tensor, cv: Tensor, run: CompressedRun) -> tuple[Tensor | None, ...]:
        with torch.autocast(q.device.type, enabled=False):
            o, lse, indices = run.forward(q, ck, cv)
        ctx.save_for_backward(q, ck, cv, lse)
        ctx.run = run
        if indices is not None:
            ctx.mark_non_differentiable(indices)
        return o, lse, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dlse: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        q, ck, cv, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            return *backward_tiles(q, ck, cv, lse, do, dlse, ctx.run.tiles(), ctx.run.scale), None


def _attend_opaque(
    q: Tensor, ck: Tensor, cv: Tensor | None, grid: CellGrid, rule: BlockTopK | None, layout: SequenceLayout,
    scale: float, normaliser: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Call :data:`_operator`, which a graph that is being compiled takes as a whole."""
    sizes = (grid.width, grid.stride)
    chosen = (0, 0, 0, 0, False, False)
    if rule is not None:
        chosen = (
            rule.block_size, rule.num_blocks, rule.num_sink_blocks, rule.num_local_blocks,
            rule.reduce == "max", rule.per_head,
        )  # fmt: skip

    if cv is None:
        q = q.detach()
        ck = ck.detach()

    o, lse, indices = _operator(q, ck, cv, normaliser, *sizes, *chosen, *flatten(layout), scale)
    if cv is None:
        o = lse = None
    return o, lse, None if rule is None else indices


def _restore(
    width: int, stride: int, size: int, blocks: int, sinks: int, local: int, largest: bool, per_head: bool
) -> tuple[CellGrid, BlockTopK | None]:
    if not blocks:
        return CellGrid(width=width, stride=stride), None
    return CellGrid(width=width, stride=stride), BlockTopK(
        block_size=size,
        num_blocks=blocks,
        num_sink_blocks=sinks,
        num_local_blocks=local,
        reduce="max" if largest else "sum",
        per_head=per_head,
    )


def _run(
    q: Tensor, ck: Tensor, cv: Tensor | None, normaliser: Tensor | None, *flat: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grid, rule = _restore(*flat[:8])
    found = attend_cells(q, (ck,), cv, grid, rule, restore(flat[8:-1]), flat[-1], normaliser)
    nothing = _fake(q, ck, None, None, *flat)
    o, lse, indices = (y if x is None else x.contiguous() for x, y in zip(found, nothing, strict=True))
    return o, lse, indices if rule is None else fit_lists(indices, _size(q, ck, *flat))


def _fake(
    q: Tensor, ck: Tensor, cv: Tensor | None, normaliser: Tensor | None, *flat: Any
) -> tuple[Tensor, Tensor, Tensor]:
    o, lse = (q.new_empty(0), q.new_empty(0)) if cv is None else like_attention(q, cv)
    if not flat[3]:
        return o, lse, q.new_empty(0, dtype=torch.long)

    lists = q.shape[2] if flat[7] else ck.shape[2]
    indices = q.new_empty(q.shape[0], lists, q.shape[1], _size(q, ck, *flat), dtype=torch.long)
    return o, lse, indices


def _size(q: Tensor, ck: Tensor, width: int, stride: int, size: int, blocks: int, *flat: Any) -> int:
    """Return S, the length of the lists, from an upper bound of the visible tokens that shapes alone give."""
    slot, first = flat[4:6]
    tokens = first + q.shape[1] if slot is None else (ck.shape[1] - 1) * stride + width + stride - 1
    return list_size(blocks, (tokens + size - 1) // size)


def _plan(
    q: Tensor, ck: Tensor, cv: Tensor, normaliser: Tensor | None, *flat: Any
) -> tuple[TilePlan, int, float]:
    (grid, rule), layout, scale = _restore(*flat[:8]), restore(flat[8:-1]), flat[-1]
    ck, _ = _complete(q, ck, None, grid, layout)
    return CompressedRun(q, ck, grid, rule, layout, scale).tiles, ck.shape[1], scale


_operator = differentiable(
    "compressed_tiles",
    "Tensor q, Tensor ck, Tensor? cv, Tensor? normaliser, SymInt width, SymInt stride, SymInt block_size, "
    "SymInt num_blocks, SymInt num_sink_blocks, SymInt num_local_blocks, bool largest, bool per_head, "
    f"{LAYOUT_SCHEMA}, float scale",
    "(Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _plan,
)
