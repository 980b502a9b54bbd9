"""Files of the Hub's cache against the hashes the Hub declared, which are the names of its blobs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from nsa_convert.checkpoint.scan import hash_file, run_threads
from nsa_convert.errors import CheckpointError

SHA256 = re.compile(r"[0-9a-f]{64}")
GIT_BLOB = re.compile(r"[0-9a-f]{40}")
Seen = Mapping[str, list[int]]


def check_snapshot(folder: Path, seen: Seen) -> dict[str, list[int]]:
    """Hash the files of a snapshot that were not hashed before.

    Args:
        folder: ``snapshots/<commit>``, whose files are symlinks to ``blobs/<hash>``.
        seen: Blob -> size and time of those found right earlier.

    Returns:
        The same for all blobs of the snapshot.

    Raises:
        CheckpointError: A file is not what the Hub declared (HB22); it is removed, to be fetched again.
    """
    # The files, the blobs they link to, and what tells whether a blob has changed.
    files = [path for path in sorted(folder.rglob("*")) if path.is_symlink() and path.is_file()]
    blobs = {path: path.resolve() for path in files}
    facts = {str(blob): [blob.stat().st_size, blob.stat().st_mtime_ns] for blob in blobs.values()}

    # Only what was not found right before, in this state, is read.
    new = [path for path, blob in blobs.items() if seen.get(str(blob)) != facts[str(blob)]]
    right = run_threads(lambda path: _is_right(blobs[path]), new)
    wrong = [path for path, good in zip(new, right, strict=True) if not good]

    for path in wrong:
        blobs[path].unlink()  # why: a download whose hash is wrong has to be fetched again
        path.unlink()

    if wrong:
        names = ", ".join(str(path.relative_to(folder)) for path in wrong[:5])
        raise CheckpointError(
            f"{len(wrong)} downloaded files are not what the Hub declared: {names}",
            code="HB22",
            where=str(folder),
            hint="they were removed from the cache; run the command again to fetch them anew",
        )

    return facts


def _is_right(blob: Path) -> bool:
    """Return whether a blob's bytes have the hash that is its name; true for names that are no hash."""
    # LFS files are named by their sha256, regular files by their git blob id.
    if SHA256.fullmatch(blob.name):
        return hash_file(blob) == blob.name
    if GIT_BLOB.fullmatch(blob.name):
        data = blob.read_bytes()
        head = b"blob %d\0" % len(data)
        return hashlib.sha1(head + data, usedforsecurity=False).hexdigest() == blob.name
    return True
