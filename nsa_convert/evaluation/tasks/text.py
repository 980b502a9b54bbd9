"""Texts to evaluate on: the user's file, or code and documentation that come with every Python.

The package ships no texts. The default code text is the source of standard-library modules, the default prose
text is the language reference that ``pydoc`` displays. Both are read from the running interpreter, so only
figures of the same Python version can be compared (the report names it).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import platform
from pathlib import Path
from typing import Any

from nsa_convert.errors import ConfigError, MachineError

CODE_MODULES = ("argparse", "subprocess", "tarfile", "inspect")
PROSE_TOPICS = (
    "objects",
    "execmodel",
    "import",
    "assignment",
    "compound",
    "specialnames",
    "typesseq",
    "formatstrings",
)
MIN_TOKENS = 16
"""Averages over fewer tokens mean nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalText:
    """One text with its origin.

    Attributes:
        name: Short name for tables and file names.
        kind: ``"code"``, ``"prose"`` or ``"file"``.
        source: Origin of the text, for the report.
        text: The text itself.
    """

    name: str
    kind: str
    source: str
    text: str

    @property
    def sha256(self) -> str:
        """Return the SHA-256 hash of the UTF-8 text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def code_text() -> EvalText:
    """Return source code of the standard library, ``argparse`` first (about 100 kB).

    Raises:
        MachineError: This Python has no source files (EV12).
    """
    parts = []
    for name in CODE_MODULES:
        try:
            parts.append(inspect.getsource(importlib.import_module(name)))
        except OSError as error:
            raise MachineError(
                f"this Python has no source for its own module {name!r}: {error}",
                code="EV12",
                hint="give a text file instead",
            ) from error

    source = f"CPython {platform.python_version()} sources: {', '.join(CODE_MODULES)}"
    return EvalText(name="code", kind="code", source=source, text="\n".join(parts))


def prose_text() -> EvalText:
    """Return chapters of the Python language reference as ``pydoc`` stores them (about 200 kB).

    Raises:
        MachineError: This Python does not have them (EV12).
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise MachineError(
            "this Python has no pydoc_data package, the default prose text",
            code="EV12",
            hint="give a text file instead",
        ) from error

    parts = [topics[name] for name in PROSE_TOPICS if name in topics]
    source = f"CPython {platform.python_version()} language reference (pydoc_data.topics)"
    return EvalText(name="prose", kind="prose", source=source, text="\n\n".join(parts))


def default_texts() -> list[EvalText]:
    """Return the code text and the prose text."""
    return [code_text(), prose_text()]


def file_text(path: str | Path) -> EvalText:
    """Read a UTF-8 text file.

    Raises:
        ConfigError: The file cannot be read, is not UTF-8 text, or is empty (DA01).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ConfigError(
            f"cannot read the evaluation text {str(path)!r}: {reason}", code="DA01", where=str(path)
        ) from error

    if not text.strip():
        raise ConfigError(f"the evaluation text {str(path)!r} is empty", code="DA01", where=str(path))
    return EvalText(name=path.stem, kind="file", source=f"file {path.name}", text=text)


def first_tokens(tokenizer: Any, text: EvalText, length: int) -> list[int]:
    """Return at most ``length`` token ids of the text, with the special tokens that the tokenizer adds.

    Only as many characters as are needed are tokenised: a book of megabytes costs no more than its beginning.

    Raises:
        ConfigError: The text has fewer than 16 tokens (DA02).
    """
    characters = 16 * length  # no common tokenizer averages 16 characters a token over a window
    ids = tokenizer(text.text[:characters], verbose=False)["input_ids"]
    # The text may still have unusually long tokens.
    if len(ids) < length and len(text.text) > characters:
        ids = tokenizer(text.text, verbose=False)["input_ids"]

    if len(ids) < MIN_TOKENS:
        raise ConfigError(
            f"text too short: {text.source} has {len(ids)} tokens, at least {MIN_TOKENS} are needed",
            code="DA02",
            where=text.source,
            expected=f">= {MIN_TOKENS} tokens",
            found=str(len(ids)),
        )
    return ids[:length]
