"""Backward of attention to selected blocks, part 2: the gradients of keys and values, in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_convert.kernels.common.toolchain import (
    Config,
    all_finite,
    clean_rows,
    declare,
    dot,
    finite,
    finite_rows,
    padded_dim,
)
from nsa_convert.kernels.union.triton_plan import Plan, Readers, invert
from nsa_convert.kernels.union.triton_steps import (
    EXACT,
    GEOMETRY,
    LONG,
    key_steps,
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


@triton.jit
def sum_readers(
    b_k, b_v, o_k, m_k, q, do, base, delta, tiles, entry_tiles, entry_members, begin, end, i_h, first_row, HQ,
    num_tiles, scale, s_qt, s_qh, s_dt, s_dh,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr, UPCAST: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """Return dk, without the scale, and dv of a block: sums over the entries ``begin .. end - 1``."""
    if CLEAN:
        b_k = finite(b_k)
        b_v = finite(b_v)

    b_dk = tl.zeros([BN, DP], tl.float32)
    b_dv = tl.zeros([BN, DP], tl.float32)
    o_r = tl.arange(0, BR)
    o_d = tl.arange(0, DP)

    STEPS: tl.constexpr = (BM + BR - 1) // BR
    for j in range(begin * STEPS, end * STEPS):
        entry = tl.load(entry_tiles + j // STEPS)
        bits = tl.load(entry_members + j // STEPS)

        # Which tile the entry names, and the rows of it that this step takes
        p_tile = tiles + (entry % num_tiles).to(tl.int64) * 8
        first = tl.load(p_tile)
        count = tl.load(p_tile + 1)
        slot = tl.load(p_tile + 2)

        o_m = j % STEPS * BR + o_r
        o_w = o_m // R
        m_m = (o_w < count) & (o_m < W * R)

        o_q = (first + o_w).to(tl.int64)
        o_hq = i_h * G + entry // num_tiles * R + o_m % R
        m_md = m_m[:, None] & (o_d < D)[None, :]
        p_q = q + (o_q * s_qt + o_hq * s_qh)[:, None] + o_d[None, :]
        p_do = do + (o_q * s_dt + o_hq * s_dh)[:, None] + o_d[None, :]
        b_q = tl.load(p_q, mask=m_md, other=0.0)  # [BR, DP]
        b_do = tl.load(p_do, mask=m_md, other=0.0)

        row = (first_row + o_q) * HQ + o_hq
        b_base = tl.load(base + row, mask=m_m, other=float("inf"))
        b_delta = tl.load(delta + row, mask=m_m, other=0.0)

        listed = ((bits >> o_w.to(tl.int64)) & 1) != 0
        visible = (listed & m_m)[None, :] & m_k[:, None] & (o_k[:, None] <= (slot + o_w)[None, :])
        if CLEAN:
            good = finite_rows(b_q) & finite_rows(b_do)
            b_q = clean_rows(b_q, good)
            b_do = clean_rows(b_do, good)
            b_base = tl.where(good, b_base, float("nan"))

        b_s = tl.where(visible, dot(b_k, tl.trans(b_q), UPCAST) * scale, float("-inf"))  # [BN, BR]
        b_p = tl.exp2(b_s - b_base[None, :])
        b_dp = dot(b_v, tl.trans(b_do), UPCAST) - b_delta[None, :]
        if CLEAN:
            b_p = tl.where(visible, b_p, 0.0)
            b_dp = tl.where(visible, b_dp, 0.0)

        b_dv += dot(b_p.to(b_do.dtype), b_do, UPCAST)
        b_dk += dot((b_p * b_dp).to(b_q.dtype), b_q, UPCAST)
    return b_dk, b_dv


@declare(
    types={
        **GEOMETRY, "q": "*T", "k": "*T", "v": "*T", "do": "*T", "base": "*fp32", "delta": "*fp32",
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
    q, k, v, do, base, delta, dk, dv, part_k, part_v, broken, items, entry_tiles, entry_members, tiles, scale,
    TQ, TK, HQ, H, key_heads, block_rows, num_tiles,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_db, s_dt, s_dh,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    BS: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, UPCAST: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """Sum dk and dv of one block over the tiles that read it, or over one item of them.

    Programs: (items, key heads that share the item, parts of BN keys). BR rows of a tile are taken at a time.
    A second launch with CLEAN computes again what is not finite, as in the forward.
    """
    p_broken = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    p_broken = broken + p_broken.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    if CLEAN:  # noqa: SIM102 - one is a constant of the compiler, the other is not
        if tl.load(p_broken) == 0:
            return

    # The work item: a block of one key head and a run of its readers
    p_item = items + tl.program_id(0).to(tl.int64) * 4
    block, begin, end, at = (
        tl.load(p_item), tl.load(p_item + 1), tl.load(p_item + 2), tl.load(p_item + 3)
    )  # fmt: skip
    block = tl.maximum(block, 0)
    i_bh = block // block_rows
    i_b = i_bh // key_heads
    i_h = i_bh % key_heads * (H // key_heads) + tl.program_id(1)

    # Where the block's document lies, from any tile that reads it
    tiles += i_b * num_tiles * 8
    p_tile = tiles + (tl.load(entry_tiles + begin, mask=begin < end, other=0) % num_tiles).to(tl.int64) * 8
    start = tl.load(p_tile + 3)
    stop = tl.load(p_tile + 4)
    first_block = tl.load(p_tile + 5)
    stop = tl.where(begin < end, stop, 0)  # a spare item has no entries: its masks are empty

    o_n = tl.program_id(2) * BN + tl.arange(0, BN)
    o_d = tl.arange(0, DP)
    o_k = start + (block % block_rows - first_block) * BS + o_n  # int64
    m_d = o_d < D
    m_k = (o_n < BS) & (o_k >= start) & (o_k < stop) & (o_k < TK)
    m_kd = m_k[:, None] & m_d[None, :]
    b_k = tl.load(k + i_b * s_kb + i_h * s_kh + (o_k * s_kt)[:, None] + o_d[None, :], mask=m_kd, other=0.0)
    b_v = tl.load(v + i_b * s_vb + i_h * s_vh + (o_k * s_vt)[:, None] + o_d[None, :], mask=m_kd, other=0.0)

    q += i_b * s_qb
    do += i_b * s_db
    begin = begin.to(tl.int32)
    end = end.to(tl.int32)
    b_dk, b_dv = sum_readers(
        b_k, b_v, o_k, m_k, q, do, base, delta, tiles, entry_tiles, entry_members, begin, end, i_h, i_b * TQ,
        HQ, num_tiles, scale, s_qt, s_qh, s_dt, s_dh, D, DP, BM, R, G, W, BN, BR, UPCAST, CLEAN,
    )  # fmt: skip

    if not CLEAN:
        tl.store(p_broken, 1 - (all_finite(b_dk) & all_finite(b_dv)).to(tl.int32))

    LN2: tl.constexpr = 0.6931471805599453  # scale holds log2(e)
    b_dk *= scale * LN2

    # The only item of a block writes its gradients, others a partial sum.
    if at < 0:
        p_d = ((i_b * TK + o_k) * H + i_h)[:, None] * D + o_d[None, :]
        tl.store(dk + p_d, b_dk.to(dk.dtype.element_ty), mask=m_kd)
        tl.store(dv + p_d, b_dv.to(dv.dtype.element_ty), mask=m_kd)
    else:
        p_d = ((at * tl.num_programs(1) + tl.program_id(1)) * BS + o_n)[:, None] * D + o_d[None, :]
        tl.store(part_k + p_d, b_dk, mask=m_kd)
        tl.store(part_v + p_d, b_dv, mask=m_kd)


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

    i_bh = block // block_rows
    i_b = i_bh // key_heads
    i_h = i_bh % key_heads * (H // key_heads) + tl.program_id(1)

    # Where the block's document lies, from any tile that reads it
    p_tile = tiles + (i_b * num_tiles + tl.load(entry_tiles + entry, mask=count > 1, other=0) % num_tiles) * 8
    start = tl.load(p_tile + 3)
    stop = tl.load(p_tile + 4)
    first_block = tl.load(p_tile + 5)
    stop = tl.where(count > 1, stop, 0)

    o_n = tl.program_id(2) * BN + tl.arange(0, BN)
    o_d = tl.arange(0, DP)
    o_k = start + (block % block_rows - first_block) * BS + o_n
    m_k = (o_n < BS) & (o_k >= start) & (o_k < stop) & (o_k < TK)
    m_kd = m_k[:, None] & (o_d < D)[None, :]

    b_dk = tl.zeros([BN, DP], tl.float32)
    b_dv = tl.zeros([BN, DP], tl.float32)

    for i in range(count):
        p_d = (((at + i) * tl.num_programs(1) + tl.program_id(1)) * BS + o_n)[:, None] * D + o_d[None, :]
        b_dk += tl.load(part_k + p_d, mask=m_kd, other=0.0)
        b_dv += tl.load(part_v + p_d, mask=m_kd, other=0.0)

    p_d = ((i_b * TK + o_k) * H + i_h)[:, None] * D + o_d[None, :]
    tl.store(dk + p_d, b_dk.to(dk.dtype.element_ty), mask=m_kd)
    tl.store(dv + p_d, b_dv.to(dv.dtype.element_ty), mask=m_kd)


def backward_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    delta: Tensor,
    base: Tensor,
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
            grid, q, row_bytes(q), q=q, k=k, v=v, do=do, base=base, delta=delta, items=readers.items,
            entry_members=readers.entry_members, broken=broken, BN=keys, CLEAN=clean,
            s_vb=v.stride(0), s_vt=v.stride(1), s_vh=v.stride(2),
            s_db=do.stride(0), s_dt=do.stride(1), s_dh=do.stride(2),
            **common, **tile_arguments(q, k, plan, scale),
        )  # fmt: skip

    add_parts.launch(
        (readers.sums.shape[0], shared, -(-plan.block_size // 16)), q, row_bytes(q),
        sums=readers.sums, tiles=plan.tiles, TK=k.shape[1], D=dim, DP=padded_dim(dim), BN=16, **common,
    )  # fmt: skip
    return dk, dv
