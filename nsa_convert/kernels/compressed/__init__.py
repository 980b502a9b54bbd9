"""Attention over compressed cells, and the choice of blocks from its probabilities (NSA eqs. 7-12)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_convert.kernels.common.backend import implementation
from nsa_convert.kernels.common.checks import check_parts, check_qkv, default_scale
from nsa_convert.kernels.compressed.cells import CellGrid
from nsa_convert.kernels.compressed.torch_backend import attend_cells as gathered
from nsa_convert.patterns import DENSE_LAYOUT, BlockSelection, BlockTopK, SequenceLayout


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressedOutput:
    """Result of :func:`compressed_attention`.

    Attributes:
        o: ``[B, TQ, HQ, D]`` in the dtype of q, or None when no values were given.
        lse: ``[B, TQ, HQ]`` float32 (float64 for float64 input), or None when no values were given;
            -inf where no cell is complete yet.
        selection: The chosen blocks, or None when no rule was given.
    """

    o: Tensor | None
    lse: Tensor | None
    selection: BlockSelection | None


def compressed_attention(
    q: Tensor,
    ck: Tensor,
    cv: Tensor | None,
    *,
    width: int,
    stride: int,
    rule: BlockTopK | None = None,
    layout: SequenceLayout = DENSE_LAYOUT,
    scale: float | None = None,
) -> CompressedOutput:
    """Attend to compressed keys and, in the same pass, pick the blocks that got the most attention.

    Cell i of a document stands for its tokens ``i * stride .. i * stride + width - 1`` and is visible to a
    query once its last token is (NSA eq. 7). ``p = softmax(q ck^T)`` is summed over the query heads that
    share a key head (eq. 10), mapped from cells to blocks by ``rule`` (eq. 9), forced blocks are put first,
    future blocks are excluded, and the ``num_blocks`` best are kept; equal scores go to the lower block.
    Gradients flow into q, ck and cv through o and lse; the selection has none.

    Args:
        q: ``[B, TQ, HQ, D]``.
        ck: ``[B, C, H, D]`` compressed keys; with packed documents the cells of all documents one after
            another, ``max(0, (length - width) // stride + 1)`` for each. C may exceed the complete cells.
        cv: ``[B, C, H, D]`` compressed values, or None to score only.
        width: l, tokens in a cell.
        stride: d, tokens between cells; divides ``width`` and ``rule.block_size``.
        rule: How to choose blocks, or None to choose none.
        layout: Position of the queries, padding and packing.
        scale: Factor on the scores; D ** -0.5 by default.

    Returns:
        Output, lse and selection. ``selection.block_indices`` is ``[B, H, TQ, S]`` int64 (int32 on the triton
        backend), or HQ lists where the rule is per head; ascending, -1 at the end where fewer blocks exist,
        with S = min(num_blocks, blocks of the longest document); S may count left padding and spare cells as
        part of the document.

    Raises:
        ValueError: Shapes, dtypes or devices do not agree, or sizes do not divide.
    """
    check_qkv(q, ck, cv)
    grid = CellGrid(width=width, stride=stride)
    o, lse, indices = _run(q, (ck,), cv, grid, rule, layout, scale, None)

    selection = None
    if rule is not None:
        assert indices is not None
        selection = BlockSelection(block_indices=indices, block_size=rule.block_size)
    return CompressedOutput(o=o, lse=lse, selection=selection)


def block_topk(
    q: Tensor,
    ck: Tensor | Sequence[Tensor],
    *,
    width: int,
    stride: int,
    rule: BlockTopK,
    layout: SequenceLayout = DENSE_LAYOUT,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> BlockSelection:
    """Choose blocks from compressed keys without computing an output; see :func:`compressed_attention`.

    Args:
        q: ``[B, TQ, HQ, E]``.
        ck: ``[B, C, H, E]``, or parts of it that would lie side by side along E. While decoding the torch
            backend reads each where it lies; elsewhere they are joined.
        width: l, tokens in a cell.
        stride: d, tokens between cells.
        rule: How to choose.
        layout: Position of the queries, padding and packing.
        scale: Factor on the scores.
        lse: ``[B, TQ, HQ]`` to normalise with, ``p = exp(s - lse)``, in place of the one over the cells; it
            saves a pass over them on the triton backend. It decides only how much each head of a
            group weighs; a head whose lse is -inf has no say.

    Raises:
        ValueError: Shapes, dtypes or devices do not agree, or sizes do not divide.
    """
    parts = (ck,) if isinstance(ck, Tensor) else tuple(ck)
    check_parts(q, parts)

    if lse is not None:
        if lse.shape != q.shape[:3]:
            raise ValueError(f"lse must be {tuple(q.shape[:3])} like the queries, got {tuple(lse.shape)}")
        lse = lse.detach().masked_fill(lse == -torch.inf, torch.inf)

    indices = _run(q, parts, None, CellGrid(width=width, stride=stride), rule, layout, scale, lse)[2]
    assert indices is not None
    return BlockSelection(block_indices=indices, block_size=rule.block_size)


def _run(
    q: Tensor,
    ck: tuple[Tensor, ...],
    cv: Tensor | None,
    grid: CellGrid,
    rule: BlockTopK | None,
    layout: SequenceLayout,
    scale: float | None,
    lse: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the output, its lse and the lists of blocks from the backend of these tensors."""
    if rule is not None:
        grid.check_rule(rule)
    value_dim = None if cv is None else cv.shape[-1]
    run = implementation("compressed.attend_cells", q, gathered, value_dim)
    return run(q, ck, cv, grid, rule, layout, default_scale(q, scale), lse)
