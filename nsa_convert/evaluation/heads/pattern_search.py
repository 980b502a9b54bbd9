"""MInference's head search: for each head the candidate pattern that holds most of its attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nsa_convert.config import FULL, AttentionGeometry, LayerRule, SparseAttentionConfig
from nsa_convert.evaluation.metrics.mass import (
    NUM_QUERIES,
    captured_mass,
    dense_probabilities,
    spaced_queries,
)
from nsa_convert.heads.patterns import HeadPattern
from nsa_convert.methods.minference import MInference, MInferenceSettings, least_budget
from nsa_convert.methods.parts.base import AttentionInputs, AttentionRecord, observe
from nsa_convert.patch.patching import patch_model, unpatch_model

CANDIDATES: tuple[HeadPattern, ...] = (
    ("stream_llm", 100, 800),
    ("vertical_and_slash", 30, 800),
    ("vertical_and_slash", 100, 750),
    ("vertical_and_slash", 500, 700),
    ("vertical_and_slash", 3500, 100),
    ("block_sparse", 10, 1),
)
"""Candidates of the released code; each has about as many keys per query."""

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def search_patterns(
    model: PreTrainedModel,
    ids: Sequence[int],
    candidates: Sequence[HeadPattern] = CANDIDATES,
    num_queries: int = NUM_QUERIES,
) -> tuple[list[list[HeadPattern]], list[list[float]]]:
    """Choose a pattern for every query head of a dense model.

    Args:
        model: A dense causal model; it is patched while it reads and restored afterwards.
        ids: Tokens of the prompt; more than the candidates see, or all candidates are alike.
        candidates: Patterns to choose from; of equal ones the first wins.
        num_queries: Queries per layer that the attention is measured on.

    Returns:
        ``(patterns [L][HQ], shares [L][HQ])``: the best candidate, and the share of the attention it holds.

    Raises:
        ValueError: The prompt is so short that every candidate sees all of it.
    """
    if all(len(ids) <= least_budget(head, MInferenceSettings().block_size) for head in candidates):
        raise ValueError(f"{len(ids)} tokens are too few: every candidate sees all of them")

    shares: list[Tensor] = []

    def look(record: AttentionRecord) -> None:
        shares.append(candidate_shares(record, candidates, num_queries))

    # Every layer reports its queries and keys while the dense model reads the prompt.
    patch_model(model, SparseAttentionConfig(default=LayerRule(method=FULL)))
    try:
        with observe(look):
            model.base_model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    finally:
        unpatch_model(model)

    # The best candidate of each head.
    best = [layer.max(0) for layer in shares]
    patterns = [[candidates[i] for i in layer.indices.tolist()] for layer in best]
    return patterns, [[round(x, 4) for x in layer.values.tolist()] for layer in best]


def candidate_shares(record: AttentionRecord, candidates: Sequence[HeadPattern], num_queries: int) -> Tensor:
    """Return the share of dense attention on the visible keys of each candidate, ``[candidates, HQ]``."""
    heads = record.q.shape[2]
    kv_heads = record.k.shape[2]
    dim = record.q.shape[3]
    geometry = AttentionGeometry(
        hidden_size=heads * dim, num_query_heads=heads, num_kv_heads=kv_heads, head_dim=dim
    )
    # A pattern needs queries and keys only: values and hidden states are placeholders.
    x = AttentionInputs(
        q=record.q, k=record.k, v=record.k, hidden=record.q[..., 0], pooled={}, layout=record.layout,
        scale=record.scale,
    )  # fmt: skip

    # Dense probabilities of each KV head's query heads: [G, N, TK].
    queries = spaced_queries(record.q.shape[1], 0, num_queries).to(record.q.device)
    dense = [dense_probabilities(record, queries, head) for head in range(kv_heads)]

    rows = []
    for candidate in candidates:
        settings = MInferenceSettings(head_patterns=[candidate] * heads, chunks="own")
        patterns = MInference(settings, geometry, record.layer_index).patterns(x)

        # A method's patterns show different keys: their masses are added.
        shares = [
            torch.cat([captured_mass(p, pattern, queries, head, kv_heads)[0] for head, p in enumerate(dense)])
            for pattern in patterns.values()
        ]

        rows.append(sum(shares[1:], start=shares[0]))

    return torch.stack(rows)
