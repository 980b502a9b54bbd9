"""Files of documents: checked and hashed before training, then read by document number."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nsa_convert.errors import ConfigError
from nsa_convert.settings import suggest

PIECE = 1 << 20
"""Bytes of a piece that is hashed of a long file."""
HASHED_WHOLE = 1 << 30
"""Files up to this many bytes are hashed completely; of longer ones only evenly spaced pieces are."""
PIECES = 256
"""Number of pieces that are hashed of a long file."""
CHECKED_WHOLE = 1 << 30
"""Lines up to this byte are parsed before training; those after it only when they are read."""
SHOWN = 3
"""Number of bad documents that a message names."""


@dataclasses.dataclass(frozen=True)
class Lines:
    """Where the lines of a file begin and end, and which of them hold no document.

    Attributes:
        starts: ``[N]`` int64 byte offsets of the lines that are not blank.
        ends: ``[N]`` int64 byte offsets of their ends.
        numbers: ``[N]`` int64 line numbers, from 1.
        bad: ``(index, line number, reason)`` of the lines that hold no document.
    """

    starts: np.ndarray
    ends: np.ndarray
    numbers: np.ndarray
    bad: tuple[tuple[int, int, str], ...]


def file_fingerprint(path: Path) -> str:
    """Return a hash of a file's bytes; of a file of more than 1 GiB, of its size and 256 pieces of 1 MiB."""
    info = path.stat()
    return _fingerprint(path, info.st_size, info.st_mtime_ns)


@functools.cache
def _fingerprint(path: Path, size: int, modified: int) -> str:
    """Return the hash of a file; size and time of its last change are the key of the cache."""
    with path.open("rb") as file:
        if size <= HASHED_WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

        digest = hashlib.sha256(str(size).encode())
        for number in range(PIECES):
            file.seek((size - PIECE) * number // (PIECES - 1))
            digest.update(file.read(PIECE))
    return digest.hexdigest()[:16]


def read_text(path: Path) -> str:
    """Return the text of a file, without a byte order mark.

    Raises:
        ConfigError: The file cannot be read (DA01), is not UTF-8 or contains a NUL byte (DA03; the line is
            named).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", code="DA01", where=str(path)) from error

    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _bad_bytes(path, data.count(b"\n", 0, error.start) + 1, "is not UTF-8 text") from error

    if "\0" in text:
        raise _bad_bytes(path, text.count("\n", 0, text.index("\0")) + 1, "holds a NUL byte")
    return text


def _bad_bytes(path: Path, line: int, reason: str) -> ConfigError:
    """Return the error for bytes that are no text."""
    return ConfigError(
        f"{path}:{line} {reason}",
        code="DA03",
        where=f"{path}:{line}",
        hint="correct the file, or set skip_bad: N in the source to leave out up to N such documents",
    )


def read_line(path: Path, start: int, end: int) -> Any:
    """Return the JSON value of the line between two byte offsets; ValueError says what is wrong with it."""
    with path.open("rb") as file:
        file.seek(start)
        return parse_line(file.read(end - start))


def parse_line(data: bytes) -> Any:
    """Return the JSON value of a line; ValueError says what is wrong with it."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text") from None

    if "\0" in text:
        raise ValueError("holds a NUL byte")

    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    return value


def document(row: Any, column: str, is_chat: bool) -> Any:
    """Return the document in a row: a text or a list of messages.

    Args:
        row: JSON value of a line, or row of a table.
        column: Name of the field that holds the document.
        is_chat: The document is a list of messages.

    Raises:
        ValueError: There is no such document; the message says what is wrong.
    """
    if not isinstance(row, dict):
        raise ValueError(f"holds a {type(row).__name__}, not an object")
    if column not in row:
        raise ValueError(f"has no column '{column}'{suggest(column, [str(key) for key in row])}")

    value = row[column]
    if is_chat:
        if not _is_chat(value):
            raise ValueError(f"column '{column}' is no list of messages with role and content")
        return value

    # A text must not be empty, and must be possible to encode.
    if not isinstance(value, str):
        raise ValueError(f"column '{column}' is {_named(value)}, not a text")
    if not value:
        raise ValueError(f"column '{column}' is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"column '{column}' holds half a surrogate pair") from None
    return value


def _named(value: Any) -> str:
    """Return how a message names the type of a JSON value."""
    return "null" if value is None else f"a {type(value).__name__}"


def _is_chat(value: Any) -> bool:
    """Return whether a value is a list of messages, each with a role and content."""
    turns = value if isinstance(value, list) else []
    whole = [isinstance(x, dict) and isinstance(x.get("role"), str) and "content" in x for x in turns]
    return bool(whole) and all(whole)


def index_lines(path: Path, column: str, is_chat: bool) -> Lines:
    """Find and check the lines of a JSON lines file; done once as long as the file does not change."""
    info = path.stat()
    return _index_lines(path, column, is_chat, info.st_size, info.st_mtime_ns)


@functools.cache
def _index_lines(path: Path, column: str, is_chat: bool, size: int, modified: int) -> Lines:
    """Find and check the lines of a file; size and time of its last change are the key of the cache."""
    # Arrays, not lists: a list of numbers would need four times as much memory for a hundred million lines.
    starts, ends, numbers = (array("q") for _ in range(3))
    bad: list[tuple[int, int, str]] = []

    with path.open("rb") as file:
        begin = 0
        for number, line in enumerate(file, 1):
            # Blank lines hold no document, but count in the line numbers.
            if line.strip():
                if begin <= CHECKED_WHOLE:
                    try:
                        document(parse_line(line), column, is_chat)
                    except ValueError as error:
                        bad.append((len(starts), number, str(error)))
                starts.append(begin)
                ends.append(begin + len(line))
                numbers.append(number)
            begin += len(line)

    first, last, counted = (np.array(rows, np.int64) for rows in (starts, ends, numbers))
    return Lines(starts=first, ends=last, numbers=counted, bad=tuple(bad))


@functools.cache
def _text_problem(path: Path, size: int, modified: int) -> str | None:
    """Return what is wrong with a text file, or None; size and time are the key of the cache."""
    try:
        return None if read_text(path).strip() else f"{path} is empty"
    except ConfigError as error:
        return error.message


def text_problems(files: Sequence[Path]) -> list[tuple[int, str]]:
    """Return ``(index, what is wrong)`` of bad text files; none for a collection too large to check first."""
    stats = [path.stat() for path in files]
    if sum(info.st_size for info in stats) > CHECKED_WHOLE:
        return []

    found = [
        _text_problem(path, info.st_size, info.st_mtime_ns) for path, info in zip(files, stats, strict=True)
    ]
    return [(number, problem) for number, problem in enumerate(found) if problem]


def good_documents(
    count: int, bad: Sequence[tuple[int, str]], skip: int
) -> tuple[Sequence[int], tuple[str, ...]]:
    """Return the indices of the good documents, and notes on those left out.

    Args:
        count: Number of documents.
        bad: ``(index, what is wrong)`` of the bad ones.
        skip: How many bad documents may be left out.

    Raises:
        ConfigError: There are more bad documents than ``skip``.
    """
    if not bad:
        return range(count), ()

    # Messages name the first few.
    shown = "; ".join(reason for _, reason in bad[:SHOWN])
    if len(bad) > SHOWN:
        shown += f"; and {len(bad) - SHOWN} more"

    if len(bad) > skip:
        raise ConfigError(
            f"{shown} ({len(bad)} of {count} documents cannot be used, {skip} may be skipped)",
            code=_code_of(bad[0][1]),
            where=bad[0][1].split(" ")[0],
            hint=f"correct the data, or set skip_bad: {len(bad)} in the source to leave these out",
        )

    left = {number for number, _ in bad}
    good = [number for number in range(count) if number not in left]
    return good, (f"{len(bad)} of {count} documents are left out: {shown}",)


def _code_of(problem: str) -> str:
    """Return the error code of a bad document: DA03 encoding, DA02 JSON, DA04 content."""
    if any(word in problem for word in ("NUL", "UTF-8", "surrogate")):
        return "DA03"
    return "DA02" if "is not JSON" in problem else "DA04"
