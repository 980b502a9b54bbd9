"""Split padded and packed batches into plain sequences, so that the fast paths know neither."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from nsa_convert.patterns import SequenceLayout

DECODE_QUERIES = 16
"""Calls with at most this many queries fetch keys query by query."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """One document of one row: its queries, its keys, and how many of its keys precede its first query.

    Attributes:
        row: Batch row.
        queries: ``(begin, end)`` among the query slots.
        keys: ``(begin, end)`` among the key slots; ends with the last query's own slot.
        offset: Position of the first query inside the document.
        document: Number of the packed document (0 otherwise).
    """

    row: int
    queries: tuple[int, int]
    keys: tuple[int, int]
    offset: int
    document: int = 0

    @property
    def num_queries(self) -> int:
        """Queries in the segment."""
        return self.queries[1] - self.queries[0]

    @property
    def num_keys(self) -> int:
        """Keys in the segment."""
        return self.keys[1] - self.keys[0]


def segments(layout: SequenceLayout, batch: int, num_queries: int, num_keys: int) -> Iterator[Segment]:
    """Yield the non-empty segments of a batch; queries in the left padding belong to none."""
    if layout.cu_seqlens is not None:
        yield from _packed(layout, num_queries)
        return
    offset = int(layout.offset)
    starts = [0] * batch if layout.start is None else layout.start.tolist()
    for row, start in enumerate(starts):
        first = max(0, start - offset)  # the first query that is not padding
        end = min(offset + num_queries, num_keys)
        if first < num_queries and end > start:
            yield Segment(
                row=row, queries=(first, num_queries), keys=(start, end), offset=offset + first - start
            )


def _packed(layout: SequenceLayout, num_queries: int) -> Iterator[Segment]:
    assert layout.cu_seqlens is not None
    bounds, shift = layout.cu_seqlens.tolist(), int(layout.offset)
    for document, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        begin, end = max(start, shift), min(stop, shift + num_queries)
        if end > begin:
            yield Segment(
                row=0,
                queries=(begin - shift, end - shift),
                keys=(start, end),
                offset=begin - start,
                document=document,
            )


def is_decode(layout: SequenceLayout, q: Tensor, *others: Tensor | None) -> bool:
    """Return whether a call takes the decode path: few queries on a cache, and no gradient wanted."""
    if layout.cu_seqlens is not None:
        return False
    tensors = (q, *(x for x in others if x is not None))
    if any(x.shape[1] == 0 for x in tensors):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    # A graph that takes the offset as a tensor must not look at its value, as the tiles do.
    static = isinstance(layout.offset, Tensor) and torch.compiler.is_compiling()
    return static or q.shape[1] <= DECODE_QUERIES
