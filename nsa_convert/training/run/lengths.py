"""How much of what a stage reads stands beyond the visible budget: the tokens that teach selection."""

from __future__ import annotations

import dataclasses
from itertools import islice

from nsa_convert.training.data.rows import PackedRows

SAMPLE_TOKENS = 1 << 17
"""Tokens that are read to estimate it; at least SAMPLE_ROWS rows."""
SAMPLE_ROWS = 8
SAMPLE_LANES = 4
"""Lanes that are read: a stream opens a shard for each of them."""
ENOUGH = 0.25
"""Below this share of tokens beyond the budget a stage teaches little about selection."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """What a sample of a stage's rows says of its documents.

    Attributes:
        budget: Keys that the sparse layer with the smallest visible budget shows.
        beyond: Share of the tokens that stand beyond it in their document, or in its part in a row.
        tokens: Tokens that were read of each document, on average, for each source; of a document longer than
            the sample less than it has.
        passed: Share of the documents of each source that min_tokens and max_tokens leave out.
    """

    budget: int
    beyond: float
    tokens: tuple[float, ...]
    passed: tuple[float, ...]

    def to_text(self) -> str:
        """Return one line about the lengths."""
        means = ", ".join(f"{mean:,.0f}" for mean in self.tokens)
        text = f"{self.beyond:.0%} of the tokens are beyond the visible budget of {self.budget:,}; of a "
        text += f"document {means} tokens are read on average"
        if any(self.passed):
            text += f", {', '.join(f'{share:.0%}' for share in self.passed)} of the documents are passed over"
        return text

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is probably not intended."""
        if self.beyond >= ENOUGH:
            return ()
        return (
            f"only {self.beyond:.0%} of the tokens are beyond the visible budget of {self.budget:,}: nothing "
            "is hidden from the others, and they teach nothing about selection; take longer documents "
            "(min_tokens of a source leaves the short ones out) or longer rows",
        )


def sample_lengths(rows: PackedRows, budget: int, tokens: int) -> Lengths:
    """Read some rows of a stage and return what they say.

    Args:
        rows: Rows of the stage, at their beginning.
        budget: The smallest visible budget of the sparse layers.
        tokens: Budget of the stage: no more is read.
    """
    count = max(SAMPLE_ROWS, SAMPLE_TOKENS // rows.seq_len)
    count = max(1, min(count, tokens // rows.seq_len))
    beyond = sum(
        sum(position >= budget for position in row["position_ids"]) for row in islice(iter(rows), count)
    )

    # Every source, over the lanes that were read; a document that is not read to its end counts as begun.
    cursors = [[lane.cursors[i] for lane in rows.open_lanes()] for i in range(len(rows.sources))]
    seen = [sum(cursor.documents for cursor in one) for one in cursors]
    left = [sum(cursor.skipped for cursor in one) for one in cursors]
    read = [sum(cursor.emitted for cursor in one) for one in cursors]
    return Lengths(
        budget=budget,
        beyond=beyond / (count * rows.seq_len),
        tokens=tuple(x / max(1, n) for x, n in zip(read, seen, strict=True)),
        passed=tuple(x / max(1, x + n) for x, n in zip(left, seen, strict=True)),
    )
