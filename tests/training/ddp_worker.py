"""One process of a data-parallel run: ``python -m tests.training.ddp_worker FOLDER NAME...``.

transformers' Trainer trains each model; process 0 writes the trained weights. Where it is started alone it
reads what two processes read together.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from tests.models import VARIANTS
from tests.training.test_ordinary_trainers import start, trainer

transformers.logging.set_verbosity_error()


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    for name in names:
        args = {"gradient_checkpointing": True, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        # Plain descent: Adam makes a whole step of a gradient that is nothing but rounding.
        args |= {"optim": "sgd", "learning_rate": 0.1}
        run = trainer(start(VARIANTS[name]), folder / name, 3, **args)
        run.args.per_device_train_batch_size = 2 // run.args.world_size
        run._train_batch_size = run.args.train_batch_size
        run.train()
        if run.args.process_index == 0:
            weights = run.accelerator.unwrap_model(run.model).state_dict()
            kind = "shared" if run.args.world_size > 1 else "alone"
            save_file({k: x.contiguous() for k, x in weights.items()}, folder / f"{name}.{kind}.safetensors")


if __name__ == "__main__":
    main()
