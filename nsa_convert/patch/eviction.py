"""The KV cache of a layer that evicts tokens: kept tokens for methods with a policy, all for the others.

A layer of a dynamic cache is retyped in place, as in :mod:`nsa_convert.patch.cache`. Heads whose method has
no cache policy stay in its ``keys`` and ``values``; the others move to ``held``, where their storage really
shrinks. What a row holds follows from what it has seen, so rows are reordered and selected as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from nsa_convert.errors import CacheError
from nsa_convert.methods.parts.base import SparseMethod
from nsa_convert.methods.parts.cache_policy import CachePolicy, forget
from nsa_convert.methods.parts.inputs import CachedPart, select_heads
from nsa_convert.methods.parts.mix import cached_heads, leaves
from nsa_convert.patch.cache import (
    AGAIN,
    SparseCacheLayer,
    SparseDynamicLayer,
    held_tokens,
    other_heads,
    same_rows,
    sparse_cache_layer,
)
from nsa_convert.patch.cache_storage import GROWTH, append_tokens, may_write_in_place
from nsa_convert.patch.cache_writer import writes_alike
from nsa_convert.patch.layout import SparseContext
from nsa_convert.patterns import SequenceLayout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """What is left of the past for one method's heads.

    Attributes:
        keys: ``[B, h, M, D]``, each row's tokens at the end.
        values: ``[B, h, M, D]``.
        memory: What the method remembers beside them, batch first.
    """

    keys: Tensor
    values: Tensor
    memory: dict[str, Tensor]

    def map(self, change: Callable[[Tensor], Tensor]) -> Held:
        """Return this with every tensor changed."""
        memory = {name: change(x) for name, x in self.memory.items()}
        return Held(keys=change(self.keys), values=change(self.values), memory=memory)


class EvictingLayer(SparseDynamicLayer):
    """A dynamic cache layer that has forgotten tokens; its length is still what it has seen."""

    is_croppable = False
    seen = 0
    held: dict[int, Held] | None = None  # number of the method among the layer's -> what is left
    rooms: dict[int, tuple[Tensor, Tensor]] | None = None  # buffers of the parts that still only grow
    # Of the base, a class that is made at run time.
    keys: Any
    values: Any
    cells: dict[str, Tensor] | None
    writer: Any
    starts: tuple[int, ...] | None

    def open(self, method: SparseMethod, starts: tuple[int, ...] | None, past: int | Tensor) -> None:
        """Check that the method may go on with the layer: evicted tokens cannot be restored.

        Raises:
            CacheError: Another method than the one that forgot reads the layer, or it was changed since.
        """
        if self.seen and not (self.is_as_left() and writes_alike(self.writer, method)):
            raise CacheError(
                "this cache has forgotten tokens, and it was last written by a model with another method or "
                f"other settings, was changed, or a call broke off: {AGAIN}"
            )
        if self.seen and not same_rows(self.starts, starts, past):
            raise CacheError(
                f"the padding of the rows differs from that of the call before, and this cache has forgotten "
                f"tokens by it: {AGAIN}"
            )

        self.writer = method
        self.starts = starts

    def update(self, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Refuse tokens of a model that would read what was forgotten.

        Raises:
            CacheError: Always; see :meth:`append`.
        """
        raise CacheError(f"this cache has forgotten tokens that this model needs: {AGAIN}")

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append tokens of the heads that keep all, ``[B, h, T, D]``, and return all of them."""
        return super().update(keys, values)

    def get_seq_length(self) -> int:
        """Return how many tokens the layer has seen, forgotten ones included."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to go back: what was forgotten for the tokens to remove is gone.

        Raises:
            CacheError: Unless nothing has to be removed.
        """
        if tokens_to_remove and self.seen:
            raise CacheError(
                "this cache has forgotten tokens and cannot be cropped: assisted decoding, prompt lookup and "
                "contrastive search need a method that keeps its cache (streaming: cache=keep)",
                code="CA02",
            )

    def reset(self) -> None:
        """Forget everything; the layer serves any model again."""
        super().reset()
        self.seen = 0
        self.held = None
        self.rooms = None

        self.__class__ = SparseDynamicLayer

    def offload(self) -> None:
        """Move to the CPU."""
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move back to the layer's device."""
        self._map(lambda x: x.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._map_rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._map_rows(lambda x: x[indices.to(x.device)])

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor by an operation on rows, whose padding is not known afterwards."""
        self._map(change)
        self.starts = ()

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor of the layer."""
        whole = self.is_as_left()

        if self.is_initialized and self.keys.dim() == 4:  # an empty DynamicLayer holds a 1-D tensor
            self.keys = change(self.keys)
            self.values = change(self.values)

        self.cells = {name: change(x) for name, x in (self.cells or {}).items()}
        self.held = {i: held.map(change) for i, held in (self.held or {}).items()}
        self.rooms = None

        if whole:
            self.settle()

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "rooms": None}


def has_eviction(method: SparseMethod) -> bool:
    """Return whether any part of a layer's method has a cache policy."""
    return any(leaf.cache_needs().policy is not None for leaf in leaves(method))


def evicting_cache_layer(
    cache: Cache, layer_index: int, method: SparseMethod, k: Tensor, context: SparseContext
) -> EvictingLayer:
    """Return the layer of a dynamic cache, made if needed and retyped so that it can forget.

    Where it holds tokens of another origin, the method forgets of them what it would have forgotten after
    reading them in one call.

    Args:
        cache: A transformers cache.
        layer_index: Layer of the model.
        method: The layer's method.
        k: ``[B, T, Hc, D]`` new keys.
        context: Padding of the rows.

    Raises:
        CacheError: The cache is static, quantised or offloaded; its tokens come from elsewhere and the method
            decides by attention; or it has forgotten by other rules.
    """
    layer = sparse_cache_layer(cache, layer_index)

    if isinstance(layer, EvictingLayer):
        layer.open(method, context.starts, layer.seen)
        return layer

    if type(layer) is not SparseDynamicLayer or getattr(cache, "offloading", False):
        kind = type(cache).__name__
        raise CacheError(
            f"this model's layers forget tokens, which a {kind} of {layer.sparse_base.__name__}s cannot: use "
            "the default dynamic cache, or a method that keeps its cache (streaming: cache=keep)",
            code="CA02",
        )

    # Tokens of another origin: forget of them what the method would have forgotten.
    past = layer.get_seq_length()
    layer.open(method, context.starts, past)
    if past:
        _take_over(method, layer, past, k, context)

    # Retype in place.
    layer.__class__ = EvictingLayer
    evicting = cast(EvictingLayer, layer)
    evicting.seen = past
    evicting.settle()

    return evicting


def _take_over(
    method: SparseMethod, layer: SparseCacheLayer, past: int, k: Tensor, context: SparseContext
) -> None:
    """Move cached tokens to where the method's parts keep theirs, and forget what they give up."""
    policies = [leaf.cache_needs().policy for leaf in leaves(method)]
    heads = cached_heads(method)

    # Refuse what the keys and values alone do not tell.
    if any(policy is not None and policy.asks_attention for policy in policies):
        raise CacheError(
            "this cache was filled from elsewhere, and the method decides what to keep by the attention that "
            f"tokens have received: {AGAIN}"
        )
    if layer.keys.shape[:2] != (k.shape[0], k.shape[2]):
        raise other_heads(layer.keys, k.transpose(1, 2))

    # The heads of a method with a policy move to its own part.
    rows = _Rows.of(context, past, k.shape[0], 0)
    tokens = layer.keys.transpose(1, 2), layer.values.transpose(1, 2)
    parts = {}
    for i, (policy, own) in enumerate(zip(policies, heads, strict=True)):
        if policy is not None:
            keys, values = (select_heads(x, own) for x in tokens)
            keys, values, memory = forget(policy, keys, values, {}, list(rows.before), rows.stay(policy))
            parts[i] = Held(keys=keys.transpose(1, 2), values=values.transpose(1, 2), memory=memory)

    # The heads that keep all tokens stay where they are.
    whole = list(whole_heads(method))
    layer.held = parts
    layer.buffers = (None, None)
    if whole:
        layer.keys = layer.keys[:, whole]
        layer.values = layer.values[:, whole]
    else:
        layer.keys = layer.keys.new_empty(0)
        layer.values = layer.values.new_empty(0)


def append(
    method: SparseMethod, layer: EvictingLayer, k: Tensor, v: Tensor, context: SparseContext
) -> tuple[CachedPart, ...]:
    """Append new tokens and return what each of a layer's methods may read.

    Args:
        method: The layer's method.
        layer: Its cache layer.
        k: ``[B, T, Hc, D]`` new keys.
        v: ``[B, T, Hc, D]`` new values.
        context: Padding of the rows.
    """
    if not layer.is_initialized:
        layer.lazy_initialization(k, v)
    layer.settled = False

    policies = [leaf.cache_needs().policy for leaf in leaves(method)]
    heads = cached_heads(method)
    rows = _Rows.of(context, layer.seen, k.shape[0], k.shape[1])

    # Heads that keep all tokens: one append for all of them.
    place = whole_heads(method)
    whole: tuple[Tensor, Tensor] = (k, v)
    if place:
        new = (x[:, :, list(place)].transpose(1, 2) for x in (k, v))
        whole = held_tokens(layer.append(*new), context.layout.offset, k, v)

    # What each method reads: its heads of these, or its own kept tokens followed by the new ones.
    parts = []
    for i, (policy, own) in enumerate(zip(policies, heads, strict=True)):
        if policy is None:
            keys, values = (select_heads(x, [place[head] for head in own]) for x in whole)
            parts.append(CachedPart(k=keys, v=values, layout=context.layout))
            continue

        held = (layer.held or {}).get(i)
        keys, values = (select_heads(x, own).transpose(1, 2) for x in (k, v))
        keys, values = _append(layer, i, policy, keys, values)
        memory = {} if held is None else dict(held.memory)
        layout, dropped = rows.layout(policy, keys.shape[1], k.shape[1], k.device)
        parts.append(CachedPart(k=keys, v=values, layout=layout, dropped=dropped, memory=memory))

    return tuple(parts)


def evict(
    method: SparseMethod,
    layer: EvictingLayer,
    parts: Sequence[CachedPart],
    context: SparseContext,
    new_tokens: int,
) -> None:
    """Forget what the policies of a layer's methods give up, after a call with ``new_tokens`` tokens.

    Args:
        method: The layer's method.
        layer: Its cache layer.
        parts: From :func:`recall`, with the memory that the methods have changed.
        context: Padding of the rows.
        new_tokens: Tokens of the call.
    """
    rows = _Rows.of(context, layer.seen, parts[0].k.shape[0], new_tokens)
    layer.held = layer.held or {}

    for i, (leaf, part) in enumerate(zip(leaves(method), parts, strict=True)):
        policy = leaf.cache_needs().policy
        if policy is not None:
            held = rows.held(policy)
            stay = rows.stay(policy)
            k, v, memory = forget(policy, part.k, part.v, part.memory or {}, held, stay)
            k, v = (x.transpose(1, 2).to(layer.keys.dtype) for x in (k, v))
            layer.held[i] = Held(keys=k, values=v, memory=memory)

    layer.seen += new_tokens
    layer.settle()


def _append(layer: EvictingLayer, part: int, policy: CachePolicy, *new: Tensor) -> list[Tensor]:
    """Return a part's old and new keys and values ``[B, T, h, D]``, in place while nothing leaves."""
    held = (layer.held or {}).get(part)
    if held is None:
        return [x.transpose(1, 2) for x in new]

    # In the dtype of what is held.
    dtypes = [x.dtype for x in new]
    pairs = [(old, x.to(old.dtype)) for old, x in zip((held.keys, held.values), new, strict=True)]
    room = (layer.rooms or {}).pop(part, None)

    # Append in place while no token leaves within the next GROWTH ones; otherwise concatenate.
    later = layer.seen + new[0].shape[2] + GROWTH
    if policy.size(later) < later or not all(may_write_in_place(*pair) for pair in pairs):
        grown = [torch.cat(pair, 2) for pair in pairs]
    else:
        appended = [append_tokens(b, *pair) for b, pair in zip(room or (None, None), pairs, strict=True)]
        (key_room, _), (value_room, _) = appended
        layer.rooms = {**(layer.rooms or {}), part: (key_room, value_room)}
        grown = [x for _, x in appended]

    return [x.transpose(1, 2).to(dtype) for x, dtype in zip(grown, dtypes, strict=True)]


def whole_heads(method: SparseMethod) -> dict[int, int]:
    """Return cached head -> its place among the heads of a layer that keep all tokens."""
    pairs = zip(leaves(method), cached_heads(method), strict=True)
    kept = [head for leaf, heads in pairs if leaf.cache_needs().policy is None for head in heads]
    return {head: place for place, head in enumerate(kept)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """Real tokens of each row before a call and in it."""

    before: tuple[int, ...]
    new: tuple[int, ...]

    @classmethod
    def of(cls, context: SparseContext, past: int, batch: int, new_tokens: int) -> _Rows:
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                "a cache that forgets cannot be compiled: run decoding without compiling"
            )

        starts = context.starts or (0,) * batch
        before = tuple(max(0, past - start) for start in starts)
        after = (max(0, past + new_tokens - start) for start in starts)
        return cls(before=before, new=tuple(b - a for a, b in zip(before, after, strict=True)))

    def held(self, policy: CachePolicy) -> list[int]:
        """Return the tokens of each row among a call's keys."""
        return [policy.size(seen) + new for seen, new in zip(self.before, self.new, strict=True)]

    def stay(self, policy: CachePolicy) -> list[int]:
        """Return the tokens of each row that stay after the call."""
        return [policy.size(seen + new) for seen, new in zip(self.before, self.new, strict=True)]

    def layout(
        self, policy: CachePolicy, num_keys: int, new_tokens: int, device: torch.device
    ) -> tuple[SequenceLayout, Tensor | None]:
        """Return where queries and rows are among ``num_keys`` keys, and how much of each row is dropped."""
        start = [num_keys - held for held in self.held(policy)]
        dropped = [seen - policy.size(seen) for seen in self.before]
        starts, forgotten = (torch.tensor(x, device=device) if any(x) else None for x in (start, dropped))
        return SequenceLayout(offset=num_keys - new_tokens, start=starts), forgotten


def cache_bytes(cache: Cache) -> int:
    """Return the bytes a cache holds: keys, values, cells, what methods remember, room to grow included."""
    seen: dict[int, int] = {}
    for layer in cache.layers:
        for x in _tensors(layer):
            storage = x.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def _tensors(layer: CacheLayerMixin) -> list[Tensor]:
    tensors = [layer.keys, layer.values, *(getattr(layer, "cells", None) or {}).values()]
    for part in (getattr(layer, "held", None) or {}).values():
        tensors += [part.keys, part.values, *part.memory.values()]
    return [x for x in tensors if isinstance(x, Tensor)]
