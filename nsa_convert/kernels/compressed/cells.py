"""The grid of compressed cells: sizes, counts and visibility."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_convert.patterns import BlockTopK, SequenceLayout

MAX_EXPONENT = 80.0
"""Scores above a given lse count as this much above it, so that a group's sum stays finite in float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellGrid:
    """Cells of ``width`` tokens, one every ``stride`` tokens.

    Attributes:
        width: l, tokens in a cell.
        stride: d, tokens between the first tokens of neighbouring cells.
    """

    width: int
    stride: int

    def __post_init__(self) -> None:
        if self.stride < 1 or self.width < self.stride or self.width % self.stride:
            raise ValueError(
                f"the cell width must be a positive multiple of the stride, got width {self.width} "
                f"and stride {self.stride}"
            )

    def check_rule(self, rule: BlockTopK) -> None:
        """Raise ValueError unless the stride divides the rule's block size."""
        if rule.block_size % self.stride:
            raise ValueError(
                f"block_size {rule.block_size} is not a multiple of the compression stride {self.stride}"
            )

    def complete(self, length: Tensor) -> Tensor:
        """Return how many cells are complete after ``length`` tokens of a document."""
        return ((length - self.width) // self.stride + 1).clamp(min=0)

    def count(self, length: int) -> int:
        """Return how many cells are complete after ``length`` tokens of a document."""
        return max(0, (length - self.width) // self.stride + 1)

    def first_cells(self, layout: SequenceLayout) -> Tensor:
        """Return the number of each packed document's first cell among the cells of all, ``[N]``."""
        assert layout.cu_seqlens is not None
        counts = self.complete(layout.cu_seqlens.diff())
        return counts.cumsum(0) - counts

    def packed_cells(self, layout: SequenceLayout, count: int) -> tuple[Tensor, Tensor]:
        """Return where the first ``count`` cells of packed documents begin, without reading a value.

        Args:
            layout: The documents.
            count: Cells; those behind the last document's have no meaning.

        Returns:
            The slot of each cell's first token, and its place in the document, ``[count]`` int64 each.
        """
        assert layout.cu_seqlens is not None
        counts = self.complete(layout.cu_seqlens.diff())
        ends = counts.cumsum(0)
        cell = torch.arange(count, device=counts.device)

        document = torch.bucketize(cell, ends, right=True).clamp(max=counts.shape[0] - 1)
        place = (cell - (ends - counts)[document]) * self.stride
        return layout.cu_seqlens[document] + place, place

    def visible(self, num_cells: int, ages: Tensor, first: int = 0) -> Tensor:
        """Return which cells from ``first`` on are complete after ``ages [...]`` tokens, ``[..., cells]``."""
        # Tokens are compared, not cells: a division would run again for every element of a compiled loop.
        ends = torch.arange(first, num_cells, device=ages.device) * self.stride + self.width
        return ends <= ages[..., None]


def renormalise(p: Tensor, own: Tensor, lse: Tensor | None) -> Tensor:
    """Return probabilities with another normaliser: ``exp(s - lse)`` from ``p = exp(s - own)``.

    Args:
        p: ``[..., C]``.
        own: ``[...]`` lse over the cells.
        lse: ``[...]`` to normalise with, or None to return p.
    """
    return p if lse is None else p * (own - lse).clamp(max=MAX_EXPONENT).exp()[..., None]


def join_parts(ck: Sequence[Tensor]) -> Tensor:
    """Return the parts of the cell keys as one tensor ``[B, C, H, E]``."""
    return ck[0] if len(ck) == 1 else torch.cat(list(ck), -1)
