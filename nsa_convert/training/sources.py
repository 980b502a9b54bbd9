"""Documents of a data source by number: files, data sets, what comes with Python, generated recall tasks."""

from __future__ import annotations

import glob
import hashlib
import importlib
import json
import random
import string
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from nsa_convert.errors import ConfigError, MachineError
from nsa_convert.training.losses import mix
from nsa_convert.training.parts import Source

SUFFIXES = {"text": (".txt", ".md", ".py", ".rst"), "jsonl": (".jsonl", ".json"), "parquet": (".parquet",)}
STDLIB_SKIPS = (
    "test",
    "tests",
    "idlelib",
    "turtledemo",
    "site-packages",
    "__pycache__",
    "lib2to3",
    "ensurepip",
)


class Documents:
    """Documents that can be read by number.

    Args:
        read: Returns document ``i``.
        count: How many there are; None for no end.
        facts: What identifies the data, for the check at a resume.
    """

    def __init__(self, read: Callable[[int], Any], count: int | None, facts: Any) -> None:
        self.read = read
        self.count = count
        self.facts = facts

    def order(self, epoch: int, position: int, seed: int) -> int:
        """Return the number of the document at ``position`` of a seeded shuffle of an epoch."""
        if self.count is None:
            return position
        key = (epoch, seed)
        if getattr(self, "_key", None) != key:
            generator = torch.Generator().manual_seed(mix(seed, "order", epoch))
            self._key, self._order = key, torch.randperm(self.count, generator=generator)
        return int(self._order[position])

    def fingerprint(self) -> str:
        """Return a hash of what identifies the data."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]


def open_source(source: Source, base: Path, *, held_out: bool = False) -> Documents:
    """Return the documents of a source.

    Args:
        source: The source.
        base: Folder that relative paths start from.
        held_out: Return the held-out documents instead of those for training.

    Raises:
        ConfigError: A file is missing, empty, not text, or has no such column.
        MachineError: The package ``datasets`` is missing, or this Python has no sources.
    """
    if source.kind == "recall":
        first = 1 << 40 if held_out else 0
        count = source.size or None
        return Documents(
            lambda i: recall_text(first + i, source.pairs), count, ["recall", source.pairs, source.size]
        )
    if source.kind == "python":
        documents = _files(_stdlib_files(), errors="ignore")
    elif source.kind == "reference":
        documents = _reference()
    elif source.kind == "text":
        documents = _files(_matching(source, base), errors="strict")
    else:
        documents = _table(source, base)
    return _split(documents, source, held_out)


def _split(documents: Documents, source: Source, held_out: bool) -> Documents:
    """Keep the training part or the held-out part: the last documents of a fixed shuffle."""
    count = documents.count
    if count == 0:
        raise ConfigError(f"data {source.kind} {source.path or ''} holds no document", code="DA01")
    if count is None or not (source.hold_out or held_out):
        return documents
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    cut = count - max(1, round(count * source.hold_out))
    picked = order[cut:] if held_out else order[:cut]
    if not picked:
        raise ConfigError(
            f"data {source.kind} {source.path or ''}: {count} documents leave none beside hold_out",
            code="DA01",
        )
    if source.size:
        picked = picked[: source.size]
    return Documents(
        lambda i: documents.read(picked[i]), len(picked), [documents.facts, source.hold_out, held_out]
    )


def recall_text(number: int, pairs: int) -> str:
    """Return a generated document: values are set for keys, then asked for again and again in random order.

    ``set k7p3m0`` gives three keys their values, ``get p3k7`` asks: after a key, only its value is right.
    The number of keys is drawn from 4 to ``pairs``, so that easy documents come among hard ones; a document
    has three rounds of asking for ``pairs`` keys, whatever its own number.
    """
    rng = random.Random(mix("recall", number))
    keys = rng.sample(string.ascii_lowercase, min(rng.randint(min(4, pairs), pairs), 26))
    values = {key: rng.randrange(10) for key in keys}
    asked = rng.choices(keys, k=3 * pairs)
    told, wanted = ("".join(f"{key}{values[key]}" for key in row) for row in (keys, asked))
    return f"set {told} get {wanted}\n"


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not set(path.relative_to(root).parts) & set(STDLIB_SKIPS) and path.stat().st_size > 2000
    ]
    if not files:
        raise MachineError(f"this Python has no sources of its library in {root}", code="EV12")
    return files


def _reference() -> Documents:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise MachineError("this Python has no pydoc_data package", code="EV12") from error
    texts = [text for _, text in sorted(topics.items()) if len(text) > 500]
    return Documents(texts.__getitem__, len(texts), ["reference", [len(text) for text in texts]])


def describe_source(source: Source, base: Path) -> str:
    """Return the kind of a source and what it reads; a path from the root."""
    if source.path is None or source.kind == "hub":
        return " ".join(filter(None, (source.kind, source.path, source.config)))
    return f"{source.kind} {_place(source, base).absolute()}"


def _place(source: Source, base: Path) -> Path:
    """Return the path of a source, from the recipe's folder, else from the current one."""
    assert source.path is not None
    given = Path(source.path).expanduser()
    here = given.is_absolute() or (not (base / given).exists() and glob.glob(str(given)))
    return given if here else base / given


def _matching(source: Source, base: Path) -> list[Path]:
    """Return the files a path, folder or glob names."""
    place = _place(source, base)
    if place.is_dir():
        files = sorted(path for path in place.rglob("*") if path.suffix in SUFFIXES[source.kind])
    else:
        files = sorted(Path(name) for name in glob.glob(str(place)))
    if not files:
        raise ConfigError(
            f"data {source.kind}: no file at {place}",
            code="DA01",
            where=str(place),
            hint=f"a folder is searched for {', '.join(SUFFIXES[source.kind])}",
        )
    empty = [str(path) for path in files if path.stat().st_size == 0]
    if empty:
        raise ConfigError(
            f"data {source.kind}: 0 bytes in {', '.join(empty[:5])}", code="DA01", where=empty[0]
        )
    return files


def _files(files: list[Path], errors: str) -> Documents:
    def read(index: int) -> str:
        try:
            return files[index].read_text(encoding="utf-8", errors=errors)
        except (OSError, UnicodeDecodeError) as error:
            reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "cannot be read"
            raise ConfigError(f"{files[index]} {reason}", code="DA01", where=str(files[index])) from error

    return Documents(read, len(files), [[path.name, path.stat().st_size] for path in files])


def _table(source: Source, base: Path) -> Documents:
    """Return the rows of JSON lines, Parquet files or a Hub data set."""
    table, facts = load_table(source, base)
    columns = table.column_names or list(next(iter(table), {}))  # a stream may not know them
    if source.column not in columns:
        from nsa_convert.config import suggest

        raise ConfigError(
            f"data {source.kind} {source.path}: no column '{source.column}'{suggest(source.column, columns)}",
            code="DA04",
            where=source.path,
        )
    if source.streaming:
        return _streamed(table, source)
    bad = [i for i in range(min(len(table), 1000)) if not table[i][source.column]]
    if bad:
        raise ConfigError(
            f"data {source.kind} {source.path}: column '{source.column}' is empty in row {bad[0]}"
            + (f" and {len(bad) - 1} more of the first 1000" if len(bad) > 1 else ""),
            code="DA04",
            where=source.path,
        )
    return Documents(lambda i: table[i][source.column], len(table), facts)


def load_table(source: Source, base: Path) -> tuple[Any, Any]:
    """Return the data set of a ``jsonl``, ``parquet`` or ``hub`` source, and what identifies it.

    Raises:
        ConfigError: A file is missing, empty or damaged.
        MachineError: The package ``datasets`` is missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise MachineError(
            "the package datasets is missing", code="CL11", hint="pip install 'nsa-convert[train]'"
        ) from error
    assert source.path is not None
    datasets.disable_progress_bars()
    if source.kind == "hub":
        table = datasets.load_dataset(
            source.path, source.config, split=source.split, streaming=source.streaming
        )
        return table, ["hub", source.path, source.config, source.split]
    files = _matching(source, base)
    builder = {"jsonl": "json", "parquet": "parquet"}[source.kind]
    try:
        table = datasets.load_dataset(builder, data_files=[str(path) for path in files], split="train")
    except Exception as error:
        cause = error.__cause__ or error
        raise ConfigError(
            f"data {source.kind}: {files[0]} cannot be read: {str(cause).splitlines()[0]}",
            code="DA01",
            where=str(files[0]),
        ) from error
    return table, [[path.name, path.stat().st_size] for path in files]


def _streamed(table: Any, source: Source) -> Documents:
    """Return a stream as documents by number: reading goes forward only, a resume skips to its place."""
    state: dict[str, Any] = {"next": 0, "rows": iter(())}

    def read(index: int) -> Any:
        if index != state["next"] or index == 0:
            state["rows"] = iter(table.skip(index))
            state["next"] = index
        try:
            row = next(state["rows"])
        except StopIteration:
            raise EndOfStream from None
        state["next"] = index + 1
        return row[source.column]

    return Documents(read, None, ["stream", source.path, source.config, source.split])


class EndOfStream(Exception):
    """A streamed data set has no further row."""


def iterate(documents: Documents) -> Iterator[Any]:
    """Yield every document once, in stored order; for evaluation."""
    for index in range(documents.count or 0):
        yield documents.read(index)
