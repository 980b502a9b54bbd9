"""Every configuration of every kernel compiles for real GPUs, without one, and fits them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
import triton

from nsa_convert.kernels import dense_attention, use_backend
from nsa_convert.kernels.common.toolchain import Kernel, all_kernels
from nsa_convert.kernels.selftest import self_test
from nsa_convert.patterns import SequenceLayout
from tests.kernels.triton.ahead import RECORD, SHARED_BYTES
from tests.marks import slow

ROOT = Path(__file__).parents[3]

SPILL_BYTES = 320
"""Registers a thread may spill, in half precision; exact products of float32 spill more and are for tests."""


def ahead(*options: str) -> dict[str, dict[str, int]]:
    """Compile in a process of its own: here kernels belong to the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.kernels.triton.ahead", *options]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    made: dict[str, dict[str, int]] = {}
    for line in done.stdout.splitlines():
        made |= json.loads(line)
    return made


def problems(made: dict[str, dict[str, int]]) -> list[str]:
    """Return what does not fit, and what left the record of the triton it was made with."""
    record = json.loads(RECORD.read_text())
    same = record["triton"] == triton.__version__
    found = []
    for name, row in made.items():
        target = name.split()[-1]
        if row["shared"] > SHARED_BYTES[target]:
            found.append(f"{name}: {row['shared']} bytes of shared memory of {SHARED_BYTES[target]}")
        if "dtype=fp32" not in name and row.get("stack", 0) > SPILL_BYTES:
            found.append(f"{name}: spills {row['stack']} bytes")
        if not same:
            continue
        known = record.get(name)
        if known is None:
            found.append(f"{name}: not in {RECORD.name}; run python -m tests.kernels.triton.ahead --write")
            continue
        registers = abs(row.get("registers", 0) - known.get("registers", 0))
        if row["matrix"] != known["matrix"] or registers > 24:
            found.append(f"{name}: {row}, recorded {known}")
    return found


@pytest.mark.parametrize("target", ["sm_90", slow("sm_80"), slow("sm_100")])
def test_each_configuration_compiles_and_fits(target: str) -> None:
    made = ahead("--few", "--only", target)
    assert len(made) > 10
    assert problems(made) == []


@pytest.mark.slow
def test_every_launch_of_the_self_test_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The interpreter takes any argument; a GPU needs types that agree, whatever numbers are specialised."""
    seen: dict[str, tuple] = {}

    def short(x: Any) -> Any:  # launches that differ in lengths and strides alone count once
        if isinstance(x, tuple):
            return tuple(short(y) for y in x)
        return min(x, 2) if type(x) is int else x

    def launch(self: Kernel, grid, like, row, **arguments) -> None:
        real(self, grid, like, row, **arguments)
        given = {**arguments, **self.fitting(row, arguments)[0].arguments()}
        given = {n: {"tensor": str(x.dtype)[6:]} if torch.is_tensor(x) else x for n, x in given.items()}
        small = {n: short(x) if n[0].islower() else x for n, x in given.items()}
        seen.setdefault(f"{self.name} {small}", (self.name, given))

    real = Kernel.launch
    monkeypatch.setattr(Kernel, "launch", launch)
    with use_backend("triton"):
        self_test("cpu", length=41, dim=16, half="float16", groups=(3,), layouts=(), dtypes=())
        q, k = torch.randn(1, 1, 3, 16), torch.randn(1, 2100, 1, 16)
        dense_attention(q, k, k, layout=SequenceLayout(offset=2099))  # long enough to be split
    assert {name for name, _ in seen.values()} == {kernel.name for kernel in all_kernels()}
    (tmp_path / "launches.json").write_text(json.dumps(list(seen.values())))
    ahead("--launches", str(tmp_path / "launches.json"))


@pytest.mark.slow
def test_each_configuration_compiles_and_fits_everywhere() -> None:
    assert problems(ahead()) == []


def test_the_record_is_that_of_the_table() -> None:
    names = set(ahead("--names"))
    record = json.loads(RECORD.read_text())
    assert set(record) - {"triton"} == names, "run python -m tests.kernels.triton.ahead --write"


def test_misfits_are_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = tmp_path / "ahead.json"
    record.write_text(json.dumps({"triton": triton.__version__, "a sm_80": {"matrix": 8, "registers": 100}}))
    monkeypatch.setitem(problems.__globals__, "RECORD", record)
    fine = {"shared": 1 << 10, "matrix": 8, "registers": 110, "stack": 0}
    assert problems({"a sm_80": fine}) == []
    assert "shared memory" in problems({"a sm_80": fine | {"shared": 200 << 10}})[0]
    assert "spills" in problems({"a sm_80": fine | {"stack": 400}})[0]
    assert "recorded" in problems({"a sm_80": fine | {"matrix": 16}})[0]
    assert "recorded" in problems({"a sm_80": fine | {"registers": 140}})[0]
    assert "not in" in problems({"b sm_80": fine})[0]
