"""Reading a few rows of a cache, whatever its memory layout, without copying the rest."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def fetch_runs(x: Tensor, rows: Tensor, heads: Tensor, slots: Tensor, size: int) -> Tensor:
    """Copy runs of ``size`` neighbouring tokens out of keys or values.

    Args:
        x: ``[B, T, H, D]``, often a view of a cache ``[B, H, capacity, D]``; T >= size.
        rows: Batch row of each run, int64.
        heads: Head of each run, broadcasts with ``rows``.
        slots: First token of each run, in ``0 .. T - size``; broadcasts with ``rows``.
        size: Tokens in a run.

    Returns:
        ``[..., size, D]`` with the broadcast shape of the index tensors.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.stride(3) != 1:
        tokens = slots[..., None] + torch.arange(size, device=x.device)
        return x[rows[..., None], tokens, heads[..., None]]
    # index_select copies row by row; make a row as long as the layout allows.
    batch, length, num_heads, dim = x.shape
    row_stride, token_stride, head_stride, _ = x.stride()
    whole = token_stride == dim and row_stride % dim == 0 and head_stride % dim == 0
    unit = dim if whole else math.gcd(row_stride, token_stride, head_stride)
    index = (rows * (row_stride // unit) + heads * (head_stride // unit)) + slots * (token_stride // unit)
    last = ((batch - 1) * row_stride + (num_heads - 1) * head_stride) // unit
    if whole:
        runs = x.as_strided((last + length - size + 1, size * dim), (unit, 1))
        return runs.index_select(0, index.flatten()).view(*index.shape, size, dim)
    tokens = x.as_strided((last + (length - 1) * (token_stride // unit) + 1, dim), (unit, 1))
    index = index[..., None] + torch.arange(size, device=x.device) * (token_stride // unit)
    return tokens.index_select(0, index.flatten()).view(*index.shape, dim)
