"""Rows of packed documents from a mixture of sources; the position in it can be saved and resumed exactly."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from nsa_convert.errors import ConfigError
from nsa_convert.notices import Say
from nsa_convert.training.data.documents import Documents, Order
from nsa_convert.training.data.lanes import Encoder, Lane, Packed
from nsa_convert.training.data.sources import describe_source, open_source
from nsa_convert.training.losses import uniform
from nsa_convert.training.recipe.sections import MOST_LANES, Source

Row = dict[str, list[int]]


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


def lane_count(rows: int, documents: Sequence[Documents], most: int = MOST_LANES) -> int:
    """Return the number of lanes of a stage: the largest divisor of a step's rows that all data allow.

    It depends on the recipe and its data alone, not on processes: they share the lanes as they are.

    Args:
        rows: Rows of one optimizer step.
        documents: The sources; one of N documents (of a stream: N shards) can be shared by N lanes.
        most: Most lanes that are wanted.
    """
    most = min([most, *(one.parts for one in documents if one.parts is not None)])
    return max(count for count in range(1, max(1, min(rows, most)) + 1) if rows % count == 0)


class PackedRows(IterableDataset):
    """Endless rows of ``seq_len`` tokens: pieces of documents, in each of which positions restart at 0.

    Row ``r`` comes from lane ``r % lanes``. Lanes share the documents of every source among them, and each
    packs its own: a process reads and tokenises the lanes of its rows only, and the rows are the same however
    many processes there are.

    In a lane the next piece comes from the source that is furthest behind its share of the tokens: shares are
    exact. A document that does not fit continues in the lane's next row. Documents are read in the order that
    ``order`` describes.

    Args:
        sources: The mixture.
        tokenizer: Tokenizer of transformers.
        seq_len: Tokens in a row.
        order: Order of the documents.
        base: Folder that relative paths start from.
        rows_per_step: Rows of one optimizer step: the most lanes there can be.
        lanes: Most lanes that are wanted.
        held_out: Read the held-out documents instead of those for training.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Any,
        seq_len: int,
        order: Order,
        base: Path,
        rows_per_step: int = 1,
        lanes: int = MOST_LANES,
        *,
        held_out: bool = False,
    ) -> None:
        super().__init__()
        self.sources = tuple(sources)
        self.documents: list[Documents] = [open_source(one, base, held_out=held_out) for one in sources]
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.order = order
        self.lanes = lane_count(rows_per_step, self.documents, lanes)
        self.rows = 0
        """Rows read."""

        self.fingerprint = joint_fingerprint(self.documents)
        """Hash of what identifies the data."""

        # The lanes that were read here, and the last known position of every one that was read anywhere.
        self._open: dict[int, Lane] = {}
        self._states: dict[int, dict[str, Any]] = {}
        self._encoder = Encoder(tokenizer)

    def state(self) -> dict[str, Any]:
        """Return the position after the rows read so far as plain values."""
        known = self._states | {number: lane.state() for number, lane in self._open.items()}
        lanes = [known.get(number) for number in range(self.lanes)]
        return {"rows": self.rows, "lanes": lanes, "fingerprint": self.fingerprint}

    def note(self, rows: int, states: Mapping[int, dict[str, Any]]) -> None:
        """Record positions of lanes that another process read, after ``rows`` rows in all."""
        self.rows = rows
        self._states.update(states)

    def known(self) -> dict[int, dict[str, Any]]:
        """Return the recorded positions of lanes."""
        return dict(self._states)

    def open_lanes(self) -> list[Lane]:
        """Return the lanes that were read by this process itself."""
        return list(self._open.values())

    def restore(self, state: Mapping[str, Any], *, allow_change: bool = False, say: Say = print) -> None:
        """Continue from a saved position.

        Args:
            state: Result of :meth:`state`.
            allow_change: Continue although the data have changed.
            say: Called with a warning in that case.

        Raises:
            ConfigError: The data are not those of the saved position, or it was saved by a version that read
                documents in another order (DA08).
        """
        if "lanes" not in state:
            raise ConfigError(
                "the checkpoint was written by an earlier version, which read documents in another order: "
                "the place in it cannot be found",
                code="DA08",
                hint="finish the stage with that version, or choose another out and begin the run again",
            )
        check_same_data(state["fingerprint"], self.fingerprint, allow_change=allow_change, say=say)
        if len(state["lanes"]) != self.lanes:
            raise ConfigError(
                f"the data of the checkpoint were read in {len(state['lanes'])} lanes, these would be in "
                f"{self.lanes}: the place cannot be found again",
                code="DA08",
                hint="put back as many documents as there were, or begin the stage again",
            )

        self.rows = state["rows"]
        self._open = {}
        self._states = {number: lane for number, lane in enumerate(state["lanes"]) if lane is not None}

    def __iter__(self) -> Iterator[Row]:
        while True:
            ids, positions = self.packed(self.rows)
            self.rows += 1
            yield {"input_ids": ids.tolist(), "position_ids": positions.tolist()}

    def lane(self, number: int) -> Lane:
        """Return a lane at its recorded position; it is opened at its first use."""
        if number not in self._open:
            readers = [
                documents.open(self.order, index, number, self.lanes)
                for index, documents in enumerate(self.documents)
            ]

            # Each lane begins at another place of the mixture: all would read the same source together.
            seeds = (self.order.seed, self.order.stage, "lane", number)
            leads = [uniform(*seeds, i) * self.seq_len * (number > 0) for i in range(len(self.sources))]
            lane = self._open[number] = Lane(self.sources, readers, self._encoder, self.seq_len, leads)
            if number in self._states:
                lane.restore(self._states[number])
        return self._open[number]

    def packed(self, number: int) -> Packed:
        """Return a row by its number; rows of a lane can only be read forward."""
        lane = self.lane(number % self.lanes)
        row = lane.row()
        while lane.rows <= number // self.lanes:
            row = lane.row()
        return row


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
    encoder = Encoder(tokenizer)
    for source in sources:
        documents = open_source(source, base, chats=chats)
        wanted = math.ceil(needed * source.weight / total)
        found = 0

        if documents.count is None:
            continue

        # Documents are read only until there are enough; an endless source always has enough.
        for index in range(documents.count):
            text = documents.read(index)
            (ids,) = encoder([str(text) if chats else text])
            found += len(ids) if chats or source.takes(len(ids)) else 0
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


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return ``input_ids``, ``position_ids`` and ``labels``, each ``[B, T]``.

    The first token of a document has no label (-100): nothing in the row predicts it.
    """
    ids, positions = (torch.tensor([row[key] for row in rows]) for key in ("input_ids", "position_ids"))
    return batch_of(torch.stack((ids, positions)))


def stack(rows: Sequence[Packed]) -> Tensor:
    """Return tokens and positions of rows, ``[2, B, T]``."""
    parts = [np.stack([np.frombuffer(row[part], np.int64) for row in rows]) for part in (0, 1)]
    return torch.from_numpy(np.stack(parts))


def batch_of(stacked: Tensor) -> dict[str, Tensor]:
    """Return what :func:`collate` returns, from the tokens and positions ``[2, B, T]`` of rows."""
    ids, positions = stacked
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}
