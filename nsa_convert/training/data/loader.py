"""Micro-batches for one training process, read and packed by processes beside it."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nsa_convert.errors import MachineError, NsaConvertError
from nsa_convert.notices import Say
from nsa_convert.training.data.lanes import serial_tokenizers
from nsa_convert.training.data.rows import PackedRows, batch_of, stack

PREFETCHED = 4
"""Micro-batches that a reading process prepares ahead."""

Batch = dict[str, Tensor]


class Batches(IterableDataset):
    """The micro-batches of one process: of every ``processes`` in a row, one.

    Each is one tensor, tokens and positions ``[2, B, T]``: every tensor that comes from another process takes
    time. With it come the positions of its lanes after it, as JSON. An error is returned in place of a
    batch, so that it reaches the training process as it is.

    Args:
        rows: The rows.
        size: Rows of a micro-batch.
        process: Number of the process among those that read different rows.
        processes: Their number.
    """

    def __init__(self, rows: PackedRows, size: int, process: int, processes: int) -> None:
        super().__init__()
        self.rows = rows
        self.size = size
        self.process = process
        self.processes = processes

    def __iter__(self) -> Iterator[tuple[Tensor, str] | NsaConvertError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)

        # Batches are dealt to the processes, and those of a process to its workers, from the first one on.
        number = self.rows.rows // self.size + self.process + worker * self.processes
        while True:
            places = range(number * self.size, (number + 1) * self.size)
            try:
                batch = stack([self.rows.packed(place) for place in places])
            except NsaConvertError as error:
                yield error
                return

            lanes = sorted({place % self.rows.lanes for place in places})
            yield batch, json.dumps({lane: self.rows.lane(lane).state() for lane in lanes})
            number += self.processes * workers


class RowLoader:
    """What a training process iterates over: its micro-batches, and the rows' position after each.

    Args:
        rows: The rows.
        size: Rows of a micro-batch.
        process: Number of the process among those that read different rows.
        processes: Their number.
        workers: Most processes that read for this one; 0 reads in the training process itself.
        say: Called when a reading process died and another one takes its place.
    """

    def __init__(
        self,
        rows: PackedRows,
        size: int,
        *,
        process: int = 0,
        processes: int = 1,
        workers: int = 0,
        say: Say = print,
    ) -> None:
        self.dataset = rows
        self.batch_size = size
        self.process = process
        self.processes = processes
        self.workers = worker_count(workers, rows.lanes, size, processes)
        self.say = say

    def __iter__(self) -> Iterator[Batch]:
        """Yield micro-batches without end, from the rows' position on.

        Raises:
            NsaConvertError: What a reading process raised.
            MachineError: Reading processes died twice (DA12).
        """
        died = 0
        while True:
            try:
                yield from self._read()
            except RuntimeError as error:
                # torch tells of a dead worker so, and of nothing else in these words.
                if "DataLoader worker" not in str(error):
                    raise
                died += 1
                if died > 1:
                    raise MachineError(
                        f"a process that reads the data died twice: {error}",
                        code="DA12",
                        hint="look for a lack of memory (each one holds documents of its lanes); workers: 0 "
                        "reads in the training process; then --resume",
                    ) from error
                self.say("warning [DA12]: a process that reads the data died; another one goes on for it")

    def _read(self) -> Iterator[Batch]:
        """Yield micro-batches from the position on, read by workers that start now."""
        options: dict[str, Any] = {}
        if self.workers:
            options = {"prefetch_factor": PREFETCHED, "worker_init_fn": _begin_worker}

        # A generator of its own: the loader draws a seed, not to be taken from the run's random numbers.
        loader = DataLoader(
            Batches(self.dataset, self.batch_size, self.process, self.processes),
            batch_size=None,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
            **options,
        )
        begin = self.dataset.rows
        for number, item in enumerate(_started(loader), 1):
            if isinstance(item, NsaConvertError):
                raise item
            batch, states = item
            rows = begin + number * self.batch_size * self.processes
            self.dataset.note(rows, {int(lane): state for lane, state in json.loads(states).items()})
            yield batch_of(batch)


def worker_count(most: int, lanes: int, size: int, processes: int) -> int:
    """Return how many processes can read for one training process without two of them reading one lane.

    Args:
        most: Most that are wanted.
        lanes: Lanes of the stage.
        size: Rows of a micro-batch.
        processes: Training processes that read different rows.
    """
    for count in range(most, 1, -1):
        readers: dict[int, int] = {}
        # After lanes * count batches of each process everything repeats.
        rows = ((row // size, row % lanes) for row in range(lanes * size * processes * count))
        own = ((batch // processes % count, lane) for batch, lane in rows if batch % processes == 0)
        if all(readers.setdefault(lane, worker) == worker for worker, lane in own):
            return count
    return min(most, 1)


def _started(loader: DataLoader) -> Iterator[Any]:
    """Start the workers of a loader.

    torch sets a handler of SIGCHLD that raises wherever the training process is when a worker dies. Without
    it the next batch that is asked for tells of the death.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    started = iter(loader)
    if before is not None:
        signal.signal(signal.SIGCHLD, before)
    return started


def _begin_worker(_: int) -> None:
    """Prepare a reading process: it outlives a signal to the whole group, after which the run saves.

    A second SIGTERM ends it: that is how Python ends what is left of its processes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    serial_tokenizers()
    torch.set_num_threads(1)
