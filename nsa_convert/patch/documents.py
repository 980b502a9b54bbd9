"""Padding and packed documents of a call, read from its mask, positions and packing hints.

Input that sparse layers cannot honour is refused. While torch.compile traces, no value is read: the checks
become assertions of the graph, and its shapes follow from the shapes of the call.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nsa_convert.patterns import SequenceLayout

_HOLE = (
    "attention_mask has a hole: the real tokens of a row must be consecutive (padding on the left or on the "
    "right). A right-padded batch cannot continue with its cache; generate() guesses a mask when a prompt "
    "contains the pad token and none is given: pass attention_mask"
)
_NUMBERS = (
    "attention_mask must hold 1 for real tokens and 0 for padding, or numbers of packed documents, each one "
    "run of tokens and rising along the row (1, 1, 2, 2, 0)"
)
_NO_NUMBERS = (
    "attention_mask holds numbers of packed documents, which neither a cache nor a compiled call without "
    "position_ids can keep apart: pass no cache, and under torch.compile position_ids that restart at 0"
)
_POSITIONS = (
    "position_ids must count up by one from 0 and may only restart at 0 (a packed document): positions that "
    "begin later or skip (PoSE, a shard of context parallelism) are not supported by sparse attention "
    "layers, whose blocks are places in the text; leave position_ids out, or give consecutive ones"
)
_CONTINUE = (
    "in a call with a cache position_ids must count on from each row's first real token: packed documents "
    "neither fill nor continue a cache (pass no past_key_values), positions with an offset or gaps (PoSE) "
    "are not supported, and padding must be in attention_mask"
)
_BOUNDS = "cu_seq_lens_q must rise from 0 to the {} tokens of the batch"
_LONGEST = "max_length_q is smaller than the longest document of cu_seq_lens_q"
_AGREE = "position_ids must restart at 0 where cu_seq_lens_q begins a document, and count up by one"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Padding:
    """The padding of a batch.

    Attributes:
        start: ``[B]`` first real slot of each row, or None where no row is padded on the left.
        starts: The same as integers; None too while a graph must not read them.
        right: Whether some row ends before the others; a 0-dim tensor in a graph.
    """

    start: Tensor | None = None
    starts: tuple[int, ...] | None = None
    right: bool | Tensor = False


def require(ok: Tensor, message: str, found: Tensor | None = None) -> None:
    """Raise ValueError unless ``ok`` (0-dim bool) is true; in a graph an assertion that runs with it.

    Args:
        ok: What must hold.
        message: What is allowed, and what to do.
        found: What was given, shown outside of a graph.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(ok, message)
    elif not bool(ok):
        raise ValueError(message if found is None else f"{message}; got {_shown(found)}")


def read_numbers(mask: Tensor, past: int | Tensor, length: int, device: torch.device) -> Tensor | None:
    """Return the mask as numbers ``[B, past + T]`` int64, 0 for padding; None where all are 1.

    Its width is that of a static cache while a graph must not know ``past``.

    Raises:
        ValueError: It is too short, or holds other numbers.
    """
    numbers = mask.to(device=device, dtype=torch.long)
    total = past + length

    # Cut the mask to the tokens there are; a graph sets the rest of its static width to padding.
    if isinstance(total, Tensor):
        require(total <= mask.shape[1], "attention_mask covers fewer tokens than the cache and input hold")
        inside = torch.arange(mask.shape[1], device=device) < total
        numbers = numbers.where(inside, 0)
    elif mask.shape[1] < total:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} tokens, but the cache and input hold {total}"
        )
    else:
        numbers = numbers[:, :total]

    # A mask of ones says nothing; a graph cannot find out.
    if torch.compiler.is_compiling():
        require((numbers >= 0).all(), _NUMBERS)
        return numbers
    if bool((numbers == 1).all()):
        return None
    require((numbers >= 0).all(), _NUMBERS, numbers)
    return numbers


def read_padding(
    numbers: Tensor | None, positions: Tensor | None, past: int | Tensor, length: int
) -> Padding:
    """Return the padding of rows of one document each, the cached tokens included.

    Args:
        numbers: ``[B, past + T]`` from :func:`read_numbers`, or None for no padding.
        positions: ``[B, T]`` given positions of the new tokens, or None.
        past: Tokens in the cache.
        length: T.

    Raises:
        ValueError: A row has a hole or several documents, or the positions do not continue it.
    """
    padding = Padding()
    real = None
    start: int | Tensor = 0

    if numbers is not None:
        padding, real, start = _read_rows(numbers, past + length)

    # Positions must count on from each row's first token; in padding they may be anything.
    if positions is not None:
        slots = past + torch.arange(length, device=positions.device)
        fine = positions == slots - start
        if real is not None:
            new = slots.expand(real.shape[0], -1).clamp(max=real.shape[1] - 1)
            fine = fine | ~real.gather(1, new)
        require(fine.all(), _CONTINUE, positions)

    return padding


def _read_rows(numbers: Tensor, total: int | Tensor) -> tuple[Padding, Tensor, Tensor]:
    """Return the padding, the real tokens ``[B, past + T]`` and the first one of each row ``[B, 1]``."""
    require((numbers <= 1).all(), _NO_NUMBERS)
    real = numbers > 0
    start = torch.where(real.any(-1), real.int().argmax(-1), total)
    end = start + real.sum(-1)
    slots = torch.arange(real.shape[1], device=real.device)

    # Every row is one run of real tokens.
    one_run = (slots >= start[:, None]) & (slots < end[:, None])
    require((one_run == real).all(), _HOLE)

    # A graph keeps tensors; outside of it integers, and None where no row is padded on the left.
    right: bool | Tensor = (end < total).any()
    starts: tuple[int, ...] | None = None
    if not torch.compiler.is_compiling():
        right = bool(right)
        starts = tuple(start.tolist())
        if not any(starts):
            return Padding(right=right), real, start[:, None]

    return Padding(start=start, starts=starts, right=right), real, start[:, None]


def document_bounds(numbers: Tensor | None, positions: Tensor | None) -> Tensor | None:
    """Return where the documents of a call without a cache begin in the flattened batch, and its end.

    Padding is a document of its own. In a graph there are as many bounds as tokens, the last ones equal.

    Args:
        numbers: ``[B, T]`` from :func:`read_numbers`, or None.
        positions: ``[B, T]`` given positions, or None.

    Returns:
        ``[N + 1]`` int64, or None where every row is one document.

    Raises:
        ValueError: The numbers do not rise, or the positions neither count up nor restart at 0.
    """
    given = positions if numbers is None else numbers
    assert given is not None

    # Documents begin with a row and where their numbers change ...
    begins = torch.zeros(given.shape, dtype=torch.bool, device=given.device)
    begins[:, 0] = True
    real = None if numbers is None else numbers > 0
    if numbers is not None:
        begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        _check_rising(numbers, begins & (numbers > 0))

    # ... or where positions restart at 0; elsewhere positions count up by one.
    if positions is not None:
        begins = begins | (positions == 0 if real is None else (positions == 0) & real)
        counted = torch.cat([positions[:, :1], positions[:, :-1] + 1], 1)
        fine = torch.where(begins, positions == 0, positions == counted)
        require((fine if real is None else fine | ~real).all(), _POSITIONS, positions)

    # Bounds in the flattened batch. A graph sorts: what begins no document is put at the end.
    total = begins.numel()
    if torch.compiler.is_compiling():
        slots = torch.arange(total, device=given.device)
        bounds = slots.where(begins.flatten(), total).sort().values
    else:
        first = begins if real is None else begins & real
        if bool((first.sum(-1) <= 1).all()):
            return None
        bounds = begins.flatten().nonzero()[:, 0]

    return torch.cat([bounds, bounds.new_full((1,), total)])


def _check_rising(numbers: Tensor, begins: Tensor) -> None:
    """Refuse numbers that fall or come back along a row; of 0 and 1 alone that is a hole."""
    before = torch.cat([torch.zeros_like(numbers[:, :1]), numbers.cummax(1).values[:, :-1]], 1)
    fine = ((numbers > before) | ~begins).all()

    if torch.compiler.is_compiling():
        require(fine, _NUMBERS)
    else:
        require(fine, *((_NUMBERS, numbers) if bool((numbers > 1).any()) else (_HOLE,)))


def hinted_bounds(
    bounds: Tensor, longest: int | None, positions: Tensor | None, numbers: Tensor | None, total: int
) -> SequenceLayout:
    """Return the layout of documents whose bounds a collator has given.

    Args:
        bounds: ``[N + 1]`` bounds in the flattened batch.
        longest: Length of the longest document, if given.
        positions: ``[B, T]`` given positions, or None.
        numbers: ``[B, T]`` from :func:`read_numbers`, or None.
        total: B * T.

    Raises:
        ValueError: The bounds are not valid, or positions or mask disagree with them.
    """
    # The bounds themselves.
    message = _BOUNDS.format(total)
    if bounds.dim() != 1 or bounds.shape[0] < 2:
        raise ValueError(f"{message}; got {_shown(bounds)}")
    lengths = bounds.diff()
    require((bounds[0] == 0) & (bounds[-1] == total) & (lengths >= 0).all(), message, bounds)
    if longest is not None:
        longest = int(longest)
        require(lengths.max() <= longest, _LONGEST, lengths)
    elif not torch.compiler.is_compiling():
        longest = int(lengths.max())

    # Mask and positions must say the same.
    layout = SequenceLayout(cu_seqlens=bounds, max_seqlen=longest)
    if numbers is not None:
        require((numbers <= 1).all(), "give documents by cu_seq_lens_q or by their numbers, not by both")
    if positions is not None:
        counted = torch.arange(total, device=bounds.device) - layout.row_starts(total, bounds.device)[0]
        fine = positions.flatten() == counted
        require((fine if numbers is None else fine | (numbers.flatten() == 0)).all(), _AGREE, positions)

    return layout


def _shown(values: Tensor) -> str:
    """Return the first numbers of a tensor as text."""
    if values.dim() != 2:
        values = values.flatten()[None]
    shown = [", ".join(map(str, row[:12])) for row in values[:2].tolist()]
    return "; ".join(f"{row}, ..." if values.shape[1] > 12 else row or "none" for row in shown)
