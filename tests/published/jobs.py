"""Command lines run one after another in one process, or in several that train together.

``python -m tests.published.jobs FOLDER`` reads ``FOLDER/jobs.json`` and works in FOLDER, as each of the
processes that torchrun would start; the first one writes ``FOLDER/done.json``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner

from nsa_convert.cli import main
from nsa_convert.training.run.control import CONTROL
from nsa_convert.training.run.trainer import StageTrainer
from tests.training.processes import launch


@dataclasses.dataclass(frozen=True)
class Job:
    """One command line.

    Attributes:
        words: What stands behind ``nsa-convert``.
        stop_in: Stage whose first step is interrupted by a SIGTERM, in one of the processes.
    """

    words: Sequence[str]
    stop_in: str | None = None


@dataclasses.dataclass(frozen=True)
class Done:
    """What a command did.

    Attributes:
        status: Exit status.
        output: What it printed.
        losses: ``(stage, step, loss)`` of every micro-batch of this process.
    """

    status: int
    output: str
    losses: list[tuple[str, int, float]]


@contextlib.contextmanager
def watched(stop_in: str | None) -> Iterator[list[tuple[str, int, float]]]:
    """Note the losses of all steps inside the block, and interrupt the first step of a stage."""
    before, losses = StageTrainer.training_step, []
    last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    waits = [last and stop_in is not None]

    def step(self: StageTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Stages of a control have the names of those they are compared with.
        folder = Path(self.args.output_dir)
        name = f"{CONTROL}/{folder.name}" if folder.parent.name == CONTROL else folder.name
        if waits[0] and name == stop_in:
            waits[0] = False  # a second signal would end the process at once
            os.kill(os.getpid(), signal.SIGTERM)
        loss = before(self, *args, **kwargs)
        losses.append((name, self.state.global_step, float(loss)))
        return loss

    StageTrainer.training_step = step
    try:
        yield losses
    finally:
        StageTrainer.training_step = before


def work(job: Job) -> Done:
    """Run a command line in this process."""
    with watched(job.stop_in) as losses:
        result = CliRunner().invoke(main, list(job.words))
    return Done(result.exit_code, result.output, losses)


def work_all(jobs: Sequence[Job], folder: Path, processes: int) -> list[Done]:
    """Run command lines in ``folder``, the current one already, by processes that train together."""
    if processes == 1:
        return [work(job) for job in jobs]
    (folder / "jobs.json").write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
    launch(["-m", "tests.published.jobs", str(folder)], processes)
    return [Done(**row) for row in json.loads((folder / "done.json").read_text())]


def _run() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    jobs = [Job(**row) for row in json.loads((folder / "jobs.json").read_text())]
    os.chdir(folder)
    done = [dataclasses.asdict(work(job)) for job in jobs]
    if os.environ["RANK"] == "0":
        Path("done.json").write_text(json.dumps(done))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _run()
