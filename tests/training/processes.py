"""Start the processes of one distributed run, as torchrun does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nsa_convert.training.run.parallel import can_shard

ROOT = Path(__file__).parents[2]
SHARDED = pytest.mark.skipif(not can_shard(), reason="this transformers trains no models that are cut")

PLAIN = ("moba", "infllm_v2-coarse", "streaming")
"""Methods beside NSA and SSA that tensor parallel knows; their loss is the distance to dense attention."""


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def launch(words: list[str], count: int, timeout: float = 400, *, torchrun: bool = True) -> None:
    """Run ``python WORDS`` in ``count`` processes that find each other; all of them have to succeed.

    Without ``torchrun`` they are not told of each other: one process runs as it does by itself.
    """
    port, processes = str(free_port()), []
    for rank in range(count):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        if torchrun:
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        command = [sys.executable, *words]
        processes.append(subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=timeout)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, "\n".join(errors)[-4000:]
