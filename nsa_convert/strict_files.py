"""JSON and YAML read strictly: no key twice, no surprise types, no file that is too big to be meant."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from nsa_convert.errors import CheckpointError, ConfigError
from nsa_convert.redaction import redact

CONFIG_LIMIT = 10_000_000
"""Bytes a config or recipe may have."""
MAX_VALUES = 500_000
"""Values a JSON text may hold; the index of the largest models has a fifth of that."""

LARGEST = 10**100
"""Above this, arithmetic with floats fails. Tokenizers write 10**30 for "no limit"."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(
    raw: bytes,
    where: str,
    *,
    values: int = MAX_VALUES,
    syntax: str = "CF17",
    size: str = "CF18",
    value: str = "CF19",
) -> Any:
    """Parse JSON strictly.

    Args:
        raw: UTF-8, a byte order mark is accepted.
        where: How messages call it.
        values: How many values it may hold.
        syntax: Error code for what is not JSON.
        size: Error code for what would take too much memory.
        value: Error code for a key listed twice and for values that JSON does not know.

    Raises:
        CheckpointError: Not UTF-8, not JSON, nested too deeply, too many values, a key twice,
            NaN, an infinite number, or text that is not Unicode.
    """
    # Counted first: small lists take thirty times the memory of their text.
    count = sum(raw.count(mark) for mark in (b",", b"[", b"{"))
    if count > values:
        text = f"{where} holds about {count:,} values"
        most = f"at most {values:,}"
        raise CheckpointError(text, code=size, where=where, expected=most, found=f"{count:,}")

    try:
        parsed = json.loads(
            raw.decode("utf-8-sig"),
            object_pairs_hook=_unique_pairs,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole,
        )

        # Escapes may hold half a character, which nothing can write again.
        if _SURROGATE.search(raw):
            json.dumps(parsed, ensure_ascii=False).encode()
        return parsed

    except UnicodeDecodeError as error:
        text = f"{where} is not UTF-8 text (byte {error.start})"
        raise CheckpointError(text, code=syntax, where=where) from error
    except UnicodeEncodeError as error:
        text = f"{where} holds half a character (\\u escape {error.object[error.start]!a})"
        raise CheckpointError(text, code=value, where=where) from error
    except json.JSONDecodeError as error:
        text = f"{where} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        place = f"{where}:{error.lineno}:{error.colno}"
        raise CheckpointError(text, code=syntax, where=place) from error
    except RecursionError as error:
        raise CheckpointError(f"{where} is nested too deeply", code=size, where=where) from error
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}", code=value, where=where) from error


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = sorted(key for key, count in counts.items() if count > 1)
        raise ValueError(f"key listed twice: {', '.join(map(ascii, twice))}")
    return out


def _refuse_constant(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not JSON")


def _whole(literal: str) -> int:
    number = int(literal) if len(literal) < 110 else LARGEST + 1
    if abs(number) > LARGEST:
        raise ValueError(f"{literal[:30]} is too large a number")
    return number


def _finite(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise ValueError(f"{literal} is too large a number")
    return number


def read_json_mapping(
    path: Path, *, limit: int = CONFIG_LIMIT, values: int = MAX_VALUES, code: str = "CF17"
) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: The file.
        limit: Bytes above which the file is refused unread.
        values: How many values it may hold.
        code: Error code of a syntax error.

    Raises:
        CheckpointError: Too big, not an object, or whatever :func:`parse_json` refuses.
    """
    where = path.name
    size = path.stat().st_size
    if size > limit:
        raise CheckpointError(
            f"{where} has {size:,} bytes; a file of this kind has at most {limit:,}",
            code="CF18",
            where=where,
            expected=f"at most {limit:,} bytes",
            found=f"{size:,} bytes",
        )

    value = parse_json(path.read_bytes(), where, values=values, syntax=code)
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{where} must hold a JSON object, it holds a {type(value).__name__}", code=code, where=where
        )
    return value


def parse_yaml(text: str, where: str, *, quoted: bool = False) -> Any:
    """Parse YAML with typed scalars: ``1e-4`` is a float, only ``true``/``false`` are booleans, no dates.

    Args:
        text: YAML 1.2.
        where: How messages call it.
        quoted: Whether text must stand in quotes where YAML 1.1, which most programs read, takes it for
            something else: ``no``, ``010``, ``2024-01-01``.

    Raises:
        ConfigError: Syntax error, a key twice, an anchor, a tag such as ``!!python/object``, or such text
            without quotes.
    """
    import yaml

    try:
        return yaml.load(text, Loader=_quoting_loader() if quoted else _strict_loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        problem = f"{at}: {error.problem}{_excerpt(text, mark)}"
        code = "RC05" if error.context == _AMBIGUOUS else "RC01"
        raise ConfigError(problem, code=code, where=at) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(
            f"{where}: {str(error) or 'nested too deeply'}", code="RC01", where=where
        ) from error


def _excerpt(text: str, mark: Any) -> str:
    """Return the line that cannot be read, without a token that it may hold."""
    lines = text.splitlines()
    if mark is None or not mark.line < len(lines):
        return ""
    return f", in {redact(lines[mark.line]).strip()[:100]!r}"


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds a mapping (YAML reads JSON).

    Raises:
        ConfigError: The file is missing, too big, not text, or holds no mapping; text needs quotes.
    """
    if not path.is_file():
        raise ConfigError(f"no such file: {path}", code="RC12", where=str(path))
    if path.stat().st_size > CONFIG_LIMIT:
        raise ConfigError(f"{path.name} is bigger than {CONFIG_LIMIT:,} bytes", code="RC12", where=str(path))

    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name} is not UTF-8 text", code="RC12", where=str(path)) from error

    value = parse_yaml(text, path.name, quoted=True)
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path.name} must hold a mapping, got {type(value).__name__}", code="RC01", where=path.name
        )
    return value


_AMBIGUOUS = "while looking for text that needs quotes"


def _quoting_loader() -> type:
    """Return the strict loader, which here refuses text that YAML 1.1 takes for something else."""
    import yaml

    strict: Any = _strict_loader()

    class QuotingLoader(strict):
        def compose_scalar_node(self, anchor: Any) -> Any:
            event = self.peek_event()
            node = super().compose_scalar_node(anchor)
            plain_text = event.implicit[0] and node.tag == "tag:yaml.org,2002:str"
            old = _in_yaml_1_1(node.value) if plain_text else None
            if old is not None:
                problem = f'{node.value} is text in YAML 1.2 and {old} in YAML 1.1; write "{node.value}"'
                problem += "" if old.startswith("a ") else f" or {old}"
                raise yaml.composer.ComposerError(_AMBIGUOUS, None, problem, event.start_mark)
            return node

    return QuotingLoader


def _in_yaml_1_1(scalar: str) -> str | None:
    """Return what an unquoted scalar is in YAML 1.1, as YAML 1.2 writes it if it can; None for text."""
    import yaml

    for tag, pattern in yaml.SafeLoader.yaml_implicit_resolvers.get(scalar[:1], []):
        if pattern.match(scalar):
            name = tag.rpartition(":")[2]
            if name in ("bool", "int", "float"):
                return json.dumps(yaml.safe_load(scalar))
            return "a date" if name == "timestamp" else "a special word"
    return None


def _strict_loader() -> type:
    """Return a PyYAML loader with YAML 1.2 scalars and neither anchors nor repeated keys."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, list] = {}

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if getattr(event, "anchor", None) is not None:
                raise yaml.composer.ComposerError(
                    None, None, "anchors and aliases are not used here", event.start_mark
                )
            return super().compose_node(parent, index)

        def construct_yaml_int(self, node: Any) -> int:
            try:
                return _whole(node.value)
            except ValueError as error:
                raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            lines: dict[Any, int] = {}
            for key_node, _ in node.value:
                line = key_node.start_mark.line + 1
                if key_node.value in lines:
                    problem = (
                        f"key '{key_node.value}' is listed twice, in lines {lines[key_node.value]} and {line}"
                    )
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                if isinstance(key_node.value, str):
                    lines[key_node.value] = line
            return super().construct_mapping(node, deep)

    for tag, pattern, first in (
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
        (
            "float",
            r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.nan",
            list("-+.0123456789"),
        ),
    ):
        StrictLoader.add_implicit_resolver(
            f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first)
        )
    StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader.construct_yaml_int)
    return StrictLoader
