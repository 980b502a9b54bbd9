"""Compressed cells of a sequence: gathered from raw keys, compressed by the method, kept in the cache."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from nsa_convert.kernels.compressed.cells import CellGrid
from nsa_convert.methods.base import Pool, SparseMethod
from nsa_convert.patch.cache import write_cells
from nsa_convert.patch.layout import SparseContext
from nsa_convert.patch.rope import rotate, unrotate


def pool_sequence(method: SparseMethod, pool: Pool, source: Tensor, context: SparseContext) -> Tensor:
    """Compress every complete cell of an uncached sequence.

    Args:
        method: Owner of the compressor.
        pool: Which cells.
        source: ``[B, T, H, D]`` keys or values of the pool's heads.
        context: Padding and packing of the sequence.

    Returns:
        ``[B, C, H, D]``; cells of packed documents one after another.
    """
    grid = CellGrid(width=pool.width, stride=pool.stride)
    if context.layout.cu_seqlens is not None:
        alone = [source[:, begin:end] for begin, end in context.layout.documents()]
        parts = [_compress(method, pool, part, 0, grid.count(part.shape[1]), None, context) for part in alone]
        return torch.cat(parts, 1)
    least = min(context.starts) if context.starts else 0
    count = grid.count(source.shape[1] - least)
    start = context.layout.start
    first = 0 if start is None else torch.zeros_like(start)
    return _compress(method, pool, source, first, count, start, context)


def grow_cells(
    method: SparseMethod,
    pool: Pool,
    layer: CacheLayerMixin,
    source: Tensor,
    new_tokens: int,
    context: SparseContext,
) -> Tensor:
    """Compress the cells that the new tokens complete, store them, and return the buffer.

    Args:
        method: Owner of the compressor.
        pool: Which cells.
        layer: The retyped cache layer.
        source: ``[B, TK, H, D]`` cached keys or values of the pool's heads, the new tokens included (the
            whole capacity while compiling a static cache).
        new_tokens: How many of them are new.
        context: Offset and padding.

    Returns:
        ``[B, C, H, D]``. C may exceed the complete cells: a product reads a whole buffer where it lies, of a
        part it makes a copy first. With gradients C is exact.
    """
    grid = CellGrid(width=pool.width, stride=pool.stride)
    past, start = context.layout.offset, context.layout.start
    capacity = grid.count(layer.get_max_length() if layer.is_compileable else source.shape[1])
    if isinstance(past, Tensor) or (start is not None and context.starts is None):
        return _grow_compiled(method, pool, layer, source, new_tokens, context, grid, capacity)
    starts = context.starts or (0,)
    held = [grid.count(past - s) for s in starts]
    done = [grid.count(past + new_tokens - s) for s in starts]
    count = max(after - before for before, after in zip(held, done, strict=True))
    # A padded row that completes fewer cells than another one writes its tail early; it is rewritten later.
    first: int | Tensor = held[0] if start is None else start.new_tensor(held)
    room = max(capacity, max(before + count for before in held))
    cells = _compress(method, pool, source, first, count, start, context)
    buffer = write_cells(
        layer, pool.name, first, cells, capacity if layer.is_compileable and start is None else room
    )
    if cells.requires_grad:
        # The buffer holds values only: join the new cells again so that gradients reach the compressor.
        if start is not None and past > 0:
            raise ValueError(
                "training through a padded batch that continues a cache is not supported; "
                "pass use_cache=False"
            )
        return torch.cat([buffer[:, :, : held[0]].transpose(1, 2), cells], dim=1)
    return buffer.transpose(1, 2)


def grow_stream(layer: CacheLayerMixin, name: str, new: Tensor, past: int | Tensor) -> Tensor:
    """Append per-token vectors to the cache and return all of them.

    Args:
        layer: The retyped cache layer.
        name: Name of the stream.
        new: ``[B, T, h, d]`` vectors of the new tokens.
        past: Slot of the first new token.

    Returns:
        ``[B, past + T, h, d]``; the whole capacity while compiling a static cache.
    """
    name, count = f"stream {name}", new.shape[1]
    if isinstance(past, Tensor):
        buffer = write_cells(layer, name, past.expand(new.shape[0]), new, layer.get_max_length())
        return buffer.transpose(1, 2)
    capacity = layer.get_max_length() if layer.is_compileable else past + count
    buffer = write_cells(layer, name, past, new, capacity)
    if new.requires_grad:  # the buffer holds values only
        return torch.cat([buffer[:, :, :past].transpose(1, 2), new], 1)
    return buffer[:, :, : past + count].transpose(1, 2)


def _grow_compiled(
    method: SparseMethod,
    pool: Pool,
    layer: CacheLayerMixin,
    source: Tensor,
    new_tokens: int,
    context: SparseContext,
    grid: CellGrid,
    capacity: int,
) -> Tensor:
    """Write the last cells that can have been completed, whether or not they were: shapes stay fixed."""
    past, start = context.layout.offset, context.layout.start
    count = min(-(-new_tokens // grid.stride), capacity)
    length = torch.as_tensor(past + new_tokens, device=source.device).expand(source.shape[0])
    length = length if start is None else length - start
    first = (grid.complete(length) - count).clamp(min=0)  # [B]
    start = torch.zeros_like(first) if start is None else start
    cells = _compress(method, pool, source, first, count, start, context)
    return write_cells(layer, pool.name, first, cells, capacity).transpose(1, 2)


def _compress(
    method: SparseMethod,
    pool: Pool,
    source: Tensor,
    first: int | Tensor,
    count: int,
    start: Tensor | None,
    context: SparseContext,
) -> Tensor:
    """Compress cells ``first .. first + count - 1`` of each row, counted from the row's start."""
    batch, _, heads, dim = source.shape
    if count == 0:
        return source.new_zeros(batch, 0, heads, dim)
    windows = _windows(source, pool, first, count, start)
    if pool.source == "value" or pool.rope == "after":
        return method.compress(pool.name, windows)
    cell = torch.arange(count, device=source.device)
    begin = (cell + (first if isinstance(first, int) else first[:, None])).reshape(
        -1, count
    ) * pool.stride  # [B or 1, N]
    token = begin[..., None] + torch.arange(pool.width, device=source.device)
    plain = unrotate(windows.flatten(1, 2), *_angles(context, windows, token.flatten(1))).unflatten(
        1, (count, pool.width)
    )
    return rotate(method.compress(pool.name, plain), *_angles(context, windows, begin))


def _angles(context: SparseContext, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    return context.rotary(like, position_ids=positions)


def _windows(source: Tensor, pool: Pool, first: int | Tensor, count: int, start: Tensor | None) -> Tensor:
    """Return the tokens of the cells, ``[B, N, l, H, D]``; a view where no row is padded."""
    if start is None:
        assert isinstance(first, int)
        begin = first * pool.stride
        span = source[:, begin : begin + (count - 1) * pool.stride + pool.width]
        return span.unfold(1, pool.width, pool.stride).permute(0, 1, 4, 2, 3)
    cell = first[:, None] + torch.arange(count, device=source.device)  # [B, N]
    token = (start[:, None] + cell * pool.stride)[..., None] + torch.arange(pool.width, device=source.device)
    token = token.clamp(max=source.shape[1] - 1)
    rows = torch.arange(source.shape[0], device=source.device)[:, None, None]
    return source[rows, token]
