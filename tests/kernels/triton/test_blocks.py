"""Attention to selected blocks: tiles that walk the union of their lists, forward and backward."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from nsa_convert.kernels import sparse_attention, use_backend
from nsa_convert.kernels.union import triton_plan
from nsa_convert.kernels.union.triton_lists import unite
from nsa_convert.kernels.union.triton_plan import Shape, choose_shape, invert, make_plan, tile_table
from nsa_convert.patterns import DENSE_LAYOUT, BlockSelection, SequenceLayout
from tests.kernels.triton.checks import check, poison, run
from tests.kernels.utils import LAYOUTS, as_cache, make_blocks, make_layout, make_qkv
from tests.marks import first_quick, slow

pytestmark = pytest.mark.usefixtures("poison")
__all__ = ["poison"]


def blocks_op(pattern: BlockSelection, layout: SequenceLayout):
    def op(q, k, v):
        with use_backend("triton"):
            return sparse_attention(q, k, v, pattern, layout=layout)

    return op


def mask_of(pattern: BlockSelection, q, k, layout: SequenceLayout):
    return pattern.to_dense_mask(q.shape[1], k.shape[1], q.shape[2], layout, device=q.device)


@pytest.mark.parametrize(
    ("kind", "num_queries", "heads", "lists", "dim", "dtype", "block_size", "size", "query_block"),
    [
        ("plain", 75, (4, 2), 2, 16, torch.float32, 16, 3, 1),
        ("plain", 41, (1, 1), 1, 32, torch.float16, 8, 4, 1),
        slow("plain", 90, (14, 2), 2, 16, torch.float16, 64, 1, 1),
        slow("plain", 70, (6, 2), 6, 16, torch.float32, 16, 2, 32),
        slow("offset", 60, (3, 1), 1, 80, torch.float16, 32, 2, 1),
        slow("offset", 33, (16, 1), 1, 16, torch.float16, 5, 6, 1),
        ("offset", 50, (4, 2), 1, 16, torch.float32, 48, 1, 8),
        ("padded", 65, (2, 1), 1, 16, torch.float16, 16, 3, 1),
        slow("padded_offset", 77, (8, 1), 1, 16, torch.float16, 16, 2, 1),
        slow("padded_offset", 40, (4, 2), 4, 16, torch.float32, 130, 1, 16),
        ("packed", 100, (4, 1), 1, 16, torch.float32, 16, 3, 1),
        slow("packed", 83, (7, 1), 1, 96, torch.float16, 16, 2, 1),
        ("packed", 120, (4, 2), 4, 16, torch.float16, 16, 4, 7),
        ("plain", 40, (2, 1), 1, 128, torch.float16, 16, 2, 1),
        ("plain", 36, (2, 2), 2, 256, torch.float16, 16, 2, 1),
    ],
)
def test_blocks(kind, num_queries, heads, lists, dim, dtype, block_size, size, query_block) -> None:
    layout, batch, num_keys = make_layout(kind, num_queries)
    inputs = make_qkv(batch, num_queries, num_keys, heads, dim, dtype)
    pattern = make_blocks(batch, lists, num_queries, num_keys, size, block_size, query_block, layout)
    check(blocks_op(pattern, layout), inputs, mask_of(pattern, *inputs[:2], layout))


@pytest.mark.parametrize("kind", ["packed", slow("plain")])
def test_gradients_do_not_change_from_run_to_run(kind: str) -> None:
    layout, batch, num_keys = make_layout(kind, 60)
    inputs = make_qkv(batch, 60, num_keys, (4, 2), dtype=torch.float16)
    pattern = make_blocks(batch, 2, 60, num_keys, 3, 8, 1, layout)
    first, second = (run(blocks_op(pattern, layout), inputs) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


def test_large_scores_stay_finite() -> None:
    q, k, v = make_qkv(1, 50, 50, (4, 2), dtype=torch.float32)
    k[:, ::7] *= 200 / (q.norm(dim=-1).max() * k.norm(dim=-1).max()) * 4  # |logits| up to about 200
    pattern = make_blocks(1, 2, 50, 50, 3, 8, 1, DENSE_LAYOUT)
    got = check(blocks_op(pattern, DENSE_LAYOUT), (q, k, v), mask_of(pattern, q, k, DENSE_LAYOUT))
    assert all(x[~x.isinf()].isfinite().all() for x in got)


@pytest.mark.parametrize("moving", [False, True])
def test_caches_strides_and_a_moving_offset(moving: bool) -> None:
    layout = SequenceLayout(offset=20, start=torch.tensor([0, 9]))
    inputs = make_qkv(2, 40, 60, (4, 2), dtype=torch.float32)
    pattern = make_blocks(2, 2, 40, 60, 3, 8, 1, layout)
    expected = blocks_op(pattern, layout)(*inputs)
    q, k, v = inputs
    q = torch.stack([q, q], -2)[..., 0, :]  # every other row of memory
    k, v = (as_cache(x, 9).movedim(3, 0).contiguous().movedim(0, 3) for x in (k, v))  # head dim not innermost
    if moving:
        layout = SequenceLayout(offset=torch.tensor(20), start=layout.start)
    narrow = BlockSelection(block_indices=pattern.block_indices.int(), block_size=8)
    for x, y in zip(blocks_op(narrow, layout)(q, k, v), expected, strict=True):
        assert torch.allclose(x, y, atol=1e-6)


@pytest.mark.slow
def test_long_reader_lists_are_added_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every query reads the first blocks: their tiles are cut into items whose sums are added in order."""
    made = []
    keep = lambda *a: made.append(invert(*a)) or made[-1]  # noqa: E731
    monkeypatch.setattr("nsa_convert.kernels.union.triton_backward_kv.invert", keep)
    monkeypatch.setattr(triton_plan, "choose_shape", lambda *_: Shape(rows=16))
    inputs = make_qkv(1, 140, 140, (4, 1), dtype=torch.float32)
    own = torch.arange(140)[:, None] // 4
    indices = torch.cat([own.clamp(max=1) * 0, (own > 0) * 2 - 1, own.where(own > 1, -1)], 1)[None, None]
    pattern = BlockSelection(block_indices=indices, block_size=4)
    check(blocks_op(pattern, DENSE_LAYOUT), inputs, mask_of(pattern, *inputs[:2], DENSE_LAYOUT))
    assert made[0].slots == 4
    assert made[0].sums[:, 3].tolist() == [2, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lists", "halves"),
    first_quick([("packed", 4, 1), ("plain", 2, 1), ("padded", 1, 1), ("packed", 2, 2)]),
)
def test_a_captured_call_reads_nothing_back(
    kind: str, lists: int, halves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, batch, num_keys = make_layout(kind, 90)
    inputs = make_qkv(batch, 90, num_keys, (4, 2), dtype=torch.float32)
    pattern = make_blocks(batch, lists, 90, num_keys, 3, 8, 1, layout)
    monkeypatch.setattr(triton_plan, "capturing", lambda _: True)
    kind_of_call = (2 if lists < 4 else 1, 1, 128, 3, 8)
    shape = Shape(rows=16) if halves == 1 else Shape(rows=128, halves=2)
    monkeypatch.setattr(triton_plan, "_last_shapes", {kind_of_call: shape})

    def refuse(*_: object) -> None:
        raise AssertionError("the device was read")

    def op(q, k, v):
        with monkeypatch.context() as patch:
            patch.setattr(triton_plan, "choose_shape", refuse)
            return blocks_op(pattern, layout)(q, k, v)

    plans = []
    keep = lambda plan, heads: plans.append((plan, invert(plan, heads))) or plans[-1][1]  # noqa: E731
    monkeypatch.setattr("nsa_convert.kernels.union.triton_backward_kv.invert", keep)
    check(op, inputs, mask_of(pattern, *inputs[:2], layout))
    plan, readers = plans[0]
    assert not plan.exact
    assert plan.rows == (16 if halves == 1 else 64)  # keys walk the halves
    assert plan.unions.blocks.shape[0] > int(plan.unions.bounds[-1])
    assert readers.slots >= int((readers.items[:, 3] >= 0).sum())


def test_nothing_to_read() -> None:
    q, k, v = make_qkv(1, 20, 20, (2, 1), dtype=torch.float32)
    nothing = BlockSelection(block_indices=torch.full((1, 1, 20, 2), -1), block_size=4)
    o, lse, *grads = run(blocks_op(nothing, DENSE_LAYOUT), (q, k, v))
    assert (o == 0).all()
    assert (lse == -torch.inf).all()
    assert all((x == 0).all() for x in grads)
    o, lse = blocks_op(nothing, DENSE_LAYOUT)(q[:, :0], k, v)
    assert o.shape == (1, 0, 2, 16)
    assert lse.shape == (1, 0, 2)


def as_sets(pattern: BlockSelection, layout: SequenceLayout, num_queries: int, num_keys: int, width: int):
    """Return the union of every tile as ``{block: members}``, by Python loops."""
    starts = layout.row_starts(num_queries, torch.device("cpu"))
    sizes = width, pattern.block_size, pattern.query_block
    tiles = tile_table(
        layout, pattern.block_indices.shape[0], num_queries, num_keys, *sizes, torch.device("cpu")
    )
    expected = []
    for b in range(tiles.shape[0]):
        for lists in pattern.block_indices[b]:
            for first, count, slot, start, stop, _, at, rest in tiles[b].tolist():
                seen: dict[int, int] = {}
                reach = min(slot + count, stop)
                for w in range(count):
                    assert starts[b % len(starts), first + w] == start
                    chosen = lists[at + (rest + w) // pattern.query_block].tolist()
                    for block in [x for x in chosen if x >= 0 and start + x * pattern.block_size < reach]:
                        seen[block] = seen.get(block, 0) | 1 << w
                expected.append(dict(sorted(seen.items())))
    return tiles, expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "num_queries", "heads", "lists", "block_size", "size", "query_block"),
    [
        slow("plain", 45, (8, 1), 1, 16, 2, 1),
        slow("packed", 70, (4, 1), 1, 5, 4, 1),
        slow("padded_offset", 50, (7, 1), 1, 8, 3, 1),
        ("plain", 41, (16, 1), 1, 64, 1, 1),
        slow("offset", 39, (6, 2), 2, 130, 1, 3),
    ],
)
def test_tiles_in_halves(
    kind, num_queries, heads, lists, block_size, size, query_block, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, gradients and, with a broken value, that only those who see it are broken."""
    monkeypatch.setattr(triton_plan, "choose_shape", lambda *_: Shape(rows=128, halves=2))
    layout, batch, num_keys = make_layout(kind, num_queries)
    q, k, v = make_qkv(batch, num_queries, num_keys, heads, 16, torch.float32)
    pattern = make_blocks(batch, lists, num_queries, num_keys, size, block_size, query_block, layout)
    mask = mask_of(pattern, q, k, layout)
    o = check(blocks_op(pattern, layout), (q, k, v), mask)[0]
    hidden = num_keys - 10
    v[:, hidden, 0, 5] = torch.nan
    sees = mask[..., hidden].transpose(1, 2)  # [B, TQ, HQ]
    sees[:, :, heads[0] // heads[1] :] = False
    broken = run(blocks_op(pattern, layout), (q, k, v))[0]
    assert torch.equal(broken[~sees], o[~sees])
    assert bool(broken[sees].isnan().any(-1).all())
    assert bool(sees.any())


@pytest.mark.parametrize("heads", [(8, 1), (3, 1)])
def test_halves_group_their_blocks(heads: tuple[int, int]) -> None:
    """Those of both halves, of the first and of the second, each in ascending order."""
    layout, batch, num_keys = make_layout("packed", 90)
    pattern = make_blocks(batch, 1, 90, num_keys, 4, 4, 1, layout)
    call = pattern.block_indices, 4, 1, layout, heads, (90, num_keys)
    plan, whole = (make_plan(*call, 128, Shape(rows=128, halves=n)) for n in (2, 1))
    half, of_halves = plan.width // 2, 0
    assert plan.width == whole.width
    assert torch.equal(plan.unions.bounds, whole.unions.bounds)
    for i, (both, first) in enumerate(plan.unions.groups.tolist()):
        at = slice(*plan.unions.bounds[i : i + 2].tolist())
        blocks, members = (x[at].tolist() for x in (plan.unions.blocks, plan.unions.members))
        for group, expected in (
            (slice(0, both), (True, True)), (slice(both, both + first), (True, False)),
            (slice(both + first, None), (False, True)),
        ):  # fmt: skip
            assert blocks[group] == sorted(blocks[group])
            assert all((m % (1 << half) > 0, m >> half > 0) == expected for m in members[group])
        expected = (x[at].tolist() for x in (whole.unions.blocks, whole.unions.members))
        assert sorted(zip(blocks, members, strict=True)) == list(zip(*expected, strict=True))
        of_halves += both + len(blocks)
    assert plan.unions.of_halves == of_halves


@settings(max_examples=6, deadline=None)
@given(
    kind=st.sampled_from(LAYOUTS), num_queries=st.integers(1, 50), width=st.sampled_from([1, 3, 8, 64]),
    query_block=st.sampled_from([1, 2, 7, 64]), block_size=st.sampled_from([1, 5, 16]),
)  # fmt: skip
def test_unions_are_exact(kind, num_queries, width, query_block, block_size) -> None:
    layout, batch, num_keys = make_layout(kind, num_queries)
    pattern = make_blocks(batch, 1, num_queries, num_keys, 3, block_size, query_block, layout)
    tiles, expected = as_sets(pattern, layout, num_queries, num_keys, width)
    made = unite(pattern.block_indices, tiles, width, block_size, query_block)
    got = [
        dict(zip(made.blocks[a:b].tolist(), (made.members[a:b] & (1 << 64) - 1).tolist(), strict=True))
        for a, b in zip(made.bounds.tolist(), made.bounds[1:].tolist(), strict=False)
    ]
    assert [list(x) for x in got] == [list(x) for x in expected]
    assert got == [{b: m - (1 << 64 if m >> 63 else 0) for b, m in x.items()} for x in expected]


@pytest.mark.parametrize(
    ("kind", "query_block", "lists"), [("plain", 1, 2), ("packed", 5, 4), ("padded", 1, 1)]
)
def test_every_entry_has_one_reader_item(kind: str, query_block: int, lists: int) -> None:
    layout, batch, num_keys = make_layout(kind, 70)
    pattern = make_blocks(batch, lists, 70, num_keys, 3, 8, query_block, layout)
    sizes = (4, 2), (70, num_keys)
    plan = make_plan(pattern.block_indices, 8, query_block, layout, *sizes, shape=Shape(rows=16))
    readers = invert(plan, 2)
    real = readers.items[readers.items[:, 0] >= 0]
    covered = torch.cat([torch.arange(a, b) for _, a, b, _ in real.tolist()])
    assert torch.equal(covered, torch.arange(plan.unions.blocks.shape[0]))
    assert sorted(readers.entry_members.tolist()) == sorted(plan.unions.members.tolist())


def test_tiles_follow_the_locality_of_the_lists() -> None:
    own = torch.arange(4096)[:, None] // 8
    near = (own - torch.arange(8)).clamp(min=-1)[None, None]
    g = torch.Generator().manual_seed(0)
    far = torch.rand(1, 1, 4096, 512, generator=g).argsort(-1)[..., :8]
    for readers in (1, 3, 4, 7, 8, 16):
        wide, small = choose_shape(near, readers, 1), choose_shape(far, readers, 1)
        assert wide.rows >= 64 > small.rows
        assert wide.width(readers) * readers > wide.rows / 2
    assert choose_shape(far, 4, 64) == Shape(rows=128)  # neighbours share a list
    assert choose_shape(near, 16, 1, max_rows=64) == Shape(rows=64)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that live, and remembers the most."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.keep(x.untyped_storage())
        return out

    def keep(self, storage: torch.UntypedStorage) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def peaks_of_a_plan(length: int, halves: int) -> tuple[int, int]:
    """Return the most bytes that the plans of forward and backward hold.

    The lists have 16 blocks; the union over 32 queries has about 30.
    """
    token = torch.arange(length)[:, None]
    lists = token // 4 - torch.arange(16) * 3 // 2 - token // 2 % 2  # negative entries are unused ones
    indices = lists.expand(1, 2, -1, -1).int()
    call = indices, 4, 1, DENSE_LAYOUT, (8, 2), (length, length), 128
    with PeakMemory() as memory:
        plan = make_plan(*call, Shape(rows=128, halves=halves))
        forward = memory.peak
        assert 20 < plan.unions.blocks.shape[0] / (length // 32 * 2) < 35
        if halves == 2:
            room = plan.unions.of_halves
            del plan
            plan = make_plan(*call, Shape(rows=64), room)
            assert room == int(plan.unions.bounds[-1])
        invert(plan, 2)
    return forward, memory.peak


@pytest.mark.slow
@pytest.mark.parametrize("halves", [1, 2])
def test_side_memory_is_linear_and_small(halves: int) -> None:
    """128k tokens, 4 KV heads, 16 blocks a query: lists and unions, by count of allocations."""
    small, large = (peaks_of_a_plan(length, halves) for length in (256, 512))
    for_lists = 16 * 4  # int32, as the triton backend chooses them
    for i, allowed in enumerate((0.1, 0.2)):
        assert large[i] < 2.2 * small[i]
        per_token = (large[i] - small[i]) / 256 / 2 + for_lists  # of one head
        assert per_token * (1 << 17) * 4 < allowed * 2**30


def test_bfloat16_in_the_interpreter() -> None:
    """Its bfloat16 products are garbage unless the kernels upcast; it also truncates where a GPU rounds."""
    inputs = make_qkv(1, 40, 40, (2, 1), dtype=torch.bfloat16)
    pattern = make_blocks(1, 1, 40, 40, 3, 8, 1, DENSE_LAYOUT)
    got = run(blocks_op(pattern, DENSE_LAYOUT), inputs)
    with use_backend("reference"):
        truth = run(lambda *x: sparse_attention(*x, pattern), [x.double() for x in inputs])
    for x, y in zip(got, truth, strict=True):
        seen = ~y.isinf()
        assert (x.double() - y)[seen].abs().max() < 0.02 * y[seen].abs().max()


@pytest.mark.parametrize("moving", [False, True])
def test_compiles_without_breaks_and_checkpoints(moving: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_qkv(1, 30, 50, (2, 1), dtype=torch.float32)
    pattern = make_blocks(1, 1, 30, 50, 2, 8, 1, DENSE_LAYOUT)

    def step(q, k, v, indices, offset):
        chosen = BlockSelection(block_indices=indices, block_size=8)
        o, lse = sparse_attention(q, k, v, chosen, layout=SequenceLayout(offset=offset))
        return (o.float() * 2).sum() + lse.logsumexp(-1).nan_to_num(neginf=0.0).sum()

    def gradients(function):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with use_backend("triton"):
            return torch.autograd.grad(
                function(*leaves, pattern.block_indices, torch.tensor(20) if moving else 20), leaves
            )

    torch._dynamo.reset()
    expected = gradients(step)
    # As in a process that compiles first.
    monkeypatch.setattr("nsa_convert.kernels.common.backend._loaded", {})
    compiled = gradients(torch.compile(step, backend="aot_eager", fullgraph=True))
    repeated = gradients(lambda *x: torch.utils.checkpoint.checkpoint(step, *x, use_reentrant=False))
    for x, y, z in zip(expected, compiled, repeated, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


def test_operators_agree_with_their_fake_versions() -> None:
    from nsa_convert.kernels.union.triton_backend import selected_attention

    q, k, v = make_qkv(1, 20, 20, (2, 1), dtype=torch.float32)
    pattern = make_blocks(1, 1, 20, 20, 2, 8, 1, DENSE_LAYOUT)
    for x in (q, k, v):
        x.requires_grad_()
    arguments = (q, k, v, pattern.block_indices, 8, 1, None, 0, None, None, 0.25)
    torch.library.opcheck(selected_attention, arguments, test_utils=("test_schema", "test_faketensor"))
