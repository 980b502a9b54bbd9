"""Backward of attention to selected blocks, part 2: the gradients of keys and values, in a fixed order."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_convert.kernels.common.toolchain import Config, declare, padded_dim, strides
from nsa_convert.kernels.common.triton_flash import (
    LN2,
    Rows,
    all_finite,
    finite,
    grade_keys,
    head_rows,
    load_rows,
    store_rows,
)
from nsa_convert.kernels.union.triton_plan import Plan, Readers, invert
from nsa_convert.kernels.union.triton_steps import (
    EXACT,
    GEOMETRY,
    LONG,
    Queries,
    Row,
    flag_pointer,
    key_steps,
    load_queries,
    row_bytes,
    tile_arguments,
)

CASES: tuple[dict[str, Any], ...] = tuple(
    {"D": 128, "DP": 128, "BM": rows, "R": readers, "G": readers, "W": min(64, rows // readers), "BS": size,
     "BN": min(64, size), "UPCAST": False, "CLEAN": clean}
    for rows, readers, size, clean in (
        (128, 4, 64, False), (128, 7, 128, False), (128, 8, 16, False), (64, 8, 16, False), (128, 4, 64, True)
    )
) + ({**LONG, "CLEAN": False}, {**EXACT, "CLEAN": False})  # fmt: skip

FAST = {"CLEAN": (False,)}


Sizes = namedtuple("Sizes", ("D", "DP", "BM", "R", "W", "BR", "UPCAST", "CLEAN"))
"""Constants of :func:`sum_readers`: head dim, the same padded, rows of a tile, heads and queries of it.

``BR`` rows are taken at a time.
"""


Keys = namedtuple("Keys", ("k", "v", "slots", "exist"))
"""Keys and values of a block ``[BN, DP]``, their slots and which of them exist."""


Entries = namedtuple("Entries", ("begin", "end", "entry_tiles", "entry_members", "tiles", "num_tiles"))
"""The entries ``begin .. end - 1`` of the inverse of the lists, and the tiles that they name."""


@triton.jit
def place_of(block, key_heads, block_rows, H):
    """Return the batch row and the key head of a block row."""
    i_bh = block // block_rows
    return i_bh // key_heads, i_bh % key_heads * (H // key_heads) + tl.program_id(1)


@triton.jit
def block_keys(p_tile, block, used, TK, BS: tl.constexpr, BN: tl.constexpr):
    """Return numbers and slots of BN keys of a block, and which of them exist; none of one that is not used.

    ``p_tile`` is any tile that reads the block: it says where the document lies.
    """
    start = tl.load(p_tile + 3)
    stop = tl.where(used, tl.load(p_tile + 4), 0)
    o_n = tl.program_id(2) * BN + tl.arange(0, BN)
    o_k = start + (block - tl.load(p_tile + 5)) * BS + o_n  # int64
    return o_n, o_k, (o_n < BS) & (o_k >= start) & (o_k < stop) & (o_k < TK)


@triton.jit
def sum_readers(keys, queries, entries, head, first_row, HQ, scale, S: tl.constexpr):
    """Return dk, without the scale, and dv of a block: sums over its entries.

    ``head`` is the first query head of the block's group, ``first_row`` the row of the first query.
    """
    b_k = finite(keys.k) if S.CLEAN else keys.k
    b_v = finite(keys.v) if S.CLEAN else keys.v
    grads = (tl.zeros(b_k.shape, tl.float32), tl.zeros(b_v.shape, tl.float32))

    STEPS: tl.constexpr = (S.BM + S.BR - 1) // S.BR
    for j in range(entries.begin * STEPS, entries.end * STEPS):
        entry = tl.load(entries.entry_tiles + j // STEPS)
        bits = tl.load(entries.entry_members + j // STEPS)

        # Which tile the entry names, and the rows of it that this step takes
        p_tile = entries.tiles + (entry % entries.num_tiles).to(tl.int64) * 8
        first = tl.load(p_tile)
        count = tl.load(p_tile + 1)
        slot = tl.load(p_tile + 2)

        o_m = j % STEPS * S.BR + tl.arange(0, S.BR)
        o_w = o_m // S.R
        m_m = (o_w < count) & (o_m < S.W * S.R)

        o_q = (first + o_w).to(tl.int64)
        o_hq = head + entry // entries.num_tiles * S.R + o_m % S.R
        rows = load_queries(queries, (first_row + o_q) * HQ + o_hq, o_q, o_hq, m_m, S.D, S.DP)  # [BR, DP]

        listed = ((bits >> o_w.to(tl.int64)) & 1) != 0
        visible = (
            (listed & m_m)[None, :] & keys.exist[:, None] & (keys.slots[:, None] <= (slot + o_w)[None, :])
        )
        grads = grade_keys(grads, b_k, b_v, rows, visible, scale, True, S.CLEAN, S.UPCAST)
    return grads


@declare(
    types={
        **GEOMETRY, "q": "*T", "k": "*T", "v": "*T", "do": "*T", "lse": "*fp32", "delta": "*fp32",
        "dk": "*T", "dv": "*T", "part_k": "*fp32", "part_v": "*fp32", "items": "*i64", "entry_tiles": "*i32",
        "entry_members": "*i64", "key_heads": "i32", "block_rows": "i32", "num_tiles": "i32", "H": "i32",
    },
    configs=(
        Config(sizes={"BR": 64}, num_warps=8, num_stages=3, max_row=256, only=FAST),
        Config(sizes={"BR": 64}, num_warps=8, num_stages=2, max_row=256, only=FAST),
        Config(sizes={"BR": 32}, num_warps=4, num_stages=2, max_row=256, only=FAST),
        Config(sizes={"BR": 16}, num_warps=8, num_stages=1, min_row=256),
        Config(sizes={"BR": 64}, num_warps=8, num_stages=2, max_row=256, only={"CLEAN": (True,)}),
    ),
    key=("DP", "BM", "BN", "R"),
    cases=CASES,
)  # fmt: skip
def attend_backward_kv(
    q, k, v, do, lse, delta, dk, dv, part_k, part_v, broken, items, entry_tiles, entry_members, tiles, scale,
    TQ, TK, HQ, H, key_heads, block_rows, num_tiles, s_q, s_k, s_v, s_d,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    BS: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, UPCAST: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """Sum dk and dv of one block over the tiles that read it, or over one item of them.

    Programs: (items, key heads that share the item, parts of BN keys). BR rows of a tile are taken at a time.
    A second launch with CLEAN computes again what is not finite, as in the forward.
    """
    p_broken = flag_pointer(broken)
    if CLEAN:  # noqa: SIM102 - one is a constant of the compiler, the other is not
        if tl.load(p_broken) == 0:
            return

    # The work item: a block of one key head and a run of its readers
    p_item = items + tl.program_id(0).to(tl.int64) * 4
    block, begin, end, at = (
        tl.load(p_item), tl.load(p_item + 1), tl.load(p_item + 2), tl.load(p_item + 3)
    )  # fmt: skip
    block = tl.maximum(block, 0)
    i_b, i_h = place_of(block, key_heads, block_rows, H)

    # A spare item has no entries and no keys.
    used = begin < end
    tiles += i_b * num_tiles * 8
    p_tile = tiles + (tl.load(entry_tiles + begin, mask=used, other=0) % num_tiles).to(tl.int64) * 8
    o_n, o_k, m_k = block_keys(p_tile, block % block_rows, used, TK, BS, BN)

    b_k = load_rows(head_rows(k, s_k, i_b, i_h), o_k, m_k, D, DP, True)
    b_v = load_rows(head_rows(v, s_v, i_b, i_h), o_k, m_k, D, DP, True)
    keys = Keys(b_k, b_v, o_k, m_k)
    queries = Queries(Row(q + i_b * s_q[0], s_q), Row(do + i_b * s_d[0], s_d), lse, delta)
    entries = Entries(begin.to(tl.int32), end.to(tl.int32), entry_tiles, entry_members, tiles, num_tiles)

    S: tl.constexpr = Sizes(D, DP, BM, R, W, BR, UPCAST, CLEAN)
    b_dk, b_dv = sum_readers(keys, queries, entries, i_h * G, i_b * TQ, HQ, scale, S)

    if not CLEAN:
        tl.store(p_broken, 1 - (all_finite(b_dk) & all_finite(b_dv)).to(tl.int32))

    b_dk *= scale * LN2  # scale holds log2(e)

    # The only item of a block writes its gradients, others a partial sum.
    if at < 0:
        row = (i_b * TK + o_k) * H + i_h
        store_rows(Rows(dk, D), row, m_k, b_dk, D, DP)
        store_rows(Rows(dv, D), row, m_k, b_dv, D, DP)
    else:
        row = (at * tl.num_programs(1) + tl.program_id(1)) * BS + o_n
        store_rows(Rows(part_k, D), row, m_k, b_dk, D, DP)
        store_rows(Rows(part_v, D), row, m_k, b_dv, D, DP)


@declare(
    types={
        "part_k": "*fp32", "part_v": "*fp32", "dk": "*T", "dv": "*T", "sums": "*i64", "entry_tiles": "*i32",
        "tiles": "*i32", "TK": "i32", "H": "i32", "key_heads": "i32", "block_rows": "i32", "num_tiles": "i32",
    },
    configs=(Config(num_warps=4, num_stages=1),),
    cases=({"D": 128, "DP": 128, "BS": 64, "BN": 16},),
)  # fmt: skip
def add_parts(
    part_k, part_v, dk, dv, sums, entry_tiles, tiles, TK, H, key_heads, block_rows, num_tiles,
    D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of one block in ascending order; a block of one item has its result already.

    Programs as in :func:`attend_backward_kv`.
    """
    p_sum = sums + tl.program_id(0).to(tl.int64) * 4
    block = tl.load(p_sum)
    entry = tl.load(p_sum + 1)
    at = tl.load(p_sum + 2)
    count = tl.load(p_sum + 3)

    i_b, i_h = place_of(block, key_heads, block_rows, H)

    used = count > 1
    p_tile = tiles + (i_b * num_tiles + tl.load(entry_tiles + entry, mask=used, other=0) % num_tiles) * 8
    o_n, o_k, m_k = block_keys(p_tile, block % block_rows, used, TK, BS, BN)

    b_dk = tl.zeros([BN, DP], tl.float32)
    b_dv = tl.zeros([BN, DP], tl.float32)

    for i in range(count):
        row = ((at + i) * tl.num_programs(1) + tl.program_id(1)) * BS + o_n
        b_dk += load_rows(Rows(part_k, D), row, m_k, D, DP, True)
        b_dv += load_rows(Rows(part_v, D), row, m_k, D, DP, True)

    row = (i_b * TK + o_k) * H + i_h
    store_rows(Rows(dk, D), row, m_k, b_dk, D, DP)
    store_rows(Rows(dv, D), row, m_k, b_dv, D, DP)


def backward_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    delta: Tensor,
    lse: Tensor,
    plan: Plan,
    scale: float,
    readers: Readers | None = None,
) -> tuple[Tensor, Tensor]:
    """Return dk and dv ``[B, TK, H, D]`` in the dtype of k; bitwise the same in every run."""
    heads = k.shape[2]
    dim = q.shape[3]

    readers = invert(plan, heads) if readers is None else readers
    dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))

    # Room for partial sums, and which keys of a block a program takes
    shared = heads // readers.key_heads
    parts = torch.empty(2, readers.slots * shared, plan.block_size, dim, dtype=torch.float32, device=q.device)
    step = key_steps(plan.block_size, row_bytes(q))
    keys = max(16, step["BN"] // step["JOIN"])

    common = {
        "dk": dk, "dv": dv, "part_k": parts[0], "part_v": parts[1], "entry_tiles": readers.entry_tiles,
        "H": heads, "key_heads": readers.key_heads, "block_rows": plan.block_rows,
        "num_tiles": plan.tiles.shape[1], "BS": plan.block_size,
    }  # fmt: skip

    grid = readers.items.shape[0], shared, -(-plan.block_size // keys)
    broken = torch.empty(grid, dtype=torch.int32, device=q.device)

    # The second launch computes again what is not finite.
    for clean in (False, True):
        attend_backward_kv.launch(
            grid, q, row_bytes(q), q=q, k=k, v=v, do=do, lse=lse, delta=delta, items=readers.items,
            entry_members=readers.entry_members, broken=broken, BN=keys, CLEAN=clean,
            **strides(v=v, d=do), **common, **tile_arguments(q, k, plan, scale),
        )  # fmt: skip

    add_parts.launch(
        (readers.sums.shape[0], shared, -(-plan.block_size // 16)), q, row_bytes(q),
        sums=readers.sums, tiles=plan.tiles, TK=k.shape[1], D=dim, DP=padded_dim(dim), BN=16, **common,
    )  # fmt: skip
    return dk, dv
