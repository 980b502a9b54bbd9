"""Methods that are sparse while a prompt is read, and dense while decoding.

They choose for tiles of queries: a tile's keys depend on all of its queries, so what a query sees may be
chosen by later tokens of the prompt (it never sees them). Such a method is no causal model of a text that is
read in one pass; after the prompt, tokens are attended to densely and causally.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from nsa_convert.errors import ConfigError
from nsa_convert.kernels.attention import dense_attention, sparse_attention
from nsa_convert.kernels.common.merge import merge_lse
from nsa_convert.kernels.common.segments import segments
from nsa_convert.methods.parts.base import (
    AttentionInputs,
    Reach,
    SparseMethod,
    TrainingSpec,
    is_within_budget,
    record,
)
from nsa_convert.methods.parts.tile_budgets import BlockGrid, blocks_of
from nsa_convert.patterns import BlockSelection, Pattern, SequenceLayout

STEP_TOKENS = 16
"""A call on a past with at most this many tokens is a decoding step (drafted tokens included)."""


def is_step(x: AttentionInputs) -> bool:
    """Return whether a call continues a sequence by a few tokens; every other call reads a prompt."""
    offset = x.layout.offset
    on_past = isinstance(offset, Tensor) or offset > 0
    return on_past and x.layout.cu_seqlens is None and x.q.shape[1] <= STEP_TOKENS


class PrefillMethod(SparseMethod):
    """Attends to :meth:`patterns` of each sequence of a prompt; steps and short prompts are dense."""

    training_spec = TrainingSpec(stage_losses={}, has_dense_mode=True)

    @property
    def needs_prompt_end(self) -> bool:
        """Whether the last queries of the prompt choose, so that it cannot be read in chunks."""
        return False

    def patterns(self, x: AttentionInputs) -> Mapping[str, Pattern]:
        """Return what the queries see, as patterns over disjoint keys that share one softmax.

        Args:
            x: Sequences of one length without padding, and the keys up to their last query.
        """
        raise NotImplementedError

    def least_budget(self) -> int:
        """Return the longest prompt that is read as a whole, whatever it says."""
        raise NotImplementedError

    def reach(self) -> Reach:
        """How much of a prompt a query reads depends on its text; decoding reads everything."""
        return Reach(
            visible_budget=self.least_budget(),
            decode_keys=None,
            prompt_keys=None,
            adapts_to_prompt=True,
            is_causal=self.spec.causal_selection,
        )

    def is_dense(self, x: AttentionInputs) -> bool:
        """Return whether this call attends to everything."""
        return is_step(x) or is_within_budget(self, x, self.least_budget())

    def forward(self, x: AttentionInputs) -> Tensor:
        """Attend; returns ``[B, TQ, HQ, D]``."""
        if self.is_dense(x):
            record(self, x, x.k, {})
            return dense_attention(x.q, x.k, x.v, layout=x.layout, scale=x.scale)

        self._check_whole(x)

        # Sequences of one length are read together.
        if x.layout.start is None and x.layout.cu_seqlens is None:
            return self.attend(x)

        # Others one by one, each without its padding; a short one may be dense.
        o = torch.zeros_like(x.q)
        parts = []
        for row, (begin, end), part in sequences(x):
            dense = self.is_dense(part)
            out = (
                dense_attention(part.q, part.k, part.v, layout=part.layout, scale=x.scale)
                if dense
                else self.attend(part)
            )
            parts.append((row, begin, end, out))

        for row, begin, end, out in parts:
            o[row : row + 1, begin:end] = out

        return o

    def attend(self, x: AttentionInputs) -> Tensor:
        """Attend sparsely to sequences of one length without padding; returns ``[B, TQ, HQ, D]``."""
        patterns = self.patterns(x)
        record(self, x, x.k, patterns)
        return attend_patterns(x, patterns)

    def _check_whole(self, x: AttentionInputs) -> None:
        """Raise where a chunk of a prompt arrives and the method has to see the end of the prompt first."""
        if not self.needs_prompt_end or self.settings.chunks == "own":
            return
        if isinstance(x.layout.offset, Tensor) or x.layout.offset > 0:
            raise ConfigError(
                f"{self.spec.title} chooses from the last queries of the prompt, so it cannot read "
                f"a prompt in chunks: {x.q.shape[1]} tokens came after {int(x.layout.offset)} cached ones",
                code="CF25",
                hint="leave out prefill_chunk_size, or set chunks=own: every call then chooses from its own "
                "last queries, as it also should where a conversation goes on",
            )


class BlockPrefillMethod(PrefillMethod):
    """A prefill method whose choice is one map of blocks."""

    def grid(self, x: AttentionInputs) -> BlockGrid:
        """Return how the sequence is cut into tiles and blocks."""
        return BlockGrid(
            num_queries=x.q.shape[1],
            offset=int(x.layout.offset),
            query_block=self.settings.query_block,
            block_size=self.settings.block_size,
        )

    def keep(self, x: AttentionInputs, grid: BlockGrid) -> Tensor:
        """Return the chosen blocks, bool ``[B, Hs, NQ, NK]`` with Hs = H or HQ."""
        raise NotImplementedError

    def patterns(self, x: AttentionInputs) -> dict[str, BlockSelection]:
        """Return the chosen blocks; all of them while ``forced_budget`` is set."""
        grid = self.grid(x)
        if self.forced_budget is None:
            with torch.no_grad():
                chosen = self.keep(x, grid)
        else:
            chosen = grid.reach(x.q.device).expand(x.q.shape[0], x.q.shape[2], -1, -1)
        return {"selected": blocks_of(chosen, grid)}


def sequences(x: AttentionInputs) -> Iterator[tuple[int, tuple[int, int], AttentionInputs]]:
    """Yield ``(row, (begin, end) of its queries, inputs)`` of each sequence of a padded or packed call."""
    for s in segments(x.layout, x.q.shape[0], x.q.shape[1], x.k.shape[1]):
        row = slice(s.row, s.row + 1)
        queries = slice(*s.queries)
        keys = slice(*s.keys)

        yield (
            s.row,
            s.queries,
            dataclasses.replace(
                x,
                q=x.q[row, queries],
                k=x.k[row, keys],
                v=x.v[row, keys],
                hidden=x.hidden[row, queries],
                pooled={},
                token_states={},
                layout=SequenceLayout(offset=s.offset),
            ),
        )


def attend_patterns(x: AttentionInputs, patterns: Mapping[str, Pattern]) -> Tensor:
    """Attend to the union of patterns over disjoint keys in one softmax; returns ``[B, TQ, HQ, D]``."""
    parts = [
        sparse_attention(x.q, x.k, x.v, pattern, layout=x.layout, scale=x.scale)
        for pattern in patterns.values()
    ]
    if len(parts) == 1:
        return parts[0][0]
    return merge_lse(*zip(*parts, strict=True))[0]
