"""Lay transformers' own test files beside our suite: python -m tests.hf.fetch FOLDER [TESTS]

They come from the source distribution of the version that constraints.txt pins, downloaded by name from
the package index. It holds ``tests/test_*.py`` alone: the mixins of the sub-folders, generation and
export, are not in it, and stay empty unless TESTS names the ``tests`` folder of a checkout of that
version.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

PACKAGE = "transformers_tests"
"""Name under which the files are imported; ``tests`` is this project's."""
SUB_FOLDERS = {
    "generation/test_utils.py": "GenerationTesterMixin",
    "exporters/test_export.py": "ExportTesterMixin",
}
"""What tests/test_modeling_common.py imports from files that no source distribution has."""


def version() -> str:
    lines = Path("constraints.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith("transformers=="))


def unpack(folder: Path) -> None:
    """Put the test files of the source distribution into ``folder``."""
    pin = f"transformers=={version()}"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "transformers"]

    subprocess.run([*pip, "-d", str(folder.parent), pin], check=True)

    # Only the files tests/*.py, without their folder.
    with tarfile.open(folder.parent / f"transformers-{version()}.tar.gz") as archive:
        for member in archive.getmembers():
            path = Path(member.name)
            if member.isfile() and path.parts[1:2] == ("tests",) and len(path.parts) == 3:
                (folder / path.name).write_bytes(archive.extractfile(member).read())


def fetch(base: Path, tests: Path | None) -> None:
    folder = base / PACKAGE
    shutil.rmtree(folder, ignore_errors=True)

    if tests is not None:
        shutil.copytree(tests, folder)
    else:
        folder.mkdir(parents=True)
        unpack(folder)

    # A mixin that is missing is replaced by an empty class.
    for name, mixin in SUB_FOLDERS.items():
        file = folder / name
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"class {mixin}:\n    absent = True\n")
            print(f"{mixin} is not in the source distribution: its tests do not run (see HF_TESTS)")


if __name__ == "__main__":
    fetch(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
