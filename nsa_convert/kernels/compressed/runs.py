"""Compressed attention and block choice for runs of queries; no TQ x C tensor is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from nsa_convert.kernels.common.checks import accumulate_dtype
from nsa_convert.kernels.common.segments import Segment, row_groups, segments
from nsa_convert.kernels.common.tiles import Tiles, split_non_finite
from nsa_convert.kernels.compressed.cells import CellGrid, renormalise
from nsa_convert.kernels.compressed.topk import block_scores, top_blocks
from nsa_convert.patterns import BlockTopK, SequenceLayout

CHUNK_BYTES = 1 << 22
"""Scores held at once; small enough to stay in the cache."""

CELL_STEP = 128
"""Chunks read a multiple of this many cells: few different shapes, of each of which oneDNN keeps a kernel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """A run of queries of one document, or of the same slots in several rows of a batch.

    Attributes:
        rows: Batch rows.
        queries: Slots of the queries.
        cells: Cells that one of them may see.
        ages: ``[rows or 1, W]`` int64, tokens of the document that each query sees, at least 0.
        least: Cells that all queries see.
        longest: Most tokens that a query sees.
    """

    rows: slice
    queries: slice
    cells: slice
    ages: Tensor
    least: int
    longest: int

    @property
    def num_cells(self) -> int:
        """Cells of the chunk."""
        return self.cells.stop - self.cells.start


class CompressedRun:
    """One call: its documents with their cells, and the loops over them."""

    def __init__(
        self,
        q: Tensor,
        ck: Tensor,
        grid: CellGrid,
        rule: BlockTopK | None,
        layout: SequenceLayout,
        scale: float,
    ) -> None:
        self.grid = grid
        self.rule = rule
        self.scale = scale
        self.layout = layout
        self.num_heads = q.shape[2]
        self.num_kv_heads = ck.shape[2]
        self.device = q.device
        self.batch = q.shape[0]
        self.num_queries = q.shape[1]
        self.num_cells = ck.shape[1]

        self.offset = int(layout.offset)
        total = self.offset + self.num_queries

        self.documents: list[tuple[Segment, int]] = []  # packed ones, each with its first cell
        if layout.cu_seqlens is not None:
            first = grid.first_cells(layout).tolist()
            parts = segments(layout, self.batch, self.num_queries, total)
            self.documents = [(part, first[part.document]) for part in parts]
            total = max((part.num_keys for part, _ in self.documents), default=1)
        elif layout.start is not None:
            total -= int(layout.start.min())

        self.size = 0 if rule is None else min(rule.num_blocks, -(-max(1, total) // rule.block_size))

    def chunks(self) -> Iterator[Chunk]:
        """Yield runs of queries, each with the cells that one of them sees."""
        if self.layout.cu_seqlens is None:
            yield from self._batch_chunks()

        for part, first in self.documents:
            cells = min(self.grid.count(part.num_keys), self.num_cells - first)
            width, (begin, end) = self._width(cells, 1), part.queries

            for slot in range(begin, end, width):
                ages = part.offset + slot - begin + 1, part.offset + min(slot + width, end) - begin
                counted = torch.arange(ages[0], ages[1] + 1, device=self.device)[None]
                yield self._chunk((part.row, part.row + 1), slot, (first, cells), counted, ages)

    def _batch_chunks(self) -> Iterator[Chunk]:
        """Yield chunks of all rows at once: what a batch costs in calls does not grow with its rows."""
        cells = min(self.num_cells, self.grid.count(self.offset + self.num_queries))
        width = self._width(cells, 1)
        row_bytes = 4 * self.num_heads * max(cells, 1) * min(width, self.num_queries)

        for part in row_groups(self.layout, self.batch, row_bytes):
            width = self._width(cells, part.rows[1] - part.rows[0])
            for slot in range(max(0, part.least - self.offset), self.num_queries, width):
                first = self.offset + slot + 1
                last = self.offset + min(slot + width, self.num_queries)
                ages = torch.arange(first, last + 1, device=self.device)[None]
                if part.starts is not None:
                    ages = (ages - part.starts[:, None]).clamp(min=0)

                span = max(0, first - part.most), last - part.least
                yield self._chunk(part.rows, slot, (0, cells), ages, span)

    def _width(self, cells: int, rows: int) -> int:
        return min(256, max(16, CHUNK_BYTES // (4 * self.num_heads * max(cells, 1) * rows)))

    def _chunk(
        self, rows: tuple[int, int], slot: int, cells: tuple[int, int], ages: Tensor, span: tuple[int, int]
    ) -> Chunk:
        first, count = cells
        seen = min(count, -(-self.grid.count(span[1]) // CELL_STEP) * CELL_STEP)
        return Chunk(
            rows=slice(*rows),
            queries=slice(slot, slot + ages.shape[1]),
            cells=slice(first, first + seen),
            ages=ages,
            least=min(seen, self.grid.count(span[0])),
            longest=span[1],
        )

    def tiles(self) -> Iterator[Tiles]:
        """Yield the chunks as tiles over cells, for the backward."""
        group = self.num_heads // self.num_kv_heads

        for chunk in self.chunks():
            if not chunk.num_cells:
                continue

            visible = self.grid.visible(chunk.num_cells, chunk.ages)
            for head in range(self.num_kv_heads):
                yield Tiles(
                    rows=(chunk.rows.start, chunk.rows.stop),
                    head=head,
                    heads=(head * group, (head + 1) * group),
                    begin=chunk.queries.start,
                    count=1,
                    width=chunk.ages.shape[1],
                    keys=(chunk.cells.start, chunk.cells.stop),
                    visible=visible,
                )

    def forward(
        self, q: Tensor, ck: Tensor, cv: Tensor | None, normaliser: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return o, lse (None without values) and the block lists (None without a rule)."""
        dtype = accumulate_dtype(q.dtype)

        o = None if cv is None else q.new_zeros(*q.shape[:3], cv.shape[3])
        lse = None if cv is None else q.new_full(q.shape[:3], -torch.inf, dtype=dtype)

        indices = None
        if self.rule is not None:
            lists = q.shape[2] if self.rule.per_head else ck.shape[2]
            indices = torch.full((q.shape[0], lists, q.shape[1], self.size), -1, device=q.device)

        ck, values, bad = split_non_finite(ck, ck if cv is None else cv)

        keys = ck.to(dtype).transpose(1, 2)
        if q.shape[0] > 1:
            keys = keys.contiguous()  # rows and heads in one dimension

        scratch = self.scratch(dtype)

        for chunk in self.chunks():
            rows = chunk.rows
            queries = chunk.queries
            cells = chunk.cells

            p, part_lse = self.probabilities(q[rows, queries].to(dtype), keys[rows, :, cells], chunk, scratch)

            if o is not None and lse is not None and chunk.num_cells:
                part = torch.matmul(p.flatten(2, 3).to(q.dtype), values[rows, cells].transpose(1, 2))
                o[rows, queries] = part.unflatten(2, p.shape[2:4]).permute(0, 3, 1, 2, 4).flatten(2, 3)
                lse[rows, queries] = part_lse.permute(0, 3, 1, 2).flatten(2, 3)
                if bad is not None:
                    self.poison(o[rows, queries], lse[rows, queries], bad[rows, cells], chunk.ages)

            if indices is not None:
                if normaliser is not None:
                    heads = normaliser[rows, queries].unflatten(2, (self.num_kv_heads, -1))
                    p = renormalise(p, part_lse, heads.permute(0, 2, 3, 1))
                indices[rows, :, queries] = pad_lists(self.choose(p, chunk), self.size)
        return o, lse, indices

    def scratch(self, dtype: torch.dtype) -> Tensor:
        """Return one buffer for the scores and the probabilities of any chunk.

        Chunks grow along the sequence, so allocating each one anew would fragment memory.
        """
        sizes = ((c.rows.stop - c.rows.start) * c.num_cells * c.ages.shape[1] for c in self.chunks())
        return torch.empty(2, self.num_heads * max(sizes, default=0), dtype=dtype, device=self.device)

    def probabilities(self, q: Tensor, keys: Tensor, chunk: Chunk, scratch: Tensor) -> tuple[Tensor, Tensor]:
        """Return p ``[R, H, g, W, C]`` (0 where invisible) and lse ``[R, H, g, W]`` of one chunk.

        Args:
            q: ``[R, W, HQ, D]``.
            keys: ``[R, H, C, D]``.
            chunk: Where they are.
            scratch: See :meth:`scratch`.
        """
        count = q.shape[0]
        width = q.shape[1]
        cells = keys.shape[2]

        rows = (
            q.mul(self.scale).unflatten(2, (self.num_kv_heads, -1)).permute(0, 2, 3, 1, 4)
        )  # [R, H, g, W, D]

        if cells == 0:
            return rows.new_zeros(*rows.shape[:4], 0), rows.new_full(rows.shape[:4], -torch.inf)

        room = scratch[:, : count * self.num_heads * width * cells].view(
            2, count * self.num_kv_heads, -1, cells
        )
        torch.bmm(rows.flatten(2, 3).flatten(0, 1), keys.flatten(0, 1).mT, out=room[0])
        scores = room[0].view(*rows.shape[:4], cells)

        # Only the last cells differ between the queries of a chunk.
        ages = chunk.ages
        fewest = chunk.least
        hidden = ~self.grid.visible(cells, ages, fewest)[:, None, None]  # [R or 1, 1, 1, W, C]
        scores[..., fewest:].masked_fill_(hidden, -torch.inf)

        p = torch.softmax(scores, -1, out=room[1].view(scores.shape))
        lse = scores.amax(-1) - p.amax(-1).log()

        # Queries before the first complete cell see none.
        if fewest == 0:
            blind = (ages < self.grid.width)[:, None, None]
            p.masked_fill_(blind[..., None], 0.0)
            lse.masked_fill_(blind, -torch.inf)
        return p, lse

    def choose(self, p: Tensor, chunk: Chunk) -> Tensor:
        """Return the blocks of one chunk, ``[R, H or HQ, W, S']``, from p ``[R, H, g, W, C]``."""
        rule = self.rule
        assert rule is not None
        num_blocks = (max(1, chunk.longest) - 1) // rule.block_size + 1

        size = min(self.size, num_blocks)
        if size == num_blocks:
            lists = p.shape[1] * p.shape[2] if rule.per_head else p.shape[1]
            score = p.new_empty(p.shape[0], lists, p.shape[3], num_blocks)
        else:
            choosers = p.flatten(1, 2) if rule.per_head else p.sum(2)
            score = block_scores(choosers, num_blocks, self.grid, rule)
        return top_blocks(score, chunk.ages[:, None, :, None], size, rule)

    def poison(self, o: Tensor, lse: Tensor, bad: Tensor, ages: Tensor) -> None:
        """Set the queries that see a non-finite cell (``bad [R, C, H]``) to NaN."""
        visible = self.grid.visible(bad.shape[1], ages)  # [R or 1, W, C]
        seen = (visible[..., None] & bad[:, None]).any(2)  # [R, W, H]

        seen = seen.repeat_interleave(self.num_heads // self.num_kv_heads, 2)
        o.masked_fill_(seen[..., None], torch.nan)
        lse.masked_fill_(seen, torch.nan)


def pad_lists(lists: Tensor, size: int) -> Tensor:
    """Pad ``[..., S']`` with -1 to ``[..., size]``."""
    return torch.nn.functional.pad(lists, (0, size - lists.shape[-1]), value=-1)
