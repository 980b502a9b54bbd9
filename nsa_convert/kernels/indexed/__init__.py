"""Choice by an indexer: lists of tokens or blocks from products of index queries and keys (DSA, MSA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_convert.kernels.common.checks import default_scale
from nsa_convert.kernels.common.custom_ops import (
    LAYOUT_SCHEMA,
    fit_lists,
    flatten,
    is_opaque,
    list_size,
    operator,
    reach,
    restore,
)
from nsa_convert.kernels.indexed.lists import best_tokens, blocks_of_best_tokens, choose
from nsa_convert.patterns import DENSE_LAYOUT, BlockSelection, BlockTopK, SequenceLayout, TokenSelection


def token_topk(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    num_tokens: int,
    num_sinks: int = 0,
    window_size: int = 0,
    layout: SequenceLayout = DENSE_LAYOUT,
    scale: float | None = None,
) -> TokenSelection:
    """Choose tokens by the lightning indexer's score ``sum_j w_j relu(scale q_j k)`` (DeepSeek-V3.2, eq. 1).

    No ``TQ x TK`` tensor is kept: queries are scored in chunks. Scores are float32 (float64 for float64
    input); equal scores go to the lower token. The choice has no gradient.

    Args:
        q: ``[B, TQ, HI, D]`` index queries.
        k: ``[B, TK, HK, D]`` index keys; HI is a multiple of HK.
        weights: ``[B, TQ, HI]`` weights of the index heads.
        num_tokens: Tokens in a list, forced ones included.
        num_sinks: First tokens of the document that are always kept.
        window_size: Last tokens that are always kept, the query's own included.
        layout: Position of the queries, padding and packing.
        scale: Factor on the products; D ** -0.5 by default.

    Returns:
        ``token_indices [B, 1, TQ, S]`` int32, ascending, -1 at the end; S is at most num_tokens.

    Raises:
        ValueError: Head counts do not divide, or the forced tokens do not fit.
    """
    _check_heads(q, k)
    if num_tokens < max(1, num_sinks + window_size):
        raise ValueError(
            f"num_tokens {num_tokens} must be at least 1 and hold {num_sinks} first and {window_size} last"
        )

    sizes = (num_tokens, num_sinks, window_size)
    scale = default_scale(q, scale)

    if is_opaque(layout, q):
        given = q.detach(), k.detach(), weights.detach()
        return TokenSelection(token_indices=_token_operator(*given, *sizes, *flatten(layout), scale))
    return TokenSelection(token_indices=_choose_tokens(q, k, weights, *sizes, layout, scale))


def block_max_topk(
    q: Tensor,
    k: Tensor,
    *,
    rule: BlockTopK,
    layout: SequenceLayout = DENSE_LAYOUT,
    scale: float | None = None,
) -> BlockSelection:
    """Choose blocks by the largest product ``scale q k`` of a visible token in them (MiniMax MSA).

    Scores, ties and gradients as :func:`token_topk`.

    Args:
        q: ``[B, TQ, HI, D]`` index queries, one list for each.
        k: ``[B, TK, HK, D]`` index keys; HI is a multiple of HK.
        rule: Block size, budget and forced blocks.
        layout: Position of the queries, padding and packing.
        scale: Factor on the products; D ** -0.5 by default.

    Returns:
        ``block_indices [B, HI, TQ, S]`` int32, ascending, -1 at the end.

    Raises:
        ValueError: Head counts do not divide.
    """
    _check_heads(q, k)
    scale = default_scale(q, scale)

    if is_opaque(layout, q):
        sizes = (rule.block_size, rule.num_blocks, rule.num_sink_blocks, rule.num_local_blocks)
        lists = _block_operator(q.detach(), k.detach(), *sizes, *flatten(layout), scale)
    else:
        lists = _choose_blocks(q, k, rule, layout, scale)
    return BlockSelection(block_indices=lists, block_size=rule.block_size)


def _check_heads(q: Tensor, k: Tensor) -> None:
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"index query heads {q.shape[2]} are not a multiple of index key heads {k.shape[2]}")


def _choose_tokens(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    most: int,
    num_sinks: int,
    window_size: int,
    layout: SequenceLayout,
    scale: float,
) -> Tensor:
    def lists(q: Tensor, weights: Tensor, k: Tensor, ages: Tensor, size: int) -> Tensor:
        return best_tokens(q, k, weights, ages, min(most, size), (num_sinks, window_size), scale)

    return choose(lists, (q, weights), k, layout)


def _choose_blocks(q: Tensor, k: Tensor, rule: BlockTopK, layout: SequenceLayout, scale: float) -> Tensor:
    def lists(q: Tensor, k: Tensor, ages: Tensor, size: int) -> Tensor:
        return blocks_of_best_tokens(q, k, ages, rule, -(-size // rule.block_size), scale)

    return choose(lists, (q,), k, layout)


def _reach(q: Tensor, k: Tensor, slot: Tensor | None, first: int) -> int:
    """Return an upper bound of the visible keys that shapes alone give."""
    return torch.sym_min(k.shape[1], first + q.shape[1]) if slot is None else k.shape[1]


def _run_tokens(q: Tensor, k: Tensor, weights: Tensor, *flat: Any) -> Tensor:
    layout = restore(flat[3:-1])
    most, num_sinks, window_size = flat[:3]

    seen = k[:, : reach(layout, q, k)]
    lists = _choose_tokens(q, seen, weights, most, num_sinks, window_size, layout, flat[-1])
    return fit_lists(lists, _fake_tokens(q, k, weights, *flat).shape[-1])


def _fake_tokens(q: Tensor, k: Tensor, weights: Tensor, *flat: Any) -> Tensor:
    size = list_size(flat[0], _reach(q, k, *flat[3:5]))
    return q.new_empty(q.shape[0], 1, q.shape[1], size, dtype=torch.int32)


def _run_blocks(q: Tensor, k: Tensor, *flat: Any) -> Tensor:
    size, blocks, sinks, local = flat[:4]
    rule = BlockTopK(block_size=size, num_blocks=blocks, num_sink_blocks=sinks, num_local_blocks=local)
    layout = restore(flat[4:-1])

    lists = _choose_blocks(q, k[:, : reach(layout, q, k)], rule, layout, flat[-1])
    return fit_lists(lists, _fake_blocks(q, k, *flat).shape[-1])


def _fake_blocks(q: Tensor, k: Tensor, *flat: Any) -> Tensor:
    size = list_size(flat[1], (_reach(q, k, *flat[4:6]) + flat[0] - 1) // flat[0])
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], size, dtype=torch.int32)


_token_operator = operator(
    "index_tokens",
    "(Tensor q, Tensor k, Tensor weights, SymInt num_tokens, SymInt num_sinks, SymInt window_size, "
    f"{LAYOUT_SCHEMA}, float scale) -> Tensor",
    _run_tokens,
    _fake_tokens,
)
_block_operator = operator(
    "index_blocks",
    "(Tensor q, Tensor k, SymInt block_size, SymInt num_blocks, SymInt num_sink_blocks, "
    f"SymInt num_local_blocks, {LAYOUT_SCHEMA}, float scale) -> Tensor",
    _run_blocks,
    _fake_blocks,
)
