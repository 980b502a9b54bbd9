"""The gated sum of three branches in one pass over memory, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_convert.kernels.common.custom_ops import new_name
from nsa_convert.kernels.common.toolchain import Config, declare, padded_dim
from nsa_convert.kernels.interval.triton_backend import rows_contiguous, strides
from nsa_convert.kernels.interval.triton_forward import load_rows

TYPES = {
    **dict.fromkeys(("a", "b", "c", "gates", "o", "do", "da", "db", "dc", "dgates"), "*T"),
    **dict.fromkeys(("TQ", "HQ"), "i32"),
}
CASES = tuple({"D": d, "BD": bd} for d, bd in ((128, 128), (80, 128), (256, 256)))


@triton.jit
def store_rows(p, o_t, s_t, m_t, b_x, D: tl.constexpr, BD: tl.constexpr):
    """Store ``[N, BD]`` to the rows ``o_t`` of a ``[T, D]`` matrix."""
    o_d = tl.arange(0, BD)
    p_rows = p + o_t.to(tl.int64)[:, None] * s_t + o_d[None, :]
    tl.store(p_rows, b_x.to(p.dtype.element_ty), mask=m_t[:, None] & (o_d < D)[None, :])


@declare(types=TYPES, configs=(Config(sizes={"BM": 32}),), cases=CASES)
def gate_forward(
    a, b, c, gates, o, s_ab, s_at, s_ah, s_bb, s_bt, s_bh, s_cb, s_ct, s_ch, s_gb, s_gt, s_gh, s_gn,
    s_ob, s_ot, s_oh, TQ, HQ, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Store ``g_0 a + g_1 b + g_2 c`` for a tile of queries of one head."""
    i_b = (tl.program_id(1) // HQ).to(tl.int64)
    i_h = (tl.program_id(1) % HQ).to(tl.int64)

    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m_m = o_m < TQ

    p_g = gates + i_b * s_gb + i_h * s_gh + o_m.to(tl.int64) * s_gt
    b_o = load_rows(a + i_b * s_ab + i_h * s_ah, o_m, s_at, m_m, D, BD, True).to(tl.float32)
    b_o *= tl.load(p_g, mask=m_m, other=0.0).to(tl.float32)[:, None]

    b_x = load_rows(b + i_b * s_bb + i_h * s_bh, o_m, s_bt, m_m, D, BD, True).to(tl.float32)
    b_o += b_x * tl.load(p_g + s_gn, mask=m_m, other=0.0).to(tl.float32)[:, None]

    b_x = load_rows(c + i_b * s_cb + i_h * s_ch, o_m, s_ct, m_m, D, BD, True).to(tl.float32)
    b_o += b_x * tl.load(p_g + 2 * s_gn, mask=m_m, other=0.0).to(tl.float32)[:, None]

    store_rows(o + i_b * s_ob + i_h * s_oh, o_m, s_ot, m_m, b_o, D, BD)


@declare(types=TYPES, configs=(Config(sizes={"BM": 32}),), cases=CASES)
def gate_backward(
    a, b, c, gates, do, da, db, dc, dgates, s_ab, s_at, s_ah, s_bb, s_bt, s_bh, s_cb, s_ct, s_ch,
    s_gb, s_gt, s_gh, s_gn, s_ob, s_ot, s_oh, s_db, s_dt, s_dh, s_eb, s_et, s_eh, s_en,
    TQ, HQ, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Store the gradients of the branches, ``g_i do``, and of the gates, ``rowsum(o_i * do)``."""
    i_b = (tl.program_id(1) // HQ).to(tl.int64)
    i_h = (tl.program_id(1) % HQ).to(tl.int64)

    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m_m = o_m < TQ

    b_do = load_rows(do + i_b * s_ob + i_h * s_oh, o_m, s_ot, m_m, D, BD, True).to(tl.float32)
    p_g = gates + i_b * s_gb + i_h * s_gh + o_m.to(tl.int64) * s_gt
    p_e = dgates + i_b * s_eb + i_h * s_eh + o_m.to(tl.int64) * s_et
    p_d = i_b * s_db + i_h * s_dh

    b_x = load_rows(a + i_b * s_ab + i_h * s_ah, o_m, s_at, m_m, D, BD, True).to(tl.float32)
    b_g = tl.load(p_g, mask=m_m, other=0.0).to(tl.float32)
    tl.store(p_e, tl.sum(b_x * b_do, 1).to(dgates.dtype.element_ty), mask=m_m)
    store_rows(da + p_d, o_m, s_dt, m_m, b_do * b_g[:, None], D, BD)

    b_x = load_rows(b + i_b * s_bb + i_h * s_bh, o_m, s_bt, m_m, D, BD, True).to(tl.float32)
    b_g = tl.load(p_g + s_gn, mask=m_m, other=0.0).to(tl.float32)
    tl.store(p_e + s_en, tl.sum(b_x * b_do, 1).to(dgates.dtype.element_ty), mask=m_m)
    store_rows(db + p_d, o_m, s_dt, m_m, b_do * b_g[:, None], D, BD)

    b_x = load_rows(c + i_b * s_cb + i_h * s_ch, o_m, s_ct, m_m, D, BD, True).to(tl.float32)
    b_g = tl.load(p_g + 2 * s_gn, mask=m_m, other=0.0).to(tl.float32)
    tl.store(p_e + 2 * s_en, tl.sum(b_x * b_do, 1).to(dgates.dtype.element_ty), mask=m_m)
    store_rows(dc + p_d, o_m, s_dt, m_m, b_do * b_g[:, None], D, BD)


def gated_sum(outputs: tuple[Tensor, Tensor, Tensor], gates: Tensor) -> Tensor:
    """See :func:`nsa_convert.kernels.gates.gated_sum`; summed in float32 and rounded once."""
    return _forward(*outputs, gates)


@torch.library.custom_op(new_name("gated_sum"), mutates_args=())
def _forward(a: Tensor, b: Tensor, c: Tensor, gates: Tensor) -> Tensor:
    a, b, c = rows_contiguous(a, b, c)
    o = torch.empty(a.shape, dtype=a.dtype, device=a.device)

    gate_forward.launch(
        _grid(a),
        a,
        padded_dim(a.shape[3]) * a.element_size(),
        **strides(a=a, b=b, c=c, g=gates, o=o),
        **_sizes(a),
        s_gn=gates.stride(3),
        a=a,
        b=b,
        c=c,
        gates=gates,
        o=o,
    )
    return o


@_forward.register_fake
def _(a, b, c, gates):
    return torch.empty(a.shape, dtype=a.dtype, device=a.device)


def _grid(x: Tensor) -> Any:
    return lambda c: (triton.cdiv(x.shape[1], c["BM"]), x.shape[0] * x.shape[2])


def _sizes(x: Tensor) -> dict[str, int]:
    return {"TQ": x.shape[1], "HQ": x.shape[2], "D": x.shape[3], "BD": padded_dim(x.shape[3])}


@torch.library.custom_op(new_name("gated_sum_backward"), mutates_args=())
def _backward(
    do: Tensor, a: Tensor, b: Tensor, c: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    do, a, b, c = rows_contiguous(do, a, b, c)
    da, db, dc = (torch.empty(a.shape, dtype=a.dtype, device=a.device) for _ in range(3))
    dgates = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)

    gate_backward.launch(
        _grid(a),
        a,
        padded_dim(a.shape[3]) * a.element_size(),
        **strides(a=a, b=b, c=c, g=gates, o=do, d=da, e=dgates),
        **_sizes(a),
        s_gn=gates.stride(3),
        s_en=dgates.stride(3),
        a=a,
        b=b,
        c=c,
        gates=gates,
        do=do,
        da=da,
        db=db,
        dc=dc,
        dgates=dgates,
    )
    return da, db, dc, dgates


@_backward.register_fake
def _(do, a, b, c, gates):
    grads = (torch.empty(a.shape, dtype=a.dtype, device=a.device) for _ in range(3))
    return *grads, torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, do: Tensor) -> tuple[Tensor, ...]:
    return _backward(do, *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_save)
