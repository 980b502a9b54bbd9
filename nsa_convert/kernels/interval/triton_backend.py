"""Interval attention as a differentiable custom operator, and the intervals of each pattern.

One kernel family serves dense attention with padding or packing, sinks and a sliding window, and attention
over compressed cells: in each of them a query sees a run of keys, and the runs move forward with the queries.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
from torch import Tensor

from nsa_convert.kernels.common.custom_ops import new_name
from nsa_convert.kernels.common.toolchain import padded_dim, rows_contiguous, strides, upcast
from nsa_convert.kernels.interval.triton_backward import (
    GRANULE,
    interval_backward_kv,
    interval_backward_q,
    output_delta,
)
from nsa_convert.kernels.interval.triton_forward import interval_forward
from nsa_convert.patterns import SequenceLayout

KEY_TILE = 64
"""Keys that one program of the backward is taken to hold when programs are counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Intervals:
    """The keys ``[lo, hi)`` and the sinks ``[first, first + num_sinks)`` of each query; none at or after hi.

    Attributes:
        lo: ``[B or 1, TQ]`` int32, not decreasing.
        hi: ``[B or 1, TQ]`` int32, not decreasing; at most TK. A query with hi <= lo sees nothing.
        first: ``[B or 1, TQ]`` int32, not decreasing; None without sinks. The sinks of a document that starts
            after the first query of a tile lie among the keys of that tile.
        num_sinks: Number of sinks.
        sinks_end: No sink lies in this slot or after it; None where that is not known.
    """

    lo: Tensor
    hi: Tensor
    first: Tensor | None = None
    num_sinks: int = 0
    sinks_end: int | None = None


def layout_intervals(
    layout: SequenceLayout, num_queries: int, num_keys: int, device: torch.device,
    window_size: int | None = None, num_sinks: int = 0,
) -> Intervals:  # fmt: skip
    """Return what each query sees in dense attention, or in a window of ``window_size`` keys with sinks."""
    starts = layout.row_starts(num_queries, device)  # [B or 1, TQ]
    ends = layout.positions(num_queries, device).expand_as(starts) + 1
    lo = starts if window_size is None else torch.maximum(starts, ends - window_size)
    hi = ends.clamp(max=num_keys)

    lo, hi, starts = (x.to(torch.int32).contiguous() for x in (lo, hi, starts))
    if not num_sinks:
        return Intervals(lo=lo, hi=hi)

    end = num_sinks if layout.start is None and layout.cu_seqlens is None else None
    return Intervals(lo=lo, hi=hi, first=starts, num_sinks=num_sinks, sinks_end=end)


def interval_attention(
    q: Tensor, k: Tensor, v: Tensor, intervals: Intervals, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend to a run of keys and a few sinks.

    Args:
        q: ``[B, TQ, HQ, D]`` float32, bfloat16 or float16.
        k: ``[B, TK, H, D]``.
        v: ``[B, TK, H, D]``.
        intervals: What each query sees.
        scale: Factor on the scores.

    Returns:
        ``(o [B, TQ, HQ, D], lse [B, TQ, HQ] float32)``, differentiable in q, k and v.
    """
    at = intervals
    return _forward(q, k, v, at.lo, at.hi, at.first, at.num_sinks, at.sinks_end, scale)


def new_lse(q: Tensor) -> Tensor:
    """Return an empty lse ``[B, TQ, HQ]`` float32 for ``q [B, TQ, HQ, D]``, in memory ``[B, HQ, TQ]``."""
    shape = (q.shape[0], q.shape[2], q.shape[1])
    return torch.empty(shape, dtype=torch.float32, device=q.device).transpose(1, 2)


def key_row(x: Tensor) -> int:
    """Return the bytes of a row padded to BD elements: a :class:`Config` says which lengths it serves."""
    return padded_dim(x.shape[-1]) * x.element_size()


@torch.library.custom_op(new_name("interval_forward"), mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, first: Tensor | None, num_sinks: int,
    sinks_end: int | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = rows_contiguous(q, k, v)
    batch, num_queries, num_heads, dim = q.shape

    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = new_lse(q)

    interval_forward.launch(
        lambda c: (triton.cdiv(num_queries, c["BM"]), batch * num_heads),
        q,
        key_row(q),
        **_inputs(q, k, v, lo, hi, first, num_sinks, scale),
        **strides(q=q, k=k, v=v, o=o, l=lse),
        o=o,
        lse=lse,
    )
    return o, lse


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, first: Tensor | None, num_sinks: int,
    scale: float,
) -> dict[str, Any]:  # fmt: skip
    """Return the arguments that all kernels share, strides of tensors excluded."""
    return {
        "q": q,
        "k": k,
        "v": v,
        "lo": lo,
        "hi": hi,
        "first": lo if first is None else first,
        "s_ib": lo.stride(0) if lo.shape[0] > 1 else 0,
        "num_sinks": num_sinks,
        "scale": scale,
        "TQ": q.shape[1],
        "HQ": q.shape[2],
        "G": q.shape[2] // k.shape[2],
        "D": q.shape[3],
        "BD": padded_dim(q.shape[3]),
        "HAS_SINKS": first is not None,
        "UPCAST": upcast(q.dtype),
    }


@_forward.register_fake
def _(q, k, v, lo, hi, first, num_sinks, sinks_end, scale):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), new_lse(q)


def row_delta(o: Tensor, do: Tensor, dlse: Tensor, lse: Tensor) -> Tensor:
    """Return ``rowsum(o * do) - dlse`` with the strides of lse: what ``ds = p * (dp - delta)`` subtracts."""
    o, do = rows_contiguous(o, do)
    delta = torch.empty_strided(lse.shape, lse.stride(), dtype=torch.float32, device=lse.device)

    batch, num_queries, num_heads, dim = o.shape
    output_delta.launch(
        lambda c: (triton.cdiv(num_queries, c["BM"]), batch * num_heads),
        o,
        key_row(o),
        **strides(o=o, g=do, e=dlse, l=delta),
        o=o,
        do=do,
        dlse=dlse,
        delta=delta,
        TQ=num_queries,
        HQ=num_heads,
        D=dim,
        BD=padded_dim(dim),
    )
    return delta


@torch.library.custom_op(new_name("interval_backward"), mutates_args=())
def _backward(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, lo: Tensor, hi: Tensor,
    first: Tensor | None, num_sinks: int, sinks_end: int | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, do = rows_contiguous(q, k, v, do)
    batch, num_queries, num_heads, _ = q.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)

    delta = row_delta(o, do, dlse, lse)
    rows = {**strides(g=do, l=lse), "do": do, "lse": lse, "delta": delta}

    interval_backward_q.launch(
        lambda c: (triton.cdiv(num_queries, c["BM"]), batch * num_heads),
        q,
        key_row(q),
        **_inputs(q, k, v, lo, hi, first, num_sinks, scale),
        **strides(q=q, k=k, v=v, d=dq),
        **rows,
        dq=dq,
    )

    # The gradients of sinks are added to those of the window: both stay in float32 until then.
    wide = torch.float32 if first is not None else k.dtype
    dk, dv = _key_gradients(q, k, v, rows, lo, hi, scale, wide)
    if first is not None:
        # The sinks of a query are a run of keys, too; few keys that all queries see want many programs.
        last = torch.minimum(torch.minimum(first + num_sinks, lo), hi)
        few = slice(0, sinks_end)
        sinks = _key_gradients(q, k[:, few], v[:, few], rows, first, last, scale, wide)
        dk[:, few] += sinks[0]
        dv[:, few] += sinks[1]
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@_backward.register_fake
def _(do, dlse, q, k, v, o, lse, lo, hi, first, num_sinks, sinks_end, scale):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _key_gradients(
    q: Tensor, k: Tensor, v: Tensor, rows: dict[str, Any], lo: Tensor, hi: Tensor, scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return dk and dv of what the queries see in ``[lo, hi)``."""
    num_keys = k.shape[1]
    programs = k.shape[0] * k.shape[2]

    bounds = query_bounds(lo, hi, num_keys)

    # Each part of the queries writes gradients of its own; they are added at the end.
    parts = num_parts(k)
    shape = (parts, *k.shape)
    dk, dv = (torch.empty(shape, dtype=dtype if parts == 1 else torch.float32, device=k.device) for _ in "kv")

    shared = _inputs(q, k, v, lo, hi, None, 0, scale)
    for unused in ("first", "num_sinks", "HAS_SINKS", "TQ"):
        del shared[unused]

    interval_backward_kv.launch(
        lambda c: (triton.cdiv(num_keys, c["BN"]), programs, parts),
        q,
        key_row(q),
        **shared,
        **strides(q=q, k=k, v=v, d=dk[0]),
        **rows,
        s_pb=dk.stride(0),
        parts=parts,
        dk=dk,
        dv=dv,
        bounds=bounds,
        s_bb=bounds.stride(0) if bounds.shape[0] > 1 else 0,
        num_bounds=bounds.shape[2],
        TK=num_keys,
        GRANULE=GRANULE,
    )

    dk, dv = (x[0] if parts == 1 else x.sum(0).to(dtype) for x in (dk, dv))
    return dk, dv


def num_parts(k: Tensor) -> int:
    """Return in how many parts the queries are split, so that few keys still give enough programs.

    Compressed cells are few and seen by nearly all queries. The parts are added in a fixed order.
    """
    programs = triton.cdiv(k.shape[1], KEY_TILE) * k.shape[0] * k.shape[2]
    return max(1, min(32, 2 * processors(k) // max(programs, 1)))


def processors(x: Tensor) -> int:
    """Return how many multiprocessors the device of x has; 4 where there is no GPU."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def query_bounds(lo: Tensor, hi: Tensor, num_keys: int) -> Tensor:
    """Return where the runs of the queries begin and end around each multiple n of GRANULE.

    The result is int32 ``[B or 1, 4, N]``. Its rows count the queries with ``hi <= n``, ``hi < n``,
    ``lo <= n`` and ``lo < n``.
    """
    count = triton.cdiv(num_keys, GRANULE) + 1
    edges = torch.arange(count, dtype=torch.int32, device=lo.device) * GRANULE
    edges = edges.expand(lo.shape[0], -1).contiguous()

    rows = [
        torch.searchsorted(x, edges, right=right, out_int32=True)
        for x, right in ((hi, True), (hi, False), (lo, True), (lo, False))
    ]
    return torch.stack(rows, 1)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lo, hi, first, ctx.num_sinks, ctx.sinks_end, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, lo, hi, first)


def _gradients(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse, lo, hi, first = ctx.saved_tensors
    sinks = first, ctx.num_sinks, ctx.sinks_end
    dq, dk, dv = _backward(do, dlse, q, k, v, o, lse, lo, hi, *sinks, ctx.scale)
    return dq, dk, dv, *[None] * 6


_forward.register_autograd(_gradients, setup_context=_save)
