"""From transformers' masks, positions and packing hints to one :class:`SequenceLayout`.

What cannot be expressed is refused here, once, so that no layer is ever silently wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nsa_convert.patch.documents import (
    Padding,
    document_bounds,
    hinted_bounds,
    read_numbers,
    read_padding,
)
from nsa_convert.patch.training_pass import TrainingPass
from nsa_convert.patterns import SequenceLayout

NO_CONTINUOUS_BATCHING = (
    "continuous batching (generate_batch, transformers serve, cache_implementation='paged') is not supported "
    "by sparse attention layers: their compressed keys do not live in its paged cache; use generate()"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseContext:
    """What the model tells each of its sparse layers in one forward pass.

    Attributes:
        layout: Position of the queries, padding and packing.
        starts: The left padding of each row as integers; None when no row is padded, or while a compiled
            graph must not read it.
        right_padded: Whether some row ends before the others; a 0-dim tensor in a compiled graph.
        rotary: The model's rotary embedding, to place compressed keys.
        shared: Selections of this forward pass, for layers that reuse them.
        training: What a training step asks of the layers, and where their losses go; None elsewhere.
    """

    layout: SequenceLayout
    starts: tuple[int, ...] | None
    rotary: nn.Module
    training: TrainingPass | None = None
    shared: dict[Any, Any] = dataclasses.field(default_factory=dict)
    right_padded: bool | Tensor = False


def read_context(
    *,
    tokens: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past: int | Tensor,
    has_cache: bool,
    rotary: nn.Module,
    hints: Mapping[str, Any],
) -> tuple[SparseContext, Tensor]:
    """Read padding and packing from the arguments of a forward call.

    Args:
        tokens: ``[B, T, ...]`` ids or embeddings of the new tokens.
        attention_mask: ``[B, past + T]`` or longer, 0 for padding; None for no padding.
        position_ids: ``[B or 1, T]``, or None.
        past: Tokens already in the cache.
        has_cache: Whether a cache is in use.
        rotary: The model's rotary embedding.
        hints: Further keyword arguments (``cu_seq_lens_q``, ``max_length_q``, ``cache``).

    Returns:
        The context and the position ids ``[B or 1, T]`` (the given ones, or counted from each document's
        first token).

    Raises:
        NotImplementedError: Continuous batching.
        ValueError: A mask, positions or packing that sparse layers cannot honour.
    """
    batch, length = tokens.shape[:2]
    _refuse_unsupported(attention_mask, hints)
    if length == 0:
        raise ValueError(f"the input of shape {tuple(tokens.shape)} holds no tokens: it needs at least one")

    # Packed documents, else rows of one document with padding.
    device = tokens.device
    padding = Padding()
    positions = None if position_ids is None else _rows(position_ids, batch, length).to(device)
    layout = _documents(batch, length, attention_mask, positions, past, has_cache, hints, device)
    if layout is None:
        numbers = None if attention_mask is None else read_numbers(attention_mask, past, length, device)
        if numbers is not None and not has_cache and not torch.compiler.is_compiling():
            numbers = numbers.clamp(max=1)  # every row was found to be one document
        padding = read_padding(numbers, positions if has_cache else None, past, length)
        layout = SequenceLayout(offset=past, start=padding.start)

    # Positions, counted where none are given; 0 in padding.
    if position_ids is None:
        total = length if layout.cu_seqlens is None else batch * length
        counted = layout.positions(total, device) - layout.row_starts(total, device)
        position_ids = counted.clamp(min=0).reshape(-1, length)

    context = SparseContext(layout=layout, starts=padding.starts, rotary=rotary, right_padded=padding.right)
    return context, position_ids


def shard_context(
    position_ids: Tensor | None, cu_seqlens: Tensor | None, rotary: nn.Module, processes: Any
) -> SparseContext:
    """Return the context of a process that holds a run of every row's tokens.

    Args:
        position_ids: ``[B, T]`` of these tokens in their documents.
        cu_seqlens: ``[N + 1]`` document boundaries of the whole row, B = 1; None where a row is one document.
        rotary: The model's rotary embedding.
        processes: Those that share the rows (:class:`nsa_convert.patch.collectives.Processes`).

    Raises:
        ValueError: There are no positions, which the tokens alone do not tell.
    """
    if position_ids is None:
        raise ValueError("context parallelism needs the position_ids of this process's tokens")

    offset = processes.tokens_before(position_ids.shape[1])
    longest = None if cu_seqlens is None else int(cu_seqlens.diff().max())
    layout = SequenceLayout(offset=offset, cu_seqlens=cu_seqlens, max_seqlen=longest)
    return SparseContext(layout=layout, starts=None, rotary=rotary)


def _refuse_unsupported(attention_mask: Any, hints: Mapping[str, Any]) -> None:
    if hints.get("cache") is not None:
        raise NotImplementedError(NO_CONTINUOUS_BATCHING)

    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2):
        found = (
            tuple(attention_mask.shape)
            if isinstance(attention_mask, Tensor)
            else type(attention_mask).__name__
        )
        raise ValueError(
            f"sparse attention takes a 2-D padding mask [batch, tokens], got {found}; 4-D masks are not "
            "supported, pack documents with position_ids or cu_seq_lens_q instead"
        )


def _rows(position_ids: Tensor, batch: int, length: int) -> Tensor:
    """Return positions as ``[B, T]``."""
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
        raise ValueError(
            f"position_ids must be [{batch} or 1, {length}] as the input, got {tuple(position_ids.shape)}"
        )
    return position_ids.expand(batch, -1)


def _documents(
    batch: int,
    length: int,
    mask: Tensor | None,
    positions: Tensor | None,
    past: int | Tensor,
    has_cache: bool,
    hints: Mapping[str, Any],
    device: torch.device,
) -> SequenceLayout | None:
    """Return the layout of packed documents over the flattened batch, or None when nothing is packed."""
    bounds = hints.get("cu_seq_lens_q")

    # A cache holds rows of one document each.
    if has_cache:
        if bounds is not None:
            raise ValueError("packed documents cannot fill and cannot continue a cache: pass none")
        return None

    if torch.compiler.is_compiling() and bounds is None and positions is None:
        return None  # a mask alone is one of padding: reading it as documents would take the rows apart

    # Bounds that the collator gives; else they are read from mask and positions.
    numbers = None if mask is None else read_numbers(mask, past, length, device)
    if bounds is not None:
        bounds = bounds.to(device=device, dtype=torch.long)
        return hinted_bounds(bounds, hints.get("max_length_q"), positions, numbers, batch * length)
    if numbers is None and positions is None:
        return None
    bounds = document_bounds(numbers, positions)
    if bounds is None:
        return None

    longest = None if torch.compiler.is_compiling() else int(bounds.diff().max())
    return SequenceLayout(cu_seqlens=bounds, max_seqlen=longest)
