"""Documents of a data source by number: files, data sets, Python's own texts, generated recall tasks."""

from __future__ import annotations

import bisect
import functools
import glob
import hashlib
import importlib
import itertools
import os
import random
import string
import sysconfig
from pathlib import Path
from typing import Any

import torch

from nsa_convert.errors import ConfigError, HubError, MachineError
from nsa_convert.extras import pip_line
from nsa_convert.training.data.documents import NUMBERS, Documents, iterate
from nsa_convert.training.data.files import (
    document,
    file_fingerprint,
    good_documents,
    index_lines,
    read_line,
    read_text,
    text_problems,
)
from nsa_convert.training.data.streams import Stream
from nsa_convert.training.losses import mix
from nsa_convert.training.recipe.sections import Source

SUFFIXES = {"text": (".txt", ".md", ".py", ".rst"), "jsonl": (".jsonl", ".json"), "parquet": (".parquet",)}
PACKED = {".json", ".gz", ".zst", ".bz2", ".xz", ".zip"}
CHECKED_ROWS = 100_000
"""Rows of a table that are checked before training; the others are checked when they are read."""
COMPARED_DOCUMENTS = 100_000
"""Sources with more documents are not searched for held-out documents in their training part."""
RECALL_VALUES = "ABCDEFGHIJ"
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


def open_source(source: Source, base: Path, *, held_out: bool = False, chats: bool = False) -> Documents:
    """Return the documents of a source, after checking them.

    Args:
        source: The source.
        base: Folder that relative paths start from.
        held_out: Return the held-out documents instead of those for training.
        chats: Documents are lists of messages instead of texts.

    Raises:
        ConfigError: A file is missing, empty or not text, or has no such column.
        MachineError: The package ``datasets`` is missing, or this Python has no source files.
    """
    if source.kind == "recall":
        # Any number gives a document; held-out ones have numbers that training never reaches.
        first = NUMBERS if held_out else 0
        count = source.size or None
        facts = ["recall", source.pairs, source.size, *([source.filler] if source.filler else [])]
        make = functools.partial(recall_text, pairs=source.pairs, filler=source.filler)
        return Documents(lambda i: make(first + i), count, facts, name=source.name)

    if source.kind == "python":
        documents = _stdlib()
    elif source.kind == "reference":
        documents = _reference()
    elif source.kind == "text":
        documents = _text_files(_matching(source, base), source)
    elif source.kind == "jsonl" and not source.streaming and (files := _plain_lines(source, base)):
        documents = _json_lines(files, source, chats)
    else:
        documents = _table(source, base, chats, held_out)

    documents = _split(documents, source, held_out)
    documents.name = source.name
    return documents


def _split(documents: Documents, source: Source, held_out: bool) -> Documents:
    """Return the training part or the held-out part, which is the end of a fixed shuffle."""
    count = documents.count
    if count == 0:
        raise ConfigError(f"data {source.kind} {source.path or ''} holds no document", code="DA01")

    if held_out and not source.hold_out:
        raise ConfigError(
            f"data {source.kind} {source.path or ''} holds no document out",
            code="DA01",
            hint="give the source a hold_out, the share of its documents that training never sees",
        )
    if count is None or not (source.hold_out or source.size):
        return documents

    # Without a part to hold out the order stays, and `size` takes the first documents.
    picked = list(range(count))
    if source.hold_out:
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
    facts = [documents.facts, source.hold_out, held_out, *([source.size] if source.size else [])]
    return Documents(lambda i: documents.read(picked[i]), len(picked), facts, documents.notes)


def recall_text(number: int, pairs: int, filler: int = 0) -> str:
    """Return a generated document: keys are given values, then asked for again and again in random order.

    ``set kQ pA mF`` gives values to three keys, ``get p pA k kQ`` asks for two: after a key that stands alone
    only the pair given before is right. The number of keys is drawn from 4 to ``pairs``, so that easy
    documents are among hard ones; every document asks ``3 * pairs`` times, whatever its own number of keys.

    Args:
        number: Number of the document.
        pairs: Most keys.
        filler: Most characters of other text between what is told and what is asked.
    """
    rng = random.Random(mix("recall", number))
    keys = rng.sample(string.ascii_lowercase, min(rng.randint(min(4, pairs), pairs), 26))
    told = {key: key + rng.choice(RECALL_VALUES) for key in keys}

    asked = rng.choices(keys, k=3 * pairs)
    answers = " ".join(f"{key} {told[key]}" for key in asked)
    between = f"\n{_prose(rng, rng.randint(0, filler))}\n" if filler else " "
    return f"set {' '.join(told.values())}{between}get {answers}\n"


def _prose(rng: random.Random, length: int) -> str:
    """Return lines of Python's language reference from a random place, ``length`` characters."""
    text = _reference_text()
    begin = text.index("\n", rng.randrange(len(text) // 2)) + 1
    return (text[begin:] + text * (length // len(text) + 1))[:length]


@functools.cache
def _reference_text() -> str:
    """Return the language reference as one text."""
    return "\n".join(iterate(_reference()))


@functools.cache
def _stdlib_files() -> tuple[Path, ...]:
    """Return the source files of Python's standard library with more than 2000 bytes, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []

    for folder, inner, names in os.walk(root):
        # These folders are not entered: site-packages alone can hold a hundred times the library's files.
        inner[:] = [name for name in inner if name not in STDLIB_SKIPS]
        files += [Path(folder, name) for name in names if name.endswith(".py") and name not in STDLIB_SKIPS]

    files = sorted(path for path in files if path.stat().st_size > 2000)
    if not files:
        raise MachineError(f"this Python has no sources of its library in {root}", code="EV12")
    return tuple(files)


def _reference() -> Documents:
    """Return the chapters of Python's language reference that come with ``pydoc``."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise MachineError("this Python has no pydoc_data package", code="EV12") from error

    texts = [text for _, text in sorted(topics.items()) if len(text) > 500]
    return Documents(texts.__getitem__, len(texts), ["reference", [len(text) for text in texts]])


def describe_source(source: Source, base: Path) -> str:
    """Return the kind of a source and what it reads; a path as an absolute one."""
    if source.path is None or source.kind == "hub":
        return " ".join(filter(None, (source.kind, source.path, source.config)))
    return f"{source.kind} {_place(source, base).absolute()}"


def _place(source: Source, base: Path) -> Path:
    """Return the path of a source: relative to the recipe's folder, or else to the current one."""
    assert source.path is not None
    given = Path(source.path).expanduser()
    here = given.is_absolute() or (not (base / given).exists() and glob.glob(str(given)))
    return given if here else base / given


def _matching(source: Source, base: Path) -> list[Path]:
    """Return the files that a path, folder or glob names.

    Raises:
        ConfigError: There is none, or one of them is empty (DA01).
    """
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


def _stdlib() -> Documents:
    """Return the files of Python's standard library, one document each."""
    files = _stdlib_files()
    facts = [[path.name, path.stat().st_size] for path in files]
    return Documents(lambda i: files[i].read_text(encoding="utf-8", errors="ignore"), len(files), facts)


def _facts(files: list[Path]) -> list[list[str]]:
    """Return names and hashes of files."""
    return [[path.name, file_fingerprint(path)] for path in files]


def _text_files(files: list[Path], source: Source) -> Documents:
    """Return text files, one document each."""
    good, notes = good_documents(len(files), text_problems(files), source.skip_bad)
    return Documents(lambda i: read_text(files[good[i]]), len(good), _facts(files), notes)


def _plain_lines(source: Source, base: Path) -> list[Path]:
    """Return the files of a source if all are plain JSON lines, else none: ``datasets`` reads the others."""
    files = _matching(source, base)
    return files if all(path.suffix not in PACKED for path in files) else []


def _json_lines(files: list[Path], source: Source, chats: bool) -> Documents:
    """Return the lines of JSON lines files as documents, numbered over all files."""
    # Line tables of the files, and the number of the first document of each.
    tables = [index_lines(path, source.column, chats) for path in files]
    firsts = list(itertools.accumulate((len(table.starts) for table in tables), initial=0))

    # Bad lines are left out of the numbering.
    bad = [
        (first + index, f"{path}:{line} {reason}")
        for path, table, first in zip(files, tables, firsts, strict=False)
        for index, line, reason in table.bad
    ]
    if not firsts[-1]:
        raise ConfigError(f"data jsonl: 0 rows in {', '.join(map(str, files[:5]))}", code="DA01")
    good, notes = good_documents(firsts[-1], bad, source.skip_bad)

    def read(number: int) -> Any:
        at = bisect.bisect_right(firsts, good[number]) - 1
        path = files[at]
        table = tables[at]
        row = good[number] - firsts[at]

        try:
            value = read_line(path, int(table.starts[row]), int(table.ends[row]))
            return document(value, source.column, chats)
        except ValueError as error:
            place = f"{path}:{table.numbers[row]}"
            raise ConfigError(f"{place} {error}", code="DA04", where=place) from error

    return Documents(read, len(good), _facts(files), notes)


def _table(source: Source, base: Path, chats: bool, held_out: bool) -> Documents:
    """Return the rows of packed JSON lines, Parquet files or a Hub data set."""
    table, facts = load_table(source, base)

    # The column must exist; a stream may not know its columns before its first row.
    columns = table.column_names or list(next(iter(table), {}))
    if source.column not in columns:
        from nsa_convert.settings import suggest

        raise ConfigError(
            f"data {source.kind} {source.path}: no column '{source.column}'{suggest(source.column, columns)}",
            code="DA04",
            where=source.path,
        )

    if source.streaming:
        return Stream(
            table,
            source.column,
            facts,
            name=source.name,
            shuffle=source.shuffle,
            hold_out=source.hold_out,
            held_out=held_out,
        )

    # Check the first rows.
    bad = []
    for row in range(min(len(table), CHECKED_ROWS)):
        try:
            document(table[row], source.column, chats)
        except ValueError as error:
            bad.append((row, f"{source.path} row {row + 1}: {error}"))

    if not len(table):
        raise ConfigError(f"data {source.kind}: 0 rows in {source.path}", code="DA01", where=source.path)
    good, notes = good_documents(len(table), bad, source.skip_bad)
    return Documents(lambda i: table[good[i]][source.column], len(good), facts, notes)


def load_table(source: Source, base: Path) -> tuple[Any, Any]:
    """Return the data set of a ``jsonl``, ``parquet`` or ``hub`` source, and what identifies it.

    Raises:
        ConfigError: A file is missing, empty or damaged, or a data set is a program.
        HubError: A data set cannot be fetched.
        MachineError: The package ``datasets`` is missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise MachineError("the package datasets is missing", code="CL11", hint=pip_line("train")) from error

    assert source.path is not None
    datasets.disable_progress_bars()
    if source.kind == "hub":
        return _hub_table(datasets, source), ["hub", source.path, source.config, source.split]

    # Files are read by the builder of their format.
    files = _matching(source, base)
    builder = {"jsonl": "json", "parquet": "parquet"}[source.kind]
    try:
        names = [str(path) for path in files]
        table = datasets.load_dataset(builder, data_files=names, split="train", streaming=source.streaming)
    except Exception as error:  # why: datasets wraps every kind of damage; raised with file and line
        cause = error.__cause__ or error
        raise ConfigError(
            f"data {source.kind}: {files[0]} cannot be read: {str(cause).splitlines()[0]}",
            code="DA07",
            where=str(files[0]),
        ) from error
    return table, _facts(files)


def _hub_table(datasets: Any, source: Source) -> Any:
    """Return a data set of the Hub; one that consists of a program is never run.

    Raises:
        ConfigError: It is a program (DA14), or cannot be read (DA07).
        HubError: The Hub cannot be reached (HB10).
    """
    try:
        return datasets.load_dataset(
            source.path, source.config, split=source.split, streaming=source.streaming
        )
    except Exception as error:  # why: datasets and the Hub raise many kinds; raised with the name
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]

        if "script" in text.lower() or "trust_remote_code" in text:
            raise ConfigError(
                f"data hub {source.path}: the data set is a program, which is not run ({text})",
                code="DA14",
                where=source.path,
                hint="take a data set of plain files, or save its rows as JSON lines or Parquet yourself",
            ) from error

        if isinstance(error, (ConnectionError, TimeoutError)) or "offline" in text.lower():
            raise HubError(f"data hub {source.path}: {text}", code="HB10", where=source.path) from error
        raise ConfigError(f"data hub {source.path}: {text}", code="DA07", where=source.path) from error


def held_out_overlap(source: Source, base: Path) -> tuple[int, int]:
    """Return how many held-out documents are also in the training part, and how many there are.

    Texts count as equal if they differ in white space only. Very large sources are not compared.
    """
    if not source.hold_out or source.streaming or source.kind == "recall":
        return 0, 0

    kept, held = (open_source(source, base, held_out=part) for part in (False, True))
    if (kept.count or 0) > COMPARED_DOCUMENTS:
        return 0, held.count or 0

    own = {_text_key(text) for text in iterate(kept)}
    return sum(_text_key(text) in own for text in iterate(held)), held.count or 0


def _text_key(text: Any) -> bytes:
    """Return a hash of a text that ignores white space."""
    return hashlib.sha256(" ".join(str(text).split()).encode("utf-8", "replace")).digest()
