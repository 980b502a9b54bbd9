"""Compressed attention and block choice exactly as the formulas, for tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_convert.kernels.attention.reference import masked_softmax_attention
from nsa_convert.kernels.common.segments import segments
from nsa_convert.kernels.compressed.cells import CellGrid, join_parts, renormalise
from nsa_convert.patterns import BlockTopK, SequenceLayout


def attend_cells(
    q: Tensor,
    parts: Sequence[Tensor],
    cv: Tensor | None,
    grid: CellGrid,
    rule: BlockTopK | None,
    layout: SequenceLayout,
    scale: float,
    normaliser: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See :func:`nsa_convert.kernels.compressed.decode.decode_cells`."""
    ck = join_parts(parts)
    if layout.cu_seqlens is not None:
        return _attend_documents(q, ck, cv, grid, rule, layout, scale, normaliser)

    mask = grid.visible(ck.shape[1], layout.ages(q.shape[1], q.device))  # [B or 1, TQ, C]
    o, lse, p = masked_softmax_attention(q, ck, ck if cv is None else cv, mask[:, None], scale)

    indices = None
    if rule is not None:
        weighed = normaliser if normaliser is None else normaliser.transpose(1, 2)
        p = renormalise(p.detach(), lse.detach().transpose(1, 2), weighed)
        indices = choose_blocks(p, ck.shape[2], grid, rule, layout)
    return (None, None, indices) if cv is None else (o, lse, indices)


def choose_blocks(
    p: Tensor, num_kv_heads: int, grid: CellGrid, rule: BlockTopK, layout: SequenceLayout
) -> Tensor:
    """Turn cell probabilities into block lists.

    Args:
        p: ``[B, HQ, TQ, C]`` probabilities, 0 for invisible cells.
        num_kv_heads: H.
        grid: Cell sizes.
        rule: Block budget, forced blocks and reduction.
        layout: Position of the queries and padding (not packed).

    Returns:
        ``[B, H, TQ, S]`` int64, ascending, -1 at the end where fewer blocks exist; HQ lists per head.
    """
    group_p = p if rule.per_head else p.unflatten(1, (num_kv_heads, -1)).sum(2)  # eq. 10, [B, H or HQ, TQ, C]

    last = layout.ages(p.shape[2], p.device) - 1  # [B or 1, TQ]
    own = last.div(rule.block_size, rounding_mode="floor")[:, None, :, None]  # the query's own block
    num_blocks = max(1, int(own.max()) + 1 if own.numel() else 0)

    # The cells that overlap each block
    first, weights = rule.cell_weights(grid.width, grid.stride)
    per_block = rule.block_size // grid.stride
    cell = torch.arange(num_blocks, device=p.device)[:, None] * per_block + first
    cell = cell + torch.arange(len(weights), device=p.device)  # [NB, W]
    inside = (cell >= 0) & (cell < p.shape[3])

    parts = (
        group_p[..., cell.clamp(0, max(p.shape[3] - 1, 0))]
        if p.shape[3]
        else group_p.new_zeros(*group_p.shape[:3], *cell.shape)
    )
    parts = parts.masked_fill(~inside, 0.0)

    if rule.reduce == "sum":
        score = (parts * parts.new_tensor(weights)).sum(-1)
    else:
        score = parts.amax(-1)

    # Forced blocks come first, later ones never.
    block = torch.arange(num_blocks, device=p.device)
    forced = (block < rule.num_sink_blocks) | (block > own - rule.num_local_blocks)
    score = score.masked_fill(forced, torch.inf).masked_fill(block > own, -torch.inf)

    # A stable descending sort keeps the lower block first among equal scores.
    order = score.sort(dim=-1, descending=True, stable=True)
    size = min(rule.num_blocks, num_blocks)
    kept = order.indices[..., :size].masked_fill(order.values[..., :size] == -torch.inf, num_blocks)
    kept = kept.sort(-1).values
    return kept.masked_fill(kept == num_blocks, -1)


def _attend_documents(
    q: Tensor,
    ck: Tensor,
    cv: Tensor | None,
    grid: CellGrid,
    rule: BlockTopK | None,
    layout: SequenceLayout,
    scale: float,
    normaliser: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    parts = []
    first = grid.first_cells(layout).tolist()

    for segment in segments(layout, 1, q.shape[1], q.shape[1] + int(layout.offset)):
        queries = slice(*segment.queries)
        begin = first[segment.document]
        cells = slice(begin, begin + grid.count(segment.num_keys))
        values = None if cv is None else cv[:, cells]
        own = None if normaliser is None else normaliser[:, queries]
        alone = SequenceLayout(offset=segment.offset)
        parts.append(attend_cells(q[:, queries], (ck[:, cells],), values, grid, rule, alone, scale, own))

    outputs, lses, indices = zip(*parts, strict=True)
    merged = None if rule is None else join_indices(indices)
    if cv is None:
        return None, None, merged
    return torch.cat(outputs, 1), torch.cat(lses, 1), merged


def join_indices(indices: tuple[Tensor, ...]) -> Tensor:
    """Join the block lists of packed documents along the queries, padded with -1 to one length."""
    size = max(x.shape[-1] for x in indices)
    padded = [torch.nn.functional.pad(x, (0, size - x.shape[-1]), value=-1) for x in indices]
    return torch.cat(padded, 2)
