"""What is known of each key/value head of a model: one artefact that producers write and hybrids read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nsa_convert.config import LayerRule, SparseAttentionConfig
from nsa_convert.errors import ConfigError

FORMAT = "nsa_convert.head_profile.v1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadProfile:
    """Scores of the key/value heads of a model.

    Attributes:
        scores: ``[L, H]`` float32, larger for heads that need more of the context (retrieval heads).
        meta: What the scores are and how they were made; JSON values.
        budgets: ``[N]`` int64 ascending, keys a query sees; None when only scores are known.
        captured: ``[L, H, N]`` float32, dense attention mass captured at each budget; None without budgets.
        error: ``[L, H, N]`` float32, what the head's output misses at each budget: squared, after the output
            projection, over the squared residual stream; None without budgets.
    """

    scores: Tensor
    meta: Mapping[str, Any]
    budgets: Tensor | None = None
    captured: Tensor | None = None
    error: Tensor | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.scores.dim() != 2:
            problems.append(f"scores must be [layers, heads], got {tuple(self.scores.shape)}")

        # Budgets, captured mass and error come together and fit each other.
        if len({x is None for x in (self.budgets, self.captured, self.error)}) > 1:
            problems.append("budgets, captured and error belong together")
        elif self.budgets is not None:
            wanted = (*self.scores.shape, len(self.budgets))
            for name, x in (("captured", self.captured), ("error", self.error)):
                if x is not None and tuple(x.shape) != wanted:
                    problems.append(f"{name} must be {wanted}, got {tuple(x.shape)}")
            if (self.budgets.diff() <= 0).any() or (self.budgets < 1).any():
                problems.append(f"budgets must rise from at least 1, got {self.budgets.tolist()}")

        if not problems and not all(x.isfinite().all() for x in (self.scores, *self._optional())):
            problems.append("all numbers must be finite")
        if problems:
            raise ConfigError("; ".join(problems), code="CF22", where="head profile")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        tensors = {"scores": self.scores.float().contiguous()}
        if self.budgets is not None:
            tensors["budgets"] = self.budgets.long()
            tensors |= {name: getattr(self, name).float().contiguous() for name in ("captured", "error")}
        # why: the profile that inspect --measure was asked for
        save_file(tensors, path, metadata={"format": FORMAT, "meta": json.dumps(dict(self.meta))})

    @classmethod
    def load(cls, path: str | Path) -> HeadProfile:
        """Read a file that :meth:`save` wrote.

        Raises:
            ConfigError: There is no such file, or it is not a head profile.
        """
        hint = "make one with 'nsa-convert inspect MODEL --measure FILE'"

        try:
            with safe_open(path, "pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"cannot read head profile {path}: {error}", code="CF24", hint=hint) from error

        try:
            notes = json.loads(meta.get("meta", ""))
        except ValueError:  # why: damaged notes are refused below
            notes = None

        if meta.get("format") != FORMAT or "scores" not in tensors or not isinstance(notes, dict):
            raise ConfigError(
                f"{path} is not a head profile",
                code="CF24",
                expected=FORMAT,
                found=str(meta.get("format")),
                hint=hint,
            )

        return cls(
            scores=tensors["scores"],
            meta=notes,
            budgets=tensors.get("budgets"),
            captured=tensors.get("captured"),
            error=tensors.get("error"),
        )

    def _optional(self) -> tuple[Tensor, ...]:
        return tuple(x for x in (self.captured, self.error) if x is not None)


def density_of(budget: int, length: int) -> float:
    """Return visible pairs over causal pairs when a query sees its last or best ``budget`` keys."""
    seen = min(budget, length)
    return (seen * (seen + 1) / 2 + (length - seen) * seen) / (length * (length + 1) / 2)


def allocate(profile: HeadProfile, density: float, length: int) -> Tensor:
    """Give each head a budget so that the summed error is smallest at a fixed density of the whole model.

    Each head's error as a function of its density is replaced by its convex hull; then the steps that lower
    it most per density are taken, over all heads, until the density is used up. For convex curves this is the
    best choice, up to the last step. The captured mass is no such guide: a head with diffuse attention misses
    much of it and little output.

    Args:
        profile: With errors at several budgets.
        density: Visible pairs over causal pairs, mean over all heads, in (0, 1].
        length: Sequence length the density is meant at.

    Returns:
        ``[L, H]`` int64 keys a query sees; ``length`` stands for all of them.

    Raises:
        ConfigError: The profile has scores only, or the density cannot be reached.
    """
    if profile.error is None or profile.budgets is None:
        raise ConfigError("this head profile has scores only, no errors by budget", code="CF22")
    budgets = [b for b in profile.budgets.tolist() if b < length]
    costs = [density_of(b, length) for b in budgets] + [1.0]
    lowest = costs[0]
    if not lowest <= density <= 1:
        raise ConfigError(
            f"density {density:g} is outside {lowest:.3g} (the smallest measured budget everywhere) to 1 at "
            f"{length} tokens",
            code="CF22",
        )

    # For each head the steps along its hull: what a larger budget gains per density, and what it costs.
    layers, heads = profile.scores.shape
    steps: list[tuple[float, int, int, int, float]] = []
    for layer in range(layers):
        for head in range(heads):
            value = [-error for error in profile.error[layer, head, : len(budgets)].tolist()] + [0.0]
            hull = _concave_hull(costs, value)
            for a, b in zip(hull, hull[1:], strict=False):
                gain = (value[b] - value[a]) / (costs[b] - costs[a])
                steps.append((gain, layer, head, b, costs[b] - costs[a]))

    # Take the steps with the largest gain first, until the density is used up.
    chosen = torch.zeros(layers, heads, dtype=torch.long)
    left = (density - lowest) * layers * heads
    # A head's hull is concave: sorted by gain, its own steps come in order, and one too large ends its rise.
    ended: set[tuple[int, int]] = set()
    for _, layer, head, target, cost in sorted(steps, key=lambda step: (-step[0], step[1], step[2], step[3])):
        if (layer, head) in ended or cost > left + 1e-9:
            ended.add((layer, head))
            continue
        chosen[layer, head] = target
        left -= cost

    return torch.tensor([*budgets, length])[chosen]


def plan_of(budgets: Tensor, length: int, rule: Mapping[str, Any], per_block: int) -> SparseAttentionConfig:
    """Return a plan that gives each head its budget.

    Args:
        budgets: ``[L, H]`` keys a query sees; at least ``length`` stands for dense attention.
        length: As for :func:`allocate`.
        rule: ``{"method": ..., **settings}`` of the sparse heads, without ``num_blocks``.
        per_block: Keys in a block.

    Raises:
        ConfigError: A setting of the rule is wrong.
    """
    # Layers whose heads of one budget are the same share a rule.
    groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for layer, row in enumerate(budgets.tolist()):
        for budget in sorted(set(row)):
            heads = tuple(head for head, own in enumerate(row) if own == budget)
            groups.setdefault((min(budget, length), heads), []).append(layer)

    rules = [
        LayerRule(
            layers=tuple(layers),
            heads=None if len(heads) == budgets.shape[1] else heads,
            **_budget_rule(rule, budget, length, per_block),
        )
        for (budget, heads), layers in groups.items()
    ]

    # The default is the rule of the smallest budget.
    default = _budget_rule(rule, int(budgets.min()), length, per_block)
    return SparseAttentionConfig(default=LayerRule(**default), rules=tuple(rules))


def plan_from_profile(
    profile: HeadProfile, density: float, length: int | None = None
) -> SparseAttentionConfig:
    """Return the plan that :func:`allocate` chooses, with the method the profile was measured with.

    Args:
        profile: From ``inspect --measure``.
        density: Visible pairs over causal pairs of the whole model.
        length: Sequence length the density is meant at; by default the one that was measured.

    Raises:
        ConfigError: The profile has scores only, or the density cannot be reached.
    """
    length = length or int(profile.meta.get("length", 0)) or 8192
    budgets = allocate(profile, density, length)
    rule = dict(profile.meta["rule"])
    return plan_of(budgets, length, rule, int(rule["block_size"]))


def _budget_rule(rule: Mapping[str, Any], budget: int, length: int, per_block: int) -> dict[str, Any]:
    if budget >= length:
        return {"method": "full"}

    settings = {key: value for key, value in rule.items() if key != "method"}
    return {"method": rule["method"], "settings": {**settings, "num_blocks": budget // per_block}}


def _concave_hull(xs: Sequence[float], ys: Sequence[float]) -> list[int]:
    """Return the indices of the upper concave hull of points with rising x, first and last included."""
    hull: list[int] = []
    for i in range(len(xs)):
        while len(hull) > 1:
            a = hull[-2]
            b = hull[-1]
            if (ys[b] - ys[a]) * (xs[i] - xs[a]) > (ys[i] - ys[a]) * (xs[b] - xs[a]):
                break
            hull.pop()
        hull.append(i)
    return hull
