"""What the last queries of a prompt attend to, by key and by distance."""

from __future__ import annotations

import torch
from torch import Tensor


def last_attention(q: Tensor, k: Tensor, count: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the mean dense attention of the last queries, summed along columns and along diagonals.

    One key head at a time, so that ``[B, G, count, TK]`` is the most that is held.

    Args:
        q: ``[B, TQ, HQ, D]``; the last query is the last key.
        k: ``[B, TK, H, D]``.
        count: How many last queries, at most TQ are taken.
        scale: Factor on the scores.

    Returns:
        ``(columns, diagonals)``, each ``[B, HQ, TK]`` float32 or float64 with rows that sum to 1: by the slot
        of the key, and by how many tokens the key lies before the query.
    """
    # How far each key lies before each of the last queries; negative in their future.
    q = q[:, -count:].unflatten(2, (k.shape[2], -1))  # [B, R, H, G, D]
    rows = q.shape[1]
    total = k.shape[1]
    slot = torch.arange(total, device=q.device)
    age = torch.arange(total - rows, total, device=q.device)[:, None] - slot  # [R, TK]

    columns = []
    diagonals = []
    for head in range(k.shape[2]):
        scores = torch.matmul(q[:, :, head].transpose(1, 2), k[:, None, :, head].mT)  # [B, G, R, TK]

        scores = scores if scores.dtype == torch.float64 else scores.float()
        p = (scores * scale).masked_fill(age < 0, -torch.inf).softmax(-1) / rows

        columns.append(p.sum(2))
        diagonals.append(_by_distance(p).sum(2))

    return torch.cat(columns, 1), torch.cat(diagonals, 1)


def _by_distance(p: Tensor) -> Tensor:
    """Return ``[B, G, R, TK]`` with the columns of each row ordered by how far the key lies before the query.

    Backwards, row r begins with its R - 1 - r later keys: a stride that is one shorter than a row skips them.
    """
    rows, total = p.shape[2:]
    backwards = torch.nn.functional.pad(p.flip(-1), (0, rows)).contiguous()
    strides = (*backwards.stride()[:2], total + rows - 1, 1)
    return backwards.as_strided(p.shape, strides, rows - 1)
