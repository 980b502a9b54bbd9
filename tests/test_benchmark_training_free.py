"""benchmarks/training_free.py on a tiny model: densities counted, budgets searched, resumed."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from benchmarks import training_free
from tests.evaluation.tiny import save, tiny_dense

LENGTH, PROMPT = 600, 344


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    return save(tiny_dense().float(), folder / "model")


def run(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    words = ["--model", model, "--out", out, "--length", LENGTH, "--budget", 128, "--needles", 500]
    words += ["--texts", "prose", "--methods", "streaming,quest,xattention", "--dtype", "float32"]
    words += ["--csv", out / "rows.csv", "--plot", out / "plot.png"]
    monkeypatch.setattr(sys, "argv", ["training_free", *map(str, words)])
    training_free.main()
    with (out / "rows.csv").open() as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {row["method"]: row for row in rows}


def test_rows(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(model, tmp_path, monkeypatch)
    assert list(rows) == ["dense", "streaming", "quest", "xattention"]
    density = {m: [float(row[f"density_{k}"]) for k in ("prompt", "steps")] for m, row in rows.items()}
    assert density["dense"] == [1, 1]
    # 128 keys a query, from the 129th query on; the steps come after 344 .. 599 tokens.
    pairs = sum(min(t, 128) for t in range(1, PROMPT + 1)) / (PROMPT * (PROMPT + 1) / 2)
    steps = 256 * 128 / sum(range(PROMPT + 1, LENGTH + 1))
    assert density["streaming"] == pytest.approx([pairs, steps], rel=1e-3)
    assert density["quest"][0] == 1
    assert density["quest"][1] == pytest.approx(steps, rel=0.1)
    assert pairs < density["xattention"][0] < 0.85  # the first of three blocks and the own are always kept
    assert density["xattention"][1] == 1
    assert [rows[m]["causal"] for m in rows] == ["True", "True", "True", "False"]
    assert float(rows["streaming"]["cache_mib_500"]) < 0.5 * float(rows["quest"]["cache_mib_500"])
    assert (tmp_path / "plot.png").stat().st_size > 1000
    monkeypatch.setattr(training_free, "measure", lambda *args: pytest.fail("measured again"))
    again = run(model, tmp_path, monkeypatch)
    assert again == rows
