"""A literal float64 oracle of attention that leaves out values: the walk of a flash kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nsa_convert.patterns import BlockSelection

RUN = 64


def walk(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockSelection, offset: int, scale: float, value_skip: float,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return o, lse and the probability that was left out of each row, ``[B, TQ, HQ]``."""
    o, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -math.inf)
    lost = torch.zeros_like(lse)
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(heads):
            lists = pattern.block_indices[b, h * pattern.block_indices.shape[1] // heads]
            for first in range(0, q.shape[1], rows):
                tile = slice(first, min(first + rows, q.shape[1]))
                chosen = sorted(x for x in lists[first // pattern.query_block].tolist() if x >= 0)
                position = torch.arange(tile.start, tile.stop) + offset
                part = q[b, tile, h], k[b, :, h // group], v[b, :, h // group]
                o[b, tile, h], lse[b, tile, h], lost[b, tile, h] = _tile(
                    *part, chosen, pattern.block_size, position, scale, value_skip
                )
    return o, lse, lost


def _tile(
    q: Tensor, k: Tensor, v: Tensor, chosen: list[int], block_size: int, position: Tensor, scale: float,
    value_skip: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    top, total = q.new_full(q.shape[:1], -math.inf), q.new_zeros(q.shape[:1])
    lost, o = torch.zeros_like(total), torch.zeros_like(q)
    for block in chosen:
        for start in range(block * block_size, (block + 1) * block_size, RUN):
            end = min(start + RUN, (block + 1) * block_size, k.shape[0])
            if start >= end:
                continue
            hidden = torch.arange(start, end)[None] > position[:, None]
            scores = (q @ k[start:end].T * scale).masked_fill(hidden, -math.inf)
            largest = scores.amax(1)
            new = torch.maximum(top, largest)
            base = new.masked_fill(new == -math.inf, 0.0)
            p, shrink = torch.exp(scores - base[:, None]), torch.exp(top - base)
            total, lost, o = total * shrink + p.sum(1), lost * shrink, o * shrink[:, None]
            if (largest - base).amax() >= value_skip:
                o = o + p @ v[start:end]
            else:
                lost = lost + p.sum(1)
            top = new
    some = total.clamp(min=1e-300)
    return o / some[:, None], top + total.log(), lost / some
