"""The KV cache of a sparse layer: any transformers cache layer, retyped in place to hold cells too.

The cells are a pure function of the cached keys and values; which of them count follows from the length of
the sequence. So cropping needs no bookkeeping, and a cell that was written too early is written again when
its last token arrives.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

GROWTH = 256
"""A growing buffer gets room for at least this many tokens more, and for a 64th more than it holds."""


@functools.cache
def sparse_cache_class(base: type[CacheLayerMixin]) -> type[CacheLayerMixin]:
    """Return the subclass of a cache layer class that also keeps compressed cells."""
    # One base class only: an object can be retyped to it in place.

    class SparseLayer(base):
        is_sparse = True
        cells: dict[str, Tensor] | None = None  # pool name -> [B, H, capacity, D]
        buffers: tuple[Tensor | None, Tensor | None] = (None, None)  # room behind keys and values

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
        ) -> tuple[Tensor, Tensor]:
            if base is DynamicLayer and self.is_initialized and may_write_in_place(key_states, value_states):
                key_buffer, self.keys = append_tokens(self.buffers[0], self.keys, key_states)
                value_buffer, self.values = append_tokens(self.buffers[1], self.values, value_states)
                self.buffers = (key_buffer, value_buffer)
                return self.keys, self.values
            if self.is_compileable and self.is_initialized and self.keys.shape[1] != key_states.shape[1]:
                # Allocated ahead of time from the config, which does not count a method's extra heads.
                self.lazy_initialization(key_states, value_states)
            return super().update(key_states, value_states, *args, **kwargs)

        def reset(self) -> None:
            super().reset()
            self.cells, self.buffers = None, (None, None)

        def offload(self) -> None:
            super().offload()
            self._map_cells(lambda x: x.to("cpu", non_blocking=True))

        def prefetch(self) -> None:
            super().prefetch()
            self._map_cells(lambda x: x.to(self.device, non_blocking=True))

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._map_cells(lambda x: x.index_select(0, beam_idx.to(x.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._map_cells(lambda x: x.repeat_interleave(repeats, 0))

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._map_cells(lambda x: x[indices])

        def _map_cells(self, change: object) -> None:
            if self.cells is not None:
                self.cells = {name: change(x) for name, x in self.cells.items()}

    SparseLayer.__name__ = f"Sparse{base.__name__}"
    SparseLayer.__qualname__ = SparseLayer.__name__
    return SparseLayer


def sparse_cache_layer(cache: Cache, layer_index: int) -> CacheLayerMixin:
    """Return the layer of any cache, made if needed and retyped so that it also keeps compressed cells."""
    maker = getattr(cache, "layer_class_to_replicate", None)
    while maker is not None and len(cache.layers) <= layer_index:
        cache.layers.append(maker())
    layer = cache.layers[layer_index]
    if not getattr(layer, "is_sparse", False):
        layer.__class__ = sparse_cache_class(type(layer))
    return layer


def cached_length(layer: CacheLayerMixin) -> int | Tensor:
    """Return how many tokens a layer holds: an int, or a tensor while compiling a static cache."""
    length = layer.get_seq_length()
    if not isinstance(length, Tensor):
        return length
    # A static layer hands out the very tensor that its update() changes.
    return length.clone() if torch.compiler.is_compiling() else int(length)


def write_cells(
    layer: CacheLayerMixin, name: str, first: Tensor | int, cells: Tensor, capacity: int
) -> Tensor:
    """Store cells and return the whole buffer.

    Args:
        layer: A layer from :func:`sparse_cache_layer`.
        name: Pool name.
        first: Number of the first cell: an int, or ``[B]`` int64 when rows differ.
        cells: ``[B, N, H, D]``.
        capacity: Cells the buffer must be able to hold; the exact size for a compileable cache.

    Returns:
        ``[B, H, at least capacity, D]``.
    """
    batch, count, heads, dim = cells.shape
    if layer.cells is None:
        layer.cells = {}
    buffer = layer.cells.get(name)
    if buffer is None or buffer.shape[2] < capacity:
        size = capacity if layer.is_compileable else capacity + max(GROWTH // 16, capacity // 16)
        grown = cells.new_zeros(batch, heads, size, dim)
        if buffer is not None:
            grown[:, :, : buffer.shape[2]] = buffer
        buffer = layer.cells[name] = grown
    if count == 0:
        return buffer
    if isinstance(first, int):
        buffer[:, :, first : first + count] = cells.detach().transpose(1, 2)
    else:
        slots = first[:, None] + torch.arange(count, device=cells.device)
        rows = torch.arange(batch, device=cells.device)[:, None]
        buffer[rows, :, slots] = cells.detach()  # a compiled scatter_ would copy the whole buffer
    return buffer


def may_write_in_place(keys: Tensor, values: Tensor) -> bool:
    """Return whether no gradient and no compiler needs the cache as it was."""
    tracked = torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)
    return not tracked and not torch.compiler.is_compiling()


def append_tokens(buffer: Tensor | None, held: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Append ``new`` to ``held`` along dim 2, in place when ``held`` is the front of a buffer with room.

    torch.cat copies the whole cache for every token; a buffer with slack copies it rarely. Beam reordering
    and batch selection leave ``held`` outside the buffer, then a new buffer is made.

    Returns:
        The buffer and the part of it that is in use.
    """
    length = held.shape[2] if held.dim() == 4 else 0  # an empty DynamicLayer holds a 1-D tensor
    total = length + new.shape[2]
    fits = (
        buffer is not None
        and buffer.shape[2] >= total
        and buffer.data_ptr() == held.data_ptr()
        and buffer.stride() == held.stride()
        and buffer.shape[:2] == held.shape[:2]
    )
    if not fits:
        buffer = new.new_empty(*new.shape[:2], total + max(GROWTH, total // 64), new.shape[3])
        if length:
            buffer[:, :, :length] = held
    buffer[:, :, length:total] = new
    return buffer, buffer[:, :, :total]
