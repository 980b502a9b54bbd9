"""Configuration of a sparse model: which method runs in which layer, with which settings.

Only shapes and names are checked here. A method checks its own settings (see
``nsa_convert.methods.parts.base``), because configuration may not import methods.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from nsa_convert.errors import ConfigError

FULL = "full"
"""Method name of a layer that keeps dense attention."""

T = TypeVar("T")


def suggest(name: str, known: Collection[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or the list of known names."""
    near = difflib.get_close_matches(str(name), sorted(known), n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(sorted(known))}"


def unknown_keys(given: Collection[str], known: Collection[str], where: str) -> list[str]:
    """Return one problem line for each key of ``given`` that is not in ``known``."""
    return [f"{where}: unknown key '{key}'{suggest(key, known)}" for key in given if key not in known]


def number_ranges(numbers: Iterable[int]) -> str:
    """Return numbers as ``"0-3, 7"``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def raise_problems(problems: list[str], *, code: str = "CF13", hint: str | None = None) -> None:
    """Raise one ConfigError that lists every problem, or return when there is none."""
    if problems:
        raise ConfigError("; ".join(problems), code=code, hint=hint)


def between(name: str, value: float, least: float, most: float) -> list[str]:
    """Return the problem of a setting outside of a range, if it has one."""
    return [] if least <= value <= most else [f"{name} must be between {least} and {most}, got {value}"]


def at_least(least: int, **values: int) -> list[str]:
    """Return the problems of settings below a limit."""
    return [f"{name} must be >= {least}, got {x}" for name, x in values.items() if x < least]


def one_or_more(names: Sequence[str], settings: object) -> list[str]:
    """Return the problems of settings that must be at least 1."""
    return at_least(1, **{name: getattr(settings, name) for name in names})


def strict_dataclass(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from a mapping, every key and type checked.

    Args:
        cls: Dataclass whose fields are int, float, bool, str or ``Literal``.
        values: Given keys and values.
        where: Prefix of the messages.

    Raises:
        ConfigError: Unknown keys (the nearest field is named), wrong types, or whatever the dataclass
            itself refuses; all problems in one message.
    """
    hints = get_type_hints(cls)
    problems = unknown_keys(values, hints, where)
    for key, value in values.items():
        if key in hints and not _matches(value, hints[key]):
            problems.append(f"{where}: {key} must be {_describe(hints[key])}, got {value!r}")
    raise_problems(problems)
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}", code=error.code, hint=error.hint) from error


def _matches(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is list:
        return isinstance(value, (list, tuple))
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", list: "a list"}
    return names.get(kind, str(kind))


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
        problems = [
            f"{name} must be a positive integer, got {value!r}"
            for name, value in vars(self).items()
            if name != "qkv_bias" and (not _matches(value, int) or value < 1)
        ]
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
        problems = []
        if not isinstance(self.method, str) or not self.method:
            problems.append(f"method must be a name, got {self.method!r}")
        for name, numbers, least in (("layers", self.layers, None), ("heads", self.heads, 0)):
            problems += _list_problems(name, numbers, least)
        raise_problems(problems, code="RC10")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "rule") -> LayerRule:
        """Read ``{"method": ..., "layers": [...], "heads": [...], **settings}``."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: expected a mapping with 'method', got {values!r}", code="CF20")
        rest = dict(values)
        if "method" not in rest:
            raise ConfigError(f"{where}: 'method' is missing", code="CF20")
        method = rest.pop("method")
        lists = {name: rest.pop(name, None) for name in ("layers", "heads")}
        for name, given in lists.items():
            if given is not None and not isinstance(given, (list, tuple)):
                raise ConfigError(f"{where}: {name} must be a list of integers, got {given!r}", code="RC10")
        numbers = {name: None if given is None else tuple(given) for name, given in lists.items()}
        return cls(method=method, settings=rest, **numbers)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that :meth:`from_dict` reads."""
        out: dict[str, Any] = {"method": self.method, **self.settings}
        for name in ("layers", "heads"):
            if getattr(self, name) is not None:
                out[name] = list(getattr(self, name))
        return out


def _list_problems(name: str, numbers: tuple[int, ...] | None, least: int | None) -> list[str]:
    if numbers is None:
        return []
    if not numbers:
        return [f"{name} is empty; leave it out to cover all {name}"]
    integers = all(isinstance(i, int) and not isinstance(i, bool) for i in numbers)
    if not integers or (least is not None and min(numbers) < least):
        return [f"{name} must be integers{'' if least is None else ' from 0'}, got {list(numbers)}"]
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
        if not isinstance(values, Mapping):
            raise ConfigError(f"sparse_attention: expected a mapping, got {values!r}", code="CF20")
        raise_problems(unknown_keys(values, {"default", "rules"}, "sparse_attention"))
        if "default" not in values:
            raise ConfigError("sparse_attention: 'default' is missing", code="CF20")
        rules = values.get("rules", ())
        if not isinstance(rules, (list, tuple)):
            raise ConfigError(f"sparse_attention.rules: expected a list, got {rules!r}", code="CF20")
        return cls(
            default=LayerRule.from_dict(values["default"], "sparse_attention.default"),
            rules=tuple(
                LayerRule.from_dict(rule, f"sparse_attention.rules[{i}]") for i, rule in enumerate(rules)
            ),
        )

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
