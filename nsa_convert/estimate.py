"""Memory and work of dense and sparse attention, by arithmetic alone.

Counted: in the cache, raw keys and values that stay, compressed cells, and what a method remembers beside
them; multiply-adds of attention scores and outputs (2 FLOPs each), not of projections or the MLP, which
conversion does not change. A method that reads as much of a prompt as the text demands counts as dense there,
which bounds its attention from above; choosing is not counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from nsa_convert.config import AttentionGeometry
from nsa_convert.methods.parts.base import SparseMethod
from nsa_convert.methods.parts.mix import leaves_of

CONTEXTS = (8192, 32768, 131072)
FLOAT32 = 4
"""Bytes of a number that a method remembers beside keys and values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextCost:
    """Cost of one sequence of a given length, dense against sparse.

    Attributes:
        context: T, tokens.
        dense_kv_bytes: Size of the dense cache.
        sparse_kv_bytes: Size of the converted model's cache, compressed cells included.
        dense_prefill_flops: Attention FLOPs to read the whole sequence.
        sparse_prefill_flops: The same, converted.
        prefill_depends_on_text: Whether that is a bound from above, since some layer adapts to the prompt.
        dense_decode_bytes: Cache bytes one new token reads.
        sparse_decode_bytes: The same, converted.
        density: Share of the raw keys that the last query reads, mean over layers.
    """

    context: int
    dense_kv_bytes: int
    sparse_kv_bytes: int
    dense_prefill_flops: int
    sparse_prefill_flops: int
    prefill_depends_on_text: bool
    dense_decode_bytes: int
    sparse_decode_bytes: int
    density: float


def context_costs(
    methods: Sequence[SparseMethod], geometry: AttentionGeometry, dtype_bytes: int, contexts: Sequence[int]
) -> list[ContextCost]:
    """Return the cost at each context length.

    Args:
        methods: One method per layer, as :func:`nsa_convert.plan.resolve_plan` returns them.
        geometry: Sizes of a layer.
        dtype_bytes: Bytes of one cached number.
        contexts: Sequence lengths.
    """
    return [_cost(methods, geometry, dtype_bytes, length) for length in contexts]


def parameter_count(methods: Sequence[SparseMethod]) -> int:
    """Return how many weights a plan adds."""
    return sum(parameter.numel() for method in methods for parameter in method.parameters())


def dense_until(methods: Sequence[SparseMethod]) -> int | None:
    """Return the context up to which every layer still sees everything; None when all layers are full."""
    reaches = [leaf.reach() for leaf in leaves_of(methods)]
    budgets = [reach.visible_budget for reach in reaches if reach.decode_keys is not None]
    return min(budgets, default=None)


def _cost(
    methods: Sequence[SparseMethod], geometry: AttentionGeometry, width: int, length: int
) -> ContextCost:
    row = geometry.head_dim * width  # bytes of one cached vector
    dense_work = 4 * geometry.num_query_heads * geometry.head_dim  # FLOPs of both products with one key
    dense_entry = 2 * geometry.num_kv_heads * row
    kv = flops = decode = 0
    density = 0.0

    for method in leaves_of(methods):
        needs = method.cache_needs()
        reach = method.reach()
        heads = method.geometry.num_kv_heads
        limit = reach.decode_keys
        policy = needs.policy

        # What the cache holds, and what of it one new token reads.
        kept = length if policy is None else policy.size(length)
        seen = kept if limit is None or kept < length else min(length, limit)
        kv += 2 * heads * (1 + needs.extra_head_sets) * row * kept
        kv += heads * row * length if needs.key_taps > 1 else 0  # keys before they were mixed
        kv += 0 if policy is None else FLOAT32 * policy.numbers(length, method.geometry)
        decode += 2 * heads * row * seen
        work = 2 * method.geometry.num_query_heads * geometry.head_dim  # FLOPs of one product with a key
        flops += 2 * work * _sum_of_keys(length, reach.prompt_keys)
        density += seen / length / len(methods) * heads / geometry.num_kv_heads

        # What choosing reads: an index of every token, or cells.
        index = reach.index
        if index is not None:
            index_bytes = index.key_heads * row * length
            kv += index_bytes if index.cached else 0
            decode += index_bytes
            flops += 2 * index.query_heads * geometry.head_dim * _sum_of_keys(length, None)
        for pool in needs.pools:
            cells = max(0, (length - pool.width) // pool.stride + 1)
            pool_bytes = len(pool.heads) * row * cells
            kv += pool_bytes
            decode += pool_bytes
            flops += work * _sum_of_cells(length, pool.width, pool.stride)

    return ContextCost(
        context=length,
        dense_kv_bytes=dense_entry * length * len(methods),
        sparse_kv_bytes=kv,
        dense_prefill_flops=dense_work * _sum_of_keys(length, None) * len(methods),
        sparse_prefill_flops=flops,
        prefill_depends_on_text=any(leaf.reach().adapts_to_prompt for leaf in leaves_of(methods)),
        dense_decode_bytes=dense_entry * length * len(methods),
        sparse_decode_bytes=decode,
        density=density,
    )


def _sum_of_keys(length: int, limit: int | None) -> int:
    """Return the sum of min(t, limit) for t = 1..length."""
    if limit is None or limit >= length:
        return length * (length + 1) // 2
    return limit * (limit + 1) // 2 + (length - limit) * limit


def _sum_of_cells(length: int, width: int, stride: int) -> int:
    """Return the sum over t = 1..length of the finished cells at t, (t - width) // stride + 1."""
    if length < width:
        return 0
    whole, rest = divmod(length - width + 1, stride)
    return stride * whole * (whole + 1) // 2 + rest * (whole + 1)


def cost_lines(costs: Sequence[ContextCost]) -> list[str]:
    """Return the costs as a table for people; percentages are sparse against dense."""
    lines = ["  context   dense cache   sparse cache   read per token   attention FLOPs"]
    for cost in costs:
        work = cost.sparse_prefill_flops / cost.dense_prefill_flops
        bound = "<= " if cost.prefill_depends_on_text else ""
        lines.append(
            f"{cost.context:>9,}  {cost.dense_kv_bytes / 1e6:>9,.1f} MB  "
            f"{cost.sparse_kv_bytes / 1e6:>10,.1f} MB  "
            f"{cost.sparse_decode_bytes / cost.dense_decode_bytes:>14.1%}  "
            f"{f'{bound}{work:.1%}':>16}"
        )

    if any(cost.prefill_depends_on_text for cost in costs):
        lines.append("  <=: how much of a prompt is read depends on its text; `nsa-convert eval` counts it")
    return lines
