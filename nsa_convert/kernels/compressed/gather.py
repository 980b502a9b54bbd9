"""Compressed attention and block choice for runs of queries; no TQ x C tensor is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_convert.kernels.checks import accumulate_dtype
from nsa_convert.kernels.compressed.cells import CellGrid, join_parts, renormalise
from nsa_convert.kernels.compressed.decode import decode_cells
from nsa_convert.kernels.compressed.topk import block_scores, top_blocks
from nsa_convert.kernels.dense.segments import Segment, is_decode, segments
from nsa_convert.kernels.dense.tiles import Tiles, backward_tiles, split_non_finite
from nsa_convert.patterns import BlockTopK, SequenceLayout

CHUNK_BYTES = 1 << 22
"""Scores held at once; small enough to stay in the cache."""

CELL_STEP = 128
"""Chunks read a multiple of this many cells: few different shapes, of each of which oneDNN keeps a kernel."""


def attend(
    q: Tensor, parts: Sequence[Tensor], cv: Tensor | None, grid: CellGrid, rule: BlockTopK | None,
    layout: SequenceLayout, scale: float, normaliser: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See :func:`nsa_convert.kernels.compressed.decode.decode_cells`."""
    if is_decode(layout, q, cv):
        return decode_cells(q, parts, cv, grid, rule, layout, scale, normaliser)
    ck = join_parts(parts)
    if layout.cu_seqlens is None:
        complete = grid.count(int(layout.offset) + q.shape[1])
        ck, cv = (None if x is None else x[:, :complete] for x in (ck, cv))
    run = CompressedRun(q, ck, grid, rule, layout, scale)
    if cv is None:
        with torch.no_grad():
            return None, None, run.forward(q, ck, None, normaliser)[2]
    return _CompressedAttention.apply(q, ck, cv, run)


class _CompressedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, ck: Tensor, cv: Tensor, run: CompressedRun) -> tuple[Tensor | None, ...]:
        with torch.autocast(q.device.type, enabled=False):
            o, lse, indices = run.forward(q, ck, cv)
        ctx.save_for_backward(q, ck, cv, lse)
        ctx.run = run
        if indices is not None:
            ctx.mark_non_differentiable(indices)
        return o, lse, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dlse: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        q, ck, cv, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            return *backward_tiles(q, ck, cv, lse, do, dlse, ctx.run.tiles(), ctx.run.scale), None


class CompressedRun:
    """One call: its documents with their cells, and the loops over them."""

    def __init__(
        self, q: Tensor, ck: Tensor, grid: CellGrid, rule: BlockTopK | None, layout: SequenceLayout,
        scale: float,
    ) -> None:
        self.grid, self.rule, self.scale = grid, rule, scale
        self.num_heads, self.num_kv_heads, self.device = q.shape[2], ck.shape[2], q.device
        first = [0] if layout.cu_seqlens is None else grid.first_cells(layout).tolist()
        self.parts: list[tuple[Segment, int, int]] = []  # segment, its first cell, its cells
        for segment in segments(layout, q.shape[0], q.shape[1], q.shape[1] + int(layout.offset)):
            begin = first[segment.document]
            self.parts.append((segment, begin, min(grid.count(segment.num_keys), ck.shape[1] - begin)))
        longest = max((segment.num_keys for segment, _, _ in self.parts), default=1)
        self.size = 0 if rule is None else min(rule.num_blocks, -(-longest // rule.block_size))

    def chunks(self) -> Iterator[tuple[Segment, int, int, int, Tensor]]:
        """Yield ``(segment, first cell, first query slot, cells, ages [W])``; no query sees more cells."""
        for segment, cell, cells in self.parts:
            row_bytes = 4 * self.num_heads * max(cells, 1)
            width = min(256, max(16, CHUNK_BYTES // row_bytes))
            begin, end = segment.queries
            for slot in range(begin, end, width):
                position = segment.offset + slot - begin
                ages = torch.arange(position + 1, position + 1 + min(width, end - slot), device=self.device)
                seen = self.grid.count(position + len(ages))
                yield segment, cell, slot, min(cells, -(-seen // CELL_STEP) * CELL_STEP), ages

    def tiles(self) -> Iterator[Tiles]:
        """Yield the chunks as tiles over cells, for the backward."""
        group = self.num_heads // self.num_kv_heads
        for segment, cell, slot, seen, ages in self.chunks():
            if not seen:
                continue
            visible = self.grid.visible(seen, ages)
            for head in range(self.num_kv_heads):
                yield Tiles(
                    row=segment.row,
                    head=head,
                    heads=(head * group, (head + 1) * group),
                    begin=slot,
                    count=1,
                    width=len(ages),
                    keys=(cell, cell + seen),
                    visible=visible[None],
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
        keys = ck.to(dtype)
        scratch = self.scratch(dtype)
        for segment, cell, slot, seen, ages in self.chunks():
            row, queries, cells = segment.row, slice(slot, slot + len(ages)), slice(cell, cell + seen)
            p, part_lse = self.probabilities(q[row, queries].to(dtype), keys[row, cells], ages, scratch)
            if o is not None and seen:
                part = torch.matmul(p.flatten(1, 2).to(q.dtype), values[row, cells].transpose(0, 1))
                o[row, queries] = part.unflatten(1, p.shape[1:3]).permute(2, 0, 1, 3).flatten(1, 2)
                lse[row, queries] = part_lse.permute(2, 0, 1).flatten(1, 2)
                if bad is not None:
                    self.poison(o[row, queries], lse[row, queries], bad[row, cells], ages)
            if indices is not None:
                if normaliser is not None:
                    heads = normaliser[row, queries].unflatten(1, (self.num_kv_heads, -1)).permute(1, 2, 0)
                    p = renormalise(p, part_lse, heads)
                indices[row, :, queries] = pad_lists(self.choose(p, ages), self.size)
        return o, lse, indices

    def scratch(self, dtype: torch.dtype) -> Tensor:
        """Return room for the scores and the probabilities of the largest chunk.

        The chunks grow with the sequence: allocating each anew would leave holes that no later one fits in.
        """
        largest = max((seen * len(ages) for _, _, _, seen, ages in self.chunks()), default=0)
        return torch.empty(2, self.num_heads * largest, dtype=dtype, device=self.device)

    def probabilities(self, q: Tensor, keys: Tensor, ages: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
        """Return p ``[H, g, W, C]`` (0 where invisible) and lse ``[H, g, W]`` of one chunk."""
        width, cells = q.shape[0], keys.shape[0]
        rows = q.mul(self.scale).unflatten(1, (self.num_kv_heads, -1)).permute(1, 2, 0, 3)  # [H, g, W, D]
        if cells == 0:
            return rows.new_zeros(*rows.shape[:3], 0), rows.new_full(rows.shape[:3], -torch.inf)
        room = scratch[:, : self.num_heads * width * cells].view(2, self.num_kv_heads, -1, cells)
        torch.bmm(rows.flatten(1, 2), keys.permute(1, 2, 0), out=room[0])
        scores = room[0].unflatten(1, (-1, width))
        # Only the last cells differ between the queries of a chunk.
        fewest = min(cells, self.grid.count(int(ages[0])))
        scores[..., fewest:].masked_fill_(~self.grid.visible(cells, ages, fewest), -torch.inf)
        p = torch.softmax(scores, -1, out=room[1].view(scores.shape))
        lse = scores.amax(-1) - p.amax(-1).log()
        if fewest == 0:
            blind = ages < self.grid.width
            p.masked_fill_(blind[:, None], 0.0)
            lse.masked_fill_(blind, -torch.inf)
        return p, lse

    def choose(self, p: Tensor, ages: Tensor) -> Tensor:
        """Return the blocks of one chunk, ``[H or HQ, W, S']``, from p ``[H, g, W, C]``."""
        rule = self.rule
        assert rule is not None
        num_blocks = (int(ages[-1]) - 1) // rule.block_size + 1
        size = min(self.size, num_blocks)
        if size == num_blocks:
            lists = p.shape[0] * p.shape[1] if rule.per_head else p.shape[0]
            score = p.new_empty(lists, p.shape[2], num_blocks)
        else:
            choosers = p.flatten(0, 1) if rule.per_head else p.sum(1)
            score = block_scores(choosers, num_blocks, self.grid, rule)
        return top_blocks(score, ages[:, None], size, rule)

    def poison(self, o: Tensor, lse: Tensor, bad: Tensor, ages: Tensor) -> None:
        """Set the queries that see a non-finite cell (``bad [C, H]``) to NaN."""
        visible = self.grid.visible(bad.shape[0], ages)
        seen = (visible[..., None] & bad).any(1)  # [W, H]
        seen = seen.repeat_interleave(self.num_heads // self.num_kv_heads, 1)
        o.masked_fill_(seen[..., None], torch.nan)
        lse.masked_fill_(seen, torch.nan)


def pad_lists(lists: Tensor, size: int) -> Tensor:
    """Pad ``[..., S']`` with -1 to ``[..., size]``."""
    return torch.nn.functional.pad(lists, (0, size - lists.shape[-1]), value=-1)
