"""The kernel that leaves out values: its rule, and that a limit no score reaches changes no bit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from nsa_convert.kernels import sparse_attention, use_backend
from nsa_convert.kernels.union.skipping import skipping_attention, tile_rows
from tests.kernels.skipping import walk
from tests.kernels.test_skipping import CASES, make_case
from tests.kernels.triton.checks import poison
from tests.kernels.utils import assert_close

pytestmark = pytest.mark.usefixtures("poison")
__all__ = ["poison"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_the_rule(case: tuple, dtype: torch.dtype) -> None:
    inputs, pattern, layout = make_case(*case, dtype=dtype)
    wide = [x.double() for x in inputs]
    value_skip = -2.0
    o, lse, lost = walk(*wide, pattern, layout.offset, 0.25, value_skip, tile_rows(pattern.query_block))
    arguments = {"value_skip": value_skip, "layout": layout}
    with use_backend("triton"):
        got = skipping_attention(*inputs, pattern, **arguments)
    with use_backend("reference"):
        low = skipping_attention(*inputs, pattern, **arguments)
    for x, y, z in zip(got, low, (o, lse), strict=True):
        assert_close(x, y, z)
    assert bool((lost > 0).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_limit_changes_no_bit(dtype: torch.dtype) -> None:
    """Blocks of 64 for 64 queries of a head are walked in the same steps with and without the rule."""
    inputs, pattern, layout = make_case(130, 200, (2, 1), 2, 2, 64, 64, dtype=dtype)
    with use_backend("triton"):
        want = sparse_attention(*inputs, pattern, layout=layout)
        for value_skip in (-torch.inf, -1e30):
            got = skipping_attention(*inputs, pattern, value_skip=value_skip, layout=layout)
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_it_has_no_gradient() -> None:
    inputs, pattern, layout = make_case(*CASES[1], dtype=torch.float32)
    leaf = inputs[0].requires_grad_()
    with use_backend("triton"):
        o, _ = skipping_attention(leaf, *inputs[1:], pattern, value_skip=-1.0, layout=layout)
    with pytest.raises(RuntimeError, match="autograd"):
        o.sum().backward()
