"""Compressed cells of a sequence: gathered from raw keys, compressed by the method, kept in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_convert.errors import CacheError
from nsa_convert.kernels.compressed.cells import CellGrid
from nsa_convert.methods.parts.base import Pool, SparseMethod
from nsa_convert.patch.cache import AGAIN, STREAM, SparseCacheLayer, write_cells
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
        ``[B, C, H, D]`` in the dtype of ``source``; cells of packed documents one after another.
    """
    grid = CellGrid(width=pool.width, stride=pool.stride)

    # Packed documents: no cell crosses from one into the next.
    if context.layout.cu_seqlens is not None and torch.compiler.is_compiling():
        return _pool_packed(method, pool, source, context, grid)
    if context.layout.cu_seqlens is not None:
        alone = [source[:, begin:end] for begin, end in context.layout.documents()]
        parts = [_compress(method, pool, part, 0, grid.count(part.shape[1]), None, context) for part in alone]
        return torch.cat(parts, 1)

    # Rows: as many cells as the longest row has, counted from each row's first token.
    least = min(context.starts) if context.starts else 0
    count = grid.count(source.shape[1] - least)
    start = context.layout.start
    first = 0 if start is None else torch.zeros_like(start)
    return _compress(method, pool, source, first, count, start, context)


def grow_cells(
    method: SparseMethod,
    pool: Pool,
    layer: SparseCacheLayer,
    source: Tensor,
    new_tokens: int,
    context: SparseContext,
    *,
    tracked: bool,
) -> Tensor:
    """Compress the cells that the new tokens complete, store them, and return the buffer.

    Where the layer has none of the cells, those of the cached tokens are compressed too.

    Args:
        method: Owner of the compressor.
        pool: Which cells.
        layer: The retyped cache layer, opened for the method.
        source: ``[B, TK, H, D]`` cached keys or values of the pool's heads, the new tokens included (the
            whole capacity while compiling a static cache).
        new_tokens: How many of them are new.
        context: Offset and padding.
        tracked: Whether gradients must reach the cells of the layer.

    Returns:
        ``[B, C, H, D]`` in the dtype of ``source``. C may exceed the complete cells: a product reads a whole
        buffer where it lies, of a part it makes a copy first. With gradients C is exact.
    """
    grid = CellGrid(width=pool.width, stride=pool.stride)
    past = context.layout.offset
    start = context.layout.start
    capacity = grid.count(layer.get_max_length() if layer.is_compileable else source.shape[1])

    # A graph cannot count the cells that the new tokens complete.
    if isinstance(past, Tensor) or (start is not None and context.starts is None):
        return _grow_compiled(method, pool, layer, source, new_tokens, context, grid, capacity)

    # How many cells each row has already, and how many it has with the new tokens.
    starts = context.starts or (0,)
    # The buffer holds values only: where gradients must reach the cells, all of them are made again.
    covered = past if pool.name in (layer.cells or {}) and not tracked else 0
    held = [grid.count(covered - s) for s in starts]
    done = [grid.count(past + new_tokens - s) for s in starts]
    # A padded row that completes fewer cells than another one writes its tail early; it is rewritten later.
    count = max(after - before for before, after in zip(held, done, strict=True))

    # Compress the cells between and store them behind those that are there.
    first: int | Tensor = held[0] if start is None else start.new_tensor(held)
    cells = _compress(method, pool, source, first, count, start, context)
    room = max(capacity, max(before + count for before in held))
    buffer = write_cells(
        layer, pool.name, first, cells, capacity if layer.is_compileable and start is None else room
    )

    return cells if tracked else buffer.transpose(1, 2).to(source.dtype)


def grow_states(layer: SparseCacheLayer, name: str, new: Tensor, past: int | Tensor) -> Tensor:
    """Append per-token vectors to the cache and return all of them.

    Args:
        layer: The retyped cache layer, opened for the method.
        name: Name of the token states.
        new: ``[B, T, h, d]`` vectors of the new tokens.
        past: Slot of the first new token.

    Returns:
        ``[B, past + T, h, d]`` in the dtype of ``new``; the whole capacity while compiling a static cache.

    Raises:
        CacheError: The layer has no such vectors of the tokens it holds.
    """
    held = (layer.cells or {}).get(f"{STREAM}{name}")
    if held is None:
        _refuse_missing(name, past)

    name = f"{STREAM}{name}"
    count = new.shape[1]

    # In a graph the slot is a tensor: write there, and return the whole capacity of the static cache.
    if isinstance(past, Tensor):
        buffer = write_cells(layer, name, past.expand(new.shape[0]), new, layer.get_max_length())
        return buffer.transpose(1, 2).to(new.dtype)

    # With gradients nothing is written in place.
    if new.requires_grad or (held is not None and held.requires_grad and torch.is_grad_enabled()):
        # As keys and values: the past with its graph, so that gradients reach earlier calls.
        whole = new.transpose(1, 2)
        whole = whole if held is None else torch.cat([held[:, :, :past], whole.to(held.dtype)], 2)
        layer.cells = {**(layer.cells or {}), name: whole}
        return whole.transpose(1, 2).to(new.dtype)

    # In place.
    capacity = layer.get_max_length() if layer.is_compileable else past + count
    buffer = write_cells(layer, name, past, new, capacity)
    return buffer[:, :, : past + count].transpose(1, 2).to(new.dtype)


def _refuse_missing(name: str, past: int | Tensor) -> None:
    """Refuse to go on where tokens are cached whose vectors are not."""
    said = (
        f"cached tokens come without their '{name}' vectors, which keys and values do not tell: the cache "
        "comes from pairs of them, from another model or other settings, or its keys were changed; "
        f"{AGAIN}"
    )
    if isinstance(past, Tensor) and torch.compiler.is_compiling():
        torch._assert_async(past == 0, said)
    elif int(past):
        raise CacheError(said)


def _grow_compiled(
    method: SparseMethod,
    pool: Pool,
    layer: SparseCacheLayer,
    source: Tensor,
    new_tokens: int,
    context: SparseContext,
    grid: CellGrid,
    capacity: int,
) -> Tensor:
    """Write the last cells that can have been completed, whether or not they were: shapes stay fixed.

    Where the layer has none of the cells, that is all of them.
    """
    # As many cells as the new tokens can complete; all of them where none are there.
    past = context.layout.offset
    start = context.layout.start
    fresh = not isinstance(past, Tensor) and past == 0
    known = fresh or pool.name in (layer.cells or {})
    count = min(-(-new_tokens // grid.stride), capacity) if known else capacity

    # Write up to the last complete cell of each row.
    length = torch.as_tensor(past + new_tokens, device=source.device).expand(source.shape[0])
    length = length if start is None else length - start
    first = (grid.complete(length) - count).clamp(min=0)  # [B]
    start = torch.zeros_like(first) if start is None else start

    cells = _compress(method, pool, source, first, count, start, context)
    return write_cells(layer, pool.name, first, cells, capacity).transpose(1, 2).to(source.dtype)


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

    # The window of each cell, and the position of its first token in its row.
    windows = _windows(source, pool, first, count, start)
    cell = torch.arange(count, device=source.device)
    begin = (cell + (first if isinstance(first, int) else first[:, None])).reshape(-1, count) * pool.stride

    return _compress_windows(method, pool, windows, begin, context)


def _pool_packed(
    method: SparseMethod, pool: Pool, source: Tensor, context: SparseContext, grid: CellGrid
) -> Tensor:
    """Compress the cells of packed documents where a graph must not know how many each has.

    No documents have more cells than one of all their tokens; those that are too many are seen by no query.
    """
    count = grid.count(source.shape[1])
    if count == 0:
        return source.new_zeros(1, 0, *source.shape[2:])

    # Slots of each cell's tokens, kept inside the row for cells that are too many.
    slot, place = grid.packed_cells(context.layout, count)
    token = slot[:, None] + torch.arange(pool.width, device=source.device)
    windows = source[:, token.clamp(max=source.shape[1] - 1)]

    return _compress_windows(method, pool, windows, place[None], context)


def _compress_windows(
    method: SparseMethod, pool: Pool, windows: Tensor, begin: Tensor, context: SparseContext
) -> Tensor:
    """Compress ``windows [B, N, l, H, D]`` whose first tokens have the positions ``begin [B or 1, N]``."""
    if pool.source == "value" or pool.rope == "after":
        return method.compress(pool.name, windows).to(windows.dtype)

    # Undo RoPE, compress, and rotate the cell to the position of its first token.
    token = begin[..., None] + torch.arange(pool.width, device=windows.device)
    plain = unrotate(windows.flatten(1, 2), *_angles(context, windows, token.flatten(1))).unflatten(
        1, windows.shape[1:3]
    )
    return rotate(method.compress(pool.name, plain), *_angles(context, windows, begin)).to(windows.dtype)


def _angles(context: SparseContext, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    return context.rotary(like, position_ids=positions)


def _windows(source: Tensor, pool: Pool, first: int | Tensor, count: int, start: Tensor | None) -> Tensor:
    """Return the tokens of the cells, ``[B, N, l, H, D]``; a view where no row is padded."""
    # No padding: cells of all rows lie at the same slots.
    if start is None:
        assert isinstance(first, int)
        begin = first * pool.stride
        span = source[:, begin : begin + (count - 1) * pool.stride + pool.width]
        return span.unfold(1, pool.width, pool.stride).permute(0, 1, 4, 2, 3)

    # Each row has its own first cell.
    assert isinstance(first, Tensor)
    cell = first[:, None] + torch.arange(count, device=source.device)  # [B, N]
    token = (start[:, None] + cell * pool.stride)[..., None] + torch.arange(pool.width, device=source.device)
    token = token.clamp(max=source.shape[1] - 1)
    rows = torch.arange(source.shape[0], device=source.device)[:, None, None]
    return source[rows, token]
