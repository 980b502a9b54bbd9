"""Density, the share of dense attention's pairs that a model reads: counted in a run, or set by a search."""

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
"""Number of layers whose queries and keys a search uses, evenly spaced."""
HALVINGS = 8
"""Number of times that a search halves its interval."""


@dataclasses.dataclass
class PairCounter:
    """Counts query-key pairs that are read, against those of dense causal attention.

    Prompts and decoding steps are counted apart. :meth:`add` is an observer of one sequence without padding.
    With a cache that evicts tokens, dense attention still counts all tokens seen so far.

    Attributes:
        read: Phase -> pairs read, summed over query heads and layers.
        whole: Phase -> pairs of dense causal attention.
        seen: (layer, heads) -> number of tokens seen.
    """

    read: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    whole: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    seen: dict[tuple, int] = dataclasses.field(default_factory=dict)

    def add(self, record: AttentionRecord) -> None:
        """Count one call of a layer, or of some of its heads."""
        new, heads, place = record.q.shape[1], record.q.shape[2], (record.layer_index, record.heads)

        # Keys before the call: those in the cache, and those that dense attention would have.
        kept = int(record.layout.offset)
        phase = "prompt" if new > STEP_TOKENS else "steps"
        seen = self.seen.get(place, 0) if phase == "steps" else kept
        self.seen[place] = seen + new

        # Without patterns all keys that are there are read.
        shares = [p.density(new, record.k.shape[1], record.layout) for p in record.patterns.values()]
        self.read[phase] += heads * _pairs(new, kept) * (sum(shares) if shares else 1.0)
        self.whole[phase] += heads * _pairs(new, seen)

    def densities(self) -> dict[str, float]:
        """Return the density of prompts and of decoding steps; 1 where nothing was counted."""
        return {phase: self.read[phase] / self.whole[phase] if self.whole[phase] else 1.0 for phase in PHASES}


def _pairs(new: int, before: int) -> float:
    """Return the causal pairs of ``new`` queries with ``before`` keys and their own."""
    return new * before + new * (new + 1) / 2


def prompt_density(layer: PrefillMethod, x: AttentionInputs) -> float:
    """Return the density of a method for prompts on given queries and keys."""
    return sum(part.density(x.q.shape[1], x.k.shape[1], x.layout) for part in layer.patterns(x).values())


@torch.inference_mode()
def capture_inputs(
    model: PreTrainedModel, ids: Sequence[int], layers: int = SEARCH_LAYERS
) -> list[AttentionInputs]:
    """Return the attention inputs of some layers of a dense model that reads a prompt.

    They hold queries and keys; values and hidden states are placeholders.

    Args:
        model: A dense causal model; it is patched while it reads and restored afterwards.
        ids: Tokens of the prompt.
        layers: Number of layers, about.
    """
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
    """Search for the settings whose density is nearest to the wanted one.

    Args:
        method: Name of a method for prompts.
        settings_of: Number from 0 to 1 -> settings; larger numbers keep more pairs.
        inputs: Inputs of the layers over which the density is averaged, without padding.
        wanted: Density to reach.
        halvings: Number of times that the interval is halved.

    Returns:
        The best settings of those tried, and their density.
    """
    low = 0.0
    high = 1.0
    tried: list[tuple[float, dict[str, Any], float]] = []
    for _ in range(halvings):
        # The density at the middle of the interval.
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
    """Return the sizes of an attention layer with these queries and keys."""
    heads, dim = x.q.shape[2:]
    return AttentionGeometry(
        hidden_size=heads * dim, num_query_heads=heads, num_kv_heads=x.k.shape[2], head_dim=dim
    )
