"""What one layer hands to its method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from nsa_convert.patterns import Pattern, SequenceLayout


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedPart:
    """Keys and values that one method of a layer may read, when its cache forgets.

    Attributes:
        k: ``[B, TK, h, D]`` of the method's heads, the call's own tokens last.
        v: ``[B, TK, h, D]``.
        layout: Where the queries and the first tokens of the rows are among them.
        dropped: ``[B]`` int64, earlier tokens of each row that are forgotten; None where all are there.
        memory: What the method remembers beside them; None where it has no policy.
    """

    k: Tensor
    v: Tensor
    layout: SequenceLayout
    dropped: Tensor | None = None
    memory: dict[str, Tensor] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """What one layer hands to its method.

    Attributes:
        q: ``[B, TQ, HQ, D]`` rotated queries.
        k: ``[B, TK, Hc, D]`` rotated keys, past included; Hc = H + the method's extra heads.
        v: ``[B, TK, Hc, D]`` values, past included.
        hidden: ``[B, TQ, hidden]`` input of the attention layer.
        pooled: Pool name -> ``[B, C, H, D]`` compressed cells.
        plain_keys: In training, ``[B, TK, H, D]`` rotated keys as the dense model has them, where the method
            mixes neighbouring keys; else None, and k are these.
        shared: What layers of one forward pass tell each other: selections that later layers reuse.
        token_states: Name -> ``[B, TK, h, d]`` for the states that the method caches, ``[B, TQ, h, d]`` for
            its others.
        layout: Position of the queries, padding and packing; a cache that forgot is a shorter sequence.
        scale: Factor on the scores.
        move: ``move(x, old, new)`` turns rotated vectors ``[B, T, h, D]`` from positions ``old [B or 1, T]``
            to ``new``.
        dropped: ``[B]`` int64, tokens of each row that the cache has forgotten; None for none.
        memory: What a method with a cache policy remembers from call to call, batch first; it may change the
            entries. None where nothing is remembered.
        parts: What each method of a hybrid may read, where one of them forgets; else empty.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor
    pooled: Mapping[str, Tensor]
    layout: SequenceLayout
    scale: float
    token_states: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    plain_keys: Tensor | None = None
    shared: dict[Any, Pattern] = dataclasses.field(default_factory=dict)
    move: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    dropped: Tensor | None = None
    memory: dict[str, Tensor] | None = None
    parts: tuple[CachedPart, ...] = ()

    def positions(self) -> Tensor:
        """Return the position of each query in its document, ``[B or 1, TQ]`` int64, negative in padding."""
        length = self.q.shape[1]
        device = self.q.device
        place = self.layout.positions(length, device) - self.layout.row_starts(length, device)
        return place if self.dropped is None else place + self.dropped[:, None]


def select_heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Return some heads of ``[B, T, H, D]``, ascending; a view where they are neighbours."""
    if len(heads) == heads[-1] - heads[0] + 1:
        return x[:, :, heads[0] : heads[-1] + 1]
    return x[:, :, list(heads)]
