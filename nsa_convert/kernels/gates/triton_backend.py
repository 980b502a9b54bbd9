"""The gated sum of three branches in one pass over memory, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_convert.kernels.common.custom_ops import new_name
from nsa_convert.kernels.common.toolchain import Config, declare, padded_dim, rows_contiguous, strides
from nsa_convert.kernels.common.triton_flash import head_rows, load_rows, store_rows

TYPES = {
    **dict.fromkeys(("a", "b", "c", "gates", "o", "do", "da", "db", "dc", "dgates"), "*T"),
    **dict.fromkeys(("TQ", "HQ", "s_gn", "s_en"), "i32"),
}
CASES = tuple({"D": d, "BD": bd} for d, bd in ((128, 128), (80, 128), (256, 256)))


@triton.jit
def gated_rows(x, p_g, o_m, m_m, D: tl.constexpr, BD: tl.constexpr):
    """Return the rows ``o_m`` of a branch times their gates, in float32."""
    b_x = load_rows(x, o_m, m_m, D, BD, True).to(tl.float32)
    return b_x * tl.load(p_g, mask=m_m, other=0.0).to(tl.float32)[:, None]


@declare(types=TYPES, configs=(Config(sizes={"BM": 32}),), cases=CASES)
def gate_forward(
    a, b, c, gates, o, s_a, s_b, s_c, s_g, s_gn, s_o, TQ, HQ,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Store ``g_0 a + g_1 b + g_2 c`` for a tile of queries of one head."""
    i_b = (tl.program_id(1) // HQ).to(tl.int64)
    i_h = (tl.program_id(1) % HQ).to(tl.int64)

    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m_m = o_m < TQ

    p_g = gates + i_b * s_g[0] + i_h * s_g[2] + o_m.to(tl.int64) * s_g[1]
    b_o = gated_rows(head_rows(a, s_a, i_b, i_h), p_g, o_m, m_m, D, BD)
    b_o += gated_rows(head_rows(b, s_b, i_b, i_h), p_g + s_gn, o_m, m_m, D, BD)
    b_o += gated_rows(head_rows(c, s_c, i_b, i_h), p_g + 2 * s_gn, o_m, m_m, D, BD)

    store_rows(head_rows(o, s_o, i_b, i_h), o_m, m_m, b_o, D, BD)


@triton.jit
def gate_gradients(b_do, x, dx, p_g, p_e, o_m, m_m, D: tl.constexpr, BD: tl.constexpr):
    """Store the gradient of rows of a branch ``x`` in ``dx``, and that of their gates in ``p_e``."""
    b_x = load_rows(x, o_m, m_m, D, BD, True).to(tl.float32)
    b_g = tl.load(p_g, mask=m_m, other=0.0).to(tl.float32)
    tl.store(p_e, tl.sum(b_x * b_do, 1).to(p_e.dtype.element_ty), mask=m_m)
    store_rows(dx, o_m, m_m, b_do * b_g[:, None], D, BD)


@declare(types=TYPES, configs=(Config(sizes={"BM": 32}),), cases=CASES)
def gate_backward(
    a, b, c, gates, do, da, db, dc, dgates, s_a, s_b, s_c, s_g, s_gn, s_o, s_d, s_e, s_en, TQ, HQ,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Store the gradients of the branches, ``g_i do``, and of the gates, ``rowsum(o_i * do)``."""
    i_b = (tl.program_id(1) // HQ).to(tl.int64)
    i_h = (tl.program_id(1) % HQ).to(tl.int64)

    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m_m = o_m < TQ

    b_do = load_rows(head_rows(do, s_o, i_b, i_h), o_m, m_m, D, BD, True).to(tl.float32)
    p_g = gates + i_b * s_g[0] + i_h * s_g[2] + o_m.to(tl.int64) * s_g[1]
    p_e = dgates + i_b * s_e[0] + i_h * s_e[2] + o_m.to(tl.int64) * s_e[1]

    for i in tl.static_range(3):
        x = head_rows((a, b, c)[i], (s_a, s_b, s_c)[i], i_b, i_h)
        dx = head_rows((da, db, dc)[i], s_d, i_b, i_h)
        gate_gradients(b_do, x, dx, p_g + i * s_gn, p_e + i * s_en, o_m, m_m, D, BD)


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
