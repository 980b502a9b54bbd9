"""Checks that methods with a block budget share."""

from __future__ import annotations

from typing import Any


def block_rule_problems(settings: Any) -> list[str]:
    """Return what is wrong with ``block_size``, ``num_blocks`` and the forced blocks of the settings."""
    problems = []
    if settings.block_size < 1:
        problems.append(f"block_size must be >= 1, got {settings.block_size}")
    if settings.num_sink_blocks < 0:
        problems.append(f"num_sink_blocks must be >= 0, got {settings.num_sink_blocks}")
    if settings.num_local_blocks < 1:
        problems.append(
            "num_local_blocks must be >= 1 (a query always sees its own block), "
            f"got {settings.num_local_blocks}"
        )
    forced = settings.num_sink_blocks + settings.num_local_blocks
    if settings.num_blocks < forced:
        problems.append(
            f"num_blocks {settings.num_blocks} is smaller than the forced blocks "
            f"({settings.num_sink_blocks} sink + {settings.num_local_blocks} local)"
        )
    return problems
