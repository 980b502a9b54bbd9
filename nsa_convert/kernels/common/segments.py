"""Split padded and packed batches into plain sequences, so that fast paths need handle neither."""

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
    bounds = layout.cu_seqlens.tolist()
    shift = int(layout.offset)

    for document, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        begin = max(start, shift)
        end = min(stop, shift + num_queries)
        if end > begin:
            yield Segment(
                row=0,
                queries=(begin - shift, end - shift),
                keys=(start, end),
                offset=begin - start,
                document=document,
            )


ROW_BYTES = 1 << 24
"""Most bytes that the mask of one tile of several rows may take; larger batches are split by rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a batch whose queries are in the same slots, each row with its own padding.

    Attributes:
        rows: ``(begin, end)`` of the batch rows.
        starts: ``[rows]`` int64 first real slot of each row, or None where none is padded.
        least: Smallest of them.
        most: Largest of them.
    """

    rows: tuple[int, int]
    starts: Tensor | None
    least: int
    most: int

    def hide_padding(self, visible: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hide the left padding of each row, and say which queries still see a key.

        Args:
            visible: bool ``[1, W, L]``, the mask of a row without padding.
            keys: ``[L]`` slots of the keys.

        Returns:
            bool ``[rows or 1, W, L]``, and bool ``[rows, W]`` or None where no row is padded.
        """
        if self.starts is None:
            return visible, None

        visible = visible & (keys >= self.starts[:, None, None])
        return visible, visible.any(-1)


def row_groups(layout: SequenceLayout, batch: int, row_bytes: int) -> list[Rows]:
    """Group the rows of a batch that is not packed, as many together as :data:`ROW_BYTES` allows.

    Args:
        layout: Padding.
        batch: B.
        row_bytes: Bytes that the mask of one row's tile takes.
    """
    step = max(1, ROW_BYTES // max(1, row_bytes))

    if layout.start is None:
        return [
            Rows(rows=(i, min(i + step, batch)), starts=None, least=0, most=0) for i in range(0, batch, step)
        ]

    starts = layout.start.tolist()
    groups = []
    for i in range(0, batch, step):
        part = starts[i : i + step]
        groups.append(
            Rows(
                rows=(i, i + len(part)),
                starts=layout.start[i : i + step] if any(part) else None,
                least=min(part),
                most=max(part),
            )
        )

    return groups


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
