"""The rows of the suite ``compare``: methods and named plans, at every budget and length."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nsa_convert.config import FULL, AttentionGeometry, LayerRule, SparseAttentionConfig
from nsa_convert.errors import ConfigError
from nsa_convert.evaluation.models import UNLIMITED, reads_texts
from nsa_convert.evaluation.suites.compare_settings import (
    GRAIN,
    PAIRS,
    CompareSettings,
    budget_at,
    budget_label,
)
from nsa_convert.heads.profile import density_of
from nsa_convert.methods.parts.mix import leaves_of
from nsa_convert.methods.parts.registry import METHODS, method_class
from nsa_convert.plan import resolve_plan
from nsa_convert.settings import raise_problems

DENSE = "dense"

Search = Callable[[str, int, int], Mapping[str, Any]]
"""Method, budget in tokens, length -> settings that keep as many pairs of a prompt as the budget."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedPlan:
    """A sparse plan with a name.

    Attributes:
        name: Name in the table.
        source: How the command line names it, without folders.
        plan: A rule without settings gets those of the budget; one with settings keeps them.
    """

    name: str
    source: str
    plan: SparseAttentionConfig

    @property
    def takes_budget(self) -> bool:
        """Return whether a budget changes the plan."""
        return any(_is_open(rule) for rule in (self.plan.default, *self.plan.rules))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table: one plan at one budget and one length.

    Attributes:
        name: Name of the method or plan; ``dense`` for dense attention.
        kind: ``"dense"``, ``"trainable"``, ``"training-free"`` or ``"plan"``.
        budget: The budget as it was given, as text; ``"own"`` for a plan that has all its settings.
        length: Tokens of the text or prompt.
        tokens: The budget in tokens; None for dense attention and for a plan with its own settings.
        plan: The plan with all settings; None for dense attention.
        visible: Longest context within which every layer is dense; None for dense attention.
        causal: Whether no query's keys are chosen by later tokens.
        one_pass: Whether reading a text in one pass shows what the method does.
    """

    name: str
    kind: str
    budget: str
    length: int
    tokens: int | None
    plan: SparseAttentionConfig | None
    visible: int | None
    causal: bool
    one_pass: bool

    def facts(self) -> dict[str, Any]:
        """Return the fields for JSON, with the plan as plain values."""
        plan = None if self.plan is None else self.plan.to_dict()
        return {**vars(self), "plan": plan}


def named_plans(settings: CompareSettings, plans: Sequence[NamedPlan]) -> list[NamedPlan]:
    """Return the methods as plans, followed by the given plans.

    Raises:
        ConfigError: A name is used twice, or is that of the dense model (RC10).
    """
    alone = {name: SparseAttentionConfig(default=LayerRule(method=name)) for name in settings.methods}
    methods = [NamedPlan(name=name, source=name, plan=PAIRS.get(name, plan)) for name, plan in alone.items()]
    names = [DENSE, *(plan.name for plan in methods), *(plan.name for plan in plans)]
    twice = sorted({name for name in names if names.count(name) > 1})
    raise_problems(
        [f"the name {name!r} stands twice" for name in twice], code="RC10", hint="rename the --plan"
    )

    return [*methods, *plans]


def make_rows(
    settings: CompareSettings,
    plans: Sequence[NamedPlan],
    layers: int,
    geometry: AttentionGeometry,
    search: Search,
) -> list[Row]:
    """Return all rows: by length, then budget, then in the order of the plans, dense attention first.

    Args:
        settings: Settings of the suite.
        plans: Result of :func:`named_plans`.
        layers: Number of layers of the model.
        geometry: Sizes of its attention layers.
        search: Finds the settings of methods whose density depends on the input.

    Raises:
        ConfigError: A plan that does not fit the model, or a budget that is too small or not a multiple of a
            method's blocks; all problems in one message (CF22).
    """
    rows = []
    problems = []
    for length in settings.all_lengths():
        rows.append(_dense_row(length))
        for number, budget in enumerate(settings.budgets):
            for named in plans:
                # A plan with its own settings has one row per length, not one per budget.
                if number and not named.takes_budget:
                    continue

                own = tokens = budget_at(budget, length)
                try:
                    if settings.equal == "density":
                        own = beside_dense(tokens, length, _dense_share(named.plan, layers, geometry))
                    plan = _at_budget(named.plan, own, length, search)
                    rows.append(_row(named, budget_label(budget), tokens, length, plan, layers, geometry))
                except ConfigError as error:
                    problems.append(f"{named.name} at a budget of {tokens} tokens: {error}")

    hint = "every method takes multiples of 128 tokens from 256 on"
    raise_problems(list(dict.fromkeys(problems)), code="CF22", hint=hint)
    return rows


def _dense_row(length: int) -> Row:
    """Return the row of dense attention at a length."""
    return Row(
        name=DENSE, kind=DENSE, budget="", length=length, tokens=None, plan=None, visible=None, causal=True,
        one_pass=True,
    )  # fmt: skip


def _row(
    named: NamedPlan,
    label: str,
    tokens: int,
    length: int,
    plan: SparseAttentionConfig,
    layers: int,
    geometry: AttentionGeometry,
) -> Row:
    """Return the row of a plan whose settings are complete."""
    methods = resolve_plan(plan, layers, geometry)
    leaves = leaves_of(methods)
    visible = min(method.reach().visible_budget for method in methods)

    spec = METHODS[named.name].spec if named.name in METHODS else None
    kind = "plan" if spec is None else "trainable" if spec.trainable else "training-free"
    own = not named.takes_budget

    return Row(
        name=named.name, kind=kind, budget="own" if own else label, length=length,
        tokens=None if own else tokens, plan=plan, visible=visible if visible < UNLIMITED else None,
        causal=all(method.reach().is_causal for method in methods), one_pass=all(map(reads_texts, leaves)),
    )  # fmt: skip


def _dense_share(plan: SparseAttentionConfig, layers: int, geometry: AttentionGeometry) -> float:
    """Return the share of the model's key/value heads that a plan leaves dense."""
    leaves = leaves_of(resolve_plan(plan, layers, geometry))
    dense = sum(leaf.geometry.num_kv_heads for leaf in leaves if leaf.spec.name == FULL)
    return dense / (layers * geometry.num_kv_heads)


def beside_dense(tokens: int, length: int, share: float) -> int:
    """Return the budget of sparse heads with which they and the dense heads keep as many pairs as a budget.

    Args:
        tokens: Budget that all heads would have.
        length: Tokens of the text.
        share: Share of the heads that are dense.

    Returns:
        The nearest multiple of 128 tokens, at least 256.
    """
    if not share:
        return tokens

    choices = range(2 * GRAIN, max(2 * GRAIN, tokens) + 1, GRAIN)
    wanted = density_of(tokens, length)
    return min(choices, key=lambda n: abs(share + (1 - share) * density_of(n, length) - wanted))


def _is_open(rule: LayerRule) -> bool:
    """Return whether a rule takes its settings from the budget."""
    return rule.method != FULL and not rule.settings


def _at_budget(
    plan: SparseAttentionConfig, tokens: int, length: int, search: Search
) -> SparseAttentionConfig:
    """Return the plan with the settings of a budget in its rules without settings."""

    def filled(rule: LayerRule) -> LayerRule:
        if not _is_open(rule):
            return rule
        return dataclasses.replace(rule, settings=settings_at(rule.method, tokens, length, search))

    return SparseAttentionConfig(default=filled(plan.default), rules=tuple(map(filled, plan.rules)))


def settings_at(method: str, tokens: int, length: int, search: Search) -> dict[str, Any]:
    """Return the settings of a method at a budget.

    Raises:
        ConfigError: The budget is not a multiple of the method's blocks, or has no meaning for the method.
    """
    settings: Any = method_class(method).Settings
    # Methods say what a budget means by one of two class methods.
    if hasattr(settings, "at_budget"):
        return settings.at_budget(tokens)
    if hasattr(settings, "at_share"):
        return dict(search(method, tokens, length))
    raise ConfigError(
        f"it is not said what a budget means for '{method}'", code="CF22", hint="give its settings"
    )
