"""Documents of a source, and the order in which the lanes of a stage read them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from nsa_convert.training.losses import mix

NUMBERS = 1 << 40
"""Documents made by number: training has those below, the held-out part those from here on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """In which order a stage reads its documents.

    The first time through a source all stages of a run share one shuffle, made from ``seed``, and each begins
    at another place of it; every further time has a shuffle of its own, made from ``seed`` and ``stage``.

    Attributes:
        seed: Seed of the run.
        stage: Name of the stage.
        starts: Share of each source that later stages read first: here this stage begins. 0 where left out.
    """

    seed: int = 0
    stage: str = ""
    starts: tuple[float, ...] = ()

    def start(self, index: int) -> float:
        """Return where the stage begins in the shuffle of source ``index``, as a share of it."""
        return self.starts[index] if index < len(self.starts) else 0.0

    def seed_of(self, epoch: int, name: str) -> int:
        """Return the seed of the shuffle of a source's epoch."""
        own = () if epoch == 0 else (self.stage, epoch)
        return mix(self.seed, "order", name, *own)


class Reader(Protocol):
    """The documents that one lane gets of one source, without end."""

    def read(self) -> Any:
        """Return the next document."""

    def state(self) -> dict[str, int]:
        """Return the place of the next document as plain values."""

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on at a place that :meth:`state` returned."""


class Documents:
    """Documents that can be read by number.

    Args:
        read: Returns document ``i``.
        count: Number of documents; None for an endless source.
        facts: Plain values that identify the data, for the check at a resume.
        notes: What a user should know of them, such as documents left out.
        name: What the source is called in the seed of its order.
    """

    def __init__(
        self,
        read: Callable[[int], Any],
        count: int | None,
        facts: Any,
        notes: tuple[str, ...] = (),
        name: str = "",
    ) -> None:
        self.read = read
        self.count = count
        self.facts = facts
        self.notes = notes
        self.name = name
        self._shuffles: dict[int, Tensor] = {}

    @property
    def parts(self) -> int | None:
        """Number of lanes that can share the documents; None for any number."""
        return self.count

    def first(self, count: int) -> Iterator[Any]:
        """Yield the first documents in stored order, at most ``count``."""
        yield from map(self.read, range(count if self.count is None else min(count, self.count)))

    def shuffled(self, position: int, seed: int) -> int:
        """Return the number of the document at ``position`` of a seeded shuffle."""
        assert self.count is not None

        # Lanes may stand in neighbouring epochs: the shuffles of two are kept.
        if seed not in self._shuffles:
            if len(self._shuffles) > 1:
                self._shuffles.pop(next(iter(self._shuffles)))
            generator = torch.Generator().manual_seed(seed)
            self._shuffles[seed] = torch.randperm(self.count, generator=generator)
        return int(self._shuffles[seed][position])

    def open(self, order: Order, index: int, lane: int, lanes: int) -> Reader:
        """Return what lane ``lane`` of ``lanes`` reads of these documents, source ``index`` of a stage."""
        return NumberedReader(self, order, index, lane, lanes)

    def fingerprint(self) -> str:
        """Return a hash that identifies the data."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]


class NumberedReader:
    """Every ``lanes``-th document of the epochs that follow each other; see :class:`Reader`."""

    def __init__(self, documents: Documents, order: Order, index: int, lane: int, lanes: int) -> None:
        self.documents = documents
        self.order = order
        self.index = index
        self.lane = lane
        self.lanes = lanes
        self.taken = 0

    def read(self) -> Any:
        """Return the next document."""
        number = self._number(self.lane + self.taken * self.lanes)
        self.taken += 1
        return self.documents.read(number)

    def _number(self, place: int) -> int:
        """Return the number of the document at a place in the epochs of all lanes."""
        count = self.documents.count
        if count is None:
            # Made by number: a stage and a seed have a region of their own.
            return (mix(self.order.seed, self.order.stage, "documents") + place) % NUMBERS

        epoch, position = divmod(place, count)
        if epoch == 0:
            position = (position + round(self.order.start(self.index) * count)) % count
        return self.documents.shuffled(position, self.order.seed_of(epoch, self.documents.name))

    def state(self) -> dict[str, int]:
        """Return the place of the next document."""
        return {"taken": self.taken}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on at a place that :meth:`state` returned."""
        self.taken = state["taken"]


def iterate(documents: Documents) -> Iterator[Any]:
    """Yield every document once, in stored order; nothing for documents made by number without end."""
    if documents.count is not None or documents.parts is not None:
        yield from documents.first(1 << 62)
