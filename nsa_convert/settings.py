"""Settings read strictly: every key and type is checked, and all problems are told at once.

Plans, methods, recipes and evaluations describe their settings by dataclasses. Whatever a file or a command
line says about them is read here, so that one mistake has one wording wherever it is made. What a single
value may be, and which values fit together, each dataclass checks itself with the small helpers below.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from nsa_convert.errors import ConfigError

T = TypeVar("T")

_ONE = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list"}
"""Type of a single value -> what messages call it."""
_MANY = {int: "whole numbers", float: "numbers", str: "texts"}
"""Type of the items of a list or mapping -> what messages call them."""


class _WrongType(Exception):
    """A value does not have the type of its field."""


def suggest(name: str, known: Collection[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or the list of known names."""
    near = difflib.get_close_matches(str(name), sorted(known), n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(sorted(known))}"


def unknown_keys(given: Collection[Any], known: Collection[str], where: str) -> list[str]:
    """Return one problem line for each key of ``given`` that is not in ``known``."""
    return [f"{where}: unknown key '{key}'{suggest(key, known)}" for key in given if key not in known]


def raise_problems(
    problems: Sequence[str | ConfigError], *, code: str = "CF13", hint: str | None = None
) -> None:
    """Raise one ConfigError that lists every problem, or return when there is none.

    Args:
        problems: Messages, or errors that keep their own codes.
        code: Error code of the messages.
        hint: What to do next; by default the first hint that an error has.
    """
    if not problems:
        return
    errors = [p if isinstance(p, ConfigError) else ConfigError(p, code=code) for p in problems]
    hint = hint or next((error.hint for error in errors if error.hint), None)

    # The sum has the code of its first problem; the single errors are kept beside it.
    text = "; ".join(error.message for error in errors)
    whole = ConfigError(text, code=errors[0].code, hint=hint)
    whole.problems = tuple(errors) if len(errors) > 1 else ()
    raise whole


def between(name: str, value: float, least: float, most: float) -> list[str]:
    """Return the problem of a setting outside of a range, if it has one."""
    return [] if least <= value <= most else [f"{name} must be between {least} and {most}, got {value}"]


def at_least(least: int, **values: int) -> list[str]:
    """Return the problems of settings below a limit."""
    return [f"{name} must be >= {least}, got {x}" for name, x in values.items() if x < least]


def one_or_more(names: Sequence[str], settings: object) -> list[str]:
    """Return the problems of settings that must be at least 1."""
    return at_least(1, **{name: getattr(settings, name) for name in names})


def read_settings(cls: type[T], values: Any, where: str, *, code: str = "CF22") -> T:
    """Build a dataclass from a mapping, every key and type checked.

    Fields may be int, float, bool, str, list, ``Literal``, ``Any``, dataclasses, ``Mapping[str, X]``,
    ``tuple[X, ...]``, and unions of these with each other and with None. A whole number may be written as a
    float (``5e9``). A class whose written form differs from its fields has a static method ``as_fields``
    that turns a written mapping into one of fields.

    Args:
        cls: The dataclass.
        values: Given keys and values.
        where: Prefix of the messages.
        code: Error code of missing keys and wrong types; unknown keys have CF13.

    Raises:
        ConfigError: Unknown keys (the nearest field is named), missing keys, wrong types, or whatever a
            dataclass itself refuses; all problems in one message, and each of them in ``problems``.
    """
    reader = _Reader(code)
    settings = reader.dataclass(cls, values, where)
    raise_problems(reader.problems)
    return cast(T, settings)


def read_values(
    kinds: Mapping[str, Any], values: Mapping[str, Any], where: str, *, code: str = "CF22"
) -> dict[str, Any]:
    """Read a mapping that belongs to no dataclass; keys may be left out.

    Args:
        kinds: Known key -> type of its value, as fields of :func:`read_settings` have them.
        values: Given keys and values.
        where: Prefix of the messages.
        code: Error code of wrong types; unknown keys have CF13.

    Raises:
        ConfigError: Unknown keys and wrong types, all in one message.
    """
    reader = _Reader(code)
    read = reader.mapping(kinds, values, where)
    raise_problems(reader.problems)
    return read


def type_problems(settings: Any) -> list[str]:
    """Return one problem line for each field of a built dataclass whose value has the wrong type."""
    reader = _Reader("", written=False)
    hints = get_type_hints(type(settings))
    reader.mapping({name: hints[name] for name in vars(settings)}, vars(settings), "")
    return [problem.message for problem in reader.problems]


class _Reader:
    """Reads values as types, and collects what is wrong with them.

    Args:
        code: Error code of missing keys and wrong types.
        written: Whether a file or a command line says the values, where a whole number may be written as a
            float; a built dataclass must hold the whole number itself.
    """

    def __init__(self, code: str, *, written: bool = True) -> None:
        self.code = code
        self.written = written
        self.problems: list[ConfigError] = []

    def dataclass(self, cls: type, values: Any, where: str) -> Any:
        """Return the dataclass, or None after what is wrong was added to the problems."""
        if not isinstance(values, Mapping):
            self._refuse(f"{where}: expected a mapping, got {values!r}")
            return None
        if hasattr(cls, "as_fields"):
            values = cls.as_fields(values)

        fields = dataclasses.fields(cls)
        hints = get_type_hints(cls)
        before = len(self.problems)
        read = self.mapping({field.name: hints[field.name] for field in fields}, values, where)
        for field in fields:
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and field.name not in values:
                self._refuse(f"{where}: '{field.name}' is missing")
        if len(self.problems) > before:
            return None

        # What the values themselves have to fulfil, the dataclass checks.
        try:
            return cls(**read)
        except ConfigError as error:
            for own in error.problems or (error,):
                text = f"{where}: {own.message}"
                self.problems.append(ConfigError(text, code=own.code, hint=own.hint or error.hint))
            return None

    def mapping(self, kinds: Mapping[str, Any], values: Mapping[Any, Any], where: str) -> dict[str, Any]:
        """Return the values that have the types of ``kinds``; add what is wrong to the problems."""
        self.problems += [ConfigError(line, code="CF13") for line in unknown_keys(values, kinds, where)]
        read: dict[str, Any] = {}
        for key, kind in kinds.items():
            if key not in values:
                continue
            try:
                read[key] = self._convert(kind, values[key], f"{where}.{key}" if where else key)
            except _WrongType:  # why: told with all other problems of the mapping
                text = f"{key} must be {_describe(kind)}, got {values[key]!r}"
                self._refuse(f"{where}: {text}" if where else text)
        return read

    def _refuse(self, text: str) -> None:
        self.problems.append(ConfigError(text, code=self.code))

    def _convert(self, kind: Any, value: Any, where: str) -> Any:
        """Return ``value`` as ``kind``.

        Problems inside of nested dataclasses are added to the problems.

        Raises:
            _WrongType: The value has another type.
        """
        origin = get_origin(kind)
        if origin in (Union, types.UnionType):
            return self._first_fit(get_args(kind), value, where)
        if origin is Literal:
            if isinstance(value, str) and value in get_args(kind):
                return value
            raise _WrongType

        # Lists and mappings, each item for itself.
        if origin is tuple:
            if not isinstance(value, (list, tuple)):
                raise _WrongType
            item = get_args(kind)[0]
            return tuple(self._convert(item, x, f"{where}[{i}]") for i, x in enumerate(value))
        if origin is not None:  # Mapping[str, X]
            if not isinstance(value, Mapping):
                raise _WrongType
            item = get_args(kind)[1]
            return {str(key): self._convert(item, x, f"{where}.{key}") for key, x in value.items()}

        if _is_dataclass(kind):
            return value if isinstance(value, kind) else self.dataclass(kind, value, where)
        return self._scalar(kind, value)

    def _first_fit(self, options: Sequence[Any], value: Any, where: str) -> Any:
        """Return ``value`` as the first of several types that it fits."""
        for option in options:
            # A dataclass is what a mapping stands for; any other value is left to the other types.
            if _is_dataclass(option) and len(options) > 1 and not isinstance(value, (Mapping, option)):
                continue
            try:
                return self._convert(option, value, where)
            except _WrongType:  # why: another of the types may fit
                continue
        raise _WrongType

    def _scalar(self, kind: Any, value: Any) -> Any:
        """Return a single value as ``kind``; true and false are no numbers."""
        if kind is Any:
            return value
        number = isinstance(value, (int, float)) and not isinstance(value, bool)

        # The same value may be written in two ways.
        if kind is float and number:
            return float(value)
        if kind is int and self.written and isinstance(value, float) and value.is_integer():
            return int(value)  # YAML writes a token budget of five billion as 5e9
        if kind is list and isinstance(value, tuple):
            return list(value)

        if isinstance(value, kind) and (kind is not int or number):
            return value
        raise _WrongType


def _is_dataclass(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _describe(kind: Any) -> str:
    """Return what messages call a type."""
    arguments = [part for part in get_args(kind) if part is not types.NoneType]
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_describe, arguments))
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin is tuple:
        return f"a list of {_MANY[arguments[0]]}" if arguments[0] in _MANY else "a list"
    if origin is not None:
        return f"a mapping of names to {_MANY[arguments[1]]}" if arguments[1] in _MANY else "a mapping"
    return _ONE.get(kind, "a mapping")
