"""Retrieval heads, found without data or training: probes that give head profiles their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_convert.config import FULL, LayerRule, SparseAttentionConfig
from nsa_convert.errors import ConfigError
from nsa_convert.heads.classes import DUO_RULE, RAZOR_RULE
from nsa_convert.heads.profile import HeadProfile
from nsa_convert.methods.parts.base import AttentionRecord, observe
from nsa_convert.patch.patching import patch_model, unpatch_model
from nsa_convert.patch.rope import mover

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPEATS = 4
"""Number of copies of the random tokens."""
ECHO_SHARE = 0.01
INDUCTION_SHARE = 0.14
"""Shares of all key/value heads that retrieve (golden-stick's defaults; the paper's are about the same)."""


@torch.inference_mode()
def razor_probe(model: PreTrainedModel, *, period: int = 2500, seed: int = 0) -> HeadProfile:
    """Find retrieval heads with random tokens that are repeated four times (RazorAttention, section 3.2).

    A head that attends from a token to its earlier copies is an echo head; one that attends to the tokens
    that follow these copies is an induction head. Both scores are the mean probability over all queries after
    the first copy and all earlier copies; of the query heads that share a key/value head the largest counts.
    Heads of all layers are ranked together.

    Args:
        model: A dense causal model; it is patched while it reads and restored afterwards.
        period: Number of random tokens in a copy.
        seed: Seed of the random tokens.

    Returns:
        Scores ``max(0.01 / echo rank, 0.14 / induction rank)`` with ranks as shares of all heads, less half a
        head: the best 1 % and 14 %, rounded, reach the threshold 1.

    Raises:
        ConfigError: The period is below 2 (CF22).
    """
    if period < 2:
        raise ConfigError(f"period must be at least 2, got {period}", code="CF22")

    # Random tokens of a part of the vocabulary, after the begin token if the model has one.
    config = model.config
    vocabulary = config.vocab_size
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(
        vocabulary // 5, max(vocabulary // 4, vocabulary // 5 + 2), (period,), generator=generator
    )
    begin = [] if config.bos_token_id is None else [int(config.bos_token_id)]
    prompt = torch.cat([torch.tensor(begin, dtype=torch.long), ids.repeat(REPEATS)])

    # Scores of all heads, [layers, KV heads].
    echo, induction = (torch.zeros(config.num_hidden_layers, config.num_key_value_heads) for _ in range(2))

    def look(record: AttentionRecord) -> None:
        pairs = repeat_scores(record.q[0], record.k[0], record.scale, period, len(begin))
        for found, x in zip((echo, induction), pairs, strict=True):
            found[record.layer_index] = x.unflatten(0, (record.k.shape[2], -1)).amax(1).cpu()

    _run_dense(model, prompt, look)

    # Ranks 1 .. n -> shares; the best heads of either kind score highest.
    shares = [(_rank(x) - 0.5) / x.numel() for x in (echo, induction)]

    meta = {
        "kind": "razor",
        "source": f"{period} random tokens, {REPEATS} times",
        "seed": seed,
        "threshold": 1.0,
        "rule": RAZOR_RULE,
        "model_type": config.model_type,
        "echo": echo.tolist(),
        "induction": induction.tolist(),
    }
    return HeadProfile(scores=torch.maximum(ECHO_SHARE / shares[0], INDUCTION_SHARE / shares[1]), meta=meta)


def repeat_scores(q: Tensor, k: Tensor, scale: float, period: int, begin: int) -> tuple[Tensor, Tensor]:
    """Return each query head's mean probability of earlier copies, and of the tokens that follow them.

    Args:
        q: ``[T, HQ, D]`` queries of the repeated tokens.
        k: ``[T, H, D]`` keys.
        scale: Factor on the scores.
        period: Number of tokens in a copy.
        begin: Number of tokens before the first copy.

    Returns:
        Echo and induction, each ``[HQ]`` float32.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1).float()
    q = q.float() * scale
    first = begin + period
    norm = _log_denominators(q, k)[first:]  # [T - first, HQ]

    # Echo looks back whole periods; induction one token less, at what followed the earlier copy.
    scores = []
    for shift in (0, 1):
        total = torch.zeros(q.shape[1], device=q.device)
        count = 0
        for back in range(period - shift, len(q) - begin, period):
            # Only queries after the first copy that have such a key after the first tokens.
            own = slice(max(first, begin + back), len(q))
            earlier = k[own.start - back : len(q) - back]
            p = ((q[own] * earlier).sum(-1) - norm[own.start - first :]).exp()
            total = total + p.sum(0)
            count = count + len(p)

        scores.append(total / count)
    return scores[0], scores[1]


def _log_denominators(q: Tensor, k: Tensor, width: int = 256) -> Tensor:
    """Return the log-sum-exp of causal attention, ``[T, HQ]``, for scaled ``q`` and ``k [T, HQ, D]``."""
    # In pieces of queries, so that no [T, T] tensor is held.
    parts = []
    for begin in range(0, len(q), width):
        end = min(begin + width, len(q))
        scores = torch.einsum("qhd,khd->qhk", q[begin:end], k[:end])
        future = torch.arange(end, device=q.device) > torch.arange(begin, end, device=q.device)[:, None]
        parts.append(scores.masked_fill(future[:, None], -torch.inf).logsumexp(-1))
    return torch.cat(parts)


@torch.inference_mode()
def distance_probe(model: PreTrainedModel, ids: Sequence[int], *, length: int = 500) -> HeadProfile:
    """Score heads by how far back their mean query attends, in one pass over a short text.

    The mean query and the mean key of each head, before RoPE, are repeated ``length`` times and rotated to
    their positions. The score is the mean of the cumulative attention of the last query: 1 if all of it is on
    the first token, near 0 if it is on the last ones. It approximates learned gates.

    Args:
        model: A dense causal model; it is patched while it reads and restored afterwards.
        ids: Tokens of a text.
        length: Number of repetitions.

    Returns:
        Scores ``[layers, KV heads]``, without a threshold.
    """
    config, scores = (
        model.config,
        torch.zeros(model.config.num_hidden_layers, model.config.num_key_value_heads),
    )
    move = mover(model.model.rotary_emb)

    def look(record: AttentionRecord) -> None:
        # Undo RoPE and average over the text: [1, 1, heads, D].
        place = torch.arange(record.q.shape[1], device=record.q.device)[None]
        q, k = (
            move(x.float(), place, torch.zeros_like(place)).mean(1, keepdim=True)
            for x in (record.q, record.k)
        )

        # Keys at positions 0 .. N - 1, the query at the last one.
        far = torch.arange(length, device=q.device)[None]
        k = move(k.expand(-1, length, -1, -1), torch.zeros_like(far), far)[0]  # [N, H, D]
        q = move(q, torch.zeros_like(far[:, :1]), far[:, -1:])[0, 0].unflatten(0, (k.shape[1], -1))

        # Mean over positions and the query heads of a KV head.
        p = (torch.einsum("hgd,nhd->hgn", q, k) * record.scale).softmax(-1)
        scores[record.layer_index] = p.cumsum(-1).mean((1, 2)).cpu()

    _run_dense(model, torch.tensor(list(ids)), look)

    meta = {
        "kind": "distance",
        "source": f"cumulative attention of the mean query, {length} times, {len(ids)} tokens",
        "rule": DUO_RULE,
        "model_type": config.model_type,
    }
    return HeadProfile(scores=scores, meta=meta)


def _run_dense(model: PreTrainedModel, ids: Tensor, look: Callable[[AttentionRecord], Any]) -> None:
    """Read a text with dense attention and pass each layer's record to ``look``."""
    patch_model(model, SparseAttentionConfig(default=LayerRule(method=FULL)))
    try:
        with observe(look):
            model.model(ids[None].to(model.device), use_cache=False)
    finally:
        unpatch_model(model)


def _rank(scores: Tensor) -> Tensor:
    """Return 1 for the largest score, 2 for the next and so on; equal scores keep their order."""
    order = scores.flatten().argsort(descending=True, stable=True)
    rank = torch.empty(scores.numel())
    rank[order] = torch.arange(1.0, scores.numel() + 1)
    return rank.view_as(scores)
