"""The ops of the torch backend as custom operators, which torch.compile does not trace.

An op loops over tiles, and their number depends on the values of its tensors: tracing the loop would break
the graph at every tile. In a graph that is being compiled each call is one operator instead. The shapes of
its results follow from the shapes of its inputs; the values are read when the operator runs. Eager calls do
not use these operators.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from nsa_convert.kernels.common.checks import accumulate_dtype
from nsa_convert.kernels.common.segments import is_decode
from nsa_convert.kernels.common.tiles import TilePlan, backward_tiles
from nsa_convert.patterns import SequenceLayout

# A checkpoint's own copy of this file is another module, and so are its operators.
NAMESPACE = "nsa_convert" if __name__.startswith("nsa_convert.") else re.sub(r"\W", "_", __name__)

LAYOUT_SCHEMA = "Tensor? slot, SymInt first, Tensor? start, Tensor? cu_seqlens, SymInt? max_seqlen"
"""A :class:`SequenceLayout` in the schema of an operator."""

Flat = tuple[Tensor | None, int, Tensor | None, Tensor | None, int | None]
"""A layout as :data:`LAYOUT_SCHEMA` has it; ``slot`` is the offset where that is a tensor, else ``first``."""


_whole = False


@contextlib.contextmanager
def whole_operators() -> Iterator[None]:
    """Let every call inside the block be one operator, for tensors that have shapes and no values."""
    global _whole
    before, _whole = _whole, True
    try:
        yield
    finally:
        _whole = before


def is_opaque(layout: SequenceLayout, q: Tensor, *others: Tensor | None) -> bool:
    """Return whether a call becomes one operator of the graph that is being compiled.

    A decoding step of one token does not, as it depends on shapes alone: the compiler can trace it and fuse
    it with its neighbours. The exception is a padded batch with an int offset, whose row starts must be read.
    """
    if not (_whole or torch.compiler.is_compiling()):
        return False
    reads = layout.start is not None and not isinstance(layout.offset, Tensor)
    return q.shape[1] != 1 or reads or not is_decode(layout, q, *others)


def flatten(layout: SequenceLayout) -> Flat:
    """Return the parts of a layout in the order of :data:`LAYOUT_SCHEMA`."""
    rest = layout.start, layout.cu_seqlens, layout.max_seqlen
    if isinstance(layout.offset, Tensor):
        return layout.offset, 0, *rest
    return None, layout.offset, *rest


def restore(flat: Flat) -> SequenceLayout:
    """Return the layout that :func:`flatten` took apart; an offset in a tensor is read from the device."""
    slot, first, start, cu_seqlens, longest = flat
    offset = first if slot is None else int(slot)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.unique_consecutive()  # a graph may count empty documents behind the others

    return SequenceLayout(offset=offset, start=start, cu_seqlens=cu_seqlens, max_seqlen=longest)


def reach(layout: SequenceLayout, q: Tensor, k: Tensor) -> int:
    """Return how many keys the queries can see; the slots of a static cache after them are still empty."""
    if layout.cu_seqlens is not None:
        return k.shape[1]
    return min(k.shape[1], cast(int, layout.offset) + q.shape[1])


def list_size(most: int, items: int) -> int:
    """Return the length of a list of at most ``most`` out of ``items``; a graph keeps it symbolic."""
    return torch.sym_min(most, torch.sym_max(items, 1))


def fit_lists(lists: Tensor, size: int) -> Tensor:
    """Pad ascending lists ``[..., S]`` with -1 to ``size`` entries; S is at most ``size``."""
    return torch.nn.functional.pad(lists, (0, size - lists.shape[-1]), value=-1).contiguous()


def new_name(name: str) -> str:
    """Return a name in :data:`NAMESPACE` that no operator has yet: ``name``, or one with a number behind it.

    Defining an operator again would free the first, which graphs and modules may still call: a module that is
    executed a second time (reload, autoreload of notebooks) has operators of its own.
    """
    defined = getattr(torch.ops, NAMESPACE)
    free = name
    number = 1

    while hasattr(defined, free):
        number += 1
        free = f"{name}_{number}"
    return f"{NAMESPACE}::{free}"


def operator(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
) -> torch.library.CustomOpDef:
    """Define an operator without a gradient.

    Args:
        name: Its name in :data:`NAMESPACE`.
        schema: Its arguments and results, as torch writes them.
        run: Computes it; results are contiguous and new.
        fake: Returns tensors of the results' shapes.
    """
    defined = torch.library.custom_op(new_name(name), _without_grad(run), mutates_args=(), schema=schema)
    defined.register_fake(fake)
    return defined


def differentiable(
    name: str,
    arguments: str,
    results: str,
    run: Callable[..., tuple[Tensor, ...]],
    fake: Callable[..., tuple[Tensor, ...]],
    plan: Callable[..., tuple[TilePlan, int, float]],
) -> torch.library.CustomOpDef:
    """Define an operator whose gradient is that of its tiles.

    Args:
        name: Its name in :data:`NAMESPACE`.
        arguments: Its arguments as torch writes them, ``Tensor q, Tensor k, Tensor? v`` in front.
        results: Its results, o and lse in front.
        run: Computes it from all arguments; results are contiguous and new.
        fake: Returns tensors of the results' shapes.
        plan: Returns, from all arguments, the tiles of the call, how many keys they reach, and the factor on
            the scores.
    """
    forward = operator(name, f"({arguments}) -> {results}", run, fake)

    def gradients(do: Tensor, dlse: Tensor, lse: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = given[:3]
        tiles, reach, scale = plan(*given)
        grads = backward_tiles(q, k[:, :reach], v[:, :reach], lse, do, dlse, tiles(), scale)

        # Keys that no query reaches have a gradient of 0.
        unused = (0, 0, 0, 0, 0, k.shape[1] - reach)
        dk, dv = (torch.nn.functional.pad(x, unused) for x in grads[1:])
        return grads[0].contiguous(), dk.contiguous(), dv.contiguous()

    backward = operator(
        f"{name}_backward",
        f"(Tensor do, Tensor dlse, Tensor lse, {arguments}) -> (Tensor, Tensor, Tensor)",
        gradients,
        lambda do, dlse, lse, *given: tuple(x.new_empty(x.shape) for x in given[:3]),
    )

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.rest = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(output[1], *(inputs[i] for i in ctx.places))

    def differentiate(ctx: Any, do: Tensor | None, dlse: Tensor | None, *_: Any) -> tuple[Any, ...]:
        lse, *tensors = ctx.saved_tensors

        # Put the saved tensors back among the other arguments.
        given = list(ctx.rest)
        for place, x in zip(ctx.places, tensors, strict=True):
            given[place] = x

        q = given[0]
        v = given[2]
        none = (None,) * len(given)
        if v is None:  # a choice alone
            return none

        # Autograd passes None for a result that takes no part in the loss.
        do = q.new_zeros(*q.shape[:3], v.shape[3]) if do is None else do
        dlse = torch.zeros_like(lse) if dlse is None else dlse
        return (*backward(do, dlse, lse, *given), *none[3:])

    forward.register_autograd(differentiate, setup_context=save)
    return forward


def like_attention(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return empty tensors shaped as o ``[B, TQ, HQ, DV]`` and lse ``[B, TQ, HQ]``."""
    lse = q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


def _without_grad(run: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with torch.no_grad():
            return run(*args)

    return call
