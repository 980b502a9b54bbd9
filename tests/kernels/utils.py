"""Random inputs and the comparison that every kernel test uses."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_convert.kernels import use_backend
from nsa_convert.kernels.compressed.cells import CellGrid
from nsa_convert.patterns import DENSE_LAYOUT, BlockSelection, SequenceLayout, query_tiles

LAYOUTS = ("plain", "offset", "padded", "padded_offset", "packed", "packed_run")


def make_layout(kind: str, num_queries: int) -> tuple[SequenceLayout, int, int]:
    """Return ``(layout, batch, TK)`` for TQ queries."""
    if kind == "offset":
        return SequenceLayout(offset=37), 2, num_queries + 37
    if kind == "padded":
        return SequenceLayout(start=torch.tensor([0, 5, num_queries])), 3, num_queries
    if kind == "padded_offset":
        start = torch.tensor([0, 9, 21 + num_queries // 2])
        return SequenceLayout(offset=21, start=start), 3, num_queries + 21
    if kind == "packed":
        bounds = sorted({0, num_queries // 7, num_queries // 3, num_queries})
        bounds.insert(1, bounds[1])  # an empty document
        return SequenceLayout(cu_seqlens=torch.tensor(bounds)), 1, num_queries
    if kind == "packed_run":  # the queries are a part of the row, keys lie before and behind them
        num_keys = num_queries + 50
        bounds = torch.tensor([0, 13, 13, 24, 24 + num_queries // 2, num_keys - 9, num_keys])
        return SequenceLayout(cu_seqlens=bounds, offset=20), 1, num_keys
    return DENSE_LAYOUT, 2, num_queries


def make_qkv(
    batch: int,
    num_queries: int,
    num_keys: int,
    heads: tuple[int, int],
    dim: int = 16,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v; queries are large enough that scores differ."""
    g = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(batch, num_queries, heads[0], dim, generator=g, dtype=torch.float64)
    k = torch.randn(batch, num_keys, heads[1], dim, generator=g, dtype=torch.float64)
    v = torch.randn(batch, num_keys, heads[1], dim, generator=g, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def make_blocks(
    batch: int,
    lists: int,
    num_queries: int,
    num_keys: int,
    size: int,
    block_size: int,
    query_block: int,
    layout: SequenceLayout,
    seed: int = 0,
) -> BlockSelection:
    """Return lists of different random blocks, some of them unused, in the future or past the end."""
    g = torch.Generator().manual_seed(seed)
    tiles = query_tiles(num_queries, query_block, layout, torch.device("cpu"))
    count = int(tiles.max()) + 1 if num_queries else 0
    num_blocks = max(size, -(-num_keys // block_size) + 1)
    order = torch.rand(batch, lists, count, num_blocks, generator=g).argsort(-1)[..., :size]
    unused = torch.rand(order.shape, generator=g) < 0.2
    return BlockSelection(
        block_indices=order.masked_fill(unused, -1), block_size=block_size, query_block=query_block
    )


def make_cells(
    batch: int,
    num_keys: int,
    heads: int,
    grid: CellGrid,
    layout: SequenceLayout,
    dim: int = 16,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Return ck, cv with as many cells as the layout has, and two spare ones where it is not packed."""
    count = grid.count(num_keys) + 2
    if layout.cu_seqlens is not None:
        count = sum(grid.count(end - begin) for begin, end in layout.documents())
    _, ck, cv = make_qkv(batch, 1, count, (heads, heads), dim, dtype, seed=3)
    return ck, cv


def as_cache(x: Tensor, room: int = 0) -> Tensor:
    """Return the same ``[B, T, H, D]`` as a view of cache memory ``[B, H, T + room, D]``."""
    buffer = x.new_zeros(x.shape[0], x.shape[2], x.shape[1] + room, x.shape[3])
    buffer[:, :, : x.shape[1]] = x.transpose(1, 2)
    return buffer[:, :, : x.shape[1]].transpose(1, 2)


def both(op, *args, **kwargs):
    """Run an op on both backends; the fast one first."""
    with use_backend("torch"):
        fast = op(*args, **kwargs)
    with use_backend("reference"):
        return fast, op(*args, **kwargs)


def exact(op, *args: object, **kwargs: object):
    """Run an op on the reference in float64."""
    wide = [x.double() if isinstance(x, Tensor) else x for x in args]
    with use_backend("reference"):
        return op(*wide, **kwargs)


def assert_close(
    fast: Tensor, low: Tensor, truth: Tensor, inputs: torch.dtype | None = None, extra: float = 0.0
) -> None:
    """Assert that the error is at most twice the reference's own in the same dtype, plus 1e-5.

    Args:
        fast: Result under test.
        low: Reference in the dtype of the test.
        truth: Reference in float64.
        inputs: Dtype of q where ``fast`` is a float32 lse of half-precision inputs: torch's fused kernel uses
            a shorter exp for these, so an eighth of their rounding step is added to the allowed error.
        extra: Added to the allowed error.
    """
    assert fast.shape == truth.shape
    assert fast.dtype == low.dtype
    infinite = truth.isinf()
    assert torch.equal(fast.isinf(), infinite)
    if not truth.numel():
        return
    error, allowed = ((x.double() - truth).masked_fill(infinite, 0.0).abs().max() for x in (fast, low))
    slack = extra + (1e-10 if fast.dtype == torch.float64 else 1e-5)
    if inputs is not None and fast.dtype != inputs:
        slack += torch.finfo(inputs).eps / 8
    assert error <= 2 * allowed + slack, f"error {error:.3g}, reference {allowed:.3g}"
