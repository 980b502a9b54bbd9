"""Attention to selected blocks as a differentiable custom operator, which torch.compile does not trace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_convert.kernels.common.custom_ops import new_name
from nsa_convert.kernels.interval.triton_backend import row_delta
from nsa_convert.kernels.union.triton_backward_kv import backward_kv
from nsa_convert.kernels.union.triton_backward_q import backward_q
from nsa_convert.kernels.union.triton_forward import forward
from nsa_convert.kernels.union.triton_plan import ROWS, Plan, Shape, make_plan
from nsa_convert.kernels.union.triton_steps import ROW_BYTES, row_bytes
from nsa_convert.patterns import BlockSelection, SequenceLayout


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockSelection, layout: SequenceLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`nsa_convert.kernels.attention.sparse_attention`; any number of queries and gradients."""
    moving = isinstance(layout.offset, Tensor)
    offset = (layout.offset, 0) if moving else (None, layout.offset)
    return selected_attention(
        q, k, v, pattern.block_indices, pattern.block_size, pattern.query_block,
        *offset, layout.start, layout.cu_seqlens, scale,
    )  # fmt: skip


@torch.library.custom_op(new_name("selected_attention"), mutates_args=())
def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    block_size: int,
    query_block: int,
    offset_tensor: Tensor | None,
    offset: int,
    start: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return ``(o [B, TQ, HQ, D], lse [B, TQ, HQ] float32)``; both take part in the backward."""
    if not q.numel() or not indices.numel():
        return torch.zeros_like(q, memory_format=torch.contiguous_format), q.new_full(
            q.shape[:3], -torch.inf, dtype=torch.float32
        )
    q, k, v = (_rows(x) for x in (q, k, v))
    layout = _layout(offset_tensor, offset, start, cu_seqlens)
    return forward(q, k, v, _plan(q, k, indices, block_size, query_block, layout), scale)


@selected_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        q.shape[:3], dtype=torch.float32
    )


@torch.library.custom_op(new_name("selected_attention_backward"), mutates_args=())
def selected_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor,
    block_size: int,
    query_block: int,
    offset_tensor: Tensor | None,
    offset: int,
    start: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv; the unions of the lists are built again rather than kept."""
    if not q.numel() or not indices.numel():
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        return dq, dk, dv

    q, k, v, do = (_rows(x) for x in (q, k, v, do))
    layout = _layout(offset_tensor, offset, start, cu_seqlens)
    plan = _plan(q, k, indices, block_size, query_block, layout)

    delta = row_delta(o, do, dlse, lse)
    dq = backward_q(q, k, v, do, delta, lse, plan, scale)
    if plan.halves == 2:  # keys walk the halves that list them
        room = plan.unions.of_halves
        shape = Shape(rows=plan.rows // 2)
        del plan
        plan = _plan(q, k, indices, block_size, query_block, layout, shape, room)

    return dq, *backward_kv(q, k, v, do, delta, lse, plan, scale)


@selected_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, indices, *rest = inputs
    ctx.save_for_backward(q, k, v, indices, *output, *(x for x in rest if isinstance(x, Tensor)))
    ctx.rest = tuple(None if isinstance(x, Tensor) else x for x in rest)
    ctx.tensors = tuple(i for i, x in enumerate(rest) if isinstance(x, Tensor))


def _backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, indices, o, lse, *tensors = ctx.saved_tensors

    rest = list(ctx.rest)
    for i, x in zip(ctx.tensors, tensors, strict=True):
        rest[i] = x
    grads = selected_attention_backward(q, k, v, indices, o, lse, do, dlse, *rest)
    return *grads, None, *(None for _ in rest)


selected_attention.register_autograd(_backward, setup_context=_setup_context)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _layout(
    offset_tensor: Tensor | None, offset: int, start: Tensor | None, cu_seqlens: Tensor | None
) -> SequenceLayout:
    return SequenceLayout(
        offset=offset if offset_tensor is None else offset_tensor, start=start, cu_seqlens=cu_seqlens
    )


def _plan(
    q: Tensor,
    k: Tensor,
    indices: Tensor,
    block_size: int,
    query_block: int,
    layout: SequenceLayout,
    shape: Shape | None = None,
    room: int | None = None,
) -> Plan:
    heads = (q.shape[2], k.shape[2])
    lengths = (q.shape[1], k.shape[1])
    most = min(ROWS[0], ROW_BYTES // row_bytes(q))
    return make_plan(indices, block_size, query_block, layout, heads, lengths, most, shape, room)
