"""One of two processes of tests/training/test_optimizer_states.py.

``python -m tests.training.state_worker FOLDER`` cuts a model (FSDP2), loads the optimizer's state that one
process wrote to ``FOLDER/one``, and writes that of both to ``FOLDER/two``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from nsa_convert.training.run.optimizer import MasterAdamW
from nsa_convert.training.run.optimizer_states import load_optimizer, save_optimizer
from tests.training.test_optimizer_states import small_model


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    model = fully_shard(small_model())
    optimizer = MasterAdamW(model.parameters())
    load_optimizer(model, optimizer, folder / "one")

    # Every moment and master is cut as its weight is.
    for p, state in optimizer.state.items():
        assert {state[key].placements for key in state if key != "step"} == {p.placements}
    save_optimizer(model, optimizer, folder / "two")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
