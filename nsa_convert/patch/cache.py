"""The KV cache of a sparse layer: any transformers cache layer, retyped in place to hold cells too.

What lies beside keys and values (compressed cells, token states) covers all the tokens the layer holds,
or is not there. A layer remembers how a call of its method left it: by which method, that the call came to
its end, which tensors keys and values were. What happened since (another model appended, keys were replaced
or edited, a call broke off) shows as a difference, and what lies beside is dropped: cells are pooled again
from the cached keys, and what is no function of them is asked for by an error.

The cells are a pure function of the cached keys and values; which of them count follows from the length of
the sequence. So cropping needs no bookkeeping, and a cell that was written too early is written again when
its last token arrives. None of this is a number that grows with every token: a compiled step stays the same.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from nsa_convert.errors import CacheError
from nsa_convert.methods.parts.base import SparseMethod
from nsa_convert.patch.cache_storage import (
    GROWTH,
    append_tokens,
    may_be_written,
    may_write_in_place,
    version,
)
from nsa_convert.patch.cache_writer import Writer, writer_fingerprint, writes_alike

STREAM = "stream "
"""The names of token states in ``cells`` begin with this."""
AGAIN = "read the prompt again with this model, from an empty cache"


# The members below end up in subclasses of cache layers: a type checker sees them in one.
_Layer: Any = object


class SparseCacheLayer(_Layer):
    """What a cache layer does differently once a sparse layer has used it; see :func:`sparse_cache_class`.

    Its members go into subclasses of cache layer classes one by one: an object can be retyped in place to a
    subclass with one base only. So ``self.sparse_base`` stands for ``super()``.
    """

    sparse_base: type[CacheLayerMixin]
    keys: Tensor
    values: Tensor
    is_initialized: bool
    _layer_type = None  # a subclass of a layer class must not take its place in transformers' tables
    is_sparse = True
    cells: dict[str, Tensor] | None = None  # pool or token states -> [B, H, capacity, D]
    buffers: tuple[Tensor | None, Tensor | None] = (None, None)  # room behind keys and values
    writer: Writer | None = None  # the method that wrote cells and token states
    settled = False  # whether what lies beside belongs to the tokens held
    starts: tuple[int, ...] | None = ()  # left padding of the rows that cells count from; () for not known
    known: tuple[tuple[weakref.ref, int | None], ...] | None = None  # keys and values as they were left

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append tokens in the cache's dtype; cells and token states miss them until :meth:`settle`."""
        self.settled = False

        # New tokens take the cache's dtype; a static cache may be made for other heads or in inference mode.
        if self.is_initialized and isinstance(self.keys, Tensor):
            key_states = key_states.to(self.keys.dtype)
            value_states = value_states.to(self.values.dtype)
            if self.keys.dim() == 4 and self.keys.shape[:2] != key_states.shape[:2]:
                self._start_again(key_states, value_states)
            elif self.is_compileable:
                self._leave_inference_mode()

        # A growing cache appends in place; transformers' own class copies all tokens for each new one.
        if self.sparse_base is DynamicLayer and self.is_initialized:
            pairs = (self.keys, key_states), (self.values, value_states)
            if all(may_write_in_place(*pair) for pair in pairs):
                key_buffer, self.keys = append_tokens(self.buffers[0], *pairs[0])
                value_buffer, self.values = append_tokens(self.buffers[1], *pairs[1])
                self.buffers = (key_buffer, value_buffer)
                return self.keys, self.values

        return self.sparse_base.update(self, key_states, value_states, *args, **kwargs)

    def open(self, method: SparseMethod, starts: tuple[int, ...] | None, past: int | Tensor) -> None:
        """Drop what does not belong to the tokens held, before ``method`` reads the layer.

        Args:
            method: Who reads, and writes afterwards.
            starts: The left padding of each row; None for no padding, or while compiling.
            past: Tokens held.

        Raises:
            CacheError: The layer's kind cannot carry what the method keeps beside keys and values, or its
                keys were replaced by others of unknown positions.
        """
        needs = method.cache_needs()
        keeps_states = bool(needs.token_states) or needs.key_taps > 1
        if hasattr(self, "_quantize") and (needs.pools or keeps_states):
            raise CacheError(
                f"{method.spec.name} keeps more than keys and values, which a quantised cache "
                f"({self.sparse_base.__name__}) cannot carry: use the default dynamic cache",
                code="CA02",
            )

        # Drop what is stale: everything after changed keys or a call that broke off, the cells after a change
        # of method or padding. Token states stay where the new method would compute the same ones.
        compiling = torch.compiler.is_compiling()
        if not self.settled:
            self.cells = None
        elif not compiling and not self.is_as_left():
            self._refuse_unknown_places(method, past)
            self.cells = None
        elif self.writer is not method:
            self._keep_states(keeps_states and not compiling and writes_alike(self.writer, method))
        elif not compiling and not same_rows(self.starts, starts, past):
            self._keep_states(True)

        # From here on this method writes.
        self.writer = method
        if not compiling:
            self.starts = starts
        self.settle()

    def settle(self) -> None:
        """Mark cells and token states as covering all the keys and values held."""
        self.settled = True
        if torch.compiler.is_compiling():
            if not self.is_compileable:
                self.known = None
        elif isinstance(self.keys, Tensor):
            counted = not self.is_compileable  # a compiled step counts no versions
            self.known = tuple(
                (weakref.ref(x), version(x) if counted else None) for x in (self.keys, self.values)
            )

    def is_as_left(self) -> bool:
        """Return whether keys and values are the tensors of the last :meth:`settle`, and unedited."""
        if not self.settled or self.known is None:  # None: as a compiled call left it
            return self.settled
        held = zip(self.known, (self.keys, self.values), strict=True)
        return all(left() is x and count in (None, version(x)) for (left, count), x in held)

    def reset(self) -> None:
        """Forget everything."""
        if issubclass(self.sparse_base, DynamicLayer):
            # Before 5.18 transformers zeroes the keys of a dynamic cache and goes on counting them.
            self.keys = self.values = None  # type: ignore[assignment]  # as transformers makes them
            self.is_initialized = False

        self.sparse_base.reset(self)
        self.cells = None
        self.buffers = (None, None)
        self.writer = None
        self.settled = False
        self.starts = ()
        self.known = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens."""
        self._carry(lambda: self.sparse_base.crop(self, tokens_to_remove))

    def offload(self) -> None:
        """Move keys and values to the CPU; cells stay, since every step reads them."""
        self.buffers = (None, None)
        self._carry(lambda: self.sparse_base.offload(self))

    def prefetch(self) -> None:
        """Move keys and values back."""
        self._carry(lambda: self.sparse_base.prefetch(self))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        self._carry(
            lambda: self.sparse_base.reorder_cache(self, beam_idx),
            lambda x: x.index_select(0, beam_idx.to(x.device)),
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._carry(
            lambda: self.sparse_base.batch_repeat_interleave(self, repeats),
            lambda x: x.repeat_interleave(repeats, 0),
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._carry(
            lambda: self.sparse_base.batch_select_indices(self, indices),
            lambda x: x[indices.to(x.device)],
        )

    def _carry(self, act: Callable[[], None], rows: Callable[[Tensor], Tensor] | None = None) -> None:
        """Change keys and values by ``act``; change or drop what lies beside them.

        Args:
            act: Changes the keys and values of the layer in place.
            rows: The same change of rows for cells and token states; None where rows stay.
        """
        whole = self.is_as_left()
        act()

        if not whole:
            self.settled = False  # so that the next call drops what lies beside
            return

        # Rows moved: what lies beside moves with them, and their padding is not known any more.
        if rows is not None:
            self.cells = {name: rows(x) for name, x in (self.cells or {}).items()}
            self.starts = ()
        self.settle()

    def _keep_states(self, keep: bool) -> None:
        """Drop the cells, and the token states too unless told otherwise."""
        kept = {name: x for name, x in (self.cells or {}).items() if keep and name.startswith(STREAM)}
        self.cells = kept or None

    def _refuse_unknown_places(self, method: SparseMethod, past: int | Tensor) -> None:
        """Refuse keys of unknown positions where cells are compressed before RoPE, which needs them."""
        left = self.known[0][0]() if self.known else None
        same = left is not None and left.shape == self.keys.shape
        if past and not same and any(pool.rope == "before" for pool in method.cache_needs().pools):
            raise CacheError(
                "the cached keys were replaced since this model wrote them, so the positions that cells "
                f"compressed before RoPE need are not known: {AGAIN}"
            )

    def _start_again(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate anew: a cache made ahead of time does not count the further heads of a method."""
        length = self.get_seq_length()
        if isinstance(length, Tensor) and torch.compiler.is_compiling():
            torch._assert_async(length == 0, f"a filled cache has other rows or heads: {AGAIN}")
        elif int(length) or not self.is_compileable:
            raise other_heads(self.keys, key_states)
        self.lazy_initialization(key_states, value_states)

    def _leave_inference_mode(self) -> None:
        """Copy what was made under ``torch.inference_mode()`` where it must be written outside of it."""
        for name in ("keys", "values", "cumulative_length"):
            x = getattr(self, name, None)
            if isinstance(x, Tensor) and not may_be_written(x):
                setattr(self, name, x.clone())
                torch._dynamo.mark_static_address(getattr(self, name))

    def _state(self) -> dict[str, Any]:
        """Return the attributes without references to this process and without room to grow."""
        state = {**self.__dict__, "known": None, "buffers": (None, None), "settled": self.is_as_left()}

        # A copy of the tokens in use, not of the buffer they are the front of.
        if self.buffers[0] is not None:
            state |= {"keys": self.keys.clone(), "values": self.values.clone()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.settled:
            self.settle()

    def __reduce_ex__(self, protocol: object) -> tuple:
        state = self._state()
        if self.writer is not None:
            state["writer"] = writer_fingerprint(self.writer)

        # A class made at run time cannot be imported by name: a pickle names its base.
        made_here = "sparse_base" in vars(type(self))
        return blank_layer, (self.sparse_base if made_here else type(self), made_here), state

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseCacheLayer:
        other = memo[id(self)] = type(self).__new__(type(self))
        memo[id(self.writer)] = self.writer  # the method is not part of the cache
        other.__setstate__(copy.deepcopy(self._state(), memo))
        return other


_OF_THE_TEMPLATE = ("__dict__", "__weakref__")
_CLASSES: dict[type[CacheLayerMixin], type[CacheLayerMixin]] = {}


def sparse_cache_class(base: type[CacheLayerMixin]) -> type[CacheLayerMixin]:
    """Return the subclass of a cache layer class that also keeps compressed cells."""
    if base not in _CLASSES:
        name = f"Sparse{base.__name__}"
        own = {key: value for key, value in vars(SparseCacheLayer).items() if key not in _OF_THE_TEMPLATE}
        metaclass: Any = type(base)
        _CLASSES[base] = metaclass(name, (base,), {**own, "__qualname__": name, "sparse_base": base})
    return _CLASSES[base]


SparseDynamicLayer = sparse_cache_class(DynamicLayer)
SparseStaticLayer = sparse_cache_class(StaticLayer)


def blank_layer(cls: type[CacheLayerMixin], retype: bool) -> SparseCacheLayer:
    """Return an empty layer for a pickle to fill: of ``cls``, or of its subclass that keeps cells."""
    cls = sparse_cache_class(cls) if retype else cls
    return object.__new__(cls)


def _class_for_graph(base: type[CacheLayerMixin]) -> type[CacheLayerMixin]:
    """Return :func:`sparse_cache_class` as a constant of a traced graph, which itself can make no class."""
    return sparse_cache_class(base)


_class_for_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def sparse_cache_layer(cache: Cache, layer_index: int) -> SparseCacheLayer:
    """Return the layer of any cache, made if needed and retyped so that it also keeps compressed cells.

    Raises:
        CacheError: The layer keeps a sliding window only.
    """
    # A dynamic cache makes its layers at their first use.
    maker = getattr(cache, "layer_class_to_replicate", None)
    while maker is not None and len(cache.layers) <= layer_index:
        cache.layers.append(maker())
    layer = cache.layers[layer_index]

    # Retype what transformers made.
    if not getattr(layer, "is_sparse", False):
        if getattr(layer, "is_sliding", False):
            raise CacheError(
                f"a {type(layer).__name__} keeps the last tokens only, this model's layers read all of them: "
                "make the cache without a config, or with this model's",
                code="CA02",
            )
        if torch.compiler.is_compiling():  # a graph cannot retype an object: another one takes its place
            cls = _class_for_graph(type(layer))
            held = layer
            layer = object.__new__(cls)
            for name, value in vars(held).items():
                setattr(layer, name, value)
            cache.layers[layer_index] = layer
        else:
            layer.__class__ = sparse_cache_class(type(layer))

    return layer


def held_tokens(
    cached: tuple[Tensor, Tensor], offset: int | Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the cached keys and values ``[B, T, H, D]`` that a call may read, in the dtype of the new ones.

    Args:
        cached: What a cache handed out, ``[B, H, T, D]``.
        offset: Tokens that were cached before the call.
        k: ``[B, T, H, D]`` new keys.
        v: ``[B, T, H, D]`` new values.

    Raises:
        CacheError: The layer holds another number of tokens than the first layer of the cache.
    """
    keys, values = (x.to(new.dtype).transpose(1, 2) for x, new in zip(cached, (k, v), strict=True))

    if isinstance(offset, Tensor):
        return keys, values

    # Every layer must hold the tokens that the first layer counts.
    total = offset + k.shape[1]
    if not torch.compiler.is_compiling() and keys.shape[1] < total:
        raise CacheError(
            f"a layer of the cache holds {keys.shape[1]} tokens where {total} are expected: every layer must "
            f"hold all tokens of the text; {AGAIN}"
        )
    return keys[:, :total], values[:, :total]  # a static cache hands out its whole capacity


def other_heads(held: Tensor, new: Tensor) -> CacheError:
    """Return the error that says that keys ``[B, H, T, D]`` cannot follow those held."""
    (rows, heads), (new_rows, new_heads) = held.shape[:2], new.shape[:2]
    return CacheError(
        f"the cache holds {rows} rows of {heads} key/value heads, the new tokens have {new_rows} rows of "
        f"{new_heads}: {AGAIN}"
    )


def same_rows(left: tuple[int, ...] | None, starts: tuple[int, ...] | None, past: int | Tensor) -> bool:
    """Return whether the rows of a cache begin where they began; a row without a token may begin anywhere."""
    if left == starts or left == ():
        return True

    # Rows without padding begin at 0.
    rows = len(left or starts or ())
    left = left or (0,) * rows
    starts = starts or (0,) * rows
    return len(left) == len(starts) and all(
        a == b or min(a, b) >= past for a, b in zip(left, starts, strict=True)
    )


def write_cells(
    layer: CacheLayerMixin, name: str, first: Tensor | int, cells: Tensor, capacity: int
) -> Tensor:
    """Store cells, in the dtype of the first ones, and return the whole buffer.

    Args:
        layer: A layer from :func:`sparse_cache_layer`.
        name: Pool name.
        first: Number of the first cell: an int, or ``[B]`` int64 when rows differ.
        cells: ``[B, N, H, D]``.
        capacity: Cells the buffer must be able to hold; the exact size for a compileable cache.

    Returns:
        ``[B, H, at least capacity, D]``.
    """
    # Find the buffer, or make a larger one and copy the cells into it.
    batch, count, heads, dim = cells.shape
    if layer.cells is None:
        layer.cells = {}
    buffer = layer.cells.get(name)
    if buffer is None or buffer.shape[2] < capacity or not may_be_written(buffer):
        size = capacity if layer.is_compileable else capacity + max(GROWTH // 16, capacity // 16)
        grown = (cells if buffer is None else buffer).new_zeros(batch, heads, size, dim)
        if buffer is not None:
            grown[:, :, : buffer.shape[2]] = buffer.detach()[:, :, :size]
        buffer = layer.cells[name] = grown

    if count == 0:
        return buffer

    # Write in place, at one slot for all rows or at each row's own.
    cells = cells.detach().to(buffer.dtype)
    if isinstance(first, int):
        buffer[:, :, first : first + count] = cells.transpose(1, 2)
    else:
        slots = first[:, None] + torch.arange(count, device=cells.device)
        rows = torch.arange(batch, device=cells.device)[:, None]
        buffer[rows, :, slots] = cells  # a compiled scatter_ would copy the whole buffer

    return buffer
