"""From measured heads to a converted hybrid, on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluation.tiny import save, tiny_dense

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_measured_heads_convert_at_a_fixed_density(tmp_path):
    source = save(tiny_dense().float(), tmp_path / "dense")
    profile, out = tmp_path / "heads.safetensors", tmp_path / "hybrid"
    run = [sys.executable, "-m", "nsa_convert.cli"]
    small = ["--set", "length=256", "--set", "block_size=8"]
    measured = subprocess.run(
        [*run, "inspect", str(source), "--measure", str(profile), *small, "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert measured.returncode == 0, measured.stderr
    assert json.loads(measured.stdout)["budgets"] == [24, 32, 64, 128]
    again = subprocess.run(
        [*run, "inspect", str(source), "--measure", str(profile), *small],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert again.returncode == 2
    assert "exists" in again.stderr
    converted = subprocess.run(
        [*run, "convert", str(source), str(out), "--profile", str(profile), "--density", "0.5", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert converted.returncode == 0, converted.stderr
    rules = json.loads((out / "config.json").read_text())["sparse_attention"]["rules"]
    assert {rule["method"] for rule in rules} <= {"ssa", "full"}
    assert any("heads" in rule or "layers" in rule for rule in rules)
