"""What ``hf download --local-dir`` notes of each file it fetches: the revision, and the hash of its bytes.

The notes tell shards of two models apart that agree in every name, shape and dtype. A folder that nobody
downloaded that way has none, and such shards cannot be told apart in it.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from nsa_convert.checkpoint.problems import Problems
from nsa_convert.errors import CheckpointError

FOLDER = ".cache/huggingface/download"
_NOTE = re.compile(r"([0-9a-f]{40})\n([0-9a-f]{64})\n([0-9]+\.?[0-9]*)\n?")
_NOTE_BYTES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownloadNote:
    """What is noted of one file.

    Attributes:
        revision: Commit on the Hub.
        sha256: Of the file when it was fetched.
        fresh: Whether the file was not changed after the download, give or take a second.
    """

    revision: str
    sha256: str
    fresh: bool


def read_note(folder: Path, name: str) -> DownloadNote | None:
    """Return the note of a file, None where there is none with a sha256."""
    note = f"{name}.metadata"
    if len(os.fsencode(note)) > 255:  # no file system has such a name
        return None

    path = folder.resolve() / FOLDER / note
    if path.resolve() != path or not path.is_file() or path.stat().st_size > _NOTE_BYTES:
        return None

    match = _NOTE.fullmatch(path.read_text(encoding="utf-8", errors="replace"))
    if match is None:
        return None

    fresh = (folder / name).stat().st_mtime - 1 <= float(match[3])
    return DownloadNote(revision=match[1], sha256=match[2], fresh=fresh)


def compare_revisions(folder: Path, names: Sequence[str], problems: Problems) -> None:
    """Report weight files that were fetched at different revisions, and not touched since."""
    notes = {name: note for name in names if (note := read_note(folder, name)) and note.fresh}

    # The first file of each revision stands for it in the message.
    first = {note.revision: name for name, note in reversed(notes.items())}
    if len(first) > 1:
        places = ", ".join(f"{name} at {revision[:12]}" for revision, name in sorted(first.items()))
        problems.add(
            f"the weight files were downloaded at different revisions: {places}",
            code="CK30",
            where=str(folder),
            expected="one revision",
            found=f"{len(first)} revisions",
            hint="an update was interrupted: run `hf download` with --local-dir again",
        )


def compare_hashes(folder: Path, hashes: Mapping[str, str]) -> list[str]:
    """Compare the weight files with the hashes of their download.

    Args:
        folder: Of the source.
        hashes: Name -> sha256 of each of its weight files.

    Returns:
        Warnings: all files were rewritten since, or one came from elsewhere.

    Raises:
        CheckpointError: Some files are the downloaded ones and others are not.
    """
    notes = {name: note for name in hashes if (note := read_note(folder, name))}
    wrong = [name for name, note in notes.items() if note.sha256 != hashes[name]]
    unknown = sorted(hashes.keys() - notes.keys())

    if wrong and len(wrong) < len(notes):
        raise CheckpointError(
            f"not the files that were downloaded with the others: {', '.join(wrong[:5])}",
            code="CK30",
            where=wrong[0],
            expected=f"sha256 {notes[wrong[0]].sha256}",
            found=f"sha256 {hashes[wrong[0]]}",
            hint="remove them and download again; if you changed them, remove .cache in the folder",
        )

    # All of them changed: the model was saved anew, which is no damage.
    if wrong:
        return ["the weight files were changed after they were downloaded (CK30)"]
    if notes and unknown:
        return [f"not downloaded with the other weight files: {', '.join(unknown[:5])} (CK30)"]
    return []
