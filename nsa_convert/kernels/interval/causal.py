"""Dense causal attention that also returns its lse, and that can start in the middle of a sequence."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nsa_convert.kernels.common.segments import Segment, row_groups, segments
from nsa_convert.kernels.common.tiles import TilePlan, Tiles, attend_tiles
from nsa_convert.patterns import SequenceLayout

TILE_WIDTH = 256


def attend_causal(
    q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Return ``(o [B, TQ, HQ, D], lse [B, TQ, HQ])`` of dense causal attention in O(T) memory."""
    return attend_tiles(q, k, v, plan_causal(q, k, layout), scale)


def plan_causal(q: Tensor, k: Tensor, layout: SequenceLayout) -> TilePlan:
    """Return the tiles of dense causal attention of ``q [B, TQ, HQ, D]`` to ``k [B, TK, H, D]``."""
    if layout.cu_seqlens is None:
        return lambda: _batch_tiles(q, k, layout)
    parts = list(segments(layout, q.shape[0], q.shape[1], k.shape[1]))
    group = q.shape[2] // k.shape[2]

    def plan() -> Iterator[Tiles]:
        for segment in parts:
            for head in range(k.shape[2]):
                yield from _head_tiles(segment, head, group, q.device)

    return plan


def _batch_tiles(q: Tensor, k: Tensor, layout: SequenceLayout) -> Iterator[Tiles]:
    """Yield tiles of all rows at once: what a batch costs in calls does not grow with its rows."""
    offset = int(layout.offset)
    num_queries = q.shape[1]
    num_keys = k.shape[1]

    group = q.shape[2] // k.shape[2]
    mask_bytes = min(TILE_WIDTH, num_queries) * num_keys * (1 + q.element_size())

    for part in row_groups(layout, q.shape[0], mask_bytes):
        first = max(0, part.least - offset)  # queries before it are padding in every row

        for begin in range(first, num_queries, TILE_WIDTH):
            width = min(TILE_WIDTH, num_queries - begin)

            positions = torch.arange(offset + begin, offset + begin + width, device=q.device)
            end = min(num_keys, offset + begin + width)
            if end <= part.least:
                continue
            keys = torch.arange(part.least, end, device=q.device)

            visible, alive = part.hide_padding((keys <= positions[:, None])[None], keys)

            for head in range(k.shape[2]):
                yield Tiles(
                    rows=part.rows,
                    head=head,
                    heads=(head * group, (head + 1) * group),
                    begin=begin,
                    count=1,
                    width=width,
                    keys=(part.least, end),
                    visible=visible,
                    alive=alive,
                )


def _head_tiles(segment: Segment, head: int, group: int, device: torch.device) -> Iterator[Tiles]:
    first_query, last_query = segment.queries

    for begin in range(first_query, last_query, TILE_WIDTH):
        width = min(TILE_WIDTH, last_query - begin)

        position = segment.offset + begin - first_query
        length = min(segment.num_keys, position + width)

        queries = torch.arange(position, position + width, device=device)
        visible = torch.arange(length, device=device) <= queries[:, None]

        yield Tiles(
            rows=(segment.row, segment.row + 1),
            head=head,
            heads=(head * group, (head + 1) * group),
            begin=begin,
            count=1,
            width=width,
            keys=(segment.keys[0], segment.keys[0] + length),
            visible=visible[None],
        )
