"""The plot of a comparison: one line per method, one panel per figure."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nsa_convert.evaluation.report.compare_tables import DISTANCES, distance_of, summary
from nsa_convert.evaluation.report.drawing import DENSE, FOURTH, SPARSE, THIRD, Panel, Plot, legend, plot_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOOKS = ((SPARSE, "o"), (DENSE, "s"), (THIRD, "^"), (FOURTH, "D"), ("0.5", "v"), ("0.2", "P"))
"""Colour and marker of the groups of rows, in order; a group is a budget and a length."""
FIGURES: tuple[tuple[str, str, float, bool], ...] = (
    ("kl", "KL to dense, beyond the budget", 1.0, True),
    ("kl_after", "KL to dense, last tokens", 1.0, True),
    ("found", "needles found", 1.0, False),
    ("nll", "needle: answer NLL", 1.0, True),
    ("density_prompt", "pairs of the prompt", 1.0, False),
    ("density_steps", "keys of a step", 1.0, False),
    ("cache_bytes", "cache, MiB", 2.0**-20, True),
)
"""Key of the figure, title, factor, whether its axis is logarithmic."""
INCHES = 0.25
"""Height of a method's line in inches."""
SPREAD = 0.22
"""Distance between the marks of neighbouring groups, as a share of a line's height."""


def comparison(report: Mapping[str, Any]) -> Plot | None:
    """Return the plot of a comparison, with a mark for each budget and length; None for other reports."""
    rows = report.get("rows", [])
    # The first method is drawn at the top.
    names = list(dict.fromkeys(row["name"] for row in rows))[::-1]

    # Rows without a budget open no group of their own, they join one.
    groups: dict[str, list[Mapping[str, Any]]] = {}

    for row in rows:
        if row["kind"] != "dense" and row["budget"] != "own":
            groups.setdefault(_group(row), [])
    for row in rows:
        for name in _groups_of(row, groups):
            groups[name].append(row)

    # Figures that some row has; of the two distances only the one that all rows have.
    shown = [
        (key, title, factor, log)
        for key, title, factor, log in FIGURES
        if (key not in DISTANCES or key == distance_of(rows))
        and any(summary(row)[key] is not None for row in rows)
    ]

    panels = [
        Panel(
            title=title,
            draw=functools.partial(
                _draw, groups=groups, names=names, key=key, factor=factor, log=log, named=number == 0
            ),
            height=1.1 + INCHES * len(names),
        )
        for number, (key, title, factor, log) in enumerate(shown)
    ]

    return plot_of(
        "compare", "Methods at equal budgets", panels, "compare.csv",
        "Untrained methods on one dense model. KL is the mean over the texts, NLL over the needles; smaller "
        "is better. Pairs and keys are counted, over those of dense attention.",
    )  # fmt: skip


def _group(row: Mapping[str, Any]) -> str:
    """Return the label of a row's group."""
    return f"budget {row['budget']}, {row['length']} tokens"


def _groups_of(row: Mapping[str, Any], groups: Mapping[str, Any]) -> list[str]:
    """Return the groups of a row; rows without a budget belong to the first group of their length."""
    own = _group(row)
    if own in groups:
        return [own]
    return [name for name in groups if name.endswith(f", {row['length']} tokens")][:1]


def _draw(
    axis: Axes,
    groups: Mapping[str, Sequence[Mapping[str, Any]]],
    names: Sequence[str],
    key: str,
    factor: float,
    log: bool,
    named: bool,
) -> None:
    """Draw one figure of all methods.

    Args:
        axis: Axes to draw on.
        groups: Label of a group -> its rows.
        names: Methods, from the bottom up.
        key: Key of the figure in the summary of a row.
        factor: Multiplies the figure.
        log: Use a logarithmic axis; values of 0 are left out then.
        named: Add the legend of the groups.
    """
    # Marks of a group are shifted off the line, so that equal figures do not hide each other.
    for number, (label, rows) in enumerate(groups.items()):
        colour, marker = LOOKS[number % len(LOOKS)]
        places = [(summary(row)[key], names.index(row["name"])) for row in rows]
        off = SPREAD * ((len(groups) - 1) / 2 - number)
        shown = [(x * factor, y + off) for x, y in places if x is not None and (x > 0 or not log)]

        look: dict[str, Any] = {"linestyle": "none", "color": colour, "marker": marker, "markersize": 5}
        axis.plot([x for x, _ in shown], [y for _, y in shown], alpha=0.85, label=label, **look)

    # Figures that are not logarithmic are shares, from 0 to 1.
    if log:
        from matplotlib.ticker import LogLocator, NullFormatter

        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.set_xlim(-0.05, 1.05)

    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(alpha=0.3)
    if named:
        legend(axis, loc="upper center", bbox_to_anchor=(0.5, -0.08))
