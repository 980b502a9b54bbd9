"""benchmarks/training_free.py on a tiny model: densities counted, budgets searched, resumed."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import training_free
from nsa_convert.config import AttentionGeometry, LayerRule
from nsa_convert.methods.base import AttentionInputs, observe
from nsa_convert.methods.registry import build_method
from nsa_convert.patterns import SequenceLayout
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


def test_a_prompt_read_in_two_parts_counts_once() -> None:
    """Tri-shape: a band for the first 44 tokens, everything for the last 20; then a step that sees all."""
    geometry = AttentionGeometry(hidden_size=8, num_query_heads=1, num_kv_heads=1, head_dim=8)
    settings = {"num_sinks": 0, "window_size": 16, "num_last": 20}
    layer = build_method(LayerRule(method="tri_shape", settings=settings), geometry, 0)
    counted = training_free.Densities()
    with observe(counted.add):
        for new, offset in ((64, 0), (4, 64)):
            q, k = torch.randn(1, new, 1, 8), torch.randn(1, new + offset, 1, 8)
            layout = SequenceLayout(offset=offset)
            layer(AttentionInputs(q=q, k=k, v=k, hidden=q[..., 0], pooled={}, layout=layout, scale=1.0))
    pairs = sum(min(t, 16) for t in range(1, 45)) + sum(range(45, 65))
    assert counted.means() == pytest.approx({"density_prompt": pairs / 2080, "density_steps": 1.0})
