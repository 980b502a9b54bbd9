"""The fused operator in the shapes and dtypes that it is slow in, which take another way."""

from __future__ import annotations

import pytest
import torch

from nsa_convert.kernels.common import flash


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("limit", [0, 1 << 21])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(
    dtype: torch.dtype, rows: int, limit: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "WIDE_ELEMENTS", limit)
    monkeypatch.setattr(flash, "NATIVE", dict.fromkeys((torch.bfloat16, torch.float16), native))
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 16, generator=g).to(dtype) for length in (rows, 70, 70))
    k[:, 1:], v[:, 1:] = k[:, :1], v[:, :1]
    shared = [x[:, :1].expand(-1, 3, -1, -1) for x in (k, v)]
    bias = torch.zeros(2, 1, rows, 70, dtype=dtype).masked_fill_(torch.arange(70) < 9, -torch.inf)
    scores = (q.double() @ k.double().mT * 0.3 + bias.double()).softmax(-1)
    for keys, values in ((k, v), shared):
        o, lse = flash.attend_rows(q, keys, values, bias.expand(-1, 3, -1, -1), 0.3)
        assert o.dtype == dtype
        assert o.shape == q.shape
        assert lse.dtype == torch.float32
        assert lse.shape == q.shape[:3]
        assert (o - scores @ v.double()).abs().max() < 2 * torch.finfo(dtype).eps
