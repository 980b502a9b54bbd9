"""Shapes, numbers and layouts at the limits of the kernels: right on every backend, or refused (KN).

The kernels run in triton's interpreter, on CPU tensors; tests/kernels has the long lists of cases.
"""

from __future__ import annotations

import itertools
import math
import sys
import warnings

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from nsa_convert.kernels import sparse_attention, use_backend
from nsa_convert.kernels.attention import dense_attention
from nsa_convert.kernels.common import backend
from nsa_convert.kernels.compressed import block_topk, compressed_attention
from nsa_convert.patterns import (
    DENSE_LAYOUT,
    BlockSelection,
    BlockTopK,
    SequenceLayout,
    SinkWindow,
)
from tests.kernels.triton.checks import check, rounding, run
from tests.kernels.utils import assert_close, make_blocks, make_layout, make_qkv

__all__ = ["rounding"]

BACKENDS = ("torch", "triton")


def attend(name: str, pattern, layout: SequenceLayout = DENSE_LAYOUT):
    """Return pattern attention on one backend as a function of q, k, v."""

    def op(q: Tensor, k: Tensor, v: Tensor):
        with use_backend(name):
            return sparse_attention(q, k, v, pattern, layout=layout)

    return op


def matches(inputs, pattern, layout: SequenceLayout = DENSE_LAYOUT, names=BACKENDS) -> None:
    """Compare output, lse and gradients of the backends with dense attention under the pattern's mask."""
    q, k, _ = inputs
    mask = pattern.to_dense_mask(q.shape[1], k.shape[1], q.shape[2], layout, device="cpu")
    for name in names:
        check(attend(name, pattern, layout), inputs, mask)


def blocks(num_queries: int, num_keys: int, lists: int, size: int = 3, block_size: int = 8, **keys):
    """Return random lists of blocks for one row."""
    layout = keys.pop("layout", DENSE_LAYOUT)
    return make_blocks(1, lists, num_queries, num_keys, size, block_size, 1, layout, **keys)


@pytest.mark.parametrize(
    "dim",
    [32, 60, 96, 256, *(pytest.param(x, marks=pytest.mark.slow) for x in (48, 64, 80, 100, 112, 128, 192))],
)
def test_kn01_head_dims(dim):
    inputs = make_qkv(1, 19, 19, (2, 1), dim, torch.float32)
    matches(inputs, blocks(19, 19, 1))


def test_kn01_a_head_dim_no_kernel_serves_runs_without(monkeypatch):
    monkeypatch.setattr(backend, "_told", set())
    q, k, v = make_qkv(1, 9, 9, (2, 1), 320, torch.float32)
    pattern = SinkWindow(window_size=4)
    with pytest.warns(UserWarning, match="there are no kernels for head dims 320 and 320"):
        o, _ = attend("triton", pattern)(q, k, v)
    assert torch.equal(o, attend("torch", pattern)(q, k, v)[0])


@pytest.mark.parametrize("group", [1, 2, 4, 5, 6, 7, 8, 16])
def test_kn02_group_sizes(group):
    inputs = make_qkv(1, 21, 21, (group, 1), 16, torch.float32)
    matches(inputs, blocks(21, 21, 1))


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 31])
def test_kn03_lengths_around_a_block(length):
    """Blocks of 8, a window of 12 and cells of 8: none, less than one, exactly one, one more."""
    inputs = make_qkv(1, length, length, (2, 1), 16, torch.float32)
    matches(inputs, blocks(length, length, 1))
    matches(inputs, SinkWindow(window_size=12))
    q, k, v = inputs
    cells = (length - 8) // 4 + 1 if length >= 8 else 0
    ck, cv = k[:, :cells], v[:, :cells]
    rule = BlockTopK(block_size=8, num_blocks=3)
    outs = {}
    for name in (*BACKENDS, "reference"):
        with use_backend(name):
            outs[name] = compressed_attention(q, ck, cv, width=8, stride=4, rule=rule)
    for name in BACKENDS:
        torch.testing.assert_close(outs[name].o, outs["reference"].o, rtol=1e-4, atol=1e-5)
        assert torch.equal(outs[name].o[:, :7], torch.zeros_like(outs[name].o[:, :7])), "no cell is seen"


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_kn04_block_sizes(block_size):
    inputs = make_qkv(1, 70, 130, (2, 1), 16, torch.float32)
    layout = SequenceLayout(offset=60)
    matches(inputs, blocks(70, 130, 1, size=2, block_size=block_size, layout=layout), layout)


def test_kn04_strides_that_do_not_divide_are_refused():
    q, k, v = make_qkv(1, 40, 40, (2, 1), 16, torch.float32)
    rule = BlockTopK(block_size=8, num_blocks=3)
    for width, stride in ((8, 3), (6, 4)):
        for name in (*BACKENDS, "reference"):
            with use_backend(name), pytest.raises(ValueError, match=r"stride|multiple|divide"):
                compressed_attention(q, k[:, :8], v[:, :8], width=width, stride=stride, rule=rule)


def test_kn05_odd_block_lists():
    """No item, only -1, duplicates are not allowed by contract, unsorted, in the future, past the end."""
    q, k, v = make_qkv(1, 20, 20, (2, 1), 16, torch.float32)
    empty = BlockSelection(block_indices=torch.zeros(1, 1, 20, 0, dtype=torch.long), block_size=8)
    unused = BlockSelection(block_indices=torch.full((1, 1, 20, 2), -1), block_size=8)
    for name, pattern in itertools.product(BACKENDS, (empty, unused)):
        o, lse = attend(name, pattern)(q, k, v)
        assert torch.equal(o, torch.zeros_like(o))
        assert bool((lse == -torch.inf).all())
    rows = torch.tensor([[2, 0, -1, 5, 1 << 20]]).expand(20, -1)[None, None]
    matches((q, k, v), BlockSelection(block_indices=rows, block_size=8))
    everything = torch.arange(6).expand(20, -1)[None, None]
    dense, _ = dense_attention(q, k, v), None
    for name in BACKENDS:
        o, _ = attend(name, BlockSelection(block_indices=everything, block_size=8))(q, k, v)
        torch.testing.assert_close(o, dense)


@pytest.mark.parametrize("name", BACKENDS)
def test_kn05_out_of_range_reads_no_memory_outside(name):
    """Keys are a view into a larger buffer that is NaN around them: a read outside would show."""
    q, k, v = make_qkv(1, 12, 12, (2, 1), 16, torch.float32)
    rows = torch.tensor([[0, 1, 2, 3, 1 << 24]]).expand(12, -1)[None, None]
    pattern = BlockSelection(block_indices=rows, block_size=8)
    inside = []
    for x in (k, v):
        buffer = torch.full((1, 300, 1, 16), torch.nan)
        buffer[:, 100:112] = x
        inside.append(buffer[:, 100:112])
    assert torch.equal(attend(name, pattern)(q, *inside)[0], attend(name, pattern)(q, k, v)[0])


@pytest.mark.parametrize("name", BACKENDS)
def test_kn06_extreme_scores(name):
    q, k, v = make_qkv(1, 24, 24, (2, 1), 16, torch.float16)
    size = math.sqrt(1e4 / 4)
    q, k = (x / x.norm(dim=-1, keepdim=True) * size * 2 for x in (q, k))  # scores up to +-1e4 after scaling
    pattern = blocks(24, 24, 1)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float().expand(-1, -1, 2, -1)) / 4
    assert scores.abs().max() > 1e3
    got = run(attend(name, pattern), (q, k, v))
    assert all(bool(x[~x.isinf()].isfinite().all()) for x in got)
    with use_backend("reference"):
        want, _ = sparse_attention(q.double(), k.double(), v.double(), pattern)
        low, _ = sparse_attention(q, k, v, pattern)
    assert_close(got[0], low, want, extra=1e-3)


@pytest.mark.parametrize("name", BACKENDS)
def test_kn06_nan_reaches_only_those_who_see_it(name):
    q, k, v = make_qkv(1, 40, 40, (2, 1), 16, torch.float32)
    k[0, 20, 0, 3] = torch.nan
    pattern = blocks(40, 40, 1)
    o, _ = attend(name, pattern)(q, k, v)
    sees = pattern.to_dense_mask(40, 40, 2)[0, 0, :, 20]
    assert bool(o[0, ~sees].isfinite().all())
    assert bool(o[0, sees].isnan().any())


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_kn07_mixed_dtypes_are_refused(name):
    q, k, v = make_qkv(1, 9, 9, (2, 1), 16, torch.float32)
    for mixed in ((q.half(), k, v), (q, k.bfloat16(), v), (q.bfloat16(), k.bfloat16(), v)):
        for pattern in (SinkWindow(window_size=3), blocks(9, 9, 1)):
            with pytest.raises(ValueError, match="dtypes differ: q .*cast them to one dtype first"):
                attend(name, pattern)(*mixed)
        with use_backend(name), pytest.raises(ValueError, match="dtypes differ"):
            dense_attention(*mixed)


@pytest.mark.parametrize("name", BACKENDS)
def test_kn08_any_memory_order(name):
    q, k, v = make_qkv(1, 20, 20, (2, 2), 16, torch.float32)
    pattern = blocks(20, 20, 2)
    want = attend(name, pattern)(q, k, v)[0]
    odd = (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([k, k], 1)[:, 0],
        v.flip(-1).contiguous().flip(-1),
    )
    torch.testing.assert_close(attend(name, pattern)(*odd)[0], want)
    shared = make_blocks(1, 1, 20, 20, 3, 8, 1, DENSE_LAYOUT)
    one_k, one_v = k[:, :, :1], v[:, :, :1]
    spread = attend(name, shared)(q, one_k.expand(-1, -1, 2, -1), one_v.expand(-1, -1, 2, -1))[0]  # stride 0
    torch.testing.assert_close(spread, attend(name, shared)(q, one_k, one_v)[0])


def test_kn08_addresses_are_64_bit():
    """A kernel's offsets are int64: every product with a stride takes an index that was widened before."""
    import inspect

    from nsa_convert.kernels.common.toolchain import KERNELS

    assert len(KERNELS) > 10
    texts = {kernel.name: inspect.getsource(kernel.fn.fn) for kernel in KERNELS}
    assert [name for name, text in texts.items() if " s_" in text and "int64" not in text] == []


def test_kn09_packed_documents():
    bounds = torch.tensor([0, 0, 1, 18, 18, 40])  # empty, one token, and two of some length
    layout = SequenceLayout(cu_seqlens=bounds)
    inputs = make_qkv(1, 40, 40, (2, 1), 16, torch.float32)
    matches(inputs, blocks(40, 40, 1, layout=layout), layout)
    matches(inputs, SinkWindow(num_sinks=1, window_size=5), layout)


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-3)])
def test_kn11_gradients(dtype, limit):
    """Of q, k, v, compressed cells and gates, against autograd of the plain formula in float64."""
    from nsa_convert.kernels.gates import gated_sum

    g = torch.Generator().manual_seed(3)
    q, k, v = make_qkv(1, 40, 40, (4, 1), 16, dtype)
    gates = torch.rand(1, 40, 4, 3, generator=g).to(dtype)
    rule, window = BlockTopK(block_size=8, num_blocks=3), SinkWindow(window_size=8)

    def total(name, *tensors):
        with use_backend(name):
            q, k, v, gates = tensors
            ck, cv = (x.unfold(1, 8, 4).mean(-1) for x in (k, v))
            compressed = compressed_attention(q, ck, cv, width=8, stride=4, rule=None)
            selected, _ = sparse_attention(q, k, v, chosen)
            windowed, _ = sparse_attention(q, k, v, window)
            return (gated_sum((compressed.o, selected, windowed), gates).double() * weights).sum()

    weights = torch.randn(1, 40, 4, 16, generator=g, dtype=torch.float64)
    with use_backend("reference"):
        ck = k.double().unfold(1, 8, 4).mean(-1)
        chosen = block_topk(q.double(), ck, width=8, stride=4, rule=rule)
    truth = grads("reference", total, [x.double() for x in (q, k, v, gates)])
    for name in BACKENDS:
        for got, want in zip(grads(name, total, [q, k, v, gates]), truth, strict=True):
            assert (got.double() - want).norm() / want.norm() < limit, name


def grads(name, total, tensors):
    inputs = [x.detach().clone().requires_grad_() for x in tensors]
    return torch.autograd.grad(total(name, *inputs), inputs)


@pytest.mark.parametrize("name", BACKENDS)
def test_kn12_backward_twice(name):
    layout, _, num_keys = make_layout("packed", 40)
    inputs = make_qkv(1, 40, num_keys, (4, 2), 16, torch.float16 if name == "triton" else torch.float32)
    pattern = blocks(40, num_keys, 2, layout=layout)
    first, second = (run(attend(name, pattern, layout), inputs) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_kn13_ties_go_to_the_lower_block(name):
    q, k, _ = make_qkv(1, 60, 60, (2, 1), 16, torch.float32)
    q, ck = torch.zeros_like(q), k[:, :7]  # every score is 0
    rule = BlockTopK(block_size=8, num_blocks=4, num_local_blocks=1)
    with use_backend(name):
        found = block_topk(q, ck, width=8, stride=8, rule=rule).block_indices
    assert sorted(found[0, 0, 59].tolist()) == [0, 1, 2, 7]


def test_kn14_no_gpu_and_no_triton(monkeypatch):
    inputs = make_qkv(1, 9, 9, (2, 1), 16, torch.float32)
    pattern = SinkWindow(window_size=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a CPU tensor takes the torch backend without a word
        want = sparse_attention(*inputs, pattern)[0]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(backend.BackendError, match="the triton backend cannot run on cpu tensors"):
        attend("triton", pattern)(*inputs)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backend, "_HAS_KERNELS", False)
    with pytest.raises(backend.BackendError, match="triton or the installed nsa_convert package") as caught:
        attend("triton", pattern)(*inputs)
    assert caught.value.hint == "pip install triton"
    assert caught.value.exit_status == 5
    assert torch.equal(sparse_attention(*inputs, pattern)[0], want)
    for module in [name for name in sys.modules if name.split(".")[0] == "nsa_convert"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed: importing must not fail
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    import nsa_convert.kernels.common.backend as fresh

    assert fresh._HAS_KERNELS is False


@pytest.mark.parametrize("name", BACKENDS)
def test_kn16_rows_of_a_batch_do_not_see_each_other(name):
    q, k, v = make_qkv(3, 30, 30, (4, 2), 16, torch.float32)
    pattern = make_blocks(3, 2, 30, 30, 3, 8, 1, DENSE_LAYOUT)
    whole = attend(name, pattern)(q, k, v)[0]
    for i in range(3):
        alone = BlockSelection(block_indices=pattern.block_indices[i : i + 1], block_size=8)
        assert torch.equal(attend(name, alone)(q[i : i + 1], k[i : i + 1], v[i : i + 1])[0], whole[i : i + 1])
    order = [2, 0, 1]
    turned = BlockSelection(block_indices=pattern.block_indices[order], block_size=8)
    assert torch.equal(attend(name, turned)(q[order], k[order], v[order])[0], whole[order])


def test_kn18_the_interpreter_tunes_nothing(monkeypatch):
    """Tuning needs a driver and a timer; in the interpreter the first configuration is taken."""
    monkeypatch.setattr("triton.autotune", lambda *args, **kwargs: pytest.fail("tuned"))
    matches(make_qkv(1, 11, 11, (2, 1), 16, torch.float32), blocks(11, 11, 1), names=("triton",))
    matches(make_qkv(1, 11, 11, (2, 1), 16, torch.float32), SinkWindow(window_size=4), names=("triton",))
