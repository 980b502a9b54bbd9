"""Pattern attention for a few queries: only the keys of the pattern are copied out of the cache.

Nothing here depends on the value of a tensor, so a compiled graph can take ``layout.offset`` as a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_convert.kernels.common.fetch import fetch_runs
from nsa_convert.kernels.common.flash import attend_rows
from nsa_convert.patterns import BlockSelection, SequenceLayout, SinkWindow


def decode_blocks(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockSelection, layout: SequenceLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Return ``(o [B, TQ, HQ, D], lse [B, TQ, HQ])``; every query fetches its own blocks."""
    batch, num_queries, num_heads, _ = q.shape
    num_keys, num_kv_heads = k.shape[1:3]

    # One list for every query and every head that fetches
    indices = pattern.block_indices
    if pattern.query_block > 1:
        indices = indices[:, :, torch.arange(num_queries, device=q.device) // pattern.query_block]
    indices = indices.transpose(1, 2)  # [B, TQ, Hs, S]
    lists = max(indices.shape[2], num_kv_heads)  # heads that fetch
    indices = indices.expand(-1, -1, lists, -1)

    # First slot of each listed block
    size = min(pattern.block_size, num_keys)
    wanted = indices * pattern.block_size
    if layout.start is not None:
        wanted = wanted + layout.start[:, None, None, None]

    # The last block may end before its full size: fetch a full run that ends with the keys.
    slots = wanted.clamp(0, num_keys - size)

    rows = torch.arange(batch, device=q.device)[:, None, None, None] if batch > 1 else None
    heads = torch.arange(num_kv_heads, device=q.device)[:, None]
    if lists > num_kv_heads:
        heads = heads.repeat_interleave(lists // num_kv_heads, 0)

    # A run may begin before its block and reach beyond the query: those tokens are masked.
    lead = wanted.masked_fill(indices < 0, num_keys) - slots  # tokens of the run before the block
    token = torch.arange(size, device=q.device)
    visible = token >= lead[..., None]
    own = None
    blind = lead >= size
    if not _only_past(layout, num_queries, num_keys):
        own = layout.positions(num_queries, q.device)[:, None, None, None]
        reach = own[..., 0] - slots
        visible = visible & (token <= reach[..., None])
        blind = blind | (lead > reach)

    runs = fetch_runs(k, v, rows, heads, slots, size, visible, own)
    k, v = (x.flatten(3, 4).flatten(0, 1) for x in runs)

    shape = (batch * num_queries, lists, num_heads // lists, -1)  # the group is on the rows
    visible = visible.flatten(3, 4).flatten(0, 1)[:, :, None]
    blind = blind.all(-1).flatten(0, 1)[..., None]
    o, lse = _attend_masked(q.reshape(shape), k, v, visible, blind, scale)
    return o.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])


def decode_window(
    q: Tensor, k: Tensor, v: Tensor, pattern: SinkWindow, layout: SequenceLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Return ``(o [B, TQ, HQ, D], lse [B, TQ, HQ])``; the queries share one run of keys."""
    num_queries = q.shape[1]
    num_kv_heads = k.shape[2]
    rows = q.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 1, 3, 4)  # [B, H, TQ, g, D]
    group = rows.shape[3]

    # One run of neighbouring keys that are all seen is a slice; otherwise they are fetched.
    if _only_past(layout, num_queries, k.shape[1]) and pattern.num_sinks == 0:
        begin = max(0, k.shape[1] - pattern.window_size)
        k, v = (x[:, begin:].transpose(1, 2) for x in (k, v))
        o, lse = attend_rows(rows.flatten(2, 3), k, v, None, scale)
    else:
        tokens, visible = _window_tokens(pattern, layout, num_queries, k.shape[1], q.device)
        index = torch.arange(k.shape[0], device=q.device)[:, None, None]
        heads = torch.arange(num_kv_heads, device=q.device)[:, None]
        own = layout.positions(1, q.device) if num_queries == 1 else None
        runs = fetch_runs(k, v, index, heads, tokens[:, None], 1, visible[..., None], own)
        k, v = (x.squeeze(3) for x in runs)  # [B, H, L, D]

        if num_queries > 1:
            visible = visible.repeat_interleave(group, 1)
        visible = visible[:, None]  # [B or 1, 1, TQ * g or 1, L]
        o, lse = _attend_masked(rows.flatten(2, 3), k, v, visible, ~visible.any(-1), scale)

    o, lse = (x.unflatten(2, (num_queries, group)) for x in (o, lse))
    return o.permute(0, 2, 1, 3, 4).flatten(2, 3), lse.permute(0, 2, 1, 3).flatten(2, 3)


def _only_past(layout: SequenceLayout, num_queries: int, num_keys: int) -> bool:
    """Return whether the one query is known to be the last key, without padding: then nothing is masked."""
    if isinstance(layout.offset, Tensor) or layout.start is not None:
        return False
    return num_queries == 1 and layout.offset + 1 == num_keys


def _window_tokens(
    pattern: SinkWindow, layout: SequenceLayout, num_queries: int, num_keys: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the slots any query needs ``[B or 1, L]`` and who sees them ``[B or 1, TQ, L]``."""
    positions = layout.positions(num_queries, device)
    starts = (positions.new_zeros(1) if layout.start is None else layout.start)[:, None]

    # The keys in any query's window, and the sinks
    band = min(pattern.window_size + num_queries - 1, num_keys)
    own = positions[-1:] - band + 1 + torch.arange(band, device=device)
    sinks = starts + torch.arange(min(pattern.num_sinks, num_keys), device=device)  # [B or 1, sinks]

    oldest = (positions - pattern.window_size)[:, None]
    in_window = (own > oldest) & (own <= positions[:, None]) & (own >= starts[..., None])
    tokens = torch.cat([sinks, own.expand(sinks.shape[0], -1)], 1)

    # A sink counts as one only where it is not in the window already.
    is_sink = sinks[:, None] <= oldest
    visible = torch.cat([is_sink.expand(-1, num_queries, -1), in_window], 2) & (tokens < num_keys)[:, None]
    return tokens.clamp(0, num_keys - 1), visible


def _attend_masked(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, blind: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend where ``visible`` (broadcasts to ``[N, H, R, L]``).

    Rows in ``blind`` (broadcasts to ``[N, H, R]``) see nothing: they get o = 0 and lse = -inf. Where rows see
    different keys, a key that is not finite reaches only the rows that see it; where all rows see the same
    keys, the caller has made the hidden ones finite already.
    """
    bad = None
    if visible.shape[2] > 1:
        bad = ~(k.isfinite().all(-1) & v.isfinite().all(-1))  # [N, H, L]
        k, v = (x.masked_fill(bad[..., None], 0.0) for x in (k, v))

    bias = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, -torch.inf)
    o, lse = attend_rows(q, k, v, bias, scale)

    if bad is not None:
        sees = (visible & bad[:, :, None]).any(-1)
        o, lse = o.masked_fill(sees[..., None], torch.nan), lse.masked_fill(sees, torch.nan)
    return o.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -torch.inf)
