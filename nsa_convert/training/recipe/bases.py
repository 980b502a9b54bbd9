"""A recipe with a ``base`` says only what differs from another one: read and shown as if it said all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from nsa_convert.errors import ConfigError, UsageError
from nsa_convert.strict_files import read_mapping
from nsa_convert.training.recipe.library import find_recipe

BASE = "base"
"""Key of the recipe that this one builds on: a name, or a path from the folder of this one."""


def read_recipe_values(path: Path) -> dict[str, Any]:
    """Read a recipe file and what it builds on as one mapping, which has no key ``base``.

    Mappings are merged key by key, stages by their name; any other value takes the place of the base's. A
    stage that the base lacks comes after the base's.

    Raises:
        ConfigError: A file is missing or cannot be read, bases go round in a circle, or stages cannot be
            told apart.
    """
    return _merge_files(_files(path))


def resolved_text(path: Path) -> str:
    """Return the text of a recipe that runs without its base; a recipe without one is returned as it is.

    The heads of all the files come first. Comments above keys and stages stay above them, the recipe's own in
    place of its base's; those inside data sources and short mappings are left out.

    Raises:
        ConfigError: As :func:`read_recipe_values` does.
    """
    import yaml

    files = _files(path)
    texts = [file.read_text(encoding="utf-8-sig") for file in files]
    if len(texts) == 1:
        return texts[0]
    heads = [_head(text) for text in texts]
    comments: dict[tuple, list[str]] = {}
    for text in reversed(texts):
        comments |= _comments(text)
    # Short mappings on one line, as the recipes are written.
    style: dict[str, Any] = {"default_flow_style": None, "sort_keys": False, "allow_unicode": True}
    body = yaml.safe_dump(_merge_files(files), width=110, **style)
    lines = []
    places = _places(body)
    for number, line in enumerate(body.splitlines()):
        indent = line[: len(line) - len(line.lstrip())]
        lines += [indent + comment for comment in comments.get(places.get(number, ()), ())]
        lines.append(line)
    head = "\n#\n".join("\n".join(head) for head in heads if head)
    return "\n".join([head, *lines]).lstrip("\n") + "\n"


def _files(path: Path) -> dict[Path, dict[str, Any]]:
    """Return what a recipe's file says, then its base's, and so on, each without the key ``base``."""
    found: dict[Path, dict[str, Any]] = {}
    while True:
        values = read_mapping(path)
        found[path] = {key: value for key, value in values.items() if key != BASE}
        if BASE not in values:
            return found

        base = _find_base(values[BASE], path)
        if any(base.samefile(file) for file in found):
            raise ConfigError(
                f"{path.name}: recipes build on each other: {' -> '.join(map(str, (*found, base)))}",
                code="RC08",
                where=str(path),
                hint="let one of them say everything, without a base",
            )
        path = base


def _find_base(name: Any, path: Path) -> Path:
    if not isinstance(name, str):
        text = "base must be the name of a recipe, or a path from the folder of this one"
        raise ConfigError(f"{path.name}: {text}, got {name!r}", code="RC08", where=str(path))

    hint = "`nsa-convert recipes` lists names; a path ends in .yaml and starts from the folder of the recipe"
    try:
        base = find_recipe(name, path.parent)
    except UsageError as error:
        text = f"{path.name}: base: {error.message}"
        raise ConfigError(text, code="RC12", where=str(path), hint=error.hint or hint) from error

    if not base.is_file():
        text = f"{path.name}: base: no such file: {base}"
        raise ConfigError(text, code="RC12", where=str(path), hint=hint)
    return base


def _merge_files(files: Mapping[Path, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what files say together, each but the last building on the next."""
    (first, values), *others = reversed(list(files.items()))
    where = first.name
    for path, own in others:
        both = _merged(values, own)
        rows = values.get("stages")
        changes = own.get("stages")
        if isinstance(rows, list) and isinstance(changes, list):
            stages = _merged(_by_name(rows, where), _by_name(changes, path.name))
            both["stages"] = list(stages.values())
        # What the recipe adds comes first: model and out stand above the stages.
        added = [key for key in own if key not in values]
        values = {key: both[key] for key in (*added, *values)}
        where = path.name
    return dict(values)


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        out[key] = _merged(base[key], value) if both else value
    return out


def _by_name(rows: list[Any], where: str) -> dict[str, Any]:
    """Return stages by their name."""
    named: dict[str, Any] = {}

    for index, row in enumerate(rows):
        name = row.get("name") if isinstance(row, dict) else None
        if not isinstance(name, str) or name in named:
            problem = f"is named {name} again" if isinstance(name, str) else "has no name"
            raise ConfigError(
                f"{where}: stages[{index}] {problem}; stages of a recipe and its base are matched by name",
                code="RC08",
                where=where,
                hint="give each stage the name of the base's stage that it changes, or a new one",
            )
        named[name] = row
    return named


def _head(text: str) -> list[str]:
    """Return the comment lines that a file begins with."""
    return list(takewhile(lambda line: line.startswith("#"), text.splitlines()))


def _comments(text: str) -> dict[tuple[str, ...], list[str]]:
    """Return the comment lines above keys and stages by their place, the head of the file left out."""
    found: dict[tuple[str, ...], list[str]] = {}
    places, block, lines = _places(text), [], text.splitlines()
    for number in range(len(_head(text)), len(lines)):
        if lines[number].lstrip().startswith("#"):
            block.append(lines[number].strip())
            continue
        if block and number in places:
            found[places[number]] = block
        block = []
    return found


def _places(text: str) -> dict[int, tuple[str, ...]]:
    """Return line -> the place that begins there: keys, and names of stages, from the outermost on."""
    import yaml

    def walk(node: Any, place: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                yield key.start_mark.line, (*place, key.value)
                yield from walk(value, (*place, key.value))
        elif isinstance(node, yaml.SequenceNode) and place == ("stages",):
            for item in node.value:
                keys = item.value if isinstance(item, yaml.MappingNode) else []
                name = next((value.value for key, value in keys if key.value == "name"), "")
                yield item.start_mark.line, (*place, name)
                yield from walk(item, (*place, name))

    places: dict[int, tuple[str, ...]] = {}
    for line, place in walk(yaml.compose(text, Loader=yaml.SafeLoader), ()):
        places.setdefault(line, place)
    return places
