"""Choices by an index: lists of tokens or blocks from products of index queries and index keys (DSA, MSA)."""

from __future__ import annotations

from torch import Tensor

from nsa_convert.kernels.checks import default_scale
from nsa_convert.kernels.indexed.lists import best_blocks, best_tokens, choose
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
    scale = default_scale(q, scale)

    def lists(q: Tensor, weights: Tensor, k: Tensor, ages: Tensor, size: int) -> Tensor:
        return best_tokens(q, k, weights, ages, min(num_tokens, size), (num_sinks, window_size), scale)

    return TokenSelection(token_indices=choose(lists, (q, weights), k, layout))


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

    def lists(q: Tensor, k: Tensor, ages: Tensor, size: int) -> Tensor:
        return best_blocks(q, k, ages, rule, -(-size // rule.block_size), scale)

    return BlockSelection(block_indices=choose(lists, (q,), k, layout), block_size=rule.block_size)


def _check_heads(q: Tensor, k: Tensor) -> None:
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"index query heads {q.shape[2]} are not a multiple of index key heads {k.shape[2]}"
        )
