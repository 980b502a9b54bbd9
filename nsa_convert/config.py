"""Configuration of a sparse model: which method runs in which layer, with which settings.

Only shapes and names are checked here. A method checks its own settings (see
``nsa_convert.methods.parts.base``), because configuration may not import methods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from nsa_convert.errors import ConfigError
from nsa_convert.settings import (
    at_least,
    one_or_more,
    raise_problems,
    read_settings,
    read_values,
    type_problems,
)

FULL = "full"
"""Method name of a layer that keeps dense attention."""
PAIR = "phases"
"""Method name by which older plans, and ``--method``, ask for a method for each phase."""

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)
SCOPE = ("layers", "heads", "phase")
"""What a rule may be limited to, from what weighs most when several rules cover a head."""


def number_ranges(numbers: Iterable[int]) -> str:
    """Return numbers as ``"0-3, 7"``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionGeometry:
    """Sizes of one attention layer.

    Attributes:
        hidden_size: Width of the residual stream.
        num_query_heads: HQ.
        num_kv_heads: H; HQ must be a multiple of it.
        head_dim: D.
        qkv_bias: Whether the query, key and value projections have a bias.
    """

    hidden_size: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        sizes = [field.name for field in dataclasses.fields(self) if field.name != "qkv_bias"]
        problems = type_problems(self) or one_or_more(sizes, self)
        if not problems and self.num_query_heads % self.num_kv_heads:
            problems.append(
                f"num_attention_heads {self.num_query_heads} is not a multiple of "
                f"num_key_value_heads {self.num_kv_heads}"
            )
        raise_problems(problems, code="CF02")

    @property
    def group_size(self) -> int:
        """G, the number of query heads that share one key/value head."""
        return self.num_query_heads // self.num_kv_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRule:
    """One method with its settings, and the layers, heads and phase that it is for.

    Attributes:
        method: Registered method name, or ``"full"`` for dense attention.
        settings: The method's own settings; checked by the method.
        layers: Layer indices the rule covers, negative ones from the end; None covers every layer.
        heads: Key/value heads the rule covers in its layers; None covers all of them.
        phase: ``"prefill"`` while a prompt is read, ``"decode"`` afterwards; None covers both.
    """

    method: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    phase: Phase | None = None

    def __post_init__(self) -> None:
        problems = type_problems(self)
        if not problems:
            problems += [] if self.method else ["method is empty; name a method"]
            problems += _list_problems("layers", self.layers)
            problems += _list_problems("heads", self.heads)
            problems += at_least(0, heads=min(self.heads or (0,)))
        raise_problems(problems, code="RC10")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "rule") -> LayerRule:
        """Read ``{"method": ..., "layers": [...], "heads": [...], "phase": ..., **settings}``."""
        return read_settings(cls, values, where, code="CF20")

    @staticmethod
    def as_fields(values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a rule is read from: the settings of the method stand beside the rule's own keys."""
        own = {key: values[key] for key in ("method", *SCOPE) if key in values}
        return {**own, "settings": {key: values[key] for key in values if key not in own}}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that :meth:`from_dict` reads."""
        out: dict[str, Any] = {"method": self.method, **self.settings}
        for name in SCOPE:
            value = getattr(self, name)
            if value is not None:
                out[name] = list(value) if isinstance(value, tuple) else value
        return out

    @property
    def claim(self) -> tuple[bool, ...]:
        """How narrow the rule is: whether it names layers, heads, a phase; the larger claim goes first."""
        return tuple(getattr(self, name) is not None for name in SCOPE)

    def covers(self, layer: int, head: int, phase: Phase) -> bool:
        """Return whether the rule is for a key/value head of a layer in a phase."""
        return (
            (self.layers is None or layer in self.layers)
            and (self.heads is None or head in self.heads)
            and self.phase in (None, phase)
        )


def _list_problems(name: str, numbers: tuple[int, ...] | None) -> list[str]:
    if numbers is None:
        return []
    if not numbers:
        return [f"{name} is empty; leave it out to cover all {name}"]
    if len(set(numbers)) != len(numbers):
        return [f"{name} are listed twice: {sorted(numbers)}"]
    return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseAttentionConfig:
    """The plan stored under ``config.sparse_attention`` of a converted model.

    A key/value head of a layer runs, in each phase, the narrowest rule that covers it: rules that name layers
    go before those that do not, then those that name heads, then those that name a phase; the default comes
    last. Two rules that name the same of these may not cover the same head of a layer in the same phase.

    Attributes:
        default: Rule for whatever no other rule covers.
        rules: Rules for some layers, heads or a phase.
    """

    default: LayerRule
    rules: tuple[LayerRule, ...] = ()

    def __post_init__(self) -> None:
        default, rules = _without_pairs(self.default, self.rules)
        object.__setattr__(self, "default", default)
        object.__setattr__(self, "rules", rules)

        problems = [
            f"default: '{name}' belongs in a rule, not in the default"
            for name in SCOPE
            if getattr(default, name) is not None
        ]
        for index, rule in enumerate(rules):
            if not any(rule.claim):
                given = ", ".join(rule.to_dict())
                problems.append(f"rules[{index}]: 'layers', 'heads' or 'phase' is missing, it has {given}")
            for before, other in enumerate(rules[:index]):
                problems += [
                    f"{place} is named by rules[{before}] and rules[{index}]"
                    for place in _shared(other, rule)
                ]
        raise_problems(problems, code="RC10")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparseAttentionConfig:
        """Read ``{"default": {...}, "rules": [...]}``; unknown keys are an error."""
        return read_settings(cls, values, "sparse_attention", code="CF20")

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that :meth:`from_dict` reads."""
        out: dict[str, Any] = {"default": self.default.to_dict()}
        if self.rules:
            out["rules"] = [rule.to_dict() for rule in self.rules]
        return out

    def shares(self, layer: int, num_kv_heads: int) -> dict[tuple[int, ...], dict[Phase, int]]:
        """Return which heads of a layer run the same rules.

        Returns:
            Key/value heads, ascending -> phase -> number of the rule: 0 is the default, ``rules`` follow.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for head in range(num_kv_heads):
            numbers = tuple(self._rule_of(layer, head, phase) for phase in PHASES)
            groups.setdefault(numbers, []).append(head)
        return {tuple(heads): dict(zip(PHASES, numbers, strict=True)) for numbers, heads in groups.items()}

    def _rule_of(self, layer: int, head: int, phase: Phase) -> int:
        covering = [i for i, rule in enumerate(self.rules, 1) if rule.covers(layer, head, phase)]
        return max(covering, key=lambda number: self.rules[number - 1].claim, default=0)

    def for_layer(self, layer: int, num_kv_heads: int) -> list[LayerRule]:
        """Return the rules of a layer in the order of their first head, each as far as it is run.

        A rule that covers a part of the heads carries them in ``heads``, ascending, and one for a single
        phase carries that, the default's share too. Where phases differ, the rule for prompts comes first.
        """
        every = (self.default, *self.rules)
        shares = self.shares(layer, num_kv_heads)
        found = []
        for heads, numbers in shares.items():
            own = heads if len(shares) > 1 else None
            if len(set(numbers.values())) == 1:
                found.append(dataclasses.replace(every[numbers["prefill"]], heads=own, phase=None))
                continue
            for phase, number in numbers.items():
                found.append(dataclasses.replace(every[number], heads=own, phase=phase))
        return found

    def resolved(self, num_layers: int, num_kv_heads: int) -> SparseAttentionConfig:
        """Return the plan with layers counted from the front.

        Raises:
            ConfigError: A rule names a layer or a head the model does not have, or one twice.
        """
        problems = []
        rules = []
        for index, rule in enumerate(self.rules):
            layers = rule.layers or ()
            outside = sorted(layer for layer in layers if not -num_layers <= layer < num_layers)
            if outside:
                problems.append(
                    f"rules[{index}]: layers {number_ranges(outside)} do not exist: the model has layers "
                    f"0-{num_layers - 1}"
                )
            missing = [head for head in rule.heads or () if head >= num_kv_heads]
            if missing:
                problems.append(
                    f"rules[{index}]: key/value heads {number_ranges(missing)} do not exist: the model has "
                    f"heads 0-{num_kv_heads - 1}"
                )

            # A layer that is named from both ends is named twice.
            if layers and not outside:
                front = tuple(layer % num_layers for layer in layers)
                try:
                    rule = dataclasses.replace(rule, layers=front)
                except ConfigError as error:
                    problems.append(f"rules[{index}]: {error}")
            rules.append(rule)
        raise_problems(problems, code="RC10")
        return dataclasses.replace(self, rules=tuple(rules))


def _shared(one: LayerRule, other: LayerRule) -> list[str]:
    """Return what two rules of equal claim both cover, as messages call it."""
    if one.claim != other.claim or one.phase != other.phase:
        return []
    if one.heads is not None and not set(one.heads) & set(other.heads or ()):
        return []
    if one.layers is None:
        return ["every layer"]
    return [f"layer {layer}" for layer in one.layers if layer in (other.layers or ())]


def _without_pairs(default: LayerRule, rules: Sequence[LayerRule]) -> tuple[LayerRule, tuple[LayerRule, ...]]:
    """Return a plan's rules without the method ``phases``, by which older plans name a method for each phase.

    ``{"method": "phases", "prefill": {...}, "decode": {...}}`` is a rule for each of them. The second one is
    put behind all others, so that the numbers of the rules stay.
    """
    found = []
    further = []
    for index, rule in enumerate((default, *rules)):
        if rule.method != PAIR:
            found.append(rule)
            continue
        where = f"rules[{index - 1}]" if index else "default"
        parts = _parts_of_pair(rule, f"{where} ({PAIR})")
        scope = {name: getattr(rule, name) for name in SCOPE}
        # The default's method for prompts is the new default: it is all that the rule for decoding leaves.
        prompts: dict[str, Any] = {"phase": "prefill"} if index else {}
        found.append(dataclasses.replace(parts["prefill"], **{**scope, **prompts}))
        further.append(dataclasses.replace(parts["decode"], **{**scope, "phase": "decode"}))
    return found[0], (*found[1:], *further)


def _parts_of_pair(rule: LayerRule, where: str) -> dict[Phase, LayerRule]:
    """Return the rules of both phases that the settings of ``phases`` hold."""
    kinds: dict[str, Any] = dict.fromkeys(PHASES, str | Mapping)
    dense: dict[str, Any] = dict.fromkeys(PHASES, FULL)
    given = dense | read_values(kinds, rule.settings, where)
    problems: list[str] = []
    parts: dict[Phase, LayerRule] = {}
    if rule.phase is not None:
        problems.append(f"{where} names both phases; leave out 'phase'")

    # Each phase is a name, or a rule without layers, heads and phase of its own.
    for phase in PHASES:
        part = given[phase]
        values = {"method": part} if isinstance(part, str) else part
        if "method" not in values or set(SCOPE) & values.keys():
            problems.append(
                f"{where}: {phase} must be a name, or a mapping with 'method' and its settings, got {part!r}"
            )
        elif values["method"] == PAIR:
            problems.append(f"{where}: {phase} cannot be {PAIR} again")
        else:
            parts[phase] = LayerRule.from_dict(values, f"{where}.{phase}")
    raise_problems(problems, code="CF22")
    return parts
