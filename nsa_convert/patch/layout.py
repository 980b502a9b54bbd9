"""From transformers' masks, positions and packing hints to one :class:`SequenceLayout`.

What cannot be expressed is refused here, once, so that no layer is ever silently wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nsa_convert.patch.collectives import tokens_before
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
        right_padded: Whether some row ends before the others, where that is known.
        rotary: The model's rotary embedding, to place compressed keys.
        shared: Selections of this forward pass, for layers that reuse them.
        training: What a training step asks of the layers, and where their losses go; None elsewhere.
    """

    layout: SequenceLayout
    starts: tuple[int, ...] | None
    rotary: nn.Module
    training: TrainingPass | None = None
    shared: dict[Any, Any] = dataclasses.field(default_factory=dict)
    right_padded: bool = False


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
    right_padded = False
    documents = _documents(batch, length, attention_mask, position_ids, past, has_cache, hints, tokens.device)
    if documents is not None:
        layout, starts = documents, None
    else:
        start, starts, right_padded = _padding(attention_mask, past, length, tokens.device)
        layout = SequenceLayout(offset=past, start=start)
    if position_ids is None:
        total = batch * length if documents is not None else length
        positions = layout.positions(total, tokens.device) - layout.row_starts(total, tokens.device)
        position_ids = positions.clamp(min=0).reshape(-1, length)
    context = SparseContext(layout=layout, starts=starts, rotary=rotary, right_padded=right_padded)
    return context, position_ids


def shard_context(
    position_ids: Tensor | None, cu_seqlens: Tensor | None, rotary: nn.Module, group: Any
) -> SparseContext:
    """Return the context of a process that holds a run of every row's tokens.

    Args:
        position_ids: ``[B, T]`` of these tokens in their documents.
        cu_seqlens: ``[N + 1]`` document boundaries of the whole row, B = 1; None where a row is one document.
        rotary: The model's rotary embedding.
        group: The processes that share the rows.

    Raises:
        ValueError: There are no positions, which the tokens alone do not tell.
    """
    if position_ids is None:
        raise ValueError("context parallelism needs the position_ids of this process's tokens")
    offset = tokens_before(position_ids.shape[1], group)
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


def _padding(
    mask: Tensor | None, past: int | Tensor, length: int, device: torch.device
) -> tuple[Tensor | None, tuple[int, ...] | None, bool]:
    """Return the first real slot of each row, as a tensor and as integers, and whether a row ends early.

    The first two are None where no row is padded on the left.
    """
    if mask is None:
        return None, None, False
    real = mask.to(device).bool()
    if torch.compiler.is_compiling():
        return real.int().argmax(-1), None, False
    total = int(past) + length
    if real.shape[1] < total:
        raise ValueError(
            f"attention_mask covers {real.shape[1]} tokens, but the cache and input hold {total}"
        )
    real = real[:, :total]
    if bool(real.all()):
        return None, None, False
    start = torch.where(real.any(-1), real.int().argmax(-1), total)
    count = real.sum(-1)
    slots = torch.arange(total, device=device)
    one_run = (slots >= start[:, None]) & (slots < (start + count)[:, None])
    if not torch.equal(one_run, real):
        raise ValueError(
            "attention_mask has a hole: the real tokens of a row must be consecutive (padding on the left or "
            "on the right). A right-padded batch cannot continue with its cache; generate() guesses a mask "
            "when a prompt contains the pad token and none is given: pass attention_mask"
        )
    starts = tuple(start.tolist())
    right_padded = not bool(real[:, -1].all())
    return (start, starts, right_padded) if any(starts) else (None, None, right_padded)


def _documents(
    batch: int,
    length: int,
    mask: Tensor | None,
    position_ids: Tensor | None,
    past: int | Tensor,
    has_cache: bool,
    hints: Mapping[str, Any],
    device: torch.device,
) -> SequenceLayout | None:
    """Return the layout of packed documents over the flattened batch, or None when nothing is packed."""
    if torch.compiler.is_compiling() and has_cache:
        return None
    bounds = hints.get("cu_seq_lens_q")
    if bounds is None:
        bounds = _restarts(batch, length, mask, position_ids, past, device)
    if bounds is None:
        return None
    if has_cache and not isinstance(past, Tensor) and past > 0:
        raise ValueError("packed documents cannot continue a cache; pass use_cache=False")
    bounds = bounds.to(device=device, dtype=torch.long)
    if bounds.numel() < 2 or bounds[0] != 0 or bounds[-1] != batch * length or (bounds.diff() < 0).any():
        raise ValueError(
            f"cu_seq_lens_q must rise from 0 to the {batch * length} tokens of the batch, "
            f"got {bounds.tolist()}"
        )
    longest = hints.get("max_length_q")
    return SequenceLayout(
        cu_seqlens=bounds, max_seqlen=int(bounds.diff().max()) if longest is None else int(longest)
    )


def _restarts(
    batch: int,
    length: int,
    mask: Tensor | None,
    position_ids: Tensor | None,
    past: int | Tensor,
    device: torch.device,
) -> Tensor | None:
    """Return document boundaries where position_ids restart at 0, or None when they never do."""
    if position_ids is None or isinstance(past, Tensor) or past > 0:
        return None
    if mask is not None and not bool(mask.to(device).bool().all()):
        return None  # a padded batch: its positions follow the mask
    positions = position_ids.expand(batch, -1)
    jumps = positions[:, 1:] - positions[:, :-1] != 1
    if bool((positions[:, 0] != 0).any()) or bool((positions[:, 1:][jumps] != 0).any()):
        raise ValueError(
            "position_ids must count up from 0 and may only restart at 0 (a packed document); a shard of a "
            "longer sequence (context parallelism) is not supported by sparse attention layers"
        )
    if not bool(jumps.any()):
        return None
    begins = torch.cat([torch.ones_like(jumps[:, :1]), jumps], dim=1).flatten().nonzero()[:, 0]
    return torch.cat([begins, begins.new_tensor([batch * length])])
