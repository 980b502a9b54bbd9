"""Forward of attention to selected blocks: a tile of queries walks the union of its blocks once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_convert.kernels.selected.triton_plan import Plan
from nsa_convert.kernels.toolchain import LOG2E, Config, declare, dot, padded_dim, upcast

KEY_BYTES = 16384
"""Keys of one step: part of a large block, or several small blocks together; 16 to 64 of them."""

ROW_BYTES = 32768
"""Queries of one tile."""

LARGE, SMALL = {"BM": (128,)}, {"BM": (16, 32, 64)}

GEOMETRY = {
    "tiles": "*i32", "bounds": "*i64", "blocks": "*i32", "members": "*i64", "scale": "fp32", "TQ": "i32",
    "TK": "i32", "HQ": "i32", "HS": "i32",
}  # fmt: skip
"""Types of the arguments that all kernels over tiles share."""

LONG = {
    "D": 256, "DP": 256, "row": 512, "BM": 64, "R": 4, "G": 4, "W": 16, "BS": 64, "BN": 32, "UPCAST": False,
}  # fmt: skip
EXACT = {**LONG, "D": 128, "DP": 128, "dtype": "fp32", "row": 1024, "BM": 32, "W": 8, "BN": 16, "slow": True}
CASES = tuple(
    {"D": 128, "DP": 128, "BM": rows, "R": readers, "G": readers, "W": min(64, rows // readers), "BS": size,
     "BN": min(64, size * join), "PARTS": parts, "JOIN": join, "UPCAST": False}
    for rows, readers, size, parts, join in (
        (128, 4, 64, 1, 1), (64, 4, 64, 1, 1), (128, 7, 128, 2, 1), (128, 8, 16, 1, 4),
    )
) + ({**LONG, "PARTS": 2, "JOIN": 1}, {**EXACT, "PARTS": 4, "JOIN": 1})  # fmt: skip


def key_steps(block_size: int, row: int) -> dict[str, int]:
    """Return the constexprs that say which keys a step covers.

    ``BN`` keys: one of ``PARTS`` parts of a block, or ``JOIN`` whole blocks, each padded to a power of two.
    """
    most = max(16, min(64, KEY_BYTES // row))
    size = triton.next_power_of_2(block_size)
    join = max(1, most // size)
    keys = min(most, size * join)
    return {"BS": block_size, "BN": keys, "PARTS": -(-block_size // keys) if join == 1 else 1, "JOIN": join}


@triton.jit
def step_keys(
    j, end, blocks, members, start, o_w,
    BS: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """Return the key slots ``[BN]`` of step j, which of them are keys, and which queries listed them."""
    o_n = tl.arange(0, BN)
    if JOIN == 1:
        inside = (j % PARTS) * BN + o_n
        bits = tl.load(members + j // PARTS)
        o_k = start + tl.load(blocks + j // PARTS) * BS + inside
        m_k = inside < BS
        listed = ((bits >> o_w) & 1)[:, None] != 0
    else:
        o_e = j + o_n // (BN // JOIN)
        m_e = o_e < end
        inside = o_n % (BN // JOIN)
        bits = tl.load(members + o_e, mask=m_e, other=0)
        o_k = start + tl.load(blocks + o_e, mask=m_e, other=0) * BS + inside
        m_k = m_e & (inside < BS)
        listed = ((bits[None, :] >> o_w[:, None]) & 1) != 0
    return o_k, m_k, listed


@declare(
    types={**GEOMETRY, "q": "*T", "k": "*T", "v": "*T", "o": "*T", "lse": "*fp32"},
    configs=(
        Config(num_warps=8, num_stages=2, max_row=256, only=LARGE),
        Config(num_warps=8, num_stages=3, max_row=256, only=LARGE),
        Config(num_warps=4, num_stages=2, max_row=256, only=SMALL),
        Config(num_warps=4, num_stages=3, max_row=256, only=SMALL),
        Config(num_warps=8, num_stages=1, min_row=256),
    ),
    key=("DP", "BM", "BN", "R"),
    cases=CASES,
)
def attend_forward(
    q, k, v, o, lse, tiles, bounds, blocks, members, scale, TQ, TK, HQ, HS,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    BS: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, JOIN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attend with one tile and R heads. Programs: (tiles, HQ / R, B); row r is query r // R, head r % R."""
    i_t, i_p, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_tiles = tl.num_programs(0)
    p_tile = tiles + (i_b * num_tiles + i_t) * 8
    first, count, slot, start = (
        tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2), tl.load(p_tile + 3)
    )  # fmt: skip
    i_h = (i_p * R) // G

    o_m, o_d = tl.arange(0, BM), tl.arange(0, DP)
    o_w = o_m // R
    m_m = (o_w < count) & (o_m < W * R)
    o_q = (first + o_w).to(tl.int64)
    o_hq = i_p * R + o_m % R
    m_d = o_d < D
    p_q = q + i_b * s_qb + (o_q * s_qt + o_hq * s_qh)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)  # [BM, DP]
    position = slot + o_w
    o_bit = o_w.to(tl.int64)

    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, DP], tl.float32)
    k += i_b * s_kb + i_h.to(tl.int64) * s_kh
    v += i_b * s_vb + i_h.to(tl.int64) * s_vh
    i_list = (i_b * HS + i_p * HS // (HQ // R)) * num_tiles + i_t
    begin, end = tl.load(bounds + i_list).to(tl.int32), tl.load(bounds + i_list + 1).to(tl.int32)
    for j in range(begin * PARTS, end * PARTS, JOIN):
        o_k, m_k, listed = step_keys(j, end, blocks, members, start, o_bit, BS, BN, PARTS, JOIN)
        m_k = m_k & (o_k < TK)
        o_k64 = o_k.to(tl.int64)
        m_kd = m_k[:, None] & m_d[None, :]
        b_k = tl.load(k + (o_k64 * s_kt)[:, None] + o_d[None, :], mask=m_kd, other=0.0)  # [BN, DP]
        b_v = tl.load(v + (o_k64 * s_vt)[:, None] + o_d[None, :], mask=m_kd, other=0.0)
        visible = listed & m_k[None, :] & (o_k[None, :] <= position[:, None])
        b_s = tl.where(visible, dot(b_q, tl.trans(b_k), UPCAST) * scale, float("-inf"))  # [BM, BN]
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - safe[:, None])
        shrink = tl.exp2(b_m - safe)
        b_l = b_l * shrink + tl.sum(b_p, 1)
        b_o = b_o * shrink[:, None] + dot(b_p.to(b_v.dtype), b_v, UPCAST)
        b_m = b_new

    seen = b_l > 0.0
    b_l = tl.where(seen, b_l, 1.0)
    row = (i_b * TQ + o_q) * HQ + o_hq
    p_o = o + row[:, None] * D + o_d[None, :]
    tl.store(p_o, (b_o / b_l[:, None]).to(o.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])
    LN2: tl.constexpr = 0.6931471805599453
    b_lse = tl.where(seen, (b_m + tl.log2(b_l)) * LN2, float("-inf"))
    tl.store(lse + row, b_lse, mask=m_m)


def row_bytes(q: Tensor) -> int:
    """Return the bytes that a padded row of q, k or v takes, at most 1024.

    float32 counts twice: its exact products hold their operands in registers.
    """
    size = 8 if q.dtype == torch.float32 else q.element_size()
    return min(1024, padded_dim(q.shape[3]) * size)


def tile_arguments(q: Tensor, k: Tensor, plan: Plan, scale: float) -> dict:
    """Return the launch arguments that all kernels over tiles share."""
    return {
        "tiles": plan.tiles, "scale": scale * LOG2E, "TQ": q.shape[1], "TK": k.shape[1], "HQ": q.shape[2],
        "s_qb": q.stride(0), "s_qt": q.stride(1), "s_qh": q.stride(2),
        "s_kb": k.stride(0), "s_kt": k.stride(1), "s_kh": k.stride(2),
        "D": q.shape[3], "DP": padded_dim(q.shape[3]), "BM": plan.rows, "R": plan.readers,
        "G": q.shape[2] // k.shape[2], "W": plan.width, "UPCAST": upcast(q.dtype),
    }  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """Return ``(o [B, TQ, HQ, D], lse [B, TQ, HQ] float32)``; queries in no tile do not exist.

    Args:
        q: ``[B, TQ, HQ, D]``, the last dim contiguous, as in k and v.
        k: ``[B, TK, H, D]``.
        v: ``[B, TK, H, D]``.
        plan: Tiles and blocks.
        scale: Factor on the scores.
    """
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    attend_forward.launch(
        (plan.tiles.shape[1], q.shape[2] // plan.readers, q.shape[0]),
        q,
        row_bytes(q),
        q=q, k=k, v=v, o=o, lse=lse, bounds=plan.bounds, blocks=plan.blocks, members=plan.members,
        HS=plan.lists, s_vb=v.stride(0), s_vt=v.stride(1), s_vh=v.stride(2),
        **tile_arguments(q, k, plan, scale), **key_steps(plan.block_size, row_bytes(q)),
    )  # fmt: skip
    return o, lse
