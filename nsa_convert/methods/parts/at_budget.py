"""What a budget of so many tokens means for each method: the settings under which methods are compared.

A budget is the number of keys a query sees. Methods that keep a number of tokens or blocks get it exactly;
methods whose choice adapts to the inputs are searched for the setting that keeps as many pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nsa_convert.errors import ConfigError

BLOCK = 64
"""Tokens of a block of the methods that keep a few larger ones."""
SMALL_BLOCK = 16
"""Tokens of a block of SSA and of a page of Quest."""
SINKS = 4
PAIRED_PREFILL = "xattention"
PAIRED_DECODE = "quest"
"""The methods that ``phases`` is compared with: one for each phase."""


def fixed_settings(method: str, budget: int) -> dict[str, Any]:
    """Return the settings under which a query sees ``budget`` keys.

    Args:
        method: One of :data:`FIXED`.
        budget: Tokens.

    Raises:
        ConfigError: The budget is no multiple of the method's blocks.
    """
    return FIXED[method](budget)


def paired(budget: int, prefill: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of ``phases``, given those found for the method that reads the prompt."""
    return {
        "prefill": {"method": PAIRED_PREFILL, **prefill},
        "decode": {"method": PAIRED_DECODE, **fixed_settings(PAIRED_DECODE, budget)},
    }


def _parts(budget: int, size: int) -> int:
    """Return the budget in parts of a size."""
    if budget < size or budget % size:
        raise ConfigError(
            f"a budget of {budget} tokens is no multiple of {size}",
            code="CF22",
            found=str(budget),
            expected=f"a multiple of {size}",
        )
    return budget // size


def _blocks(budget: int) -> dict[str, Any]:
    return {"block_size": BLOCK, "num_blocks": _parts(budget, BLOCK)}


def _small_blocks(budget: int) -> dict[str, Any]:
    return {"block_size": SMALL_BLOCK, "num_blocks": _parts(budget, SMALL_BLOCK)}


def _band(budget: int) -> dict[str, Any]:
    return {"num_sinks": SINKS, "window_size": budget - SINKS}


def _infllm_v2(budget: int) -> dict[str, Any]:
    """Half of the budget is window, half is chosen."""
    half = _parts(budget, 2 * BLOCK)
    return {"block_size": BLOCK, "topk": half, "window_size": half * BLOCK}


def _infllm(budget: int) -> dict[str, Any]:
    """Half of the budget is window, a block of it the first tokens, the rest is looked up."""
    half = _parts(budget, 2 * BLOCK)
    return {
        "num_sinks": BLOCK,
        "window_size": half * BLOCK,
        "block_size": BLOCK,
        "num_blocks": half - 1,
        "query_block": 2 * BLOCK,
    }


def _h2o(budget: int) -> dict[str, Any]:
    half = _parts(budget, 2)
    return {"num_heavy": half, "num_recent": half}


FIXED: dict[str, Callable[[int], dict[str, Any]]] = {
    "nsa": lambda budget: {**_blocks(budget), "window_size": BLOCK},
    "ssa": _small_blocks,
    "moba": _blocks,
    "infllm_v2": _infllm_v2,
    "dsa": lambda budget: {"num_tokens": budget},
    "msa": _blocks,
    "streaming": _band,
    "quest": _small_blocks,
    "h2o": _h2o,
    "razor": lambda budget: {**_band(budget), "window_share": 0},
    "infllm": _infllm,
    "tri_shape": lambda budget: {**_band(budget), "num_last": 100},
}
"""Methods that keep a number of tokens or blocks -> settings at a budget. NSA's window, which is dense
attention's equal only after training, is kept at its least."""

SEARCHED: dict[str, Callable[[float, int], dict[str, Any]]] = {
    "xattention": lambda x, length: {"threshold": x, "stride": 8},
    "flexprefill": lambda x, length: {"gamma": x, "min_budget": 128},
    "spargeattn": lambda x, length: {"top": x},
    "minference": lambda x, length: {"vertical_size": 64, "slash_size": max(100, round(x * length))},
}
"""Methods whose density follows from the inputs -> settings for a number in 0 .. 1, larger for more pairs,
and the length of the prompt."""
