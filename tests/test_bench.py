"""The bench function: what it measures, what it refuses, and that it checks before it times."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from nsa_convert import bench
from nsa_convert.errors import CheckFailedError, ConfigError
from nsa_convert.kernels import current_backend


def test_report(tmp_path: Path) -> None:
    report = bench.run_bench("4/2/16", lengths=(256,), repeats=1, dtype="float32")
    names = {(row.phase, row.name) for row in report.rows}
    for phase in ("prefill", "decode"):
        assert {(phase, "nsa"), (phase, "ssa"), (phase, "nsa: window")} <= names
        rows = [row for row in report.rows if row.phase == phase]
        best = max(row.speedup for row in rows if row.name.startswith(bench.DENSE))
        assert best == 1.0
    assert "| decode | 256 | nsa |" in report.to_table()
    report.write_csv(tmp_path / "x.csv")
    with (tmp_path / "x.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(report.rows)
    assert lines[0]["torch"] == torch.__version__
    assert report.to_dict()["geometry"] == "4/2/16"


@pytest.mark.parametrize(
    "settings",
    [{"geometry": "4/2"}, {"geometry": "4/3/16"}, {"dtype": "int8"}, {"lengths": ()}, {"lengths": (64,)}],
)
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(ConfigError) as caught:
        bench.run_bench(**settings)
    assert caught.value.code != "CF13"  # that one is for unknown keys


def test_wrong_numbers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench.sparse_attention

    def broken(*args: object, **kwargs: object):
        o, lse = real(*args, **kwargs)
        return (o if current_backend() == "reference" else o + 0.1), lse

    monkeypatch.setattr(bench, "sparse_attention", broken)
    with pytest.raises(CheckFailedError, match="differs from the reference"):
        bench.run_bench("4/2/16", lengths=(256,), repeats=1)


def test_drifting_inputs_select_alike() -> None:
    x = bench.OpInputs.drifting(bench.parse_geometry("4/2/16"), 2048, torch.float32, "cpu")
    near = torch.nn.functional.cosine_similarity(x.q[0, 1:], x.q[0, :-1], dim=-1).mean()
    far = torch.nn.functional.cosine_similarity(x.q[0, 1024:], x.q[0, :1024], dim=-1).mean()
    assert near > 0.5 > far.abs()


def test_a_check_comes_before_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = bench.self_test
    small = {"length": 40, "dim": 16, "groups": (2,), "half": "float32", "layouts": (), "dtypes": ()}
    monkeypatch.setattr(bench, "self_test", lambda device: asked.append(device) or real(device, **small))
    report = bench.run_bench("4/2/16", lengths=(128,), repeats=1, dtype="float32", check=True)
    assert asked == ["cpu"]
    assert report.to_dict()["checks"][0]["op"] == "selected blocks"
    assert report.to_table().startswith("| op | backend |")
