"""What trains an index: KL of its scores to the true attention mass, on a sample of the queries."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_convert.methods.parts.losses import Total, counted_mean, own
from nsa_convert.patterns import SequenceLayout


def index_kl(mass: Tensor, logits: Tensor, seen: Tensor, total: Total = own) -> Tensor:
    """Return ``KL(mass || softmax(logits))`` over the tokens in ``seen``.

    Args:
        mass: ``[B, h, NQ, TK]`` true attention probabilities, no gradient; renormalised over ``seen``.
        logits: ``[B, h, NQ, TK]`` scores of the index.
        seen: bool, broadcasts to ``[B, h, NQ, TK]``.
        total: All-reduce (sum) over the context-parallel group.

    Returns:
        Mean over the heads and the queries that see at least two tokens; 0 where there is none.
    """
    tiny = 1e-9
    seen = seen.expand(mass.shape)
    p = mass.masked_fill(~seen, 0.0)
    p = p / p.sum(-1, keepdim=True).clamp(min=tiny)

    log_q = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).log_softmax(-1)
    kl = (p * (p.clamp(min=tiny).log() - log_q.masked_fill(~seen, 0.0))).sum(-1)

    return counted_mean(kl, seen.sum(-1) > 1, total)


def visible_tokens(
    queries: Tensor, num_queries: int, num_keys: int, layout: SequenceLayout
) -> tuple[Tensor, Tensor]:
    """Return what sampled queries may see, bool ``[B or 1, 1, NQ, TK]``, and document-relative positions.

    Args:
        queries: ``[NQ]`` query slots.
        num_queries: TQ.
        num_keys: TK.
        layout: Position of the queries, padding and packing.

    Returns:
        The mask, and the positions of the keys inside each query's document, ``[B or 1, NQ, TK]`` int64.
    """
    slots = queries + layout.offset
    starts = layout.row_starts(num_queries, queries.device)[:, queries]  # [B or 1, NQ]
    keys = torch.arange(num_keys, device=queries.device)
    relative = keys - starts[..., None]
    return ((keys <= slots[:, None]) & (relative >= 0))[:, None], relative


def listed_tokens(lists: Tensor, relative: Tensor, block_size: int) -> Tensor:
    """Return which keys lie in listed blocks, bool ``[B, Hs, NQ, TK]``.

    Args:
        lists: ``[B, Hs, NQ, S]`` document-relative block numbers of the sampled queries, -1 where unused.
        relative: ``[B or 1, NQ, TK]`` positions of the keys.
        block_size: Tokens in a block.
    """
    # Listed blocks as booleans, with one more entry for unused places.
    num_blocks = -(-relative.shape[-1] // block_size)
    lists = lists.long()
    chosen = torch.zeros(*lists.shape[:3], num_blocks + 1, dtype=torch.bool, device=lists.device)
    chosen = chosen.scatter_(3, lists.where(lists >= 0, num_blocks), True)[..., :num_blocks]

    # The block of each key, looked up.
    block = relative.clamp(min=0) // block_size
    return chosen.gather(3, block[:, None].expand(*lists.shape[:3], -1))
