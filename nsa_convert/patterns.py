"""Patterns: which keys a query may see, as small frozen dataclasses of tensors.

A pattern knows no model, no method and no kernel. Letters used in the whole package: B batch, T tokens
(TQ queries, TK keys), HQ query heads, H key/value heads, G = HQ // H, D head dim, S selected items,
C compressed cells, BS block size, N packed documents. Tensors are laid out ``[B, T, H, D]``.

Indices of blocks and tokens are *document-relative*: block 0 starts at the first real token of the row
(after left padding) or of the packed document, so that a padded or packed sequence gives the same answer
as the same sequence alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceLayout:
    """Where the queries sit among the keys, and where each document begins.

    The TQ queries occupy the consecutive key slots ``offset .. offset + TQ - 1``. A query sees only keys
    from the start of its document to its own slot.

    Attributes:
        offset: Slot of the first query; an int, or a 0-dim int64 tensor when a compiled graph must not
            depend on its value (then TK is the capacity of a static cache).
        start: ``[B]`` int64, first real slot of each row (the number of left pads); None means 0.
        cu_seqlens: ``[N + 1]`` int64 on the same device, document boundaries packed into one row
            (B = 1, TK = cu_seqlens[-1]); excludes ``start``. The offset is an int then: the queries are a
            run of the row's tokens, all of them where it is 0 and TQ = TK.
        max_seqlen: Length of the longest packed document, when the caller knows it.
    """

    offset: int | Tensor = 0
    start: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None

    def __post_init__(self) -> None:
        if self.cu_seqlens is not None and self.start is not None:
            raise ValueError("give either cu_seqlens (packed documents) or start (left padding), not both")
        if self.cu_seqlens is not None and isinstance(self.offset, Tensor):
            raise ValueError("packed documents take an offset as an int, not as a tensor")

    def positions(self, num_queries: int, device: torch.device) -> Tensor:
        """Return the key slots of the queries, ``[TQ]`` int64."""
        return torch.arange(num_queries, device=device) + self.offset

    def row_starts(self, num_queries: int, device: torch.device) -> Tensor:
        """Return the slot at which each query's document begins, ``[B or 1, TQ]`` int64."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens[self.document_of(num_queries, device)][None]
        if self.start is not None:
            return self.start[:, None].expand(-1, num_queries)
        return torch.zeros(1, num_queries, dtype=torch.long, device=device)

    def ages(self, num_queries: int, device: torch.device) -> Tensor:
        """Return how many keys dense causal attention shows each query, ``[B or 1, TQ]`` int64."""
        ages = self.positions(num_queries, device) - self.row_starts(num_queries, device) + 1
        return ages.clamp(min=0)

    def document_of(self, num_queries: int, device: torch.device) -> Tensor:
        """Return the number of the packed document of each query, ``[TQ]`` int64."""
        assert self.cu_seqlens is not None
        return torch.bucketize(self.positions(num_queries, device), self.cu_seqlens[1:], right=True)

    def query_bounds(self, num_queries: int) -> Tensor:
        """Return the packed document boundaries among the queries of the call, ``[N + 1]``, from 0 to TQ."""
        assert self.cu_seqlens is not None
        return (self.cu_seqlens - self.offset).clamp(min=0, max=num_queries)

    def documents(self) -> Iterator[tuple[int, int]]:
        """Yield ``(begin, end)`` slots of each non-empty packed document."""
        if self.cu_seqlens is None:
            raise ValueError("this layout holds no packed documents")
        bounds = self.cu_seqlens.tolist()
        for begin, end in zip(bounds, bounds[1:], strict=False):
            if end > begin:
                yield begin, end

    def longest(self, num_keys: int) -> int:
        """Return an upper bound on the keys any query can see.

        It reads the device once if it must; a graph that is being compiled takes the bound of one document.
        """
        if self.cu_seqlens is None:
            return num_keys
        if self.max_seqlen is not None:
            return self.max_seqlen
        if torch.compiler.is_compiling():
            return num_keys
        return int(self.cu_seqlens.diff().max()) if self.cu_seqlens.numel() > 1 else 0

    def visible(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        """Return what dense attention may see: causal and inside the document, bool ``[B or 1, TQ, TK]``."""
        keys = torch.arange(num_keys, device=device)
        causal = keys <= self.positions(num_queries, device)[:, None]
        return causal & (keys >= self.row_starts(num_queries, device)[..., None])


DENSE_LAYOUT = SequenceLayout()
"""Queries and keys are the same unpadded tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SinkWindow:
    """A static band: the first tokens of the document and the last ones before the query.

    Attributes:
        num_sinks: Leading tokens every query sees.
        window_size: Trailing tokens every query sees, *the query's own token included*.
    """

    num_sinks: int = 0
    window_size: int

    def __post_init__(self) -> None:
        if self.num_sinks < 0 or self.window_size < 1:
            raise ValueError(
                f"num_sinks must be >= 0 and window_size >= 1, got {self.num_sinks} and {self.window_size}"
            )

    @property
    def budget(self) -> int:
        """Largest number of keys one query sees."""
        return self.num_sinks + self.window_size

    def to_dense_mask(
        self,
        num_queries: int,
        num_keys: int,
        num_heads: int,
        layout: SequenceLayout = DENSE_LAYOUT,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Return the visible keys, bool ``[B or 1, 1, TQ, TK]`` (the same for every head)."""
        device = torch.device(device)
        keys = torch.arange(num_keys, device=device)
        queries = layout.positions(num_queries, device)[:, None]

        sink = keys < layout.row_starts(num_queries, device)[..., None] + self.num_sinks
        band = (keys > queries - self.window_size) | sink
        return (band & layout.visible(num_queries, num_keys, device))[:, None]

    def density(self, num_queries: int, num_keys: int, layout: SequenceLayout = DENSE_LAYOUT) -> float:
        """Return visible pairs over the pairs dense causal attention computes."""
        device = layout.start.device if layout.start is not None else torch.device("cpu")
        ages = layout.ages(num_queries, device)
        seen = torch.minimum(ages, torch.full_like(ages, self.budget))
        return _ratio(seen, ages)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSelection:
    """Per tile of queries, a list of key blocks; causality is tested token by token inside each block.

    Attributes:
        block_indices: ``[B, Hs, NQ, S]`` int32 or int64, document-relative block numbers, -1 where unused;
            Hs is 1, H or HQ, NQ the number of query tiles. No block may be listed twice in one row.
        block_size: Keys in a block.
        query_block: Queries in a tile; 1 gives every query its own list.
    """

    block_indices: Tensor
    block_size: int
    query_block: int = 1

    @property
    def budget(self) -> int:
        """Largest number of keys one query sees."""
        return self.block_indices.shape[-1] * self.block_size

    def to_dense_mask(
        self,
        num_queries: int,
        num_keys: int,
        num_heads: int,
        layout: SequenceLayout = DENSE_LAYOUT,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Return the visible keys, bool ``[B, HQ, TQ, TK]`` for ``num_heads`` = HQ query heads."""
        device = self.block_indices.device

        # The list of each query, through the tile it is in.
        tiles = query_tiles(num_queries, self.query_block, layout, device)
        indices = self.block_indices.long()[:, :, tiles]  # [B, Hs, TQ, S]

        # Chosen blocks as booleans; unused places write to one more entry, which is cut off.
        num_blocks = -(-num_keys // self.block_size)
        slot = indices.where((indices >= 0) & (indices < num_blocks), num_blocks)
        chosen = torch.zeros(*indices.shape[:3], num_blocks + 1, dtype=torch.bool, device=device)
        chosen = chosen.scatter_(3, slot, True)[..., :num_blocks]

        # Each key looks up the block of the document it lies in.
        starts = layout.row_starts(num_queries, device)  # [B or 1, TQ]
        relative = torch.arange(num_keys, device=device) - starts[..., None]
        block_of = (relative.clamp(min=0) // self.block_size).expand(chosen.shape[0], -1, -1)
        mask = chosen.gather(3, block_of[:, None].expand(-1, chosen.shape[1], -1, -1))

        mask = mask & layout.visible(num_queries, num_keys, device)[:, None]
        return mask.repeat_interleave(num_heads // mask.shape[1], 1)

    def density(self, num_queries: int, num_keys: int, layout: SequenceLayout = DENSE_LAYOUT) -> float:
        """Return visible pairs over the pairs dense causal attention computes, over all selecting heads."""
        device = self.block_indices.device
        tiles = query_tiles(num_queries, self.query_block, layout, device)
        indices = self.block_indices.long()[:, :, tiles]

        # Of each listed block a query sees the keys up to its own.
        ages = layout.ages(num_queries, device)[:, None, :, None]  # [B or 1, 1, TQ, 1]
        left = ages - indices * self.block_size
        seen = left.clamp(min=0, max=self.block_size).where(indices >= 0, 0).sum(-1)
        return _ratio(seen, ages[..., 0].expand(seen.shape))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSelection:
    """Per query, a list of key tokens.

    Attributes:
        token_indices: ``[B, Hs, NQ, S]`` int32 or int64, document-relative token numbers, -1 where unused;
            Hs is 1, H or HQ. No token may be listed twice in one row.
        query_block: Queries that share one list.
    """

    token_indices: Tensor
    query_block: int = 1

    def as_blocks(self) -> BlockSelection:
        """Return the same selection as blocks of one token."""
        return BlockSelection(block_indices=self.token_indices, block_size=1, query_block=self.query_block)

    @property
    def budget(self) -> int:
        """Largest number of keys one query sees."""
        return self.token_indices.shape[-1]

    def to_dense_mask(
        self,
        num_queries: int,
        num_keys: int,
        num_heads: int,
        layout: SequenceLayout = DENSE_LAYOUT,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Return the visible keys, bool ``[B, HQ, TQ, TK]`` for ``num_heads`` = HQ query heads."""
        return self.as_blocks().to_dense_mask(num_queries, num_keys, num_heads, layout)

    def density(self, num_queries: int, num_keys: int, layout: SequenceLayout = DENSE_LAYOUT) -> float:
        """Return visible pairs over the pairs dense causal attention computes, over all selecting heads."""
        return self.as_blocks().density(num_queries, num_keys, layout)


Pattern = SinkWindow | BlockSelection | TokenSelection


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockTopK:
    """How scores of compressed cells become a list of blocks (NSA eqs. 9-11, InfLLM-v2 section 3).

    Attributes:
        block_size: l', keys in a selected block.
        num_blocks: n, blocks kept per query, forced ones included.
        num_sink_blocks: First blocks of the document that are always kept.
        num_local_blocks: Last blocks that are always kept, the query's own block included (>= 1).
        reduce: How the cells that overlap a block become its score: ``"sum"`` weights each cell by its
            overlap in strides (NSA eq. 9), ``"max"`` takes the largest (InfLLM-v2).
        per_head: Whether every query head chooses for itself; otherwise the query heads that share a key head
            choose together, by the sum of their probabilities (eq. 10).
    """

    block_size: int
    num_blocks: int
    num_sink_blocks: int = 1
    num_local_blocks: int = 2
    reduce: str = "sum"
    per_head: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.block_size < 1:
            problems.append(f"block_size must be >= 1, got {self.block_size}")

        if self.num_sink_blocks < 0 or self.num_local_blocks < 1:
            problems.append(
                "num_sink_blocks must be >= 0 and num_local_blocks >= 1 (a query always sees its own "
                f"block), got {self.num_sink_blocks} and {self.num_local_blocks}"
            )
        elif self.num_blocks < self.num_sink_blocks + self.num_local_blocks:
            problems.append(
                f"num_blocks {self.num_blocks} is smaller than the forced blocks: "
                f"{self.num_sink_blocks} sink + {self.num_local_blocks} local"
            )

        if self.reduce not in ("sum", "max"):
            problems.append(f"reduce must be 'sum' or 'max', got {self.reduce!r}")

        if problems:
            raise ValueError("; ".join(problems))

    @property
    def budget(self) -> int:
        """Largest number of keys one query sees; a shorter context is attended densely."""
        return self.num_blocks * self.block_size

    def cell_weights(self, width: int, stride: int) -> tuple[int, tuple[int, ...]]:
        """Return ``(first, weights)``: block j overlaps cells ``j * (l'/d) + first + o`` with ``weights[o]``.

        NSA eq. 9 sums ``p[(l'/d) j + m - n]`` over ``m < l'/d`` and ``n < l/d``; the printed ``- m - n``
        would score the cells that lie before the block. The weight of a cell is the number of strides it
        shares with the block: 1, 2, 2, 2, 1 for l = 32, d = 16, l' = 64.
        """
        steps = self.block_size // stride
        overlap = width // stride
        counts = [0] * (steps + overlap - 1)

        for m in range(steps):
            for n in range(overlap):
                counts[m - n + overlap - 1] += 1

        return 1 - overlap, tuple(counts)


def query_tiles(num_queries: int, query_block: int, layout: SequenceLayout, device: torch.device) -> Tensor:
    """Return the tile number of each query, ``[TQ]`` int64; tiles never cross packed documents."""
    slots = torch.arange(num_queries, device=device)
    if layout.cu_seqlens is None or query_block == 1:
        return slots // query_block

    # Each document has tiles of its own, which follow those of the documents before it.
    bounds = layout.query_bounds(num_queries)
    tiles = (bounds.diff() + query_block - 1) // query_block
    base = torch.cat([tiles.new_zeros(1), tiles.cumsum(0)])
    document = layout.document_of(num_queries, device)
    return base[document] + (slots - bounds[document]) // query_block


def _ratio(seen: Tensor, ages: Tensor) -> float:
    ages = ages.expand(seen.shape)
    return (seen.minimum(ages).sum() / ages.sum().clamp(min=1)).item()
