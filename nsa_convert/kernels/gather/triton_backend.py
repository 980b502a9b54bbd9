"""Attention query by query as a custom operator: decoding, and lists of tokens with gradients."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from nsa_convert.kernels.common.custom_ops import new_name
from nsa_convert.kernels.common.toolchain import padded_dim, rows_contiguous, strides, upcast
from nsa_convert.kernels.gather.triton_backward import (
    CHUNK,
    gather_backward_kv,
    gather_backward_q,
    sum_chunks,
)
from nsa_convert.kernels.gather.triton_forward import gather_forward, merge_parts
from nsa_convert.kernels.interval.triton_backend import (
    Intervals,
    key_row,
    new_lse,
    processors,
    row_delta,
)
from nsa_convert.patterns import BlockSelection, SequenceLayout, query_tiles

PROGRAMS_PER_PROCESSOR = 4
"""Programs that keep a multiprocessor busy: the keys of a query are split until there are as many."""

PART = 128
"""Fewest keys in a part."""


def attend_runs(
    q: Tensor, k: Tensor, v: Tensor | None, runs: Intervals, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend to a run of keys and a few sinks, for a few queries; not differentiable.

    Args:
        q: ``[B, TQ, HQ, D]``.
        k: ``[B, TK, H, D]``.
        v: ``[B, TK, H, D]``, or None to compute the lse alone (o is then undefined).
        runs: What each query sees.
        longest: Upper bound of the keys one query sees.
        scale: Factor on the scores.

    Returns:
        ``(o [B, TQ, HQ, D], lse [B, TQ, HQ] float32)``.
    """
    return _attend(q, k, v, None, None, runs.lo, runs.hi, runs.first, runs.num_sinks, 1, 1, longest, scale)


def attend_lists(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockSelection, layout: SequenceLayout, bounds: Intervals,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend to the blocks that each query lists; differentiable for blocks of one token.

    Args:
        q: ``[B, TQ, HQ, D]``.
        k: ``[B, TK, H, D]``.
        v: ``[B, TK, H, D]``.
        pattern: The lists.
        layout: Position of the queries, padding and packing.
        bounds: What dense attention shows each query.
        scale: Factor on the scores.

    Returns:
        ``(o [B, TQ, HQ, D], lse [B, TQ, HQ] float32)``.
    """
    list_of = None
    if layout.cu_seqlens is not None and pattern.query_block > 1:
        list_of = query_tiles(q.shape[1], pattern.query_block, layout, q.device).to(torch.int32)
    return _attend(
        q, k, v, pattern.block_indices, list_of, bounds.lo, bounds.hi, None, 0, pattern.block_size,
        pattern.query_block, pattern.budget, scale,
    )  # fmt: skip


def num_splits(q: Tensor, programs: int, longest: int) -> int:
    """Return in how many parts the keys of a query are split, a power of two."""
    wanted = processors(q) * PROGRAMS_PER_PROCESSOR // max(programs, 1)
    parts = min(wanted, -(-longest // PART), 64)
    return 1 << (max(parts, 1).bit_length() - 1)


@torch.library.custom_op(new_name("gather_forward"), mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor | None, items: Tensor | None, list_of: Tensor | None, lo: Tensor,
    hi: Tensor, first: Tensor | None, num_sinks: int, block_size: int, query_block: int, longest: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, num_queries, num_heads, dim = q.shape
    shared = _inputs(q, k, v, items, list_of, lo, hi, first, num_sinks, block_size, query_block, scale)

    o = torch.empty(q.shape if v is not None else (0, 0, 0, 0), dtype=q.dtype, device=q.device)
    lse = new_lse(q)

    # Few queries leave processors idle: the keys of each are split, and the parts joined afterwards.
    programs = num_heads // shared["GROUP"]
    splits = num_splits(q, batch * num_queries * programs, longest)
    out = o
    out_lse = lse
    part_strides = {"s_os": 0, "s_ls": 0}

    if splits > 1:
        shape = (batch, num_queries, num_heads, splits)
        out = torch.empty(*shape, dim if v is not None else 0, dtype=torch.float32, device=q.device)
        out_lse = torch.empty(shape, dtype=torch.float32, device=q.device)
        part_strides = {"s_os": out.stride(3), "s_ls": 1}

    gather_forward.launch(
        (num_queries * splits, batch * programs),
        q,
        key_row(q),
        **shared,
        **strides(o=out, l=out_lse),
        **part_strides,
        o=out,
        lse=out_lse,
        splits=splits,
        VALUES=v is not None,
    )

    if splits > 1:
        merge_parts.launch(
            (num_queries, batch * num_heads),
            q,
            key_row(q),
            **strides(p=out, e=out_lse, o=o, l=lse),
            s_ps=out.stride(3),
            s_es=1,
            part=out,
            part_lse=out_lse,
            o=o,
            lse=lse,
            HQ=num_heads,
            splits=splits,
            D=dim,
            BD=padded_dim(dim),
            PARTS=splits,
            VALUES=v is not None,
        )
    return o, lse


@_attend.register_fake
def _(q, k, v, items, list_of, lo, hi, first, num_sinks, block_size, query_block, longest, scale):
    return q.new_empty(q.shape if v is not None else (0, 0, 0, 0)), new_lse(q)


def _inputs(
    q: Tensor, k: Tensor, v: Tensor | None, items: Tensor | None, list_of: Tensor | None, lo: Tensor,
    hi: Tensor, first: Tensor | None, num_sinks: int, block_size: int, query_block: int, scale: float,
) -> dict[str, Any]:  # fmt: skip
    """Return the arguments that the forward and the backward in q share."""
    q, k, v = rows_contiguous(q, k, k if v is None else v)
    num_heads = q.shape[2]
    num_kv_heads = k.shape[2]

    lists = 1 if items is None else items.shape[1]
    group = num_heads // max(num_kv_heads, lists)
    listed = items is not None

    # A pointer that the kernel does not read still needs a tensor.
    items = lo if items is None else rows_contiguous(items)[0]
    return {
        "q": q,
        "k": k,
        "v": v,
        "items": items,
        "list_of": lo if list_of is None else list_of,
        "lo": lo,
        "hi": hi,
        "first": lo if first is None else first,
        **strides(q=q, k=k, v=v),
        # Lists are [B, H, T, S]; strides have the order of [B, T, H].
        "s_n": tuple(items.stride(i) for i in (0, 2, 1)) if listed else (0, 0, 0),
        "s_ib": lo.stride(0) if lo.shape[0] > 1 else 0,
        "scale": scale,
        "num_sinks": num_sinks,
        "HQ": num_heads,
        "G": num_heads // num_kv_heads,
        "lists": lists,
        "size": items.shape[-1],
        "block_size": block_size,
        "query_block": query_block,
        "D": q.shape[3],
        "BD": padded_dim(q.shape[3]),
        "GROUP": group,
        "GN": max(8, triton.next_power_of_2(group)),
        "LISTED": listed,
        "MAPPED": list_of is not None,
        "HAS_SINKS": first is not None,
        "UPCAST": upcast(q.dtype),
    }


@torch.library.custom_op(new_name("gather_backward"), mutates_args=())
def _backward(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, items: Tensor,
    list_of: Tensor | None, lo: Tensor, hi: Tensor, query_block: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shared = _inputs(q, k, v, items, list_of, lo, hi, None, 0, 1, query_block, scale)
    (do,) = rows_contiguous(do)
    batch, num_queries, num_heads, _ = q.shape

    delta = row_delta(o, do, dlse, lse)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grads = {**strides(g=do, l=lse), "do": do, "lse": lse, "delta": delta}

    gather_backward_q.launch(
        (num_queries, batch * num_heads // shared["GROUP"]),
        q,
        key_row(q),
        **shared,
        **grads,
        **strides(d=dq),
        dq=dq,
    )

    # The gradients of keys need a list for every query.
    if query_block > 1:
        row = torch.arange(num_queries, device=q.device) // query_block if list_of is None else list_of
        items = items[:, :, row.long()]
    return dq, *_key_gradients(shared, grads, items, lo, hi)


@_backward.register_fake
def _(do, dlse, q, k, v, o, lse, items, list_of, lo, hi, query_block, scale):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _key_gradients(
    shared: dict[str, Any], grads: dict[str, Any], items: Tensor, lo: Tensor, hi: Tensor
) -> tuple[Tensor, Tensor]:
    """Return dk and dv: every key sums over the queries that list it, in ascending order, CHUNK at a time."""
    k = shared["k"]
    v = shared["v"]
    batch, num_keys, num_kv_heads, dim = k.shape
    programs = shared["HQ"] // shared["GROUP"]

    # The queries of each key, cut into chunks of CHUNK; key_of says which key a chunk belongs to.
    entries, offsets, last_chunk = readers(items, lo, hi, num_keys)
    count = num_keys + entries.shape[1] // CHUNK  # chunks there can be at most
    chunk = torch.arange(count, dtype=torch.int32, device=k.device).expand(last_chunk.shape[0], -1)
    key_of = torch.searchsorted(last_chunk, chunk.contiguous(), right=True, out_int32=True)

    # Every chunk sums into rows of its own: no atomics, so the order of the sum is fixed.
    parts = torch.empty(2, batch, programs, count, dim, dtype=torch.float32, device=k.device)

    names = ("q", "k", "v", "s_q", "s_k", "s_v", "scale", "G", "lists", "D", "BD", "GROUP")
    shared = {n: shared[n] for n in names}

    gather_backward_kv.launch(
        (count, batch * programs),
        k,
        key_row(k),
        **shared,
        **grads,
        parts=parts,
        entries=entries,
        offsets=offsets,
        last_chunk=last_chunk,
        key_of=key_of,
        s_pv=parts.stride(0),
        s_ph=parts.stride(2),
        s_eb=entries.stride(0),
        s_xb=offsets.stride(0),
        s_cb=last_chunk.stride(0),
        s_fb=key_of.stride(0),
        TK=num_keys,
        heads=programs,
        CHUNK=CHUNK,
    )

    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    sum_chunks.launch(
        lambda c: (triton.cdiv(num_keys, c["BK"]), batch * num_kv_heads),
        k,
        key_row(k),
        **strides(d=dk),
        dk=dk,
        dv=dv,
        parts=parts,
        last_chunk=last_chunk,
        s_pv=parts.stride(0),
        s_ph=parts.stride(2),
        s_cb=last_chunk.stride(0),
        scale=shared["scale"],
        TK=num_keys,
        H=num_kv_heads,
        heads=programs,
        lists=shared["lists"],
        D=dim,
        BD=padded_dim(dim),
    )
    return dk, dv


def readers(items: Tensor, lo: Tensor, hi: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Invert lists of tokens.

    Args:
        items: ``[B, Hs, TQ, S]`` token numbers of each query, -1 where unused.
        lo: ``[B or 1, TQ]`` first slot of the query's document.
        hi: ``[B or 1, TQ]`` one after the last slot it may see.
        num_keys: TK.

    Returns:
        ``entries [B * Hs, TQ * S]`` int32, the queries sorted by the key they list; ``offsets`` int32
        ``[B * Hs, TK + 1]``, where those of each key begin; ``last_chunk [B * Hs, TK]`` int32, one after its
        last chunk when each key has one chunk for every CHUNK entries begun, and at least one.
    """
    slots = items + lo[:, None, :, None]
    unseen = (items < 0) | (slots >= hi[:, None, :, None])
    slots = slots.masked_fill(unseen, num_keys).flatten(0, 1).flatten(1)

    slots, order = slots.sort(dim=1, stable=True)
    entries = order.div(max(items.shape[3], 1), rounding_mode="floor").to(torch.int32)

    edges = torch.arange(num_keys + 1, dtype=slots.dtype, device=slots.device)
    edges = edges.expand(slots.shape[0], -1).contiguous()
    offsets = torch.searchsorted(slots, edges, out_int32=True)

    chunks = (offsets.diff(dim=1) + CHUNK - 1).div(CHUNK, rounding_mode="floor").clamp(min=1)
    return entries, offsets, chunks.cumsum(1, dtype=torch.int32)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, items, list_of, lo, hi, _, _, ctx.block_size, ctx.query_block, _, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, items, list_of, lo, hi)


def _gradients(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse, items, list_of, lo, hi = ctx.saved_tensors
    assert items is not None, "runs have other kernels for gradients"

    # why: the dispatch sends other shapes to other kernels
    assert ctx.block_size == 1, "blocks have other kernels for gradients"
    dq, dk, dv = _backward(do, dlse, q, k, v, o, lse, items, list_of, lo, hi, ctx.query_block, ctx.scale)
    return dq, dk, dv, *[None] * 10


_attend.register_autograd(_gradients, setup_context=_save)
