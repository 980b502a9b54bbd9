"""One flipped bit anywhere in a converted folder, its manifest included, and `verify` says so."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nsa_convert.checkpoint.manifest import MANIFEST
from nsa_convert.errors import CheckpointError
from nsa_convert.verification import verify_checkpoint
from tests.faults.checks import converted


def found(out: Path, path: Path, byte: int, bit: int) -> bool:
    """Flip one bit of a file, verify the folder, and flip it back."""
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[byte] ^= 1 << bit
    path.write_bytes(bytes(damaged))
    try:
        checks = verify_checkpoint(out).checks
        files = checks[0]
        # A flip in the manifest itself shows as a difference of the file whose line it hit.
        return files.ok is False and (path.name in files.detail or path.name == MANIFEST)
    except CheckpointError as error:
        return path.name == MANIFEST and error.code in {"SV17", "CF18", "CF19"}
    finally:
        path.write_bytes(content)


def flips(out: Path, count: int, seed: int):
    """Draw places: half of them by file, half by byte, so that small and large files have their share."""
    draw = random.Random(seed)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    for number in range(count):
        weights = sizes if number % 2 else None
        path = draw.choices(files, weights)[0]
        yield path, draw.randrange(path.stat().st_size), draw.randrange(8)


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_ck29_every_flipped_bit_is_found(source, count):
    out, _ = converted(source, "--copy")
    missed = [place for place in flips(out, count, seed=count) if not found(out, *place)]
    assert missed == []


def test_ck29_every_bit_of_the_manifest_counts(source):
    """The manifest is the one file whose hash is written nowhere: all bits of its first and last lines."""
    out, _ = converted(source, "--copy")
    path = out / MANIFEST
    size = path.stat().st_size
    places = [*range(40), *range(size - 20, size)]
    missed = [(byte, bit) for byte in places for bit in range(8) if not _refused(out, path, byte, bit)]
    assert missed == []


def _refused(out: Path, path: Path, byte: int, bit: int) -> bool:
    from nsa_convert.checkpoint.manifest import check_manifest

    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[byte] ^= 1 << bit
    path.write_bytes(bytes(damaged))
    try:
        return bool(check_manifest(out))
    except CheckpointError:
        return True
    finally:
        path.write_bytes(content)
