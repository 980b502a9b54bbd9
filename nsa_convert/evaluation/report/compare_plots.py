"""The plot of a comparison: methods below each other, one panel for each figure."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nsa_convert.evaluation.report.compare_tables import DISTANCES, distance_of, summary
from nsa_convert.evaluation.report.drawing import DENSE, FOURTH, SPARSE, THIRD, Panel, Plot, legend, plot_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOOKS = ((SPARSE, "o"), (DENSE, "s"), (THIRD, "^"), (FOURTH, "D"), ("0.5", "v"), ("0.2", "P"))
"""Colour and marker of the groups of rows, in their order."""
FIGURES: tuple[tuple[str, str, float, bool], ...] = (
    ("kl", "KL to dense, beyond the budget", 1.0, True),
    ("kl_after", "KL to dense, last tokens", 1.0, True),
    ("found", "needles found", 1.0, False),
    ("nll", "needle: answer NLL", 1.0, True),
    ("density_prompt", "pairs of the prompt", 1.0, False),
    ("density_steps", "keys of a step", 1.0, False),
    ("cache_bytes", "cache, MiB", 2.0**-20, True),
)
"""Figure, title, factor, whether on a logarithmic axis."""
INCHES = 0.25
"""Height of a line."""
SPREAD = 0.22
"""Part of a line between the marks of neighbouring groups."""


def comparison(report: Mapping[str, Any]) -> Plot | None:
    """Return the plot of a comparison: a mark for each budget and length, None for other reports."""
    rows = report.get("rows", [])
    names = list(dict.fromkeys(row["name"] for row in rows))[::-1]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] != "dense" and row["budget"] != "own":
            groups.setdefault(_group(row), [])
    for row in rows:
        for name in _groups_of(row, groups):
            groups[name].append(row)
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
    return f"budget {row['budget']}, {row['length']} tokens"


def _groups_of(row: Mapping[str, Any], groups: Mapping[str, Any]) -> list[str]:
    """Return the groups of a row; what has no budget belongs to the first of its length."""
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
    for number, (label, rows) in enumerate(groups.items()):
        colour, marker = LOOKS[number % len(LOOKS)]
        places = [(summary(row)[key], names.index(row["name"])) for row in rows]
        off = SPREAD * ((len(groups) - 1) / 2 - number)  # so that equal figures do not hide each other
        shown = [(x * factor, y + off) for x, y in places if x is not None and (x > 0 or not log)]
        look: dict[str, Any] = {"linestyle": "none", "color": colour, "marker": marker, "markersize": 5}
        axis.plot([x for x, _ in shown], [y for _, y in shown], alpha=0.85, label=label, **look)
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
