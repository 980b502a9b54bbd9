"""A method on queries, keys and values alone, without a model around it: for timing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nsa_convert.methods.parts.base import SparseMethod
from nsa_convert.methods.parts.inputs import AttentionInputs, select_heads
from nsa_convert.patterns import SequenceLayout


def inputs_alone(method: SparseMethod, q: Tensor, k: Tensor, v: Tensor) -> AttentionInputs:
    """Return what a layer would hand to its method for one unpadded sequence.

    Args:
        method: In the dtype and on the device of the tensors.
        q: ``[1, TQ, HQ, D]``, the last queries of the sequence.
        k: ``[1, TK, H, D]``.
        v: ``[1, TK, H, D]``.

    Returns:
        Inputs with compressed cells of the keys as they are, and with token states and further keys and
        values from random hidden states.
    """
    hidden = torch.randn(k.shape[0], k.shape[1], method.geometry.hidden_size, dtype=k.dtype, device=k.device)
    own = method.project(hidden, lambda x: x)
    if own.k is not None and own.v is not None:
        k = torch.cat([k, own.k], 2)
        v = torch.cat([v, own.v], 2)

    # States that are cached are there for every token, the others for the queries alone.
    new = q.shape[1]
    cached = method.cache_needs().token_states
    states = {name: x if name in cached else x[:, -new:] for name, x in own.token_states.items()}

    return AttentionInputs(
        q=q,
        k=k,
        v=v,
        hidden=hidden[:, -new:],
        pooled=_cells(method, k, v),
        layout=SequenceLayout(offset=k.shape[1] - new),
        scale=q.shape[3] ** -0.5,
        token_states=states,
    )


def _cells(method: SparseMethod, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    cells = {}
    for pool in method.cache_needs().pools:
        source = select_heads(k if pool.source == "key" else v, pool.heads)
        windows = source.unfold(1, pool.width, pool.stride).permute(0, 1, 4, 2, 3)
        cells[pool.name] = method.compress(pool.name, windows)
    return cells


def prompt_case(method: SparseMethod, q: Tensor, k: Tensor, v: Tensor) -> tuple[str, Callable[[], Tensor]]:
    """Return name and run of reading a prompt, cells, token states and choice included."""
    return method.spec.name, lambda: method(inputs_alone(method, q, k, v))


def step_cases(
    method: SparseMethod, q: Tensor, k: Tensor, v: Tensor
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield name and run of a decoding step on cached cells; nothing for methods that forget."""
    if method.cache_needs().policy is None:
        x = inputs_alone(method, q, k, v)
        # A cache holds its cells head by head.
        pooled = {name: y.transpose(1, 2).contiguous().transpose(1, 2) for name, y in x.pooled.items()}
        x = dataclasses.replace(x, pooled=pooled)
        yield method.spec.name, lambda: method(x)
