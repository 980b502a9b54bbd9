"""Reading a few rows of a cache, whatever its memory layout, without copying the rest."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def fetch_runs(
    k: Tensor,
    v: Tensor,
    rows: Tensor | None,
    heads: Tensor,
    slots: Tensor,
    size: int,
    visible: Tensor | None = None,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Copy runs of ``size`` neighbouring tokens out of keys and values.

    Args:
        k: ``[B, T, H, D]``, often a view of a cache ``[B, H, capacity, D]``; T >= size.
        v: ``[B, T, H, D]``.
        rows: Batch row of each run, int64; None when B = 1.
        heads: Head of each run, broadcasts with ``slots``.
        slots: First token of each run, in ``0 .. T - size``; broadcasts with ``rows``.
        size: Tokens in a run.
        visible: ``[..., size]`` bool, broadcasts to the result: the tokens that will have a weight.
        own: A token that every reader sees, broadcasts like ``visible``. It or a zero stands in place of what
            is not visible and may not be finite (0 * NaN is NaN); None leaves that.

    Returns:
        Two tensors ``[..., size, D]`` with the broadcast shape of the index tensors.
    """
    # Graphs and GPUs index token by token.
    if torch.compiler.is_compiling() or k.device.type != "cpu" or k.stride(3) != 1 or v.stride(3) != 1:
        tokens = slots[..., None] + torch.arange(size, device=k.device)
        if own is not None:
            assert visible is not None
            tokens = tokens.where(visible, own)
        rows = slots.new_zeros(1) if rows is None else rows
        index = (rows[..., None], tokens, heads[..., None])
        return k[index], v[index]

    # On a CPU whole rows of memory are copied; k and v of one layout share their addresses.
    addresses: dict[tuple[int, ...], Tensor] = {}
    k, v = (_fetch(x, rows, heads, slots, size, addresses) for x in (k, v))

    if own is None:
        return k, v
    assert visible is not None
    hidden = ~visible[..., None]
    return k.masked_fill_(hidden, 0.0), v.masked_fill_(hidden, 0.0)


def _fetch(
    x: Tensor,
    rows: Tensor | None,
    heads: Tensor,
    slots: Tensor,
    size: int,
    addresses: dict[tuple[int, ...], Tensor],
) -> Tensor:
    """Gather with ``index_select``, which copies whole rows: they are as long as the layout allows."""
    batch, length, num_heads, dim = x.shape
    row_stride, token_stride, head_stride, _ = x.stride()
    whole = token_stride == dim and head_stride % dim == 0 and row_stride % dim == 0
    unit = dim if whole else math.gcd(row_stride, token_stride, head_stride)

    # Number of each run's first unit in memory, computed once for each layout.
    index = addresses.get(x.stride())
    if index is None:
        index = heads * (head_stride // unit) + slots * (token_stride // unit)
        if rows is not None:
            index = index + rows * (row_stride // unit)
        if not whole:
            index = index[..., None] + torch.arange(size, device=x.device) * (token_stride // unit)
        addresses[x.stride()] = index

    last = ((batch - 1) * row_stride + (num_heads - 1) * head_stride) // unit
    if whole:
        # Overlapping rows: row r holds the ``size`` tokens from r on, so a run may begin anywhere.
        runs = x.as_strided((last + length - size + 1, size * dim), (unit, 1))
        return runs.index_select(0, index.flatten()).view(*index.shape, size, dim)

    tokens = x.as_strided((last + (length - 1) * (token_stride // unit) + 1, dim), (unit, 1))
    return tokens.index_select(0, index.flatten()).view(*index.shape, dim)
