"""The search of benchmarks/prefill_methods.py, and a whole small run."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import prefill_methods
from nsa_convert import bench


@pytest.mark.parametrize("search", prefill_methods.SEARCHES, ids=lambda search: search.method)
def test_the_density_found_is_what_the_masks_hold(search: prefill_methods.Search) -> None:
    sizes = bench.parse_geometry("4/2/16")
    x = prefill_methods.inputs_of(bench.OpInputs.drifting(sizes, 1531, torch.float32, "cpu"))
    layer, density, settings = prefill_methods.find(search, sizes, x, 0.5)
    masks = [p.to_dense_mask(1531, 1531, 4, x.layout) for p in layer.patterns(x).values()]
    assert sum(m.sum().item() for m in masks) / (4 * 1531 * 1532 / 2) == pytest.approx(density, abs=1e-6)
    assert 0.4 < density < 0.75, settings


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--geometry", "4/2/16", "--length", "700", "--repeats", "1", "--csv", str(tmp_path / "x.csv")]
    monkeypatch.setattr(sys, "argv", ["prefill_methods", *words])
    prefill_methods.main()
    with (tmp_path / "x.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"].split()[0] for row in rows] == [
        "dense:",
        "dense:",
        *(search.method for search in prefill_methods.SEARCHES),
    ]
    assert all(float(row["speedup"]) > 0 and row["commit"] and row["date"] for row in rows)
