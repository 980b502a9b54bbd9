"""The gated sum of branches."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from nsa_convert.kernels import gated_sum, use_backend
from tests.kernels.triton.checks import poison
from tests.kernels.utils import assert_close

pytestmark = pytest.mark.usefixtures("poison")
__all__ = ["poison"]


def values_and_gradients(outputs, gates, backend: str):
    inputs = [x.detach().clone().requires_grad_() for x in (*outputs, gates)]
    with use_backend(backend):
        o = gated_sum(inputs[:-1], inputs[-1])
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return o.detach(), *torch.autograd.grad((o.double() * weight).sum(), inputs)


@pytest.mark.parametrize(
    ("heads", "dim", "dtype"), [(3, 16, torch.float32), (7, 80, torch.float16), (1, 96, torch.bfloat16)]
)
def test_values_and_gradients(heads: int, dim: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    wide = [torch.randn(2, heads, 37, dim, generator=g, dtype=torch.float64).to(dtype) for _ in range(3)]
    outputs = [wide[0].transpose(1, 2), wide[1].transpose(1, 2).contiguous(), wide[2].transpose(1, 2)]
    gates = torch.rand(2, 37, heads, 3, generator=g, dtype=torch.float64).to(dtype)
    got = values_and_gradients(outputs, gates, "triton")
    low = values_and_gradients(outputs, gates, "torch")
    truth = values_and_gradients([x.double() for x in outputs], gates.double(), "torch")
    for x, y, z in zip(got, low, truth, strict=True):
        assert_close(x, y, z)


@pytest.mark.parametrize("branches", [1, 2, 4])
def test_other_numbers_of_branches(branches: int) -> None:
    outputs, gates = [torch.randn(1, 5, 2, 16) for _ in range(branches)], torch.rand(1, 5, 2, branches)
    with use_backend("triton"):
        o = gated_sum(outputs, gates)
    expected = sum(x * gates[..., i, None] for i, x in enumerate(outputs))
    assert torch.allclose(o, expected, atol=1e-6)
    with pytest.raises(ValueError, match="one gate for each branch"):
        gated_sum(outputs, torch.rand(1, 5, 2, branches + 1))
