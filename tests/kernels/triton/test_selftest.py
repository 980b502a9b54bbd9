"""The self-test on the triton backend, through every kernel."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from nsa_convert.kernels import use_backend
from nsa_convert.kernels.selftest import self_test


@pytest.mark.slow
def test_all_ops() -> None:
    with use_backend("triton"):
        rows = self_test("cpu", length=21, dim=16, half="float16", groups=(3,), layouts=(), dtypes=())
    assert {row.backend for row in rows} == {"triton"}
    assert len(rows) == 18


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_all_ops_on_a_gpu(dim: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rows = self_test("cuda", dim=dim, groups=(1, 2, 3, 4, 7, 8, 16) if dim == 128 else (3,))
    assert {row.backend for row in rows} == {"triton"}
