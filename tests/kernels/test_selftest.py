"""The self-test of the ops: it passes on correct ones and sees a wrong one."""

from __future__ import annotations

import pytest
import torch

from nsa_convert.errors import CheckFailedError
from nsa_convert.kernels import selftest
from nsa_convert.kernels.selftest import CheckRow, checks_table, run_checks, self_test

SMALL = {"length": 61, "dim": 16, "groups": (3,), "half": "float16", "dtypes": ("float32",)}


def test_every_op_and_kind_of_batch_is_checked() -> None:
    rows = self_test("cpu", **SMALL)
    assert {row.op.split(",")[0] for row in rows} == {
        "selected blocks",
        "block mask per head",
        "selected tokens",
        "window",
        "compressed",
        "block choice",
        "dense",
        "gates",
        "values left out",
    }
    assert {(row.dtype, row.group, row.layout) for row in rows} == {
        ("float16", 3, "plain"),
        ("float16", 4, "offset"),
        ("float16", 4, "padded"),
        ("float16", 4, "packed"),
        ("float32", 4, "plain"),
    }
    assert {row.backend for row in rows} == {"torch"}
    assert "| dense, decode | torch | 4 |" in checks_table(rows)


@pytest.mark.parametrize("broken", ["o", "lse", "gradient", "nan"])
def test_a_wrong_op_is_seen(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = selftest.dense_attention

    def wrong(q, k, v, *, layout):
        o = real(q, k, v, layout=layout)
        if selftest.choose_backend(q) == "reference":
            return o
        if broken == "gradient":
            return o + (q - q.detach())
        return o + (torch.nan if broken == "nan" else 0.01)

    def wrong_lse(*args, **kwargs):
        o, lse = selftest_sparse(*args, **kwargs)
        return o, lse if selftest.choose_backend(o) == "reference" else lse + 0.01

    selftest_sparse = selftest.sparse_attention
    if broken == "lse":
        monkeypatch.setattr(selftest, "sparse_attention", wrong_lse)
    else:
        monkeypatch.setattr(selftest, "dense_attention", wrong)
    with pytest.raises(CheckFailedError, match="differ from the reference"):
        self_test("cpu", **SMALL | {"layouts": (), "dtypes": ()})


def test_other_blocks_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = selftest.results

    def results(*args, **kwargs):
        out = real(*args, **kwargs)
        if "blocks" in out and selftest.choose_backend(args[1][0]) == "torch":
            out["blocks"] = out["blocks"].roll(1, -1)
        return out

    monkeypatch.setattr(selftest, "results", results)
    bad = [row for row in run_checks("cpu", **SMALL | {"layouts": (), "dtypes": ()}) if not row.passed]
    assert {(row.op, row.result) for row in bad} == {
        (op + when, "blocks") for op in ("compressed", "block choice") for when in ("", ", decode")
    }
    assert isinstance(bad[0], CheckRow)
