"""Configuration of a sparse model: which method runs in which layer, with which settings.

Only shapes and names are checked here. A method checks its own settings (see
``nsa_convert.methods.parts.base``), because configuration may not import methods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from nsa_convert.errors import ConfigError
from nsa_convert.settings import at_least, one_or_more, raise_problems, read_settings, type_problems

FULL = "full"
"""Method name of a layer that keeps dense attention."""


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
    """One method with its settings, for some layers or for all.

    Attributes:
        method: Registered method name, or ``"full"`` for dense attention.
        settings: The method's own settings; checked by the method.
        layers: Layer indices the rule covers, negative ones from the end; None covers every layer.
        heads: Key/value heads the rule covers in its layers; None covers all of them.
    """

    method: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        problems = type_problems(self)
        if not problems:
            problems += _list_problems("layers", self.layers)
            problems += _list_problems("heads", self.heads)
            problems += at_least(0, heads=min(self.heads or (0,)))
        raise_problems(problems, code="RC10")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "rule") -> LayerRule:
        """Read ``{"method": ..., "layers": [...], "heads": [...], **settings}``."""
        return read_settings(cls, values, where, code="CF20")

    @staticmethod
    def as_fields(values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a rule is read from: the settings of the method stand beside the rule's own keys."""
        own = {key: values[key] for key in ("method", "layers", "heads") if key in values}
        return {**own, "settings": {key: values[key] for key in values if key not in own}}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that :meth:`from_dict` reads."""
        out: dict[str, Any] = {"method": self.method, **self.settings}
        for name in ("layers", "heads"):
            if getattr(self, name) is not None:
                out[name] = list(getattr(self, name))
        return out


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

    Attributes:
        default: Rule for every layer and head that no other rule names.
        rules: Rules for named layers, or for some heads of them; a head may be named once.
    """

    default: LayerRule
    rules: tuple[LayerRule, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        for name in ("layers", "heads"):
            if getattr(self.default, name) is not None:
                problems.append(f"default: '{name}' belongs in a rule, not in the default")
        seen: dict[int, list[int]] = {}
        for index, rule in enumerate(self.rules):
            if rule.layers is None:
                given = ", ".join(rule.to_dict())
                problems.append(f"rules[{index}]: 'layers' is missing, it has {given}")
                continue
            for layer in rule.layers:
                for other in seen.setdefault(layer, []):
                    heads = self.rules[other].heads
                    if heads is None or rule.heads is None or set(heads) & set(rule.heads):
                        problems.append(f"layer {layer} is named by rules[{other}] and rules[{index}]")
                seen[layer].append(index)
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

    def for_layer(self, layer: int, num_kv_heads: int) -> list[LayerRule]:
        """Return the rules of a layer in the order of their first head; a single one covers all heads.

        Rules that cover a part of the heads carry them in ``heads``, ascending, the default's share too.
        """
        named = [rule for rule in self.rules if rule.layers is not None and layer in rule.layers]
        if not named:
            return [self.default]
        taken = {head for rule in named for head in rule.heads or range(num_kv_heads)}
        rest = tuple(head for head in range(num_kv_heads) if head not in taken)
        parts = [dataclasses.replace(rule, heads=tuple(sorted(rule.heads))) for rule in named if rule.heads]
        if len(parts) < len(named):
            return named
        if rest:
            parts.append(dataclasses.replace(self.default, heads=rest))
        if len(parts) == 1:
            return [dataclasses.replace(parts[0], heads=None)]
        return sorted(parts, key=lambda rule: rule.heads or ())

    def resolved(self, num_layers: int, num_kv_heads: int) -> SparseAttentionConfig:
        """Return the plan with layers counted from the front.

        Raises:
            ConfigError: A rule names a layer or a head the model does not have, or one twice.
        """
        problems, rules = [], []
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
            if layers and not outside:
                front = tuple(layer % num_layers for layer in layers)
                try:
                    rule = dataclasses.replace(rule, layers=front)
                except ConfigError as error:
                    problems.append(f"rules[{index}]: {error}")
            rules.append(rule)
        raise_problems(problems, code="RC10")
        return dataclasses.replace(self, rules=tuple(rules))
