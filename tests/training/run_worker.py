"""One of several processes that train recipes one after another.

``python -m tests.training.run_worker FOLDER`` reads ``FOLDER/jobs.json``, a list of ``{"recipe", "stop_at",
"resume"}``. A run that is to stop ends by a SIGTERM that only the last process gets.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
import transformers

from nsa_convert.training.recipe.schema import recipe_from_dict
from nsa_convert.training.run.parallel import world_size
from nsa_convert.training.run.runner import Interrupted, train_recipe
from nsa_convert.training.run.trainer import StageTrainer

ROOT = Path(__file__).parents[2]


def stop_after(step: int | None) -> None:
    """Let the last process get a SIGTERM while it does the step after this one of a stage ``pretrain``."""
    before, waits = StageTrainer.training_step, [int(os.environ.get("RANK", 0)) == world_size() - 1]

    def step_and_stop(self: StageTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        if waits[0] and self.stage.name == "pretrain" and self.state.global_step == step:
            waits[0] = False  # a second signal would end the process at once
            os.kill(os.getpid(), signal.SIGTERM)
        return before(self, *args, **kwargs)

    StageTrainer.training_step = step_and_stop


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    original = StageTrainer.training_step
    for job in json.loads((Path(sys.argv[1]) / "jobs.json").read_text()):
        stop_after(job["stop_at"])
        expected = contextlib.suppress(Interrupted) if job["stop_at"] else contextlib.nullcontext()
        with expected:
            train_recipe(recipe_from_dict(job["recipe"]), None, base=ROOT, resume=job["resume"])
        StageTrainer.training_step = original
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
