"""Dense causal attention that also returns its lse, and that can start in the middle of a sequence."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nsa_convert.kernels.dense.segments import Segment, segments
from nsa_convert.kernels.dense.tiles import Tiles, attend_tiles
from nsa_convert.patterns import SequenceLayout

TILE_WIDTH = 256


def attend_causal(
    q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Return ``(o [B, TQ, HQ, D], lse [B, TQ, HQ])`` of dense causal attention in O(T) memory."""
    parts = list(segments(layout, q.shape[0], q.shape[1], k.shape[1]))
    group = q.shape[2] // k.shape[2]

    def plan() -> Iterator[Tiles]:
        for segment in parts:
            for head in range(k.shape[2]):
                yield from _head_tiles(segment, head, group, q.device)

    return attend_tiles(q, k, v, plan, scale)


def _head_tiles(segment: Segment, head: int, group: int, device: torch.device) -> Iterator[Tiles]:
    first_query, last_query = segment.queries
    for begin in range(first_query, last_query, TILE_WIDTH):
        width = min(TILE_WIDTH, last_query - begin)
        position = segment.offset + begin - first_query
        length = min(segment.num_keys, position + width)
        queries = torch.arange(position, position + width, device=device)
        visible = torch.arange(length, device=device) <= queries[:, None]
        yield Tiles(
            row=segment.row,
            head=head,
            heads=(head * group, (head + 1) * group),
            begin=begin,
            count=1,
            width=width,
            keys=(segment.keys[0], segment.keys[0] + length),
            visible=visible[None],
        )
