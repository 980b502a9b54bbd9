"""Sinks and a sliding window, as tiles of neighbouring queries."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nsa_convert.kernels.common.segments import Segment, row_groups, segments
from nsa_convert.kernels.common.tiles import TilePlan, Tiles, attend_tiles
from nsa_convert.patterns import SequenceLayout, SinkWindow

CHUNK_BYTES = 1 << 23
"""Keys and values gathered at once."""


def attend_window(
    q: Tensor, k: Tensor, v: Tensor, pattern: SinkWindow, layout: SequenceLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Return ``(o [B, TQ, HQ, D], lse [B, TQ, HQ])``; time and memory O(T * window_size)."""
    return attend_tiles(q, k, v, plan_window(q, k, pattern, layout), scale)


def plan_window(q: Tensor, k: Tensor, pattern: SinkWindow, layout: SequenceLayout) -> TilePlan:
    """Return the tiles of a window for ``q [B, TQ, HQ, D]`` and ``k [B, TK, H, D]``."""
    group = q.shape[2] // k.shape[2]
    width = max(16, min(256, pattern.window_size // 4))

    # Without sinks, or with sinks next to the window, the keys of a tile are one run of slots.
    one_run = pattern.num_sinks == 0 or k.shape[1] <= pattern.budget + width

    if layout.cu_seqlens is None and q.shape[0] > 1 and one_run:
        return lambda: _batch_tiles(q, k, pattern, layout, width)

    parts = list(segments(layout, q.shape[0], q.shape[1], k.shape[1]))

    def plan() -> Iterator[Tiles]:
        for segment in parts:
            for begin, count, size in _runs(segment, width, pattern, k):
                keys, visible = _keys(segment, begin, count, size, pattern, q.device)
                inside = segment.offset + begin - segment.queries[0] + count * size <= segment.num_keys

                for head in range(k.shape[2]):
                    yield Tiles(
                        rows=(segment.row, segment.row + 1),
                        head=head,
                        heads=(head * group, (head + 1) * group),
                        begin=begin,
                        count=count,
                        width=size,
                        keys=keys,
                        visible=visible,
                        alive=None if inside else visible.any(-1),
                    )

    return plan


def _batch_tiles(
    q: Tensor, k: Tensor, pattern: SinkWindow, layout: SequenceLayout, width: int
) -> Iterator[Tiles]:
    """Yield tiles of all rows at once: what a batch costs in calls does not grow with its rows."""
    offset = int(layout.offset)
    num_queries = q.shape[1]
    num_keys = k.shape[1]

    group = q.shape[2] // k.shape[2]
    band = min(num_keys, pattern.budget + width)

    for part in row_groups(layout, q.shape[0], width * band * (1 + q.element_size())):
        for begin in range(max(0, part.least - offset), num_queries, width):
            size = min(width, num_queries - begin)

            # The tile's queries are the slots [first, first + size), its keys the slots [oldest, end).
            first = offset + begin
            end = min(num_keys, offset + begin + size)
            oldest = part.least if pattern.num_sinks else max(part.least, first - pattern.window_size + 1)
            if end <= oldest:
                continue

            position = torch.arange(first, first + size, device=q.device)[:, None]
            keys = torch.arange(oldest, end, device=q.device)
            visible = ((keys <= position) & (keys > position - pattern.window_size))[None]

            if pattern.num_sinks:
                starts = keys.new_full((1,), part.least) if part.starts is None else part.starts
                visible = visible | (keys <= position) & (keys < starts[:, None, None] + pattern.num_sinks)

            # Padding and slots after the last key
            visible, alive = part.hide_padding(visible, keys)
            if alive is None and first + size > num_keys:
                alive = visible.any(-1)

            for head in range(k.shape[2]):
                yield Tiles(
                    rows=part.rows,
                    head=head,
                    heads=(head * group, (head + 1) * group),
                    begin=begin,
                    count=1,
                    width=size,
                    keys=(oldest, end),
                    visible=visible,
                    alive=alive,
                )


def _runs(segment: Segment, width: int, pattern: SinkWindow, k: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield ``(first query slot, tiles, tile width)``: full tiles in chunks, then the rest."""
    begin, end = segment.queries
    token_bytes = 2 * k.shape[3] * k.element_size()
    step = max(1, CHUNK_BYTES // (token_bytes * (pattern.budget + width)))

    full = (end - begin) // width
    for i in range(0, full, step):
        yield begin + i * width, min(step, full - i), width
    if begin + full * width < end:
        yield begin + full * width, 1, end - begin - full * width


def _keys(
    segment: Segment, begin: int, count: int, width: int, pattern: SinkWindow, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the key slots ``[n, L]`` of each tile and who sees them, ``[n or 1, width, L]``."""
    position = segment.offset + begin - segment.queries[0]  # of the first query in its document
    tile = position + width * torch.arange(count, device=device)[:, None]
    last = position + count * width - 1

    # Keys that some query of a tile has in its window, and the sinks in front of them
    band = min(width + pattern.window_size - 1, last + 1)
    in_band = tile + width - band + torch.arange(band, device=device)  # [n, band]
    num_sinks = min(pattern.num_sinks, last + 1)
    sinks = torch.arange(num_sinks, device=device)
    keys = torch.cat([sinks.expand(count, -1), in_band], 1)

    # Away from both ends every tile looks the same: one mask serves all of them.
    alike = position - pattern.window_size >= num_sinks and last < segment.num_keys
    query = (tile[:1] if alike else tile)[..., None] + torch.arange(width, device=device)[:, None]
    oldest = query - pattern.window_size

    own = in_band[: query.shape[0], None]
    in_window = (own > oldest) & (own <= query) & (own >= 0)
    is_sink = (sinks <= oldest).expand(*in_window.shape[:2], -1)
    visible = torch.cat([is_sink, in_window], 2) & (keys[: query.shape[0], None] < segment.num_keys)
    return keys.clamp(0, segment.num_keys - 1) + segment.keys[0], visible
