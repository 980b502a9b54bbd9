"""Dense attention mass that each layer's pattern captures, and the most that its budget could capture.

Inside :meth:`MassProbe.watch` every sparse layer reports its queries, keys and patterns. For a sample of
queries the probe recomputes the dense attention probabilities of the same queries and keys in float32, one
key/value head at a time, so no [T, T] tensor is ever held.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nsa_convert.methods.parts.base import AttentionRecord, observe
from nsa_convert.patterns import BlockSelection, Pattern, SinkWindow, TokenSelection

NUM_QUERIES = 64
"""Queries per layer and text that the mass is measured on by default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerMass:
    """Captured mass of one pattern of one layer, averaged over the sampled queries.

    Attributes:
        layer: Index of the layer.
        pattern: Name of the branch (``"selected"``, ``"window"``).
        budget: Largest number of keys that a query sees.
        density: Visible pairs over dense causal pairs, for all queries of the sequence.
        captured: Dense attention mass on the visible keys, mean over query heads and sampled queries.
        captured_by_head: The same for each key/value head (mean over its query heads).
        oracle: Largest mass that as many blocks could hold; None for a sink and window pattern.
        recall: Share of those best blocks that were selected; None for a sink and window pattern.
        gates: Name of a branch -> mean gate, for all branches of the layer; None without gates.
        heads: Key/value heads that the row is about; None for all heads of the layer.
    """

    layer: int
    pattern: str
    budget: int
    density: float
    captured: float
    captured_by_head: tuple[float, ...]
    oracle: float | None
    gates: dict[str, float] | None
    recall: float | None = None
    heads: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return dataclasses.asdict(self)


class MassProbe:
    """Collects :class:`LayerMass` rows while a model reads one sequence without padding.

    Only queries with more than ``min_context`` tokens of context, their own included, are sampled.

    Args:
        min_context: Usually the visible budget of the model.
        num_queries: Queries sampled per layer, evenly spaced, the last one included.
    """

    def __init__(self, min_context: int, num_queries: int = NUM_QUERIES) -> None:
        self.min_context = min_context
        self.num_queries = num_queries
        self.rows: list[LayerMass] = []

    @contextlib.contextmanager
    def watch(self) -> Iterator[MassProbe]:
        """Collect rows from every sparse layer that runs inside the block."""
        with observe(self.add):
            yield self

    @torch.inference_mode()
    def add(self, record: AttentionRecord) -> None:
        """Collect rows from one call of a layer."""
        layout = record.layout
        # why: our own evaluation reads one unpadded sequence at a time
        assert record.q.shape[0] == 1, "the probe reads one sequence at a time"
        assert layout.start is None, "the probe reads unpadded sequences"
        assert layout.cu_seqlens is None, "the probe reads one document"

        if not record.patterns:
            return

        queries = spaced_queries(record.q.shape[1], self.min_context, self.num_queries).to(record.q.device)
        mass = _pattern_masses(record, queries)
        for name, pattern in record.patterns.items():
            captured, oracle, recall = mass[name]  # [HQ], [HQ] or None, the same
            kv_heads = record.k.shape[2]
            self.rows.append(
                LayerMass(
                    layer=record.layer_index,
                    pattern=name,
                    budget=pattern.budget,
                    density=pattern.density(record.q.shape[1], record.k.shape[1], layout),
                    captured=captured.mean().item(),
                    captured_by_head=tuple(captured.view(kv_heads, -1).mean(1).tolist()),
                    oracle=None if oracle is None else oracle.mean().item(),
                    recall=None if recall is None else recall.mean().item(),
                    gates=_gate_means(record),
                    heads=record.heads,
                )
            )


def spaced_queries(num_queries: int, min_context: int, count: int) -> Tensor:
    """Return ``count`` evenly spaced query positions from ``min_context`` on, int64, the last included."""
    first = min(min_context, num_queries - 1)
    return torch.linspace(first, num_queries - 1, min(count, num_queries - first)).round().long()


def _gate_means(record: AttentionRecord) -> dict[str, float] | None:
    """Return name of a branch -> mean of its gate over tokens and heads; None without gates."""
    if record.gates is None:
        return None
    means = record.gates.float().flatten(0, -2).mean(0).tolist()  # [branches]

    # NSA's order; a single gate belongs to the single pattern.
    names = ("compressed", "selected", "window") if len(means) == 3 else tuple(record.patterns)
    return dict(zip(names, means, strict=True))


def _pattern_masses(
    record: AttentionRecord, queries: Tensor
) -> dict[str, tuple[Tensor, Tensor | None, Tensor | None]]:
    """Return pattern -> captured mass, oracle and recall of each query head, ``[HQ]``, means over queries."""
    # One key/value head at a time: parts[name] has a triple of [G] tensors for each.
    kv_heads = record.k.shape[2]
    parts: dict[str, list[tuple[Tensor | None, ...]]] = {name: [] for name in record.patterns}
    for head in range(kv_heads):
        p = dense_probabilities(record, queries, head)  # [G, N, TK]
        for name, pattern in record.patterns.items():
            parts[name].append(captured_mass(p, pattern, queries, head, kv_heads))

    # Join the heads; a pattern without an oracle has None in all of them.
    out = {}
    for name, masses in parts.items():
        columns = [[value for value in column if value is not None] for column in zip(*masses, strict=True)]
        captured, *others = (torch.cat(column) if column else None for column in columns)
        assert captured is not None
        oracle, recall = others
        out[name] = captured, oracle, recall
    return out


def dense_probabilities(record: AttentionRecord, queries: Tensor, head: int) -> Tensor:
    """Return the dense attention of one key/value head's query group, ``[G, N, TK]`` float32.

    Args:
        record: A call of a layer on one sequence without padding.
        queries: ``[N]`` positions among the queries of the record.
        head: Index of the key/value head.
    """
    group = record.q.shape[2] // record.k.shape[2]
    q = record.q[0, queries, head * group : (head + 1) * group].float()  # [N, G, D]
    k = record.k[0, :, head].float()  # [TK, D]
    scores = torch.einsum("ngd,td->gnt", q, k) * record.scale
    future = torch.arange(k.shape[0], device=k.device) > (queries + record.layout.offset)[:, None]
    return scores.masked_fill(future, -torch.inf).softmax(-1)


def captured_mass(
    p: Tensor, pattern: Pattern, queries: Tensor, head: int, kv_heads: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the mass on a pattern's visible keys, the oracle, and the recall of the oracle's blocks.

    The oracle chooses as many blocks as the pattern has, by their true mass summed over the query heads that
    share a list, and without forced blocks: an upper bound for every choice with this block size and budget.

    Args:
        p: ``[G, N, TK]`` dense probabilities of the query heads of one key/value head.
        pattern: The pattern of the layer; a selection per key/value head or query head, or one for all heads.
        queries: ``[N]`` positions.
        head: Index of the key/value head.
        kv_heads: Number of key/value heads.

    Returns:
        ``([G], [G] or None, [G] or None)``, means over the queries; recall is the share of the oracle's
        blocks that are in the pattern.
    """
    # Sinks and window choose nothing, so there is no oracle.
    if isinstance(pattern, SinkWindow):
        keys = torch.arange(p.shape[2], device=p.device)
        band = (keys > queries[:, None] - pattern.window_size) | (keys < pattern.num_sinks)
        return (p * band).sum(-1).mean(-1), None, None

    # Mass of the selected blocks; unused entries of the list are negative.
    blocks = pattern.as_blocks() if isinstance(pattern, TokenSelection) else pattern
    indices = _group_indices(blocks, queries, head, kv_heads, p.shape[0])  # [1 or G, N, S]
    block_mass = _sum_blocks(p, blocks.block_size)  # [G, N, NB]
    used = indices >= 0
    captured = block_mass.gather(2, indices.clamp(min=0).expand(p.shape[0], -1, -1)) * used

    # The oracle: blocks by mass in descending order, of which it takes as many as the pattern has.
    shared = block_mass.sum(0, keepdim=True) if indices.shape[0] == 1 else block_mass
    order = shared.argsort(dim=-1, descending=True).expand(p.shape[0], -1, -1)
    rank = torch.arange(order.shape[-1], device=p.device)
    count = used.sum(-1, keepdim=True)
    best = block_mass.gather(2, order) * (rank < count)

    # Recall: selected blocks whose rank is among those.
    ranks = order.argsort(dim=-1).gather(2, indices.clamp(min=0).expand(p.shape[0], -1, -1))
    found = ((ranks < count) & used).sum(-1) / count[..., 0].clamp(min=1)
    return captured.sum(-1).mean(-1), best.sum(-1).mean(-1), found.mean(-1)


def _group_indices(blocks: BlockSelection, queries: Tensor, head: int, kv_heads: int, group: int) -> Tensor:
    """Return the block lists of one KV head's query group, ``[1, N, S]`` shared or ``[G, N, S]``."""
    indices = blocks.block_indices[0].long()[:, queries // blocks.query_block]  # [Hs, N, S]

    if indices.shape[0] == 1:
        return indices
    per_head = indices.shape[0] // kv_heads
    # why: our own methods select per model, per KV head or per query head
    assert per_head in (1, group), "a selection is per model, per KV head or per query head"
    return indices[head * per_head : (head + 1) * per_head]


def _sum_blocks(p: Tensor, block_size: int) -> Tensor:
    """Return ``[G, N, NB]`` mass per block for ``[G, N, TK]`` mass per key."""
    short = -p.shape[-1] % block_size
    return torch.nn.functional.pad(p, (0, short)).unflatten(-1, (-1, block_size)).sum(-1)
