"""The job files for clusters, run as two nodes of one process each: they learn what one process learns.

A stand-in for the scheduler starts both nodes on this machine and sets the variables that a node gets.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.published.pages import ROOT
from tests.published.places import run_command, write_recipe
from tests.training.processes import free_port
from tests.training.recipes import losses

SLURM = ROOT / "examples" / "slurm.sbatch"
SKYPILOT = ROOT / "examples" / "skypilot.yaml"
SRUN = '"$@" & "$@" & wait -n && wait -n\n'
"""Starts the same command on both nodes; fails where one of them does."""
SCONTROL = 'test "$1 $2" = "show hostnames" && echo localhost && echo another\n'


def run_job(job: Path, *commands: str, **variables: str) -> None:
    """Run shell scripts side by side in the folder of a job, as its nodes."""
    shared = {
        "RECIPE": "RECIPE",
        "OUT": "nodes",
        "PORT": str(free_port()),
        "GPUS": "1",
        "PYTHONPATH": str(ROOT),
    }
    path = os.pathsep.join([str(job / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    nodes = []
    for rank, command in enumerate(commands):
        env = {**os.environ, **shared, **variables, "PATH": path, "SKYPILOT_NODE_RANK": str(rank)}
        nodes.append(
            subprocess.Popen(["bash", "-c", command], cwd=job, env=env, stderr=subprocess.PIPE, text=True)
        )
    errors = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0] * len(nodes), "\n".join(errors)[-6000:]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a recipe, a run of one process, and stand-ins for SLURM's commands."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    run_command(["nsa-convert", "train", "RECIPE", "--set", "out=one"])
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/bash\nset -e\n{text}")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def check(job: Path) -> None:
    pairs = list(zip(losses(job / "nodes"), losses(job / "one"), strict=True))
    assert [a[:2] for a, _ in pairs] == [b[:2] for _, b in pairs]
    assert max(abs(a[2] - b[2]) for a, b in pairs) < 1e-5


@pytest.mark.slow
def test_slurm(job: Path) -> None:
    given = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"}
    run_job(job, SLURM.read_text(), **given)
    check(job)

    # Submitted again it goes on, which here finds everything done.
    run_job(job, SLURM.read_text(), **given)
    check(job)


@pytest.mark.slow
def test_skypilot(job: Path) -> None:
    command = yaml.safe_load(SKYPILOT.read_text())["run"]
    given = {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "1",
        "SKYPILOT_NODE_IPS": "localhost\nother",
    }
    run_job(job, command, command, **given)
    check(job)


def test_every_job_file_is_run() -> None:
    found = {path for path in (ROOT / "examples").iterdir() if path.suffix != ".ipynb" and path.is_file()}
    assert found == {SLURM, SKYPILOT}


@pytest.mark.parametrize("path", [SLURM, SKYPILOT], ids=lambda path: path.name)
def test_a_job_file_names_itself(path: Path) -> None:
    assert f"examples/{path.name}" in path.read_text()
