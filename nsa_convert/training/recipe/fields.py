"""Nested dataclasses from untyped YAML values, every key and type checked, all problems collected."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from nsa_convert.config import unknown_keys
from nsa_convert.errors import ConfigError

T = TypeVar("T")

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


class _Bad(Exception):
    """A value has the wrong type; the message says what was wanted."""


def read_dataclass(cls: type[T], values: Any, where: str, problems: list[str]) -> T | None:
    """Build a frozen dataclass from a mapping; append to ``problems`` and return None where it cannot be.

    Fields may be int, float, bool, str, ``Literal``, optional, dataclasses, ``Mapping[str, X]``, and
    ``tuple[X, ...]`` of these. A ConfigError that the dataclass itself raises becomes a problem too.
    """
    if not isinstance(values, Mapping):
        problems.append(f"{where}: expected a mapping, got {values!r}")
        return None
    fields = dataclasses.fields(cast(Any, cls))
    hints = {f.name: hint for f in fields for hint in [get_type_hints(cls)[f.name]]}
    before = len(problems)
    problems += unknown_keys([str(key) for key in values], hints, where)
    known: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            continue
        try:
            known[key] = _convert(hints[key], value, f"{where}.{key}" if where else key, problems)
        except _Bad as error:
            problems.append(f"{where}: {key} must be {error}, got {value!r}")
    for field in fields:
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            problems.append(f"{where}: '{field.name}' is missing")
    if len(problems) > before:
        return None
    try:
        return cls(**known)
    except ConfigError as error:
        problems += [f"{where}: {line}" for line in error.message.split("; ")]
        return None


def _convert(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """Return ``value`` as ``kind``; nested problems are appended, a wrong type raises _Bad."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        options = [option for option in get_args(kind) if option is not type(None)]
        if value is None and len(options) < len(get_args(kind)):
            return None
        return _first_fit(options, value, where, problems)
    if origin is Literal:
        if isinstance(value, str) and value in get_args(kind):
            return value
        raise _Bad("one of " + ", ".join(map(str, get_args(kind))))
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _Bad("a list")
        item = get_args(kind)[0]
        return tuple(_convert(item, x, f"{where}[{i}]", problems) for i, x in enumerate(value))
    if origin is not None:  # Mapping[str, X]
        if not isinstance(value, Mapping):
            raise _Bad("a mapping")
        item = get_args(kind)[1]
        return {str(k): _convert(item, v, f"{where}.{k}", problems) for k, v in value.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return read_dataclass(kind, value, where, problems)
    return _scalar(kind, value)


def _first_fit(options: list[Any], value: Any, where: str, problems: list[str]) -> Any:
    if len(options) == 1:
        return _convert(options[0], value, where, problems)
    wanted = []
    for option in options:
        is_class = isinstance(option, type) and dataclasses.is_dataclass(option)
        if is_class and isinstance(value, Mapping):
            return read_dataclass(option, value, where, problems)
        try:
            return _convert(option, value, where, [])
        except _Bad as error:
            wanted.append(str(error))
    raise _Bad(" or ".join(wanted))


def _scalar(kind: Any, value: Any) -> Any:
    if kind is Any:
        return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)  # YAML writes a token budget of five billion as 5e9
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    if dataclasses.is_dataclass(kind):
        raise _Bad("a mapping")
    raise _Bad(_NAMES.get(kind, str(kind)))
