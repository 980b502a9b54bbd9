"""Losses between a layer's sparse and dense attention, and between its block scores and the true mass.

All of them are computed inside one layer from what it has at hand: the dense attention over the same queries,
keys and values is the teacher, so no second model is needed. Each is a ratio of sums over queries, so that
context-parallel processes can all-reduce numerator and denominator (``total``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from nsa_convert.kernels.compressed.cells import CellGrid, join_parts
from nsa_convert.methods.parts.inputs import AttentionInputs
from nsa_convert.patterns import BlockTopK, SequenceLayout

SAMPLED_QUERIES = 64
"""Queries of each row, at least, for which the true attention mass is computed; all would cost T x T."""
SAMPLED_PAIRS = 1 << 21
"""Pairs of a query and a key of each row up to which more are taken: all of 1448 tokens, 256 of 8192."""


Total = Callable[[Tensor], Tensor]
"""All-reduce (sum) over the context-parallel group: the processes that share the tokens of a row."""


def own(x: Tensor) -> Tensor:
    """Return ``x``: the :data:`Total` of a process that holds whole rows."""
    return x


def counted_mean(values: Tensor, counted: Tensor, total: Total) -> Tensor:
    """Return the mean of the values that count over all processes; 0 where there is none."""
    return total((values * counted).sum()) / total(counted.sum()).clamp(min=1)


def output_error(sparse: Tensor, dense: Tensor, total: Total = own) -> Tensor:
    """Return ``|sparse - sg(dense)|^2 / |sg(dense)|^2`` of each head ``[B, T, HQ, D]``, mean over the heads.

    A scalar of at least float32. Heads count alike, so that a mean over processes that share them is right.
    """
    wide = torch.promote_types(sparse.dtype, torch.float32)
    target = dense.detach().to(wide)
    error = total((sparse.to(wide) - target).square().sum((0, 1, 3)))
    return (error / total(target.square().sum((0, 1, 3))).clamp(min=torch.finfo(wide).tiny)).mean()


def bidirectional_alignment(full: Tensor, sparse: Tensor, total: Total = own) -> Tensor:
    """Return SSA's alignment (arXiv 2511.20102, Alg. 1): ``S(full, sg sparse) + S(sparse, sg full)``.

    S is SmoothL1 with beta 1 and mean reduction. Both halves are needed: one alone diverges (its table 3).
    """
    wide = torch.promote_types(sparse.dtype, torch.float32)
    full = full.to(wide)
    sparse = sparse.to(wide)

    smooth = functional.smooth_l1_loss
    halves = smooth(full, sparse.detach(), reduction="sum") + smooth(sparse, full.detach(), reduction="sum")
    return total(halves) / total(full.new_tensor(full.numel()))


def sample_queries(x: AttentionInputs, draw: int) -> Tensor:
    """Return a sample of the queries of the call, evenly spaced over the row, shifted by the draw; int64.

    Processes that hold a run of the row's queries each draw one sample together.
    """
    row = x.k.shape[1]
    begin = int(x.layout.offset)
    stride = max(1, row // max(SAMPLED_QUERIES, SAMPLED_PAIRS // row))

    # An odd multiplier visits every offset of a stride that is a power of two.
    first = (draw * 7919) % stride

    # The first sampled slot that is not before this process's queries.
    first += max(0, -(-(begin - first) // stride)) * stride
    return torch.arange(first, begin + x.q.shape[1], stride, device=x.q.device) - begin


def attention_mass(q: Tensor, k: Tensor, queries: Tensor, layout: SequenceLayout, scale: float) -> Tensor:
    """Return dense attention probabilities of sampled queries, mean over the heads of a group.

    Args:
        q: ``[B, TQ, HQ, D]``.
        k: ``[B, TK, H, D]``.
        queries: ``[NQ]`` query slots.
        layout: Position of the queries, padding and packing.
        scale: Factor on the scores.

    Returns:
        ``[B, H, NQ, TK]`` without gradient, at least float32; rows of padding are 0.
    """
    with torch.no_grad():
        wide = torch.promote_types(q.dtype, torch.float32)
        picked = q[:, queries].to(wide).unflatten(2, (k.shape[2], -1))  # [B, NQ, H, G, D]
        scores = torch.einsum("bnhgd,bthd->bhgnt", picked, k.to(wide)) * scale

        # Keys of the query's document up to its own slot.
        slots = queries + layout.offset
        starts = layout.row_starts(q.shape[1], q.device)[:, queries]  # [B or 1, NQ]
        keys = torch.arange(k.shape[1], device=q.device)
        visible = (keys <= slots[:, None]) & (keys >= starts[..., None])  # [B or 1, NQ, TK]
        scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
        return scores.softmax(-1).nan_to_num(0.0).mean(2)


def to_blocks(values: Tensor, slots: Tensor, starts: Tensor, block_size: int, num_blocks: int) -> Tensor:
    """Sum values that belong to key slots over the document-relative blocks of each query.

    Args:
        values: ``[B, H, NQ, N]``, 0 where not visible.
        slots: ``[N]`` or ``[B or 1, N]`` slot of each value.
        starts: ``[B or 1, NQ]`` first slot of each query's document.
        block_size: Keys in a block.
        num_blocks: Blocks of the result.

    Returns:
        ``[B, H, NQ, num_blocks]``.
    """
    slots = slots if slots.dim() == 2 else slots[None]
    block = (slots[:, None] - starts[..., None]).clamp(min=0) // block_size  # [B or 1, NQ, N]
    block = block.clamp(max=num_blocks - 1)[:, None].expand(values.shape)
    return values.new_zeros(*values.shape[:3], num_blocks).scatter_add(3, block, values)


def pooled_block_scores(
    q: Tensor,
    ck: Tensor,
    queries: Tensor,
    grid: CellGrid,
    block_size: int,
    layout: SequenceLayout,
    scale: float,
    num_keys: int,
) -> Tensor:
    """Return the compressed attention of sampled queries as scores of blocks (NSA eqs. 8-10), with gradient.

    Args:
        q: ``[B, TQ, HQ, D]``.
        ck: ``[B, C, H, D]`` compressed keys, those of packed documents one after another.
        queries: ``[NQ]`` query slots.
        grid: Cell sizes.
        block_size: Keys in a block.
        layout: Position of the queries, padding and packing.
        scale: Factor on the scores.
        num_keys: TK.

    Returns:
        ``[B, H, NQ, NB]``: each cell's probability, summed over the group, once for every stride of the cell
        that lies in the block.
    """
    # A query scores the complete cells of its document in its past.
    wide = torch.promote_types(q.dtype, torch.float32)
    begins = _cell_slots(grid, layout, min(ck.shape[1], grid.count(num_keys)), q.device)  # [B or 1, C]
    starts = layout.row_starts(q.shape[1], q.device)[:, queries]
    slots = (queries + layout.offset)[:, None]
    visible = (begins[:, None] + grid.width - 1 <= slots) & (begins[:, None] >= starts[..., None])

    # The compressed attention (eq. 8), summed over the heads of a group (eq. 10).
    picked = q[:, queries].to(wide).unflatten(2, (ck.shape[2], -1))
    logits = torch.einsum("bnhgd,bchd->bhgnc", picked, ck[:, : begins.shape[1]].to(wide)) * scale
    hidden = ~visible[:, None, None]
    p = logits.masked_fill(hidden, torch.finfo(wide).min).softmax(-1).masked_fill(hidden, 0.0).sum(2)

    # A cell counts in a block once for each of its strides that begins there (eq. 9).
    num_blocks = -(-num_keys // block_size)
    steps = torch.arange(0, grid.width, grid.stride, device=q.device)
    strides = (begins[..., None] + steps).flatten(1)  # [B or 1, C * l / d]
    return to_blocks(p.repeat_interleave(len(steps), 3), strides, starts, block_size, num_blocks)


def _cell_slots(grid: CellGrid, layout: SequenceLayout, count: int, device: torch.device) -> Tensor:
    """Return the slot of the first token of each of ``count`` cells, ``[B or 1, count]``."""
    if layout.cu_seqlens is not None:
        return grid.packed_cells(layout, count)[0][None]
    cells = grid.stride * torch.arange(count, device=device)
    return cells[None] if layout.start is None else cells + layout.start[:, None]


def score_kl(
    x: AttentionInputs,
    k: Tensor,
    scored: tuple[Tensor, Sequence[Tensor]],
    grid: CellGrid,
    rule: BlockTopK,
    draw: int,
    total: Total = own,
) -> Tensor:
    """Return the KL of the block scores to the dense attention mass of the blocks, on sampled queries.

    Args:
        x: Inputs of the layer.
        k: ``[B, TK, H, D]`` keys of the dense model.
        scored: Queries ``[B, TQ, HQ, E]`` and the parts of the compressed keys whose product is the score,
            ``[B, C, H, E]`` side by side.
        grid: Cell sizes.
        rule: Block size and forced blocks.
        draw: Number of the micro-batch; the sample follows from it.
        total: All-reduce (sum) over the context-parallel group.
    """
    # Dense attention mass by key, and scores by block, of sampled queries.
    queries = sample_queries(x, draw)
    layout = x.layout
    mass = attention_mass(x.q, k, queries, layout, x.scale)
    size = rule.block_size
    q, parts = scored
    scores = pooled_block_scores(q, join_parts(parts), queries, grid, size, layout, x.scale, mass.shape[3])

    # The mass by block too.
    starts = layout.row_starts(x.q.shape[1], k.device)[:, queries]
    keys = torch.arange(mass.shape[3], device=k.device)
    mass = to_blocks(mass, keys, starts, size, scores.shape[3])

    # Blocks that the method is free to choose: neither forced nor in the future.
    last = (queries + layout.offset - starts).div(size, rounding_mode="floor")[:, None, :, None]
    block = torch.arange(scores.shape[3], device=k.device)
    free = (block >= rule.num_sink_blocks) & (block <= last - rule.num_local_blocks)

    return block_kl(mass, scores, free, total)


def block_kl(mass: Tensor, scores: Tensor, candidates: Tensor, total: Total = own) -> Tensor:
    """Return ``KL(mass || scores)`` over the blocks a method is free to choose.

    Args:
        mass: ``[B, H, NQ, NB]`` true attention mass, no gradient.
        scores: ``[B, H, NQ, NB]`` non-negative scores of the method, need not sum to 1.
        candidates: ``[B or 1, 1, NQ, NB]`` blocks that are neither forced nor in the future.
        total: All-reduce (sum) over the context-parallel group.

    Returns:
        Mean over the rows and heads of the mean over the queries with at least two candidates; 0 where there
        is none. A query counts by the mass of its candidates: where it attends to its forced blocks alone, no
        choice matters. Rows count alike, so that it does not matter how they are spread over passes.
    """
    tiny = 1e-9
    free = candidates.expand(mass.shape)
    p = mass.masked_fill(~free, 0.0)
    s = scores.masked_fill(~free, 0.0)

    # A query counts by the mass of its candidates, if it has at least two.
    weight = p.sum(-1) * (free.sum(-1) > 1)  # [B, H, NQ]

    # Distributions over the candidates.
    p = p / p.sum(-1, keepdim=True).clamp(min=tiny)
    s = s / s.sum(-1, keepdim=True).clamp(min=tiny)

    kl = (p * (p.clamp(min=tiny).log() - s.clamp(min=tiny).log())).sum(-1)
    return (total((kl * weight).sum(2)) / total(weight.sum(2)).clamp(min=tiny)).mean()
