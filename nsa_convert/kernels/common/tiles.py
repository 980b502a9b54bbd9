"""Attention tile by tile: runs of queries, each with its own short list of keys, forward and backward.

Every prefill path of the torch backend is a list of tiles; only the tensors of a few tiles exist at once,
and the backward computes their scores again instead of keeping them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_convert.kernels.common.checks import accumulate_dtype
from nsa_convert.kernels.common.flash import attend_group

SCORE_BYTES = 1 << 24
"""Bytes of scores in one step of the backward; they should stay in the cache of a desktop processor."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """``n`` tiles of ``width`` queries of one key head: neighbours in one row, or the same tile of many rows.

    Attributes:
        rows: ``(begin, end)`` of the batch rows; where there are several, ``count`` is 1.
        head: Key/value head.
        heads: ``(begin, end)`` of the query heads that read it.
        begin: Slot of the first query; tile i of a row holds the queries ``begin + i * width ...``.
        count: Tiles of each row; n is this times the number of rows.
        width: Queries in a tile.
        keys: ``(begin, end)`` slots that every tile reads, or ``[n, L]`` slots, one list for each tile of the
            one row.
        visible: bool ``[n or 1, width, L - free]``, or None when every query sees every listed key.
        alive: bool ``[n or 1, width]``, queries that see a key of ``visible``; None when all do.
        free: Leading listed keys that every query sees; ``visible`` is about those after them.
    """

    rows: tuple[int, int]
    head: int
    heads: tuple[int, int]
    begin: int
    count: int
    width: int
    keys: tuple[int, int] | Tensor
    visible: Tensor | None = None
    alive: Tensor | None = None
    free: int = 0

    @property
    def total(self) -> int:
        """Tiles of all rows."""
        return self.count * (self.rows[1] - self.rows[0])

    def queries(self, x: Tensor) -> Tensor:
        """Return the view ``[n, width, g, ...]`` of a tensor ``[B, TQ, HQ, ...]``."""
        part = x[slice(*self.rows), self.begin : self.begin + self.count * self.width, slice(*self.heads)]
        return part.unflatten(1, (self.count, self.width)).flatten(0, 1)

    def gather(self, x: Tensor) -> Tensor:
        """Return the listed rows ``[n or 1, L, ...]`` of a tensor ``[B, TK, H, ...]``."""
        source = x[slice(*self.rows), :, self.head]
        if isinstance(self.keys, tuple):
            return source[:, self.keys[0] : self.keys[1]]

        return source[0].index_select(0, self.keys.flatten()).unflatten(0, self.keys.shape)

    def scatter_add(self, x: Tensor, values: Tensor) -> None:
        """Add ``[n, L, ...]`` to the listed rows of ``[B, TK, H, ...]``."""
        target = x[slice(*self.rows), :, self.head]
        if isinstance(self.keys, tuple):
            target[:, self.keys[0] : self.keys[1]] += values.unflatten(0, (-1, self.count)).sum(1)
        else:
            target[0].index_add_(0, self.keys.flatten(), values.flatten(0, 1))

    def parts(self, most: int) -> Iterator[Tiles]:
        """Yield the same tiles, at most ``most`` at a time."""
        first, last = self.rows

        # Tiles are either neighbours in one row or the same tile of many rows: cut the queries or the rows.
        for i in range(0, self.total, most):
            n = min(most, self.total - i)
            one = last - first == 1
            yield dataclasses.replace(
                self,
                rows=self.rows if one else (first + i, first + i + n),
                begin=self.begin + i * self.width if one else self.begin,
                count=n if one else 1,
                keys=self.keys if isinstance(self.keys, tuple) else self.keys[i : i + n],
                visible=_rows(self.visible, i, n),
                alive=_rows(self.alive, i, n),
            )


def _rows(x: Tensor | None, begin: int, count: int) -> Tensor | None:
    return x if x is None or x.shape[0] == 1 else x[begin : begin + count]


TilePlan = Callable[[], Iterator[Tiles]]
"""Yields all tiles of a call; asked once by the forward and once by the backward."""


def attend_tiles(q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, scale: float) -> tuple[Tensor, Tensor]:
    """Attend over the tiles of a plan; queries in no tile get o = 0 and lse = -inf.

    Args:
        q: ``[B, TQ, HQ, D]``.
        k: ``[B, TK, H, D]``.
        v: ``[B, TK, H, DV]``.
        plan: The tiles; no query is in two of them.
        scale: Factor on the scores.

    Returns:
        ``(o [B, TQ, HQ, DV], lse [B, TQ, HQ])``, differentiable in q, k and v. A query that sees a key or
        value that is not finite gets NaN; one that does not see it is not touched by it.
    """
    return _TileAttention.apply(q, k, v, plan, scale)


class _TileAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, scale: float
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(q.device.type, enabled=False):
            o, lse = forward_tiles(q, k, v, plan(), scale)
        ctx.save_for_backward(q, k, v, lse)
        ctx.plan = plan
        ctx.scale = scale
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            return *backward_tiles(q, k, v, lse, do, dlse, ctx.plan(), ctx.scale), None, None


def forward_tiles(
    q: Tensor, k: Tensor, v: Tensor, tiles: Iterator[Tiles], scale: float
) -> tuple[Tensor, Tensor]:
    """Run :func:`attend_tiles` without autograd."""
    o = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=accumulate_dtype(q.dtype))

    k, v, bad = split_non_finite(k, v)

    for t in tiles:
        part, part_lse = attend_listed(t, t.queries(q).transpose(1, 2), t.gather(k), t.gather(v), scale)

        if bad is not None:
            seen = sees_bad(t, t.gather(bad))[:, None]
            part = part.masked_fill(seen[..., None], torch.nan)
            part_lse = part_lse.masked_fill(seen, torch.nan)

        t.queries(o).copy_(part.transpose(1, 2))
        t.queries(lse).copy_(part_lse.transpose(1, 2))
    return o, lse


def attend_listed(t: Tiles, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend to the listed keys: without a mask to the leading ones that every query sees, else with one.

    Args:
        t: The tiles.
        q: ``[n, g, width, D]``.
        k: ``[n or 1, L, D]``.
        v: ``[n or 1, L, DV]``.
        scale: Factor on the scores.

    Returns:
        ``(o [n, g, width, DV], lse [n, g, width])``.
    """
    # The keys that every query sees, without a mask.
    free = attend_group(q, k[:, : t.free], v[:, : t.free], None, scale) if t.free else None
    if free is not None and t.free == k.shape[1]:
        return free

    # The other keys, with a mask; a row that sees none of them has undefined results.
    bias = None
    if t.visible is not None:
        bias = torch.zeros_like(t.visible, dtype=q.dtype).masked_fill_(~t.visible, -torch.inf)

    o, lse = attend_group(q, k[:, t.free :], v[:, t.free :], bias, scale)
    if t.alive is not None:
        dead = ~t.alive[:, None]
        o, lse = o.masked_fill(dead[..., None], 0.0), lse.masked_fill(dead, -torch.inf)

    if free is None:
        return o, lse

    # Join both parts: their shares of the softmax are exp(lse_i - total).
    total = torch.logaddexp(free[1], lse)
    weight = torch.exp(lse - total)[..., None]
    return torch.lerp(free[0].to(weight.dtype), o.to(weight.dtype), weight).to(q.dtype), total


def sees_bad(t: Tiles, bad: Tensor) -> Tensor:
    """Return which queries ``[n or 1, width]`` see a key that ``bad [n or 1, L]`` marks."""
    free, masked = bad[:, None, : t.free].any(-1), bad[:, None, t.free :]
    return free | (masked if t.visible is None else masked & t.visible).any(-1)


def split_non_finite(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return k and v with every non-finite entry set to 0, and which tokens had one.

    A masked key must not reach the output, yet ``0 * NaN`` is NaN; so the tiles work on clean tensors and
    the queries that do see such a token are set to NaN afterwards.

    Returns:
        ``(k, v, bad [B, TK, H] or None)``.
    """
    total = k.sum(dtype=torch.float32) + v.sum(dtype=torch.float32)
    if torch.isfinite(total):
        return k, v, None

    fine_k = k.isfinite()
    fine_v = v.isfinite()
    return k.where(fine_k, 0), v.where(fine_v, 0), ~(fine_k.all(-1) & fine_v.all(-1))


def backward_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor,
    tiles: Iterator[Tiles],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; probabilities are recomputed from lse, in float32 or float64."""
    dtype = accumulate_dtype(q.dtype)
    dq = torch.zeros_like(q, dtype=dtype)
    dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (k, v))

    k, v, _ = split_non_finite(k, v)

    # Cut the tiles further, so that the scores of a step fit SCORE_BYTES.
    for group in tiles:
        length = group.keys[1] - group.keys[0] if isinstance(group.keys, tuple) else group.keys.shape[1]
        row_bytes = (group.heads[1] - group.heads[0]) * group.width * max(1, length) * dtype.itemsize
        for t in group.parts(max(1, SCORE_BYTES // row_bytes)):
            tile_grads(t, (q, k, v, do, lse, dlse), (dq, dk, dv), scale)

    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def tile_grads(
    t: Tiles, inputs: tuple[Tensor, ...], grads: tuple[Tensor, Tensor, Tensor], scale: float
) -> None:
    """Add the gradients of a few tiles, from ``(q, k, v, do, lse, dlse)`` to ``(dq, dk, dv)``."""
    dq, dk, dv = grads

    # [n, W * g, ...]
    q, do, lse, dlse = (t.queries(inputs[i]).to(dq.dtype).flatten(1, 2) for i in (0, 3, 4, 5))
    k, v = (t.gather(inputs[i]).to(dq.dtype).expand(t.total, -1, -1) for i in (1, 2))  # [n, L, D]

    # Probabilities from the saved lse; +inf in place of -inf gives rows without keys p = 0.
    p = torch.bmm(q, k.mT).mul_(scale)
    p.sub_(lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]).exp_()
    if t.visible is not None:
        p[..., t.free :].unflatten(1, (t.width, -1)).masked_fill_(~t.visible[:, :, None], 0.0)

    t.scatter_add(dv, torch.bmm(p.mT, do))
    ds = torch.bmm(do, v.mT).mul_(p)

    # A tile holds all keys of its rows, so the row term needs no rounded o; d lse / d score = p joins it.
    ds.addcmul_(p, (ds.sum(-1) - dlse)[..., None], value=-1.0).mul_(scale)

    t.scatter_add(dk, torch.bmm(ds.mT, q))
    t.queries(dq).copy_(torch.bmm(ds, k).unflatten(1, (t.width, -1)))
