"""How much of dense attention a model reads: counted while it runs, and set by a search."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from nsa_convert.config import FULL, AttentionGeometry, LayerRule, SparseAttentionConfig
from nsa_convert.methods.parts.base import AttentionInputs, AttentionRecord, observe
from nsa_convert.methods.parts.prefill import STEP_TOKENS, PrefillMethod
from nsa_convert.methods.parts.registry import build_method
from nsa_convert.patch.patching import patch_model, unpatch_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PHASES = ("prompt", "steps")
SEARCH_LAYERS = 6
"""Layers whose queries and keys a search looks at, evenly spaced."""
HALVINGS = 8
"""Of the interval that is searched."""


@dataclasses.dataclass
class PairCounter:
    """Pairs read over pairs of dense causal attention, of prompts and of decoding steps.

    :meth:`add` is an observer of one sequence without padding. A cache that forgot is counted by the tokens
    that were seen.

    Attributes:
        read: Phase -> pairs read, summed over query heads and layers.
        whole: Phase -> pairs of dense causal attention.
        seen: Layer and heads -> tokens seen.
    """

    read: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    whole: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    seen: dict[tuple, int] = dataclasses.field(default_factory=dict)

    def add(self, record: AttentionRecord) -> None:
        """Count a call of one layer, or of some of its heads."""
        new, heads, place = record.q.shape[1], record.q.shape[2], (record.layer_index, record.heads)
        kept = int(record.layout.offset)
        phase = "prompt" if new > STEP_TOKENS else "steps"
        seen = self.seen.get(place, 0) if phase == "steps" else kept
        self.seen[place] = seen + new
        shares = [p.density(new, record.k.shape[1], record.layout) for p in record.patterns.values()]
        self.read[phase] += heads * _pairs(new, kept) * (sum(shares) if shares else 1.0)
        self.whole[phase] += heads * _pairs(new, seen)

    def densities(self) -> dict[str, float]:
        """Return the density of the prompts and of the steps; 1 where nothing was counted."""
        return {phase: self.read[phase] / self.whole[phase] if self.whole[phase] else 1.0 for phase in PHASES}


def _pairs(new: int, before: int) -> float:
    return new * before + new * (new + 1) / 2


def prompt_density(layer: PrefillMethod, x: AttentionInputs) -> float:
    """Return the share of the pairs of dense causal attention that a method for prompts computes."""
    return sum(part.density(x.q.shape[1], x.k.shape[1], x.layout) for part in layer.patterns(x).values())


@torch.inference_mode()
def capture_inputs(
    model: PreTrainedModel, ids: Sequence[int], layers: int = SEARCH_LAYERS
) -> list[AttentionInputs]:
    """Return queries and keys of some layers of a dense model that reads a prompt."""
    records: list[AttentionRecord] = []
    total = len(model.model.layers)
    wanted = set(range(0, total, max(1, total // layers)))

    def keep(record: AttentionRecord) -> None:
        if record.layer_index in wanted:
            records.append(record)

    patch_model(model, SparseAttentionConfig(default=LayerRule(method=FULL)))
    try:
        with observe(keep):
            model.base_model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    finally:
        unpatch_model(model)
    return [
        AttentionInputs(
            q=r.q, k=r.k, v=r.k, hidden=r.q.new_zeros(*r.q.shape[:2], 1), pooled={}, layout=r.layout,
            scale=r.scale,
        )
        for r in records
    ]  # fmt: skip


@torch.inference_mode()
def search_density(
    method: str,
    settings_of: Callable[[float], Mapping[str, Any]],
    inputs: Sequence[AttentionInputs],
    wanted: float,
    halvings: int = HALVINGS,
) -> tuple[dict[str, Any], float]:
    """Return the settings, among those tried by halving, whose density is nearest to what is wanted.

    Args:
        method: Name of a method for prompts.
        settings_of: Settings for a number in 0 .. 1; larger ones keep more.
        inputs: Of the layers that the density is the mean over, without padding.
        wanted: Pairs over the pairs of dense causal attention.
        halvings: Of the interval.

    Returns:
        The settings and their density.
    """
    low, high = 0.0, 1.0
    tried: list[tuple[float, dict[str, Any], float]] = []
    for _ in range(halvings):
        middle = (low + high) / 2
        settings = dict(settings_of(middle))
        layer = build_method(LayerRule(method=method, settings=settings), geometry_of_inputs(inputs[0]), 0)
        assert isinstance(layer, PrefillMethod)
        density = sum(prompt_density(layer, x) for x in inputs) / len(inputs)
        tried.append((abs(density - wanted), settings, density))
        low, high = (middle, high) if density < wanted else (low, middle)
    _, settings, density = min(tried, key=lambda entry: entry[0])
    return settings, density


def geometry_of_inputs(x: AttentionInputs) -> AttentionGeometry:
    """Return the sizes of a layer with these queries and keys."""
    heads, dim = x.q.shape[2:]
    return AttentionGeometry(
        hidden_size=heads * dim, num_query_heads=heads, num_kv_heads=x.k.shape[2], head_dim=dim
    )
