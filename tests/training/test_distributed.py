"""Two processes on gloo compute what one process does: FSDP2, tensor parallel, context parallel."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import NSA, SSA, trained_model

ROOT = Path(__file__).parents[2]
METHODS = {
    "nsa": {**NSA, "key_compressor": "linear", "value_compressor": "weighted"},
    "ssa": {**SSA, "gate": "signed"},
}
CHECKS = [f"{kind} {method}" for kind in ("fsdp", "tensor", "context") for method in METHODS]
LIMIT = 1e-5


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("models")
    for method, settings in METHODS.items():
        trained_model("qwen3", settings, initializer_range=0.1).save_pretrained(folder / method)
    port = str(free_port())
    processes = []
    for rank in range(2):
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
        }
        command = [sys.executable, "-m", "tests.training.worker", str(folder)]
        processes.append(subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=400)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)[-4000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes_equal_one(result, check):
    assert {name: value for name, value in result[check].items() if not value < LIMIT} == {}


def test_all_processes_draw_the_same_streams(result):
    assert result["streams"]["differs"] == 0
