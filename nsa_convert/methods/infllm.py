"""InfLLM (Xiao et al. 2024, arXiv 2402.04617): a sliding window, and far blocks that are looked up.

What has left the window is seen without its order: the query is turned to one fixed position, ``window_size -
1``, and far keys are turned back to position 0, so all of them are equally far away and no distance exceeds
what the model was trained on. The far past is cut into blocks behind the first tokens. A block is known, for
each query head, by the mean of its few keys that received most attention while they were in the window. Every
``query_block`` queries look up the best blocks together: one list for all heads of a layer. Far keys and
window share one softmax. The cache keeps everything.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nsa_convert.config import AttentionGeometry
from nsa_convert.kernels.attention import dense_attention, sparse_attention
from nsa_convert.kernels.common.flash import attend_rows, plain_attention
from nsa_convert.kernels.common.merge import merge_lse
from nsa_convert.kernels.common.segments import Segment, segments
from nsa_convert.methods.parts.base import (
    AttentionInputs,
    CacheNeeds,
    MethodSpec,
    Reach,
    SparseMethod,
    TrainingSpec,
    is_observed,
    is_within_budget,
    record,
)
from nsa_convert.methods.parts.budget import parts_of
from nsa_convert.methods.parts.cache_policy import KeepAll
from nsa_convert.methods.parts.column_sums import column_sums
from nsa_convert.patterns import BlockSelection, Pattern, SequenceLayout, SinkWindow, TokenSelection
from nsa_convert.settings import at_least, one_or_more, raise_problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfLLMSettings:
    """Settings of InfLLM.

    Attributes:
        num_sinks: First tokens every query sees.
        window_size: Last tokens every query sees in their order, its own included.
        block_size: Tokens of a block of the far past.
        num_blocks: Blocks a tile of queries looks up.
        num_representatives: Keys of a block that stand for it.
        query_block: Queries of a call that look up together; 1 makes the choice causal.
    """

    num_sinks: int = 128
    window_size: int = 4096
    block_size: int = 128
    num_blocks: int = 16
    num_representatives: int = 4
    query_block: int = 512

    def __post_init__(self) -> None:
        problems = at_least(0, num_sinks=self.num_sinks)
        problems += one_or_more([name for name in vars(self) if name != "num_sinks"], self)
        if self.num_representatives > self.block_size:
            problems.append(
                f"num_representatives {self.num_representatives} is larger than block_size {self.block_size}"
            )

        raise_problems(problems, code="CF22")

    @classmethod
    def at_budget(cls, budget: int) -> dict[str, Any]:
        """Return the settings under which a query sees ``budget`` keys.

        Half of the budget is window, a block of it the first tokens, the rest is looked up.
        """
        half = parts_of(budget, 128)
        return {
            "num_sinks": 64,
            "window_size": 64 * half,
            "block_size": 64,
            "num_blocks": half - 1,
            "query_block": 128,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepAllAndBlocks(KeepAll):
    """Keeps every token, and the representative keys of the blocks of the far past.

    Attributes:
        num_sinks: Tokens before the first block.
        window_size: Tokens of the sliding window.
        block_size: Tokens of a block.
    """

    num_sinks: int
    window_size: int
    block_size: int

    def blocks_before(self, position: int) -> int:
        """Return how many blocks have left the window of a query at ``position`` entirely."""
        return max(0, (position - self.window_size + 1 - self.num_sinks) // self.block_size)

    def first_unblocked(self, position: int) -> int:
        """Return the first token behind the blocks of a query at ``position``, sinks left out."""
        return min(position, self.num_sinks + self.block_size * self.blocks_before(position))

    def numbers(self, seen: int, geometry: AttentionGeometry) -> int:
        """Return for each query head a key for each block, and a sum for each token behind the blocks."""
        per_head = seen - self.first_unblocked(seen) + self.blocks_before(seen) * geometry.head_dim
        return geometry.num_query_heads * per_head


@dataclasses.dataclass
class _Text:
    """One document while its tiles are read.

    Attributes:
        k: ``[N, H, D]`` rotated keys.
        v: ``[N, H, D]``.
        received: ``[N, HQ]`` attention each token received in the window; meaningless for tokens of blocks.
        keys: ``[blocks, HQ, D]`` mean representative key of each block, unrotated, at least float32.
        found: What the tiles of this call looked up.
    """

    k: Tensor
    v: Tensor
    received: Tensor
    keys: Tensor
    found: list[Lookup] = dataclasses.field(default_factory=list)


class InfLLM(SparseMethod):
    """A window in order and a looked-up past without order."""

    spec = MethodSpec(
        name="infllm",
        title="InfLLM",
        paper="arXiv:2402.04617",
        summary="a window, and far blocks looked up by a few keys, all at one distance",
        trainable=False,
        phases=("prefill", "decode"),
        granularity="blocks per tile of queries, one list per layer",
        sources={
            "num_sinks": "the authors' configuration (n_init)",
            "window_size": "the authors' configuration (n_local)",
            "block_size": "the authors' configuration",
            "num_blocks": "the authors' configuration (topk)",
            "num_representatives": "the authors' configuration (repr_topk)",
            "query_block": "the authors' configuration (exc_block_size)",
        },
        causal_selection=False,
        couples_heads=True,
    )
    Settings = InfLLMSettings
    training_spec = TrainingSpec(stage_losses={})

    def cache_needs(self) -> CacheNeeds:
        """Keep every token, and the representative keys of the blocks."""
        return CacheNeeds(policy=self._blocks())

    def reach(self) -> Reach:
        """Beyond the window positions differ from the dense model's.

        A query reads sinks, window, blocks, and what has left the window but fills no block yet.
        """
        s = self.settings
        keys = s.num_sinks + s.window_size + s.num_blocks * s.block_size + s.block_size + s.query_block
        return Reach(
            visible_budget=s.window_size,
            decode_keys=keys,
            prompt_keys=keys,
            is_causal=s.query_block == 1,  # then each query looks up alone
        )

    def forward(self, x: AttentionInputs) -> Tensor:
        """Attend to the window and the far past; returns ``[B, TQ, HQ, D]``."""
        s = self.settings

        # A short text without a cache is dense attention.
        if x.memory is None and is_within_budget(self, x, s.window_size):
            record(self, x, x.k, {})
            return dense_attention(x.q, x.k, x.v, layout=x.layout, scale=x.scale)

        # One document at a time.
        o = torch.zeros_like(x.q)
        texts = {}
        batch, num_queries = x.q.shape[:2]
        for part in segments(x.layout, batch, num_queries, x.k.shape[1]):
            texts[part.row] = text = self._recall(x, part)
            own = slice(*part.queries)
            o[part.row, own] = self._read(x, x.q[part.row, own], text, part.offset)
            self._record_text(x, x.q[part.row, own], text, part.offset)

        if x.memory is not None:
            x.memory.update(self._remember(x, texts))

        return o

    def _window(self) -> int:
        return max(self.settings.window_size, self.forced_budget or 0)

    def _blocks(self) -> KeepAllAndBlocks:
        s = self.settings
        return KeepAllAndBlocks(num_sinks=s.num_sinks, window_size=self._window(), block_size=s.block_size)

    def _record_text(self, x: AttentionInputs, q: Tensor, text: _Text, first: int) -> None:
        """Report what the queries ``[T, HQ, D]`` of one document have read."""
        if not is_observed():
            return

        sizes = {"num_sinks": self.settings.num_sinks, "window_size": self._window()}
        patterns: dict[str, Pattern] = {"window": SinkWindow(**sizes)}
        patterns |= far_patterns(text.found, block_size=self.settings.block_size, **sizes)

        own = dataclasses.replace(x, q=q[None], layout=SequenceLayout(offset=first))
        record(self, own, text.k[None], patterns)

    def _recall(self, x: AttentionInputs, part: Segment) -> _Text:
        """Return a document's keys and values, with what is remembered of the tokens before the call."""
        k, v = (y[part.row, part.keys[0] : part.keys[1]] for y in (x.k, x.v))

        # Nothing is remembered of the tokens of this call.
        wide = torch.promote_types(x.q.dtype, torch.float32)
        received = x.q.new_zeros(len(k), x.q.shape[2], dtype=wide)
        keys = x.q.new_zeros(0, *x.q.shape[2:], dtype=wide)

        # The cache has sums for tokens behind the blocks (aligned at the end) and keys for whole blocks.
        if part.offset and x.memory:
            begin = self._blocks().first_unblocked(part.offset)
            known = x.memory["received"][part.row]
            received[begin : part.offset] = known[len(known) - (part.offset - begin) :]
            keys = x.memory["keys"][part.row, : self._blocks().blocks_before(part.offset)]

        return _Text(k=k, v=v, received=received, keys=keys)

    def _remember(self, x: AttentionInputs, texts: dict[int, _Text]) -> dict[str, Tensor]:
        """Return the memory after a call: rows with fewer tokens have zeros in front, fewer blocks behind."""
        rows = range(x.q.shape[0])
        behind = self._blocks().first_unblocked
        tails = {row: text.received[behind(len(text.k)) :] for row, text in texts.items()}

        # Room for the longest row.
        width = max(map(len, tails.values()), default=0)
        count = max((len(text.keys) for text in texts.values()), default=0)
        wide = torch.promote_types(x.q.dtype, torch.float32)
        received = x.q.new_zeros(len(rows), width, x.q.shape[2], dtype=wide)
        keys = x.q.new_zeros(len(rows), count, *x.q.shape[2:], dtype=wide)

        # Sums are aligned at the end, as the tokens are; blocks at the start.
        for row, text in texts.items():
            received[row, width - len(tails[row]) :] = tails[row]
            keys[row, : len(text.keys)] = text.keys

        return {"received": received, "keys": keys}

    def _read(self, x: AttentionInputs, q: Tensor, text: _Text, first: int) -> Tensor:
        """Read the queries ``[T, HQ, D]`` at positions ``first ..`` tile by tile; returns ``[T, HQ, D]``."""
        out = []
        window = self._window()

        for begin in range(0, len(q), self.settings.query_block):
            tile = q[None, begin : begin + self.settings.query_block]
            position = first + begin
            end = position + tile.shape[1]
            self._form_blocks(x, text, position)

            # The window, in order.
            low = max(0, position - window + 1)
            layout = SequenceLayout(offset=position - low)
            k = text.k[None, low:end]
            v = text.v[None, low:end]
            parts = [
                sparse_attention(tile, k, v, SinkWindow(window_size=window), layout=layout, scale=x.scale)
            ]

            # The far past, from one distance.
            far = self._equally_far(x, tile, position)
            text.found.append(self._look_up(far, text, position))
            if end > window:
                parts.append(self._attend_far(x, far, text))

            # One softmax over both; note what each key of the window received of it.
            o, lse = merge_lse(*zip(*parts, strict=True))
            received = column_sums(tile, k, layout=layout, scale=x.scale, lse=lse, window=window)
            text.received[low:end] += received[0]
            out.append(o[0])

        self._form_blocks(x, text, first + len(q))
        return torch.cat(out)

    def _form_blocks(self, x: AttentionInputs, text: _Text, position: int) -> None:
        """Choose the representatives of the blocks that have left the window of a query at ``position``."""
        s, done, due = self.settings, len(text.keys), self._blocks().blocks_before(position)
        if due <= done:
            return

        # For each query head the keys of a block that received most attention.
        begin, end = (s.num_sinks + s.block_size * n for n in (done, due))
        best = text.received[begin:end].unflatten(0, (-1, s.block_size)).topk(s.num_representatives, dim=1)

        # Those keys without rotation; their mean stands for the block.
        plain = self._turn_back(x, text.k[begin:end], torch.arange(begin, end, device=text.k.device))
        plain = plain.repeat_interleave(self.geometry.group_size, 1).unflatten(0, (-1, s.block_size))
        index = best.indices[..., None].expand(-1, -1, -1, plain.shape[-1])
        text.keys = torch.cat([text.keys, plain.gather(1, index).to(text.keys.dtype).mean(1)])

    def _turn_back(self, x: AttentionInputs, k: Tensor, positions: Tensor) -> Tensor:
        """Rotate keys ``[N, H, D]`` from their positions to position 0."""
        assert x.move is not None
        return x.move(k[None], positions[None], torch.zeros_like(positions)[None])[0]

    def _look_up(self, q: Tensor, text: _Text, position: int) -> Lookup:
        """Choose the blocks with the largest product of mean query and key, summed over all heads."""
        s = self.settings
        score = torch.einsum("hd,nhd->n", q[0].to(text.keys.dtype).mean(0), text.keys)

        blocks = score.topk(min(s.num_blocks, len(score))).indices.sort().values

        behind = s.num_sinks + s.block_size * len(text.keys)
        return Lookup(position=position, num_queries=q.shape[1], blocks=blocks, behind=behind)

    def _equally_far(self, x: AttentionInputs, tile: Tensor, position: int) -> Tensor:
        """Rotate the queries of a tile to position ``window_size - 1``; far keys are rotated to 0."""
        queries = torch.arange(position, position + tile.shape[1], device=tile.device)
        assert x.move is not None
        return x.move(tile, queries[None], torch.full_like(queries, self._window() - 1)[None])

    def _attend_far(self, x: AttentionInputs, q: Tensor, text: _Text) -> tuple[Tensor, Tensor]:
        """Attend with ``q [1, T, HQ, D]`` to first tokens, found blocks and the rest outside the window."""
        s, window, device, found = self.settings, self._window(), q.device, text.found[-1]
        end = found.position + found.num_queries

        # Slots of the sinks, of the found blocks and of the tokens between the last block and the window.
        inside = torch.arange(s.block_size, device=device)
        slots = torch.cat(
            [
                torch.arange(min(s.num_sinks, end), device=device),
                (s.num_sinks + found.blocks[:, None] * s.block_size + inside).flatten(),
                torch.arange(found.behind, max(found.behind, end - window), device=device),
            ]
        )

        # What a query's own window holds is not seen a second time.
        queries = torch.arange(found.position, end, device=device)
        visible = slots <= queries[:, None] - window  # [T, L]

        return _attend(q, self._turn_back(x, text.k[slots], slots), text.v[slots], visible, x.scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend with ``q [1, T, HQ, D]`` to ``k, v [L, H, D]`` under a mask ``[T, L]``; ``(o, lse)``."""
    # The query heads that share a key head are rows of one product.
    heads = k.shape[1]
    group = q.shape[2] // k.shape[1]
    rows = q[0].unflatten(1, (heads, group)).permute(1, 2, 0, 3).flatten(1, 2)[None]  # [1, H, G T, D]

    bias = torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, -torch.inf)

    k, v = (y.transpose(0, 1)[None] for y in (k, v))
    tracked = torch.is_grad_enabled() and any(y.requires_grad for y in (q, k, v))
    run = plain_attention if tracked else attend_rows  # the fused operator has no gradient for its lse
    o, lse = run(rows, k, v, bias.repeat(group, 1)[None, None], scale)

    # Back to [1, T, HQ, ...]; a query that sees nothing gets 0 and an lse of -inf.
    o, lse = (y[0].unflatten(1, (group, -1)).movedim(2, 0).flatten(1, 2)[None] for y in (o, lse))
    none = ~visible.any(1)[None, :, None]
    return o.masked_fill(none[..., None], 0.0), lse.masked_fill(none, -torch.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookup:
    """What one tile of queries found in the far past.

    Attributes:
        position: Of the first query in its document.
        num_queries: Queries of the tile.
        blocks: ``[n]`` int64, numbers of the blocks that were looked up.
        behind: First token behind all blocks; from there to the window every token is read.
    """

    position: int
    num_queries: int
    blocks: Tensor
    behind: int


def far_patterns(
    tiles: Sequence[Lookup], *, num_sinks: int, window_size: int, block_size: int
) -> dict[str, Pattern]:
    """Return what the queries of a document read beside first tokens and window: for measurement alone.

    Args:
        tiles: The tiles of the queries in their order, all of one size but for the last.
        num_sinks: Tokens before the first block.
        window_size: Last tokens each query sees, its own included.
        block_size: Tokens of a block.

    Returns:
        ``"blocks"``, one list for each tile, and ``"between"``, for each query the tokens between the last
        block and its window. Each token is in one of them at most; what is empty is left out.
    """
    blocks = _looked_up(tiles, num_sinks, block_size)
    between = _between(tiles, window_size)

    found: dict[str, Pattern] = {}
    if blocks.budget:
        found["blocks"] = blocks
    if between.budget:
        found["between"] = between

    return found


def _looked_up(tiles: Sequence[Lookup], num_sinks: int, block_size: int) -> BlockSelection:
    # Blocks begin behind the first tokens, those of a pattern at 0: this size divides both.
    size = math.gcd(num_sinks, block_size)
    inside = torch.arange(block_size // size, device=tiles[0].blocks.device)

    lists = [((num_sinks + tile.blocks[:, None] * block_size) // size + inside).flatten() for tile in tiles]
    padded = torch.nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=-1)  # [NQ, S]
    return BlockSelection(block_indices=padded[None, None], block_size=size, query_block=tiles[0].num_queries)


def _between(tiles: Sequence[Lookup], window_size: int) -> TokenSelection:
    device = tiles[0].blocks.device
    counts = torch.tensor([tile.num_queries for tile in tiles], device=device)
    behind = torch.tensor([tile.behind for tile in tiles], device=device).repeat_interleave(counts)

    # Each query reads the tokens from the end of its tile's blocks to the start of its own window.
    positions = torch.arange(len(behind), device=device) + tiles[0].position
    read = (positions - window_size + 1 - behind).clamp(min=0)  # [TQ]
    inside = torch.arange(int(read.max()), device=device)
    tokens = (behind[:, None] + inside).where(inside < read[:, None], -1)
    return TokenSelection(token_indices=tokens.int()[None, None])
