"""Kill training at random instants: ``python -m tests.faults.kill_training --kills 100``.

A run is resumed after every kill, and killed again, until it comes to its end; its losses and its weights
must then be those of a run that nobody touched, to the bit.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from pathlib import Path

import torch

from tests.faults.kills import Tally, run_and_kill
from tests.faults.runs import train
from tests.training.recipes import NSA, losses, same_weights, stage

STEPS = 8
ALIGN = stage("align", kind="align", train="new", tokens=64 * 3, save_every=1)
PRETRAIN = stage(tokens=64 * STEPS, save_every=1, micro_batch=2)


def one_run(out: Path) -> None:
    """Train two stages with a checkpoint after every step, or go on with them."""
    train(out, NSA, ALIGN, PRETRAIN, resume=(out / "resolved_recipe.yaml").is_file())


def kill_runs(work: Path, *, kills: int, seed: int) -> Tally:
    """Kill runs until ``kills`` were hit and the last one has ended."""
    torch.set_num_threads(1)  # a forked child must not wait for threads that only its parent has
    tally, draw = Tally(), random.Random(seed)
    work.mkdir()
    one_run(work / "whole")
    begin = time.perf_counter()
    one_run(work / "again")
    span = time.perf_counter() - begin
    while tally.killed < kills:
        out = work / "run"
        shutil.rmtree(out, ignore_errors=True)
        while run_and_kill(lambda out=out: one_run(out), draw.uniform(0, 0.6 * span)):
            tally.killed += 1
            tally.left[_state(out)] += 1
        tally.finished += 1
        if losses(out) != losses(work / "whole"):
            tally.lost.append(f"run {tally.finished}: the losses differ")
        for name in ("align", "pretrain"):
            if not same_weights(out / name, work / "whole" / name):
                tally.lost.append(f"run {tally.finished}: the weights of {name} differ")
    return tally


def _state(out: Path) -> str:
    """Return how far a killed run had come."""
    name = "pretrain" if (out / "align" / "model").is_dir() else "align"
    saving = ", while saving" if (out / name / ".saving").exists() else ""
    steps = [int(path.name.rpartition("-")[2]) for path in (out / name).glob("checkpoint-*")]
    return f"{name}, checkpoint of step {max(steps, default=0)}{saving}"


def main() -> None:
    """Kill tiny runs and print the tally."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tally = kill_runs(Path(folder) / "work", kills=args.kills, seed=args.seed)
    print(f"{tally.killed} kills in {tally.finished} runs, {time.perf_counter() - begin:.0f} s")
    print(*(f"  {count:4} {state}" for state, count in sorted(tally.left.items())), sep="\n")
    print("lost:", tally.lost or "none")


if __name__ == "__main__":
    main()
