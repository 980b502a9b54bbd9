"""Read weight files once, in pieces: hash them, look for values that are not finite, copy them on the way.

Memory is one buffer per thread. hashlib and NumPy release the interpreter lock, so shards run side by side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nsa_convert.checkpoint.headers import ShardHeader, TensorEntry
from nsa_convert.checkpoint.shards import Shard
from nsa_convert.errors import CheckpointError

CHUNK_BYTES = 1 << 20
LARGE_WEIGHT = 1e4

_SHA256 = re.compile(r"[0-9a-f]{64}")

# dtype -> (integer of the same width, mask without the sign, the pattern of infinity)
_LAYOUT: dict[str, tuple[type, int, int]] = {
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "F32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
    "F64": (np.uint64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardScan:
    """What reading one shard showed.

    Attributes:
        name: File name.
        sha256: Hash of the file.
        bytes: Its size.
        warnings: Suspicious tensors.
    """

    name: str
    sha256: str
    bytes: int
    warnings: tuple[str, ...]


class TensorScan:
    """Check the values of one tensor as its bytes arrive in consecutive pieces."""

    def __init__(self, entry: TensorEntry) -> None:
        self.entry = entry
        self.layout = _LAYOUT.get(entry.dtype)
        self.seen = 0
        self.largest = 0
        self.constant = True
        self.first_value: int | None = None
        self.not_finite = 0
        self.first_bad: int | None = None

    def feed(self, piece: np.ndarray, scratch: np.ndarray) -> None:
        """Look at the next bytes; ``piece`` and ``scratch`` are uint8, the piece holds whole elements."""
        if self.layout is None:
            return

        kind, mask, infinity = self.layout
        whole = piece[: piece.size - piece.size % np.dtype(kind).itemsize]
        values: np.ndarray = whole.view(kind)
        if not values.size:
            return

        # Without the sign the bit patterns of floats sort like their values; NaN lies above infinity.
        magnitude = np.bitwise_and(values, kind(mask), out=scratch[: whole.size].view(kind))

        if self.constant:
            self.first_value = int(values[0]) if self.first_value is None else self.first_value
            self.constant = bool((values == self.first_value).all())

        # Where the first bad value lies is kept for the message.
        largest = int(magnitude.max())
        if largest >= infinity:
            bad = np.flatnonzero(magnitude >= infinity)
            self.not_finite += bad.size
            if self.first_bad is None:
                self.first_bad = self.seen + int(bad[0])

        self.largest = max(self.largest, largest)
        self.seen += values.size

    def refuse_bad_values(self, shard: str) -> None:
        """Raise CheckpointError when a NaN or an infinity was seen."""
        if self.first_bad is None:
            return

        index = [int(i) for i in np.unravel_index(self.first_bad, self.entry.shape or (1,))]
        raise CheckpointError(
            f"tensor {self.entry.name} in {shard} has {self.not_finite:,} values that are not finite, "
            f"the first at {index}",
            code="CK27",
            where=f"{shard}: {self.entry.name}",
            expected="finite values",
            found=f"{self.not_finite} NaN or infinite",
            hint="the source model is damaged; fetch it again",
        )

    def warnings(self) -> list[str]:
        """Return what is suspicious about the tensor."""
        if len(self.entry.shape) < 2 or not self.seen:
            return []
        if self.largest == 0:
            return [f"tensor {self.entry.name} is all zero (CK28)"]
        if self.constant and self.seen > 1:
            return [f"tensor {self.entry.name} has the same value everywhere (CK28)"]
        if self.largest > magnitude_bits(LARGE_WEIGHT, self.entry.dtype):
            return [f"tensor {self.entry.name} has values above {LARGE_WEIGHT:g} (CK28)"]
        return []


def magnitude_bits(value: float, dtype: str) -> int:
    """Return the bit pattern of a positive number in a weight dtype."""
    if dtype == "BF16":
        return int(np.float32(value).view(np.uint32)) >> 16
    floats: dict[str, Any] = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
    return int(floats[dtype](value).view(_LAYOUT[dtype][0]))


class ShardReader:
    """Reads one file from front to end, hashing everything and copying it where a sink is given."""

    def __init__(self, file: FileIO, sink: BinaryIO | None) -> None:
        self.file = file
        self.sink = sink
        self.digest = hashlib.sha256()
        self.buffer = np.empty(CHUNK_BYTES, np.uint8)

    def pieces(self, length: int) -> Iterator[np.ndarray]:
        """Yield the next ``length`` bytes in pieces; the array is overwritten by the next piece."""
        while length and (count := _fill(self.file, self.buffer, length)):
            piece = self.buffer[:count]
            self.digest.update(piece.data)
            if self.sink is not None:
                self.sink.write(piece.data)
            length -= count
            yield piece


def scan_shard(shard: Shard, source: Path, copy_to: Path | None = None) -> ShardScan:
    """Hash one shard, check its values, and copy it when ``copy_to`` is given.

    Raises:
        CheckpointError: A value is not finite (CK27), or the file changed since its header was read (CK39).
    """
    header = shard.header
    scratch = np.empty(CHUNK_BYTES, np.uint8)
    warnings = []

    with source.open("rb", buffering=0) as file, _synced(copy_to) as sink:
        reader = ShardReader(file, sink)

        # The header again: it must be the one that was checked.
        for _ in reader.pieces(header.data_start):
            pass
        same = reader.digest.hexdigest() == header.digest

        # Tensor by tensor, in the order of their bytes.
        for entry in header.tensors if same else ():
            scan = TensorScan(entry)
            for piece in reader.pieces(entry.nbytes):
                scan.feed(piece, scratch)
            scan.refuse_bad_values(shard.name)
            warnings += scan.warnings()

        # Neither shorter nor longer than it was.
        if not same or file.tell() != header.file_bytes or file.read(1):
            raise CheckpointError(
                f"{shard.name} changed while it was read",
                code="CK39",
                where=shard.name,
                hint="something else writes to the source; run again when it is done",
            )

    _compare_with_blob_name(header.path, shard.name, reader.digest.hexdigest())
    return ShardScan(
        name=shard.name, sha256=reader.digest.hexdigest(), bytes=header.file_bytes, warnings=tuple(warnings)
    )


def _compare_with_blob_name(path: Path, name: str, digest: str) -> None:
    """Compare a weight file in the Hub's cache with its name there, which is its hash."""
    if path.parent.name == "blobs" and _SHA256.fullmatch(path.name) and path.name != digest:
        raise CheckpointError(
            f"{name} is not the file that was downloaded: its hash is not the one the Hub cache has for it",
            code="CK30",
            where=name,
            expected=f"sha256 {path.name}",
            found=f"sha256 {digest}",
            hint=f"remove {path} and download again",
        )


def hash_file(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tensors(header: ShardHeader) -> dict[str, str]:
    """Return tensor name -> sha256 over its dtype, shape and bytes."""
    return {entry.name: tensor_digest(header.path, entry) for entry in header.tensors}


def tensor_digest(path: Path, entry: TensorEntry) -> str:
    """Return the sha256 over dtype, shape and bytes of one tensor of a file."""
    digest = hashlib.sha256(f"{entry.dtype}{list(entry.shape)}".encode())
    buffer = np.empty(CHUNK_BYTES, np.uint8)
    left = entry.nbytes

    with path.open("rb", buffering=0) as file:
        file.seek(entry.start)
        while left and (count := _fill(file, buffer, left)):
            digest.update(buffer.data[:count])
            left -= count

    return digest.hexdigest()


def run_threads(work: Callable[[Any], Any], items: Sequence[Any], threads: int | None = None) -> list[Any]:
    """Return ``[work(item) for item in items]``, several at a time; the first error stops the rest."""
    count = min(len(items), threads or os.cpu_count() or 1)
    if count <= 1:
        return [work(item) for item in items]

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:  # why: the first error stops the other threads and is raised again
            pool.shutdown(cancel_futures=True)
            raise


def _fill(file: FileIO, buffer: np.ndarray, limit: int) -> int:
    """Read until the buffer (or ``limit`` bytes) is full or the file ends; return the count."""
    view = buffer.data[: min(limit, buffer.size)]
    count = 0
    while count < len(view) and (got := file.readinto(view[count:])):
        count += got
    return count


@contextlib.contextmanager
def _synced(path: Path | None) -> Iterator[BinaryIO | None]:
    """Open a file for writing and flush it to disk at the end; None gives None."""
    if path is None:
        yield None
        return
    with path.open("wb") as file:  # why: a copy of a shard, inside the staging folder of the caller
        yield file
        file.flush()
        os.fsync(file.fileno())
