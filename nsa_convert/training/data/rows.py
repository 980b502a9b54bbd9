"""Rows of packed documents from a mixture of sources; the position in it can be saved and resumed exactly."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from nsa_convert.errors import ConfigError
from nsa_convert.notices import Say
from nsa_convert.training.data.sources import Documents, EndOfStream, describe_source, open_source
from nsa_convert.training.recipe.sections import Source

Row = dict[str, list[int]]


@dataclasses.dataclass
class Cursor:
    """Position in one source.

    Attributes:
        epoch: How many times the source was read to its end.
        position: Documents read in this epoch.
        offset: Tokens used of the current document.
        emitted: Tokens used in all.
    """

    epoch: int = 0
    position: int = 0
    offset: int = 0
    emitted: int = 0


def joint_fingerprint(documents: Sequence[Documents]) -> str:
    """Return one hash that identifies the data of several sources."""
    text = "/".join(one.fingerprint() for one in documents)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_same_data(before: str, now: str, *, allow_change: bool, say: Say) -> None:
    """Compare the data of a checkpoint with the data of this run, by their hashes.

    Raises:
        ConfigError: They differ, and ``allow_change`` is not given (DA08).
    """
    if before == now:
        return
    if not allow_change:
        raise ConfigError(
            f"the training data changed since the checkpoint was written (hash {now}, it was {before})",
            code="DA08",
            hint="put the same files back; --allow-data-change goes on at the same position in the new ones",
        )
    say("warning [DA08]: the training data changed; going on at the same position in the new ones")


class PackedRows(IterableDataset):
    """Endless rows of ``seq_len`` tokens: pieces of documents, in each of which positions restart at 0.

    The next piece comes from the source that is furthest behind its share of the tokens: shares are exact
    without random numbers. A document that does not fit continues in a later row. Documents are read in a
    seeded order, a new one in every epoch.

    Args:
        sources: The mixture.
        tokenizer: Tokenizer of transformers.
        seq_len: Tokens in a row.
        seed: Seed of the order.
        base: Folder that relative paths start from.
        keep: Number of rows whose end position is remembered for :meth:`state_after`.
        held_out: Read the held-out documents instead of those for training.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Any,
        seq_len: int,
        seed: int,
        base: Path,
        keep: int = 4096,
        *,
        held_out: bool = False,
    ) -> None:
        super().__init__()
        self.sources = tuple(sources)
        self.documents: list[Documents] = [open_source(one, base, held_out=held_out) for one in sources]
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.seed = seed
        self.keep = keep

        # Where each source stands, and the tokens of its current document: ((epoch, position), tokens).
        self.cursors = [Cursor() for _ in sources]
        self.rows = 0
        self._texts: list[tuple[tuple[int, int], list[int]] | None] = [None] * len(self.sources)

        self.fingerprint = joint_fingerprint(self.documents)
        """Hash of what identifies the data."""

        # Rows read -> position after them: a data loader reads ahead of the step that is saved.
        self._states: OrderedDict[int, dict[str, Any]] = OrderedDict()

    def state(self) -> dict[str, Any]:
        """Return the current position as plain values."""
        cursors = [dataclasses.asdict(cursor) for cursor in self.cursors]
        return {"rows": self.rows, "cursors": cursors, "fingerprint": self.fingerprint}

    def state_after(self, rows: int) -> dict[str, Any]:
        """Return the position after the first ``rows`` rows, whatever was read ahead since."""
        return copy.deepcopy(self._states[rows])

    def restore(self, state: Mapping[str, Any], *, allow_change: bool = False, say: Say = print) -> None:
        """Continue from a saved position.

        Args:
            state: Result of :meth:`state_after`.
            allow_change: Continue although the data have changed.
            say: Called with a warning in that case.

        Raises:
            ConfigError: The data are not those of the saved position (DA08).
        """
        check_same_data(state["fingerprint"], self.fingerprint, allow_change=allow_change, say=say)

        self.cursors = [Cursor(**cursor) for cursor in state["cursors"]]
        # With other data there may be fewer documents: such a source starts its epoch again.
        for cursor, documents in zip(self.cursors, self.documents, strict=True):
            if documents.count is not None and cursor.position >= documents.count:
                cursor.position = cursor.offset = 0

        self.rows = state["rows"]
        self._texts = [None] * len(self.sources)

    def __iter__(self) -> Iterator[Row]:
        self._remember()
        while True:
            row = self._next_row()
            self.rows += 1
            self._remember()
            yield row

    def _remember(self) -> None:
        """Keep the current position under the number of rows read; forget the oldest ones."""
        self._states[self.rows] = self.state()
        while len(self._states) > self.keep:
            self._states.popitem(last=False)

    def _next_row(self) -> Row:
        """Return one row of ``seq_len`` tokens."""
        ids: list[int] = []
        positions: list[int] = []
        while len(ids) < self.seq_len:
            # The source that is furthest behind its share: fewest tokens per weight.
            index = min(
                range(len(self.sources)), key=lambda i: self.cursors[i].emitted / self.sources[i].weight
            )

            piece = self._take(index, self.seq_len - len(ids))
            ids += piece
            positions += range(len(piece))
        return {"input_ids": ids, "position_ids": positions}

    def _take(self, index: int, space: int) -> list[int]:
        """Return at most ``space`` tokens of a source's current document and advance its cursor."""
        cursor = self.cursors[index]
        text = self._tokens(index)
        piece = text[cursor.offset : cursor.offset + space]
        cursor.offset += len(piece)
        cursor.emitted += len(piece)

        # The document is used up: the next one, or the first of the next epoch.
        if cursor.offset >= len(text):
            cursor.offset = 0
            cursor.position += 1
            count = self.documents[index].count
            if count is not None and cursor.position >= count:
                cursor.epoch = cursor.epoch + 1
                cursor.position = 0

        return piece

    def _tokens(self, index: int) -> list[int]:
        """Return the tokens of a source's current document, which is read only once.

        Raises:
            ConfigError: The source has no text at all (DA01).
        """
        cursor = self.cursors[index]
        documents = self.documents[index]

        # Empty documents are skipped; a thousand of them in a row count as no text.
        for _ in range(1000):
            key = (cursor.epoch, cursor.position)
            held = self._texts[index]
            if held is not None and held[0] == key:
                return held[1]

            try:
                text = documents.read(documents.order(*key, self.seed + index))
            except EndOfStream:  # why: the end of a stream begins its next epoch
                if cursor.position == 0:
                    break
                cursor.epoch = cursor.epoch + 1
                cursor.position = 0
                continue

            tokens = encode(self.tokenizer, text)
            if tokens:
                self._texts[index] = (key, tokens)
                return tokens

            cursor.position += 1
            if documents.count is not None and cursor.position >= documents.count:
                cursor.epoch = cursor.epoch + 1
                cursor.position = 0

        raise ConfigError(f"data source {index} ({self.sources[index].kind}) holds no text", code="DA01")


def check_enough(
    sources: Sequence[Source], tokenizer: Any, needed: int, base: Path, *, chats: bool = False
) -> None:
    """Check that every source holds its share of the tokens of one optimizer step.

    Args:
        sources: The mixture.
        tokenizer: Tokenizer of transformers.
        needed: Tokens of one optimizer step.
        base: Folder that relative paths start from.
        chats: Documents are lists of messages; their tokens are estimated without a template.

    Raises:
        ConfigError: A source holds less (DA06).
    """
    total = sum(source.weight for source in sources)
    for source in sources:
        documents = open_source(source, base, chats=chats)
        wanted = math.ceil(needed * source.weight / total)
        found = 0

        if documents.count is None:
            continue

        # Documents are read only until there are enough; an endless source always has enough.
        for index in range(documents.count):
            text = documents.read(index)
            found += len(encode(tokenizer, str(text) if chats else text))
            if found >= wanted:
                break
        else:
            raise ConfigError(
                f"data {describe_source(source, base)} holds {found} tokens in {documents.count} documents; "
                f"one step of {needed} tokens takes {wanted} of it",
                code="DA06",
                where=source.path,
                expected=f"at least {wanted} tokens",
                found=str(found),
                hint="add data, lower batch_tokens, or give the source a smaller weight",
            )


def encode(tokenizer: Any, text: Any) -> list[int]:
    """Return the tokens of a document, followed by the end-of-text token where the tokenizer has one.

    Raises:
        ConfigError: The document is not a text (DA04).
    """
    if not isinstance(text, str):
        raise ConfigError(f"a document is no text but {type(text).__name__}", code="DA04")

    # A tokenizer may add the end token itself.
    ids = tokenizer(text, verbose=False)["input_ids"] if text else []
    end = tokenizer.eos_token_id
    return ids + [end] if ids and end is not None and ids[-1] != end else ids


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return ``input_ids``, ``position_ids`` and ``labels``, each ``[B, T]``.

    The first token of a document has no label (-100): nothing in the row predicts it.
    """
    ids = torch.tensor([row["input_ids"] for row in rows])
    positions = torch.tensor([row["position_ids"] for row in rows])
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}
