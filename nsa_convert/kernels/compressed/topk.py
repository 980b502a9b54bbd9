"""From cell probabilities to lists of blocks: exact ties, and no shape that depends on values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa_convert.kernels.compressed.cells import CellGrid
from nsa_convert.patterns import BlockTopK

_LOW = 0xFFFFFFFF


def block_scores(group_p: Tensor, num_blocks: int, grid: CellGrid, rule: BlockTopK) -> Tensor:
    """Reduce the cells that overlap each block.

    Args:
        group_p: ``[..., C]`` probabilities summed over the group of query heads.
        num_blocks: Blocks to score.
        grid: Cell sizes.
        rule: Reduction.

    Returns:
        ``[..., num_blocks]`` in the dtype of ``group_p``; a block that no cell overlaps scores 0.
    """
    first, weights = rule.cell_weights(grid.width, grid.stride)
    step = rule.block_size // grid.stride
    length = (num_blocks - 1) * step + len(weights)

    # The o-th cell of every block is a strided slice.
    cells = pad(group_p, (-first, length + first - group_p.shape[-1]))
    parts = [cells[..., o : o + (num_blocks - 1) * step + 1 : step] for o in range(len(weights))]

    score = parts[0] * weights[0] if rule.reduce == "sum" else parts[0].clone()
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        if rule.reduce == "sum":
            score.add_(part, alpha=weight)
        else:
            torch.maximum(score, part, out=score)
    return score


def top_blocks(score: Tensor, ages: Tensor | None, size: int, rule: BlockTopK) -> Tensor:
    """Pick the best blocks; forced ones come first, future ones never, equal scores go to the lower block.

    Args:
        score: ``[..., TQ, NB]``, not negative; overwritten.
        ages: Tokens each query sees, broadcasts to ``[..., TQ, 1]``; not positive for a query that sees
            nothing. None when every query is in the last block.
        size: Blocks in a list, at most NB.
        rule: Forced blocks.

    Returns:
        ``[..., TQ, size]`` int64, ascending, -1 at the end where fewer blocks exist.
    """
    num_blocks = score.shape[-1]
    block = torch.arange(num_blocks, device=score.device)

    future = None if ages is None else block * rule.block_size >= ages

    if size == num_blocks:
        return (block if future is None else block.masked_fill(future, -1)).expand(score.shape)

    if future is None or ages is None:
        score[..., : rule.num_sink_blocks] = torch.inf
        score[..., num_blocks - rule.num_local_blocks :] = torch.inf
    else:
        local = (block + rule.num_local_blocks) * rule.block_size >= ages
        forced = (block < rule.num_sink_blocks) | local
        score = score.masked_fill_(forced, torch.inf).masked_fill_(future, -1.0)

    if score.dtype == torch.float32:
        # Non-negative floats are ordered like their bits; the block number below them settles ties.
        key = score.view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(_LOW - block)
        kept = key.topk(size, -1, sorted=False).values
        if future is None:
            return _ascending(_LOW - kept.bitwise_and_(_LOW))
        kept = torch.where(kept < 0, num_blocks, _LOW - kept.bitwise_and(_LOW))
    else:
        order = score.sort(dim=-1, descending=True, stable=True)
        kept = order.indices[..., :size].masked_fill(order.values[..., :size] < 0, num_blocks)

    kept = _ascending(kept)
    return kept.masked_fill_(kept == num_blocks, -1)


def _ascending(lists: Tensor) -> Tensor:
    """Sort short lists along the last dimension; torch's sort would also move the indices."""
    return lists.topk(lists.shape[-1], -1, largest=False).values
