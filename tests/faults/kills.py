"""Kill a command at random instants: ``python -m tests.faults.kills convert --kills 100``.

Each attempt runs in a forked process, so that starting Python takes no part of the time it can be hit in.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nsa_convert.checkpoint.manifest import MANIFEST, check_manifest
from nsa_convert.convert import convert_checkpoint
from nsa_convert.evaluation.suites.finished_cells import CELLS
from nsa_convert.evaluation.suites.long import run_long
from tests.checkpoints import tree_hash, write_dense
from tests.evaluation.tiny import save_pair
from tests.test_convert import NSA


@dataclasses.dataclass
class Tally:
    """What became of the attempts.

    Attributes:
        killed: Attempts that were still running when the signal came.
        finished: Attempts that were faster than the signal.
        left: What the kills left -> how often.
        lost: What was wrong afterwards; empty when all is well.
    """

    killed: int = 0
    finished: int = 0
    left: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    lost: list[str] = dataclasses.field(default_factory=list)


def run_and_kill(work: Callable[[], object], delay: float) -> bool:
    """Run ``work`` in a child and SIGKILL it after ``delay`` seconds; return whether it was still running."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    end = time.perf_counter() + delay
    while time.perf_counter() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise AssertionError(f"the attempt failed by itself, status {status}")
            return False
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kill_conversions(source: Path, work: Path, *, kills: int, seed: int) -> Tally:
    """Kill conversions, every second one over an older OUT, until ``kills`` were hit.

    After each kill OUT must be absent or complete, and complete again after the next run, with nothing of
    ours beside it; the source must never change.
    """
    tally, draw = Tally(), random.Random(seed)
    work.mkdir()
    out, before = work / "out", tree_hash(source)
    convert_checkpoint(source, out, NSA, copy=True)
    begin = time.perf_counter()
    convert_checkpoint(source, out, NSA, copy=True, overwrite=True)
    span, expected = time.perf_counter() - begin, _content(out)
    while tally.killed < kills:
        over = tally.killed % 2 == 1
        if not over:
            shutil.rmtree(out, ignore_errors=True)
        hit = run_and_kill(
            lambda over=over: convert_checkpoint(source, out, NSA, copy=True, overwrite=over),
            draw.uniform(0, 1.05 * span),
        )
        tally.killed += hit
        tally.finished += not hit
        tally.left[_state(work, out)] += hit
        if out.exists() and (check_manifest(out) or _content(out) != expected):
            tally.lost.append(f"attempt {tally.killed}: OUT is incomplete: {check_manifest(out)[:3]}")
        begin = time.perf_counter()
        convert_checkpoint(source, out, NSA, copy=True, overwrite=out.exists())
        span = min(span, time.perf_counter() - begin)
        if (
            check_manifest(out)
            or _content(out) != expected
            or [path.name for path in work.iterdir()] != ["out"]
        ):
            tally.lost.append(f"attempt {tally.killed}: the next run did not put things right")
        if tree_hash(source) != before:
            tally.lost.append(f"attempt {tally.killed}: the source changed")
    return tally


SUITE: dict[str, Any] = {
    "length": 60,
    "lengths": [700],
    "depths": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8],
    "task_lengths": [1024],
    "tasks": ["recall", "vt"],
}
RESULTS = ("texts", "needles", "tasks")
"""What an evaluation measures, times left out."""


def kill_evaluations(model: Path, work: Path, *, kills: int, seed: int) -> Tally:
    """Kill evaluations that resume from their folder, until ``kills`` were hit.

    After each kill no finished cell may be lost and the report must be absent or complete; an evaluation that
    was killed and resumed must measure exactly what one in a single run does.
    """
    tally, draw, out = Tally(), random.Random(seed), work / "out"
    run_long(model, out_dir=work / "warm", **SUITE)
    begin = time.perf_counter()
    expected = run_long(model, out_dir=work / "whole", **SUITE).values
    span, before, cells = time.perf_counter() - begin, tree_hash(model), 0
    while tally.killed < kills:
        # Most of a run draws plots; the early instants, where cells are computed, get more of the kills.
        delay = span * draw.random() ** 2 if cells < expected["cells"]["total"] else 10 * span
        hit = run_and_kill(lambda: run_long(model, out_dir=out, **SUITE), delay)
        tally.killed += hit
        tally.finished += not hit
        kept = _finished_cells(out)
        tally.left[f"{kept} cells"] += hit
        if kept < cells:
            tally.lost.append(f"attempt {tally.killed}: {cells - kept} finished cells are gone")
        report = out / "report.json"
        if report.exists() and any(json.loads(report.read_text())[key] != expected[key] for key in RESULTS):
            tally.lost.append(f"attempt {tally.killed}: the report differs from that of a single run")
        cells = kept
        if not hit:
            if not report.exists():
                tally.lost.append(f"attempt {tally.killed}: no report at the end")
            shutil.rmtree(out)
            cells = 0
    if tree_hash(model) != before:
        tally.lost.append("the model changed")
    return tally


def _finished_cells(out: Path) -> int:
    lines = (out / CELLS).read_bytes().split(b"\n")[:-1] if (out / CELLS).exists() else []
    return sum(isinstance(json.loads(line), dict) for line in lines)


def _content(out: Path) -> dict[str, str]:
    """Return the hashes of the files that depend on the source and the plan alone.

    The code files follow the checkout, which somebody may be editing; the manifest has their hashes.
    """
    hashes = tree_hash(out)
    return {name: digest for name, digest in hashes.items() if not name.endswith((".py", MANIFEST))}


def _state(work: Path, out: Path) -> str:
    """Return how far a killed conversion had come."""
    staging = next(work.glob(".nsa-staging-*"), None)
    if staging is None:
        return "no staging folder, " + ("OUT complete" if out.exists() else "OUT absent")
    if (staging / MANIFEST).exists():
        return "staging complete, OUT " + ("old" if out.exists() else "absent")
    return f"staging with {'weights' if list(staging.glob('*.safetensors')) else 'nothing'}"


def main() -> None:
    """Kill what was asked for, on a tiny model, and print the tally."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["convert", "eval"])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        if args.what == "convert":
            model, kill = write_dense(Path(folder) / "model"), kill_conversions
        else:
            model, kill = save_pair(Path(folder))[1], kill_evaluations
        begin = time.perf_counter()
        tally = kill(model, work, kills=args.kills, seed=args.seed)
        print(f"{tally.killed} killed, {tally.finished} too fast, {time.perf_counter() - begin:.0f} s")
        print(*(f"  {count:4} {state}" for state, count in tally.left.most_common()), sep="\n")
        print("lost:", tally.lost or "none")


if __name__ == "__main__":
    main()
