"""Streamed data sets: shuffled by shard and by block, cut for lanes, resumed where they stopped."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch

from nsa_convert.errors import ConfigError, HubError
from nsa_convert.training.data.documents import Documents, Order
from nsa_convert.training.losses import mix

SPLIT_FILES = 256
"""Data sets of up to this many Parquet files are cut at their row groups; with more it takes too long."""
READ_ROWS = 256
"""Most rows that are taken out of a stream at once."""


class Stream(Documents):
    """Rows of an ``IterableDataset`` as documents.

    The shards of the data set are files, or row groups of Parquet files where ``datasets`` can cut them
    (version 5). They are read in a seeded order, and each lane reads shards of its own. Inside of its shards
    a lane shuffles blocks of documents: a block is read, shuffled and used up, then the next one. So what a
    position has to record is small, and a resumed run reads the beginning of one shard and one block again,
    not all that came before. (The buffer of ``IterableDataset.shuffle`` is lost at a resume.)

    Args:
        table: The data set.
        column: Field that holds the document.
        facts: Plain values that identify the data.
        name: What the source is called in the seed of its order.
        shuffle: Documents that are shuffled at a time, in all lanes together.
        hold_out: Share of the documents, chosen by a hash of what they say, that training never sees.
        held_out: Read these instead of those for training.
    """

    def __init__(
        self,
        table: Any,
        column: str,
        facts: Any,
        *,
        name: str,
        shuffle: int,
        hold_out: float = 0.0,
        held_out: bool = False,
    ) -> None:
        super().__init__(self._by_number, None, ["stream", facts, shuffle, hold_out, held_out], name=name)
        self.table = table
        self.column = column
        self.shuffle = shuffle
        self.hold_out = hold_out
        self.held_out = held_out

    def _by_number(self, number: int) -> Any:
        """Raise: a stream has no numbers."""
        raise TypeError(f"a streamed source has no document {number}; open it or read its first ones")

    @functools.cached_property
    def shards(self) -> Any:
        """The data set, cut into as many shards as it can be."""
        many = self.table.num_shards > SPLIT_FILES or not hasattr(self.table, "reshard")
        return self.table if many else self.table.reshard()

    @property
    def parts(self) -> int:
        """Number of lanes that can share the documents: one has at least one shard."""
        return self.shards.num_shards

    def fingerprint(self) -> str:
        """Return a hash that identifies the data, and the shards they are cut into."""
        return hashlib.sha256(f"{super().fingerprint()}/{self.parts}".encode()).hexdigest()[:16]

    def first(self, count: int) -> Iterator[Any]:
        """Yield the first documents in stored order, at most ``count``."""
        every = (self.rows(shard, 0) for shard in range(self.parts))
        texts = (text for shard in every for _, text in shard if self.wanted(text))
        yield from islice(texts, count)

    def wanted(self, text: Any) -> bool:
        """Return whether a document belongs to the part that is read."""
        return not self.hold_out or is_held_out(text, self.hold_out) == self.held_out

    def rows(self, shard: int, skip: int) -> Iterator[tuple[int, Any]]:
        """Yield ``(rows read of the shard, document)`` of a shard after its first ``skip`` rows.

        Raises:
            HubError: A data set of the Hub cannot be read, for example because the network failed (HB10).
            ConfigError: A file is damaged (DA07).
        """
        part = self.shards.shard(num_shards=self.parts, index=shard).select_columns([self.column])
        done = 0
        try:
            # Tables, not rows: those to skip are never made into Python values.
            for table in part.with_format("arrow").iter(batch_size=READ_ROWS):
                left = table[self.column][max(0, skip - done) :].to_pylist()
                done += len(table)
                yield from enumerate(left, done - len(left) + 1)
        except Exception as error:  # why: datasets, the Hub and Arrow raise many kinds; raised with the name
            text = (str(error).strip().splitlines() or ["no message"])[0]
            said = f"data {self.name} cannot be read: {type(error).__name__}: {text}"
            hint = "--resume goes on where it stopped"
            if self.name.startswith("hub "):
                raise HubError(said, code="HB10", hint=hint) from error
            raise ConfigError(said, code="DA07", hint=hint) from error

    def open(self, order: Order, index: int, lane: int, lanes: int) -> StreamReader:
        """Return what lane ``lane`` of ``lanes`` reads of the stream, source ``index`` of a stage."""
        return StreamReader(self, order, index, lane, lanes)


class StreamReader:
    """The documents of one lane of a stream; see :class:`nsa_convert.training.data.documents.Reader`."""

    def __init__(self, stream: Stream, order: Order, index: int, lane: int, lanes: int) -> None:
        self.stream = stream
        self.order = order
        self.index = index
        self.lane = lane
        self.lanes = lanes

        # Where the current block began, its documents, and how many of them are used.
        self._begin = {"epoch": 0, "shard": 0, "row": 0}
        self._block: list[Any] | None = None
        self._used = 0

        # Where the next block begins, and the rows of the shard that is open there.
        self._next = dict(self._begin)
        self._rows: Iterator[tuple[int, Any]] | None = None

    def read(self) -> Any:
        """Return the next document.

        Raises:
            ConfigError: The lane has none at all (DA01).
            HubError: The data cannot be read.
        """
        if self._block is None or self._used >= len(self._block):
            skip = self._used if self._block is None else 0
            self._read_block()
            self._used = skip
        assert self._block is not None
        self._used += 1
        return self._block[self._used - 1]

    def state(self) -> dict[str, int]:
        """Return the place of the next document: the beginning of its block, and its place in it."""
        if self._block is not None and self._used >= len(self._block):
            return {**self._next, "used": 0}
        return {**self._begin, "used": self._used}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on at a place that :meth:`state` returned."""
        self._begin = {key: state[key] for key in ("epoch", "shard", "row")}
        self._next = dict(self._begin)
        self._used = state["used"]
        self._block = self._rows = None

    def _read_block(self) -> None:
        """Read the next block that holds a document, and shuffle it."""
        size = max(1, -(-self.stream.shuffle // self.lanes))
        epochs = 0
        block: list[Any] = []
        while not block:
            self._begin = dict(self._next)
            block = self._collect(size)

            # The lane's shards are used up: the next epoch begins, with another order.
            if len(block) < size:
                self._next = {"epoch": self._next["epoch"] + 1, "shard": 0, "row": 0}
                epochs += 1
                if epochs > 1 and not block:
                    raise ConfigError(f"a part of {self.stream.name} holds no document", code="DA01")

        place = (self.order.seed, self.order.stage, "block", self.stream.name, self.lane)
        generator = torch.Generator().manual_seed(mix(*place, *self._begin.values()))
        self._block = [block[i] for i in torch.randperm(len(block), generator=generator).tolist()]

    def _collect(self, size: int) -> list[Any]:
        """Return at most ``size`` documents of the lane's shards; fewer where they end."""
        own = self._shards(self._next["epoch"])
        found: list[Any] = []
        while self._next["shard"] < len(own):
            if self._rows is None:
                self._rows = self.stream.rows(own[self._next["shard"]], self._next["row"])

            for row, text in self._rows:
                self._next["row"] = row
                if self.stream.wanted(text):
                    found.append(text)
                if len(found) == size:
                    return found

            self._next["shard"] += 1
            self._next["row"] = 0
            self._rows = None
        return found

    def _shards(self, epoch: int) -> list[int]:
        """Return the shards of the lane in an epoch, in the order in which it reads them."""
        count = self.stream.parts
        generator = torch.Generator().manual_seed(self.order.seed_of(epoch, self.stream.name))
        shards = torch.randperm(count, generator=generator).tolist()
        first = int(self.order.start(self.index) * count) if epoch == 0 else 0
        return [*shards[first:], *shards[:first]][self.lane :: self.lanes]


def is_held_out(document: Any, share: float) -> bool:
    """Return whether a document of a stream is held out: by a hash of what it says.

    Equal documents go together.

    Args:
        document: A text, or a list of messages.
        share: Share of the documents that is held out.
    """
    text = document if isinstance(document, str) else json.dumps(document, sort_keys=True)
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "little") < share * 2.0**64
