"""One lane of a stage: its own documents of every source, packed into rows one after another."""

from __future__ import annotations

import dataclasses
import os
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from nsa_convert.errors import ConfigError
from nsa_convert.training.data.documents import Reader
from nsa_convert.training.recipe.sections import Source

Packed = tuple["array[int]", "array[int]"]
"""Tokens of a row, and their positions in their documents."""

AHEAD = 16
"""Most documents of a source that are tokenised at once."""
AHEAD_CHARACTERS = 1 << 16
"""Characters after which no further document is added to them."""
SPECIAL = 8
"""Most tokens that a tokenizer adds to a text."""
MISSES = 1000
"""Empty documents in a row that count as no text."""
MISSES_IN_CLASS = 100_000
"""Documents in a row outside of min_tokens and max_tokens that count as none inside."""


@dataclasses.dataclass
class Cursor:
    """Position in one source.

    Attributes:
        offset: Tokens used of the current document.
        emitted: Tokens used in all.
        documents: Documents begun.
        skipped: Documents passed over: empty ones, and those outside of min_tokens and max_tokens.
    """

    offset: int = 0
    emitted: int = 0
    documents: int = 0
    skipped: int = 0


@dataclasses.dataclass(frozen=True)
class Read:
    """A document that was read and tokenised.

    Attributes:
        state: Place of the document in its source.
        tokens: Its tokens.
        skipped: Documents passed over before it.
    """

    state: Mapping[str, int]
    tokens: array[int]
    skipped: int


class Encoder:
    """Tokenises documents, many at once: about twice as fast as one by one.

    Args:
        tokenizer: Tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._fast: Any = None

    def __call__(self, texts: Sequence[Any]) -> list[array[int]]:
        """Return the tokens of each document, followed by the end token where the tokenizer has one.

        Raises:
            ConfigError: A document is not a text (DA04).
        """
        for text in texts:
            if not isinstance(text, str):
                raise ConfigError(f"a document is no text but {type(text).__name__}", code="DA04")
        if self._fast is None:
            self._fast = _fast_encoder(self.tokenizer, [text for text in texts if text])

        # A tokenizer may add the end token itself.
        end = self.tokenizer.eos_token_id
        found = [array("q", ids if text else ()) for text, ids in zip(texts, self._ids(texts), strict=True)]
        for ids in found:
            if ids and end is not None and ids[-1] != end:
                ids.append(end)
        return found

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if self._fast:
            return [one.ids for one in self._fast.encode_batch_fast(list(texts))]
        return self.tokenizer(list(texts), verbose=False)["input_ids"]


def _fast_encoder(tokenizer: Any, texts: Sequence[str]) -> Any:
    """Return the tokenizer of ``tokenizers`` that gives these texts the same tokens faster, or False."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not texts or not hasattr(backend, "encode_batch_fast"):
        return False

    # The call of transformers sets truncation and padding of the tokenizer below to what it was asked for.
    expected = tokenizer(list(texts), verbose=False)["input_ids"]
    same = [one.ids for one in backend.encode_batch_fast(list(texts))] == expected
    return backend if same else False


def encode(tokenizer: Any, text: Any) -> list[int]:
    """Return the tokens of a document, followed by the end-of-text token where the tokenizer has one.

    Raises:
        ConfigError: The document is not a text (DA04).
    """
    return Encoder(tokenizer)([text])[0].tolist()


class Lane:
    """Endless rows of ``seq_len`` tokens; see :class:`nsa_convert.training.data.rows.PackedRows`.

    Args:
        sources: The mixture.
        readers: The lane's documents of each source.
        encoder: Tokenises documents.
        seq_len: Tokens in a row.
        leads: Tokens that each source counts as read at the start, so that lanes do not take turns together.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        readers: Sequence[Reader],
        encoder: Encoder,
        seq_len: int,
        leads: Sequence[float],
    ) -> None:
        self.sources = sources
        self.readers = readers
        self.encoder = encoder
        self.seq_len = seq_len
        self.leads = leads
        self.rows = 0
        self._range = array("q", range(seq_len))
        self.cursors = [Cursor() for _ in sources]

        # The current document of each source, those read ahead, those passed over after them, and how many to
        # read ahead next.
        self._now: list[Read | None] = [None] * len(sources)
        self._ahead: list[deque[Read]] = [deque() for _ in sources]
        self._passed = [0] * len(sources)
        self._room = [1] * len(sources)

    def state(self) -> dict[str, Any]:
        """Return the position after the rows so far as plain values."""
        return {"rows": self.rows, "cursors": [self._saved(index) for index in range(len(self.sources))]}

    def _saved(self, index: int) -> dict[str, Any]:
        """Return the cursor of a source, and under ``at`` the place of the document that it goes on with."""
        values = dataclasses.asdict(self.cursors[index])
        now = self._now[index] or next(iter(self._ahead[index]), None)
        if now is not None:
            # Documents passed over before the next one come before its place.
            values["skipped"] += now.skipped if self._now[index] is None else 0
            return {**values, "at": dict(now.state)}
        values["skipped"] += self._passed[index]
        return {**values, "at": self.readers[index].state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on at a position that :meth:`state` returned, before any row is read."""
        self.rows = state["rows"]
        for reader, saved in zip(self.readers, state["cursors"], strict=True):
            reader.restore(saved["at"])
        self.cursors = [
            Cursor(**{key: value for key, value in saved.items() if key != "at"})
            for saved in state["cursors"]
        ]

    def row(self) -> Packed:
        """Return the next row."""
        ids = array("q")
        positions = array("q")
        while len(ids) < self.seq_len:
            # The source that is furthest behind its share: fewest tokens per weight.
            index = min(range(len(self.sources)), key=self._behind)
            piece = self._take(index, self.seq_len - len(ids))
            ids += piece
            positions += self._range[: len(piece)]
        self.rows += 1
        return ids, positions

    def _behind(self, index: int) -> float:
        return (self.cursors[index].emitted + self.leads[index]) / self.sources[index].weight

    def _take(self, index: int, space: int) -> array[int]:
        """Return at most ``space`` tokens of a source's current document and advance its cursor."""
        cursor = self.cursors[index]
        now = self._now[index]
        if now is None:
            now = self._now[index] = self._next(index)
            if cursor.offset == 0:
                cursor.documents += 1
                cursor.skipped += now.skipped

        # After a change of the data, which a user may allow, a document may be shorter than it was.
        cursor.offset = min(cursor.offset, len(now.tokens) - 1)
        piece = now.tokens[cursor.offset : cursor.offset + space]
        cursor.offset += len(piece)
        cursor.emitted += len(piece)
        if cursor.offset >= len(now.tokens):
            cursor.offset = 0
            self._now[index] = None
        return piece

    def _next(self, index: int) -> Read:
        """Return a source's next document, from those read ahead.

        Raises:
            ConfigError: The source has no text at all, or none of the lengths asked for (DA01).
        """
        ahead = self._ahead[index]
        source = self.sources[index]
        limit = MISSES_IN_CLASS if source.min_tokens or source.max_tokens else MISSES
        while not ahead:
            self._read_ahead(index)
            skipped = self._passed[index]
            if not ahead and skipped >= limit:
                text = f"from {source.min_tokens} to {source.max_tokens or 'any number of'} tokens"
                what = f"no document of {text}" if limit > MISSES else "no text"
                raise ConfigError(
                    f"data source {index} ({source.kind}) holds {what} among {skipped}", code="DA01"
                )
        return ahead.popleft()

    def _read_ahead(self, index: int) -> None:
        """Read and tokenise some documents of a source."""
        source = self.sources[index]
        reader = self.readers[index]
        read: list[tuple[Mapping[str, int], Any]] = []
        characters = 0
        while len(read) < self._room[index] and characters < AHEAD_CHARACTERS:
            place = reader.state()
            text = reader.read()
            length = len(text) if isinstance(text, str) else 0
            # A token is at least one byte: what is certainly too short need not be tokenised to know it.
            short = 0 < length < source.min_tokens and len(text.encode()) + SPECIAL < source.min_tokens
            read.append((place, "" if short else text))
            characters += 0 if short else length
        self._room[index] = min(AHEAD, 2 * self._room[index])

        for (state, _), tokens in zip(read, self.encoder([text for _, text in read]), strict=True):
            if tokens and source.takes(len(tokens)):
                self._ahead[index].append(Read(state, tokens, self._passed[index]))
                self._passed[index] = 0
            else:
                self._passed[index] += 1


def serial_tokenizers() -> None:
    """Let a tokenizer of a reading process use one thread: there are as many processes as were asked for."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
