"""A whole small run of benchmarks/train_step.py."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from benchmarks import train_step
from nsa_convert.methods.parts.registry import METHODS


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--lengths", "80", "--steps", "1", "--rounds", "1", "--precision", "fp32"]
    monkeypatch.setattr(sys, "argv", ["train_step", *words, "--csv", str(tmp_path / "x.csv")])
    train_step.main()
    with (tmp_path / "x.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["dense", *train_step.METHODS]
    assert all(float(row["median_ms"]) > 0 and row["commit"] and row["model"] == "tiny" for row in rows)


def test_every_method_that_trains_something_new_is_measured() -> None:
    learning = {name for name, method in METHODS.items() if method.spec.trainable}
    assert set(train_step.METHODS) == learning - {"streaming"}  # no parameter and no loss of its own
