"""Compare every op with the reference on the user's device: values, gradients, group sizes, layouts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nsa_convert.errors import CheckFailedError
from nsa_convert.kernels.attention import dense_attention, sparse_attention
from nsa_convert.kernels.common.backend import choose_backend, kernel_function, use_backend
from nsa_convert.kernels.compressed import compressed_attention
from nsa_convert.kernels.compressed.cells import CellGrid
from nsa_convert.kernels.gates import gated_sum
from nsa_convert.kernels.union.skipping import skipping_attention
from nsa_convert.patterns import BlockSelection, BlockTopK, SequenceLayout, SinkWindow, TokenSelection

GROUPS = (1, 2, 3, 4, 7, 8, 16)
LAYOUTS = ("plain", "offset", "padded", "packed")
GRID = CellGrid(width=8, stride=4)
FORWARD_ONLY = ("values left out",)
"""Ops without gradients."""

DIFFERENT_BLOCKS = 2e-3
"""Share of chosen blocks that may differ: scores that agree to the last bits can trade places."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckRow:
    """One op compared with the reference.

    Attributes:
        op: What ran.
        backend: What it ran on.
        dtype: Dtype of the inputs.
        group: Query heads of a key head.
        layout: Kind of batch.
        result: Which result is farthest from what is allowed: ``"o"``, ``"lse"``, ``"dq"``, ...
        error: Its largest error.
        allowed: What is allowed: twice the error of the reference in the same dtype, 1e-5, and one rounding
            step of the largest value, since matrix units take probabilities in the dtype of the inputs
            (for dense attention, torch's own: of the square root of the group).
    """

    op: str
    backend: str
    dtype: str
    group: int
    layout: str
    result: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is allowed; NaN is not."""
        return self.error <= self.allowed


Op = Callable[[Sequence[Tensor], SequenceLayout], tuple[Tensor | None, ...]]


def run_checks(
    device: str,
    *,
    length: int = 301,
    dim: int = 128,
    half: str = "bfloat16",
    groups: Sequence[int] = GROUPS,
    layouts: Sequence[str] = LAYOUTS[1:],
    dtypes: Sequence[str] = ("float16", "float32"),
) -> Iterator[CheckRow]:
    """Yield one row for each op and case; compiles one configuration of each kernel it meets.

    Args:
        device: Where to run.
        length: Keys of a sequence.
        dim: Head dim.
        half: Dtype that most cases use.
        groups: Group sizes to try.
        layouts: Kinds of batches to try with a group of 4.
        dtypes: Other dtypes to try with a group of 4.
    """
    cases = [(half, group, "plain") for group in groups]
    cases += [(half, 4, kind) for kind in layouts]
    cases += [(dtype, 4, "plain") for dtype in dtypes if dtype != half]

    for dtype, group, kind in cases:
        for decode in (False, True):
            if decode and kind == "packed":
                continue
            layout, tensors = make_inputs(device, getattr(torch, dtype), group, kind, length, dim, decode)
            for name, op in ops(tensors, layout).items():
                yield check_op(name, op, tensors, layout, (dtype, group, kind), decode)


def self_test(device: str, **settings: Any) -> tuple[CheckRow, ...]:
    """Run every op against the reference on the device; raise CheckFailedError if one is wrong.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        settings: See :func:`run_checks`.
    """
    rows = tuple(run_checks(device, **settings))
    wrong = [row for row in rows if not row.passed]
    if wrong:
        raise CheckFailedError(
            f"{len(wrong)} of {len(rows)} checks differ from the reference:\n{checks_table(wrong)}",
            hint="use_backend('torch') runs without the compiled kernels; please report this with the table",
        )
    return rows


def checks_table(rows: Sequence[CheckRow]) -> str:
    """Return one line for each op: how many cases ran, and the one nearest to what is allowed."""
    lines = ["| op | backend | cases | nearest to its limit | error | allowed |", "|" + "---|" * 6]

    for op in dict.fromkeys(row.op for row in rows):
        own = [row for row in rows if row.op == op]
        worst = max(own, key=lambda row: row.error / row.allowed if row.error == row.error else float("inf"))
        where = f"{worst.result}, {worst.dtype}, group {worst.group}, {worst.layout}"
        lines.append(
            f"| {op} | {worst.backend} | {len(own)} | {where} | {worst.error:.2g} | {worst.allowed:.2g} |"
        )
    return "\n".join(lines)


def check_op(
    name: str,
    op: Op,
    tensors: Sequence[Tensor],
    layout: SequenceLayout,
    case: tuple[str, int, str],
    decode: bool = False,
) -> CheckRow:
    """Compare one op with the reference, in the dtype of the inputs and in float64."""
    backend = choose_backend(tensors[0])
    gradients = not decode and name not in FORWARD_ONLY

    with _first_configuration(backend):
        got = results(op, tensors, layout, gradients)

    with use_backend("reference"):
        low = results(op, tensors, layout, gradients)
        truth = results(op, [x.double() for x in tensors], layout, gradients)

    worst = ("", 0.0, 0.0)
    eps = torch.finfo(tensors[0].dtype).eps
    if name == "dense":  # torch rounds the gradient of each query head before it adds those of a group
        eps *= case[1] ** 0.5

    # Keep the result that is nearest to its limit.
    for result, x in got.items():
        if result == "blocks":
            error = (x != truth[result]).double().mean().item()
            allowed = DIFFERENT_BLOCKS
        else:
            error, allowed = (largest(y, truth[result]) for y in (x, low[result]))
            allowed = 2 * allowed + 1e-5 + eps * max(1.0, largest(truth[result], 0.0))
        if not (worst[0] and error * worst[2] <= worst[1] * allowed):
            worst = (result, error, allowed)

    dtype, group, kind = case
    return CheckRow(
        op=name + (", decode" if decode else ""),
        backend=backend,
        dtype=dtype,
        group=group,
        layout=kind,
        result=worst[0],
        error=worst[1],
        allowed=worst[2],
    )


def largest(x: Tensor, y: Tensor | float) -> float:
    """Return the largest difference; infinity where only one of both is infinite, NaN where x is NaN."""
    difference = (x.double() - y).abs()
    same = x.double() == y  # -inf - -inf is NaN
    return difference.masked_fill(same, 0.0).max().item() if x.numel() else 0.0


def results(op: Op, tensors: Sequence[Tensor], layout: SequenceLayout, gradients: bool) -> dict[str, Tensor]:
    """Return what an op returns and the gradients of a weighted sum of o and lse."""
    inputs = [x.detach().clone().requires_grad_(gradients) for x in tensors]
    with torch.set_grad_enabled(gradients):
        found = zip(("o", "lse", "blocks"), op(inputs, layout), strict=False)
        out = {name: x for name, x in found if x is not None}
        if not gradients or "o" not in out:
            return out

        # A fixed random weight for every element of o and lse; lse = -inf has no gradient.
        g = torch.Generator().manual_seed(5)
        total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
        for name in ("o", "lse"):
            if name in out:
                weight = torch.randn(out[name].shape, generator=g).to(total.device)
                finite = out[name].masked_fill(out[name] == -torch.inf, 0.0)
                total = total + (finite.double() * weight).sum()

        names = ("dq", "dk", "dv", "dck", "dcv")
        grads = torch.autograd.grad(total, inputs, allow_unused=True)
    made = {n: x for n, x in zip(names, grads, strict=True) if x is not None}
    return {n: x.detach() for n, x in out.items()} | made


def ops(tensors: Sequence[Tensor], layout: SequenceLayout) -> dict[str, Op]:
    """Return name -> op over ``(q, k, v, ck, cv)``."""
    q, k = tensors[:2]
    lists = q.shape[1]
    blocks = BlockSelection(block_indices=random_lists(q, k.shape[2], lists, 16, 3), block_size=16)
    per_head = BlockSelection(
        block_indices=random_lists(q, q.shape[2], tiles_of(q.shape[1], layout, 64), 32, 3),
        block_size=32,
        query_block=64,
    )

    tokens = TokenSelection(token_indices=random_lists(q, k.shape[2], lists, 1, 24))
    window = SinkWindow(num_sinks=3, window_size=48)
    rule = BlockTopK(block_size=8, num_blocks=4)

    def pattern_op(pattern: BlockSelection | TokenSelection | SinkWindow) -> Op:
        return lambda x, layout: sparse_attention(x[0], x[1], x[2], pattern, layout=layout)

    def compressed(
        x: Sequence[Tensor], layout: SequenceLayout, values: bool = True
    ) -> tuple[Tensor | None, ...]:
        cv = x[4] if values else None
        out = compressed_attention(
            x[0], x[3], cv, width=GRID.width, stride=GRID.stride, rule=rule, layout=layout
        )
        assert out.selection is not None
        chosen = out.selection.block_indices.long()  # S may count padding: compare what all backends list
        missing = torch.full_like(chosen[..., :1], -1).expand(*chosen.shape[:3], rule.num_blocks)
        return out.o, out.lse, torch.cat([chosen, missing], -1)[..., : rule.num_blocks]

    def skipping(x: Sequence[Tensor], layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        # So low a limit leaves nothing out: rounding could decide about any other.
        return skipping_attention(x[0], x[1], x[2], per_head, value_skip=-1e4, layout=layout)

    plain = layout.start is None and layout.cu_seqlens is None
    return {
        "selected blocks": pattern_op(blocks),
        "block mask per head": pattern_op(per_head),
        "selected tokens": pattern_op(tokens),
        "window": pattern_op(window),
        "compressed": compressed,
        "block choice": lambda x, layout: compressed(x, layout, values=False),
        "dense": lambda x, layout: (dense_attention(*x[:3], layout=layout),),
        "gates": lambda x, layout: (gated_sum((x[0], x[0] * 2, x[0].flip(1)), x[0][..., :3]),),
        **({"values left out": skipping} if plain else {}),
    }


def tiles_of(num_queries: int, layout: SequenceLayout, size: int) -> int:
    """Return how many tiles of queries there are."""
    if layout.cu_seqlens is None:
        return -(-num_queries // size)
    return sum(-(-(end - begin) // size) for begin, end in layout.documents())


def random_lists(q: Tensor, heads: int, lists: int, block_size: int, size: int) -> Tensor:
    """Return ``[B, heads, lists, size + 1]`` different random blocks, the first one among them, ascending."""
    g = torch.Generator().manual_seed(block_size)
    blocks = max(size + 1, -(-2 * q.shape[1] // block_size))

    rank = torch.rand(q.shape[0], heads, lists, blocks, generator=g)
    rank[..., 0] = 1.0
    return rank.topk(size + 1, -1).indices.sort(-1).values.to(q.device)


def make_inputs(
    device: str, dtype: torch.dtype, group: int, kind: str, length: int, dim: int, decode: bool
) -> tuple[SequenceLayout, tuple[Tensor, ...]]:
    """Return a layout and ``(q, k, v, ck, cv)`` with 2 key heads."""
    batch = 1 if kind == "packed" else 2
    queries = length

    layout = SequenceLayout()
    cells = GRID.count(length)

    if kind == "packed":
        bounds = (0, length // 5, length // 2, length)
        layout = SequenceLayout(cu_seqlens=torch.tensor(bounds, device=device))
        cells = sum(GRID.count(b - a) for a, b in zip(bounds, bounds[1:], strict=False))
    elif decode or kind == "offset":
        queries = 1 if decode else length // 2
        start = torch.tensor([0, length // 7], device=device) if kind == "padded" else None
        layout = SequenceLayout(offset=length - queries, start=start)
    elif kind == "padded":
        layout = SequenceLayout(start=torch.tensor([0, length // 7], device=device))

    g = torch.Generator().manual_seed(0)
    shapes = [(queries, 2 * group), (length, 2), (length, 2), (cells, 2), (cells, 2)]
    tensors = (torch.randn(batch, tokens, heads, dim, generator=g) for tokens, heads in shapes)
    return layout, tuple(x.to(device, dtype) for x in tensors)


def _first_configuration(backend: str) -> contextlib.AbstractContextManager:
    """Return a context in which kernels are not tuned: the check is about values."""
    if backend != "triton":
        return contextlib.nullcontext()
    return kernel_function("common.toolchain", "without_tuning")()
