"""Compressed attention and block choice for a few queries.

Nothing here depends on the value of a tensor, so a compiled graph can take ``layout.offset`` as a tensor;
the cells are then the whole buffer of a static cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_convert.kernels.common.checks import accumulate_dtype
from nsa_convert.kernels.common.products import score_product
from nsa_convert.kernels.compressed.cells import CellGrid, renormalise
from nsa_convert.kernels.compressed.topk import block_scores, top_blocks
from nsa_convert.patterns import BlockTopK, SequenceLayout


def decode_cells(
    q: Tensor,
    ck: Sequence[Tensor],
    cv: Tensor | None,
    grid: CellGrid,
    rule: BlockTopK | None,
    layout: SequenceLayout,
    scale: float,
    normaliser: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See :func:`nsa_convert.kernels.compressed.compressed_attention`; ``normaliser`` is its lse argument.

    ``ck`` are the parts of the cell keys, which lie side by side along their last dimension.
    """
    num_queries, (num_cells, num_kv_heads) = q.shape[1], ck[0].shape[1:3]
    capacity = (num_cells - 1) * grid.stride + grid.width + grid.stride - 1  # tokens these cells can cover
    complete = num_cells

    # With the offset as a number the complete cells can be counted on the host.
    if not isinstance(layout.offset, Tensor):
        capacity = layout.offset + num_queries - (0 if layout.start is None else int(layout.start.min()))
        complete = min(complete, grid.count(capacity))
        if complete == 0:
            num_cells = 0
            ck = [x[:, :0] for x in ck]
            cv = None if cv is None else cv[:, :0]

    ages = None  # [B or 1, TQ]; None where every query sees the complete cells
    if num_queries > 1 or layout.start is not None or isinstance(layout.offset, Tensor):
        ages = layout.ages(num_queries, q.device)

    p, lse = _probabilities(q, ck, grid, ages, complete, scale)  # [B, H, TQ, g, C], [B, H, TQ, g]

    indices = None
    if rule is not None:
        num_blocks = max(1, -(-capacity // rule.block_size))
        size = min(rule.num_blocks, num_blocks)

        # Every block is chosen then: only the shape of the scores matters.
        if size == num_blocks:
            lists = q.shape[2] if rule.per_head else num_kv_heads
            score = p.new_empty(q.shape[0], lists, num_queries, num_blocks)
        else:
            if normaliser is not None:
                heads = normaliser.unflatten(2, (num_kv_heads, -1)).transpose(1, 2)  # [B, H, TQ, g]
                p = renormalise(p, lse, heads)
            choosers = p.transpose(2, 3).flatten(1, 2) if rule.per_head else p.sum(3)
            score = block_scores(choosers, num_blocks, grid, rule)

        indices = top_blocks(score, None if ages is None else ages[:, None, :, None], size, rule)

    if cv is None:
        return None, None, indices

    cv = cv.transpose(1, 2)  # as a cache holds it

    # Queries that see a cell that is not finite become NaN, the others must not.
    if num_queries > 1:
        assert ages is not None
        bad = ~cv.isfinite().all(-1)  # [B, H, C]
        cv = cv.masked_fill(bad[..., None], 0.0)
        sees = (grid.visible(num_cells, ages)[:, None] & bad[:, :, None]).any(-1)[..., None]  # [B, H, TQ, 1]
        lse = lse.masked_fill(sees, torch.nan)
        p = p.masked_fill(sees[..., None], torch.nan)

    p = p.flatten(2, 3).to(q.dtype)
    o = torch.matmul(p, cv)

    if num_queries == 1:
        if ages is not None or complete < num_cells:
            ages = torch.full((1, 1), capacity, device=q.device) if ages is None else ages
            o = _without_hidden(o, p, cv, grid, ages)
        return o.flatten(1, 2)[:, None], lse.flatten(1, 3)[:, None], indices

    o = o.unflatten(2, (num_queries, -1))
    return o.permute(0, 2, 1, 3, 4).flatten(2, 3), lse.permute(0, 2, 1, 3).flatten(2, 3), indices


def _probabilities(
    q: Tensor, ck: Sequence[Tensor], grid: CellGrid, ages: Tensor | None, complete: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return p and lse over the whole buffer of cells: a product with a slice of it would copy the slice."""
    num_queries = q.shape[1]
    dtype = accumulate_dtype(q.dtype)
    rows = q.unflatten(2, (ck[0].shape[2], -1)).transpose(1, 2)  # [B, H, TQ, g, E]

    num_cells = ck[0].shape[1]
    if num_cells == 0:
        shape = rows.shape[:4]
        return q.new_zeros(*shape, 0, dtype=dtype), q.new_full(shape, -torch.inf, dtype=dtype)

    # Each part of the keys meets its part of the queries; the scores are the sum of the products.
    pairs = zip(rows.flatten(2, 3).split([part.shape[3] for part in ck], -1), ck, strict=True)
    # A cache holds its cells head by head.
    first, *others = (score_product(row, part.transpose(1, 2), scale) for row, part in pairs)
    scores = sum(others, first).unflatten(2, (num_queries, -1))

    if ages is None:
        scores[..., complete:] = -torch.inf
        return _softmax(scores)

    # The lowest finite number, not -inf: the softmax of a row without cells must not be NaN.
    visible = grid.visible(num_cells, ages)[:, None, :, None]  # [B or 1, 1, TQ, 1, C]
    scores = torch.where(visible, scores, torch.finfo(dtype).min)
    p, lse = _softmax(scores)
    blind = (ages < grid.width)[:, None, :, None]
    return p.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -torch.inf)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return p and lse over the last dimension, which has a finite score."""
    if not torch.compiler.is_compiling():
        p = scores.softmax(-1)
        return p, scores.amax(-1) - p.amax(-1).log()

    # Torch's softmax divides every element, and a graph does so again wherever p is read.
    most = scores.amax(-1, keepdim=True)
    weights = (scores - most).exp()
    total = weights.sum(-1, keepdim=True)
    return weights * total.reciprocal(), (most + total.log()).squeeze(-1)


def _without_hidden(o: Tensor, p: Tensor, cv: Tensor, grid: CellGrid, ages: Tensor) -> Tensor:
    """Recompute o without hidden cells if one that is not finite reached it (``0 * NaN`` is NaN).

    Args:
        o: ``[B, H, g, DV]``, p times the values of all cells.
        p: ``[B, H, g, C]``, 0 for hidden cells.
        cv: ``[B, H, C, DV]``.
        grid: Cell sizes.
        ages: ``[B or 1, 1]``, tokens each query sees.
    """

    def again(o: Tensor, p: Tensor, cv: Tensor, ages: Tensor) -> Tensor:
        hidden = ~grid.visible(cv.shape[2], ages)[..., None]  # [B or 1, 1, C, 1]
        return torch.matmul(p, cv.masked_fill(hidden, 0.0))

    if o.device.type != "cpu":  # the host does not wait for a value there
        return again(o, p, cv, ages)

    fine = o.isfinite().all()
    if torch.compiler.is_compiling():
        return torch.cond(fine, lambda o, *_: o.clone(), again, (o, p, cv, ages))
    return o if fine else again(o, p, cv, ages)
