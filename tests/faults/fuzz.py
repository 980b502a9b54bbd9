"""``make fuzz``: damaged checkpoints and recipes into ``inspect`` and ``convert --dry-run``, for a while.

The same property as in test_mutations.py, with another seed for every batch.
"""

from __future__ import annotations

import argparse
import collections
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.faults.checks import python
from tests.faults.mutations import check_mutation, mutations, pristine_files

BATCH, MEMORY_MB = 500, 500


def fuzz(source: Path, *, examples: int, seed: int) -> collections.Counter[str]:
    """Try ``examples`` damaged versions of a checkpoint; return how often each command ended how.

    Raises:
        AssertionError: One of them broke the rules; hypothesis has reduced it to a small one.
    """
    pristine = pristine_files(source)
    tally: collections.Counter[str] = collections.Counter()

    def attempt(files: dict[str, bytes]) -> None:
        inspected, converted = check_mutation(source, files, pristine)
        tally.update([f"inspect {inspected}", f"convert {converted}"])

    run: Any = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )(_seeded(seed, given(files=mutations(pristine))(attempt)))
    run()
    return tally


def _seeded(number: int, test: Any) -> Any:
    return seed(number)(test)


def main() -> None:
    """Fuzz until the examples or the seconds are used up, and say what was seen."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    tally: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model"
        # In another process: making a model takes more memory than looking at one.
        assert python(f"from tests.checkpoints import *; write_dense(Path({str(source)!r}))").returncode == 0
        begin, batch = time.perf_counter(), 0
        while time.perf_counter() - begin < args.seconds and tally.total() // 2 < args.examples:
            count = min(BATCH, args.examples - tally.total() // 2)
            tally += fuzz(source, examples=count, seed=args.seed + batch)
            batch += 1
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024
    seconds = time.perf_counter() - begin
    print(
        f"{tally.total() // 2} damaged inputs in {seconds:.0f} s from seed {args.seed}, peak memory {peak} MB"
    )
    print(", ".join(f"{name}: {count}" for name, count in sorted(tally.items())))
    assert peak < MEMORY_MB, f"more than {MEMORY_MB} MB"


if __name__ == "__main__":
    main()
