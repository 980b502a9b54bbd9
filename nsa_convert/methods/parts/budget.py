"""The block budget that methods share: settings, checks, and the rule the kernels take."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from nsa_convert.errors import ConfigError
from nsa_convert.patterns import BlockTopK
from nsa_convert.settings import at_least, raise_problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockBudget:
    """A number of equal blocks per query, some of them forced.

    Attributes:
        block_size: Tokens in a block.
        num_blocks: Blocks a query sees, forced ones included.
        num_sink_blocks: First blocks always selected.
        num_local_blocks: Last blocks always selected, the query's own included.
    """

    block_size: int
    num_blocks: int
    num_sink_blocks: int = 1
    num_local_blocks: int = 1
    compared_block = 64
    """Tokens of a block when methods are compared; no annotation, so that it is no setting."""

    @classmethod
    def at_budget(cls, budget: int) -> dict[str, Any]:
        """Return the settings under which a query sees ``budget`` keys."""
        return {"block_size": cls.compared_block, "num_blocks": parts_of(budget, cls.compared_block)}

    def __post_init__(self) -> None:
        raise_problems([*self.budget_problems(), *self.problems()], code="CF22")

    def problems(self) -> list[str]:
        """Return what is wrong with the settings beside the budget."""
        return []

    def budget_problems(self) -> list[str]:
        """Return what is wrong with the budget."""
        problems = at_least(1, block_size=self.block_size) + at_least(0, num_sink_blocks=self.num_sink_blocks)

        if self.num_local_blocks < 1:
            problems.append(
                "num_local_blocks must be >= 1 (a query always sees its own block), "
                f"got {self.num_local_blocks}"
            )

        forced = self.num_sink_blocks + self.num_local_blocks
        if self.num_blocks < forced:
            problems.append(
                f"num_blocks {self.num_blocks} is smaller than the forced blocks "
                f"({self.num_sink_blocks} sink + {self.num_local_blocks} local)"
            )

        return problems

    @property
    def rule(self) -> BlockTopK:
        """The block budget as the kernels take it."""
        return self.rule_with("sum")

    def rule_with(self, reduce: str, per_head: bool = False) -> BlockTopK:
        """Return the block budget as one way to choose by cells; torch.compile traces it."""
        return BlockTopK(
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            num_sink_blocks=self.num_sink_blocks,
            num_local_blocks=self.num_local_blocks,
            reduce=reduce,
            per_head=per_head,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadBudget(BlockBudget):
    """A block budget of each query head.

    Attributes:
        share: ``"none"`` lets every query head choose; ``"group"`` sums the scores of the heads that share
            a key head, which costs one list per key head.
    """

    share: Literal["none", "group"] = "none"

    @property
    def rule(self) -> BlockTopK:
        """The block budget as the kernels take it."""
        return self.rule_with("sum", per_head=self.share == "none")


def widened(rule: BlockTopK, tokens: int | None) -> BlockTopK:
    """Return a block budget that covers at least so many tokens; None leaves it as it is."""
    if tokens is None:
        return rule
    return dataclasses.replace(rule, num_blocks=max(rule.num_blocks, -(-tokens // rule.block_size)))


def band_of(budget: int) -> dict[str, Any]:
    """Return the first tokens and the window under which a query sees ``budget`` keys."""
    return {"num_sinks": 4, "window_size": budget - 4}


def parts_of(budget: int, size: int) -> int:
    """Return a budget of tokens in parts of a size.

    Raises:
        ConfigError: The budget is no multiple of the size.
    """
    if budget < size or budget % size:
        raise ConfigError(
            f"a budget of {budget} tokens is no multiple of {size}",
            code="CF22",
            found=str(budget),
            expected=f"a multiple of {size}",
        )
    return budget // size
