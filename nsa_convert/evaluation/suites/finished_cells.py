"""Results of the finished parts of a long evaluation, kept so that a run that was killed can continue."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nsa_convert.errors import MachineError

CELLS = "cells.jsonl"
"""Name of the file with the finished parts."""


class CellStore:
    """Finished results by name, kept in a file with one line each, or only in memory.

    A line is written whole and flushed to disk before the next result is computed. A last line that was cut
    off is removed. Results of another run (other model files, settings or texts) are not used: a hash of the
    run's facts is part of every line.

    Args:
        folder: Folder of the file; None keeps the results in memory.
        facts: Everything that the results depend on.
    """

    def __init__(self, folder: Path | None, facts: Mapping[str, Any]) -> None:
        self.run = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.values: dict[str, Any] = {}
        self.reused = 0
        self.path = None if folder is None else folder / CELLS
        if self.path is not None and self.path.is_file():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        """Read the results of this run from the file, without a last line that was cut off."""
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]

        if len(whole) < len(data):
            # why: a line cut off by a kill goes, so that the next one starts a line
            with path.open("r+b") as file:
                file.truncate(len(whole))

        # Lines of other runs stay in the file and are skipped.
        for line in whole.decode("utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                if row["run"] == self.run:
                    self.values[row["cell"]] = row["value"]
            except (ValueError, KeyError, TypeError):  # why: a damaged line is a cell that was not finished
                continue

    def get(self, name: str, work: Callable[[], Any]) -> Any:
        """Return a result; it is computed and kept if it is not there yet.

        Args:
            name: Name of the result.
            work: Computes it; returns a JSON value.

        Raises:
            MachineError: The file cannot be written (SV03).
        """
        if name in self.values:
            self.reused += 1
            return self.values[name]

        # Through JSON, so that it is the same whether it was computed or read.
        value = json.loads(json.dumps(work()))
        self.values[name] = value
        if self.path is not None:
            self._append({"run": self.run, "cell": name, "value": value})
        return value

    def _append(self, row: Mapping[str, Any]) -> None:
        """Add one line to the file and flush it to disk."""
        assert self.path is not None
        try:
            # why: one synced line for each finished cell, so that a kill loses none
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise MachineError(
                f"cannot write {self.path}: {error.strerror}", code="SV03", where=str(self.path)
            ) from error
