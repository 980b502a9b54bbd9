"""The whole path of benchmarks/gpu.py with small sizes, on the torch backend."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_cases import Case, decode_cases, forward_cases
from nsa_convert import bench
from nsa_convert.errors import CheckFailedError
from nsa_convert.kernels.selftest import self_test

PLAN = (("4/2/16", (1024,)),)
LIMITS = gpu.Limits(bytes_per_s=1e9, flops_per_s=1e12)


@pytest.fixture
def small_check(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"length": 40, "dim": 16, "groups": (2,), "layouts": (), "dtypes": ()}
    monkeypatch.setattr(gpu, "self_test", lambda device: self_test(device, half="float32", **small))
    monkeypatch.setattr(gpu, "DECODE_BATCHES", (1, 2))


@pytest.mark.slow
def test_the_whole_run(small_check: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--device", "cpu", "--out", str(tmp_path)]
    assert gpu.main(arguments, PLAN, (1, 64)) == 0
    told = capsys.readouterr()
    assert "| selected blocks | torch |" in told.out
    assert "TFLOP/s" in told.out
    with (tmp_path / "gpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["phase"], row["batch"], row["name"]) for row in rows}
    for name in ("nsa", "nsa: selected", "nsa: window", "ssa", "selected, random lists", "dense: SDPA flash"):
        assert {("forward", "1", name), ("backward", "1", name)} <= found
    rows_of_two = {("decode", "2", "nsa"), ("decode", "2", "dense: SDPA group as rows")}
    assert rows_of_two | {("decode", "1", "nsa")} <= found
    assert ("forward", "1", "block mask, tiles of 128") in found
    best = [float(row["speedup"]) for row in rows if row["name"].startswith("dense") and row["batch"] == "1"]
    assert max(best) == 1.0
    assert all(float(row["share"]) > 0 for row in rows if row["share"])
    assert rows[0]["commit"]
    assert (tmp_path / "gpu.png").stat().st_size > 1000 or "matplotlib is missing" in told.err
    assert "SDPA cudnn: left out" in told.err


def test_what_the_time_does_not_allow_is_said(small_check: None, tmp_path: Path, capsys) -> None:
    assert gpu.main(["--device", "cpu", "--seconds", "0", "--out", str(tmp_path)], PLAN, (1, 64)) == 0
    assert "4/2/16 at 1024: left out, the time is up" in capsys.readouterr().err


def test_wrong_ops_are_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(device: str) -> None:
        raise CheckFailedError("wrong")

    monkeypatch.setattr(gpu, "self_test", broken)
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)], PLAN, (1, 64)) == 4
    assert not (tmp_path / "gpu.csv").exists()


def test_an_error_of_our_own_ends_the_run() -> None:
    def run() -> torch.Tensor:
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        gpu.measure(Case(name="x", run=run), "forward", ("4/2/16", 8, 1), "cpu", LIMITS, print)
    peer = Case(name="x", run=run, ours=False)
    assert gpu.measure(peer, "forward", ("4/2/16", 8, 1), "cpu", LIMITS, print) is None


def test_work_is_counted() -> None:
    x = bench.OpInputs.drifting(bench.parse_geometry("4/2/16"), 2048, torch.float32, "cpu")
    cases = {case.name: case for case in forward_cases(x, "cpu")}
    causal = 2048 * 2049 / 2
    assert cases["dense: SDPA flash"].flops == 4 * 4 * 16 * causal
    window = sum(min(t, 512) for t in range(1, 2049))
    assert cases["nsa: window"].flops == pytest.approx(4 * 4 * 16 * window)
    selected = sum(min(t, 1024 - 63 + (t - 1) % 64) for t in range(1, 2049))
    assert cases["nsa: selected"].flops == pytest.approx(4 * 4 * 16 * selected, rel=1e-3)
    cells = sum(max(0, (t - 32) // 16 + 1) for t in range(1, 2049))
    assert cases["nsa: compressed + top-k"].flops == pytest.approx(6 * 4 * 16 * cells)
    assert LIMITS.floor_ms(cases["nsa: window"], "backward") == pytest.approx(
        2.5 * LIMITS.floor_ms(cases["nsa: window"], "forward")
    )
    steps = {case.name: case for case in decode_cases(x, 2)}
    assert steps["dense: SDPA enable_gqa"].bytes == 2 * 2 * 2 * 16 * 4 * 2048
    assert steps["nsa"].bytes < steps["dense: SDPA enable_gqa"].bytes


def test_speedups_are_over_the_best_dense_of_the_same_phase() -> None:
    row = gpu.Row(
        geometry="4/2/16",
        phase="forward",
        length=8,
        batch=1,
        name="nsa",
        median_ms=2.0,
        min_ms=2.0,
        max_ms=2.0,
        peak_mib=None,
        share=None,
    )
    dense = [dataclasses.replace(row, name=f"dense: {t}", median_ms=t) for t in (8.0, 6.0)]
    other = dataclasses.replace(row, phase="decode")
    assert [r.speedup for r in gpu.with_speedups([row, *dense, other])] == [3.0, 0.75, 1.0, None]
