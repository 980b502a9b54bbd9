"""What may be forgotten: which cached tokens of each key/value head stay after a call.

What a method *reads* is its pattern; what it *keeps* is its policy. A cache that has forgotten tokens is a
shorter sequence: the kept tokens of a head in their order, the rows of a batch aligned at the end. All heads
of a row keep equally many tokens, so attention over such a cache is attention over a padded batch: it needs
no kernel of its own. How many tokens a row keeps follows from how many it has seen: beams can be reordered
and rows dropped without any other bookkeeping.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from nsa_convert.config import AttentionGeometry
from nsa_convert.kernels.common.fetch import fetch_runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachePolicy:
    """Decides what stays; a subclass implements :meth:`size` and :meth:`keep`.

    A method may remember more than keys and values from call to call: it puts tensors into the ``memory`` of
    its inputs, batch first. Entries named in ``per_token`` are ``[B, N, h]``, one row for each token of the
    call's keys, and lose the rows of the tokens that leave.
    """

    per_token: ClassVar[tuple[str, ...]] = ()
    asks_attention: ClassVar[bool] = False
    """Whether what is remembered comes from attention, so that cached keys and values do not tell it."""

    def size(self, seen: int) -> int:
        """Return how many of ``seen`` tokens stay; it never falls, and rises by at most one per token."""
        raise NotImplementedError

    def keep(self, memory: Mapping[str, Tensor], start: Tensor, stay: Tensor, num_keys: int) -> Tensor:
        """Choose what stays.

        Args:
            memory: What the method remembers.
            start: ``[B]`` int64, slot of each row's first token; what lies before is no token.
            stay: ``[B]`` int64, how many tokens of each row stay.
            num_keys: N, slots.

        Returns:
            bool ``[B, N, H or 1]``, True for exactly ``stay`` tokens of each row and head.
        """
        raise NotImplementedError

    def fold(self, memory: Mapping[str, Tensor], k: Tensor, v: Tensor, leaving: Tensor) -> dict[str, Tensor]:
        """Return the memory after the tokens of ``leaving`` (bool ``[B, N, H or 1]``) left."""
        return dict(memory)

    def numbers(self, seen: int, geometry: AttentionGeometry) -> int:
        """Return how many float32 numbers of memory a row of one layer has beside keys and values."""
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepRecent(CachePolicy):
    """Keeps the first tokens of a row and the last ones.

    Attributes:
        num_sinks: Leading tokens that stay.
        num_recent: Trailing tokens that stay.
    """

    num_sinks: int
    num_recent: int

    def size(self, seen: int) -> int:
        """Return ``num_sinks + num_recent``, or all tokens while there are fewer."""
        return min(seen, self.num_sinks + self.num_recent)

    def keep(self, memory: Mapping[str, Tensor], start: Tensor, stay: Tensor, num_keys: int) -> Tensor:
        """Keep the first ``num_sinks`` tokens of each row and its last ones."""
        place = torch.arange(num_keys, device=start.device) - start[:, None]  # [B, N]
        recent = num_keys - start - (stay - self.num_sinks).clamp(min=0)  # the window begins here
        return ((place >= 0) & ((place < self.num_sinks) | (place >= recent[:, None])))[..., None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepAll(CachePolicy):
    """Keeps every token, for a method that remembers more than keys and values."""

    asks_attention: ClassVar[bool] = True

    def size(self, seen: int) -> int:
        """Return ``seen``."""
        return seen


def forget(
    policy: CachePolicy,
    k: Tensor,
    v: Tensor,
    memory: Mapping[str, Tensor],
    held: Sequence[int],
    stay: Sequence[int],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Drop the tokens that a policy gives up.

    Args:
        policy: Decides.
        k: ``[B, N, H, D]``, each row's tokens at the end.
        v: ``[B, N, H, D]``.
        memory: What the method remembers.
        held: Tokens of each row in k.
        stay: Tokens of each row that stay.

    Returns:
        Keys and values ``[B, max(stay), H, D]`` in new storage, views of ``[B, H, max(stay), D]``, and the
        memory.
    """
    length = k.shape[1]
    size = max(stay)
    rows = torch.tensor([held, stay], device=k.device)
    start = length - rows[0]

    # Nothing leaves: only slots in front of the longest row are cut off.
    if list(held) == list(stay):
        trimmed = {name: x[:, length - size :] for name, x in _of(memory, policy)}
        return k[:, length - size :], v[:, length - size :], {**memory, **trimmed}

    # Choose what stays, and let the policy fold what leaves into its memory.
    kept = policy.keep(memory, start, rows[1], length)  # [B, N, h]
    leaving = ~kept & (torch.arange(length, device=k.device) >= start[:, None])[..., None]
    memory = policy.fold(memory, k, v, leaving)
    # A stable sort keeps the order of the tokens; a row with fewer has others in front, where no one looks.
    slots = kept.to(torch.uint8).sort(dim=1, stable=True).indices[:, length - size :]
    numbers = {name: x.gather(1, slots.expand(-1, -1, x.shape[2])) for name, x in _of(memory, policy)}

    k, v = _take(k, v, slots)
    return k, v, {**memory, **numbers}


def _of(memory: Mapping[str, Tensor], policy: CachePolicy) -> list[tuple[str, Tensor]]:
    return [(name, memory[name]) for name in policy.per_token if name in memory]


def _take(k: Tensor, v: Tensor, slots: Tensor) -> list[Tensor]:
    """Return tokens ``slots [B, M, H or 1]`` of ``k, v [B, N, H, D]``, each head's together in memory."""
    rows, heads = (torch.arange(size, device=k.device) for size in (k.shape[0], k.shape[2]))
    slots = slots.transpose(1, 2).expand(-1, k.shape[2], -1)  # [B, H, M]

    taken = fetch_runs(k, v, rows[:, None, None], heads[:, None], slots, 1)  # [B, H, M, 1, D]
    return [x[..., 0, :].transpose(1, 2) for x in taken]
