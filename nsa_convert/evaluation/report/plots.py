"""The plots of an evaluation, drawn from its JSON: PNG files, and SVG for the HTML report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa_convert.evaluation.report.compare_plots import comparison
from nsa_convert.evaluation.report.drawing import (
    DENSE,
    FOURTH,
    SPARSE,
    THIRD,
    Panel,
    Plot,
    legend,
    plot_of,
    save_plots,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Report = Mapping[str, Any]

COLOURS = {"dense": DENSE, "sparse": SPARSE}
LINES = {"dense": "-", "sparse": ":"}


def plots_of(report: Report) -> list[Plot]:
    """Return the plots for which a report has data."""
    drawers = (_needles, _perplexity, _kl, _layers, _gates, _speed, _cache, comparison)
    return [plot for drawer in drawers if (plot := drawer(report)) is not None]


def write_plots(report: Report, folder: Path) -> list[Path]:
    """Write every plot as a PNG file.

    Raises:
        MachineError: matplotlib is not installed.
    """
    return save_plots(plots_of(report), folder)


def _texts(report: Report) -> list[dict[str, Any]]:
    """Return the texts that have a curve."""
    return [text for text in report.get("texts", []) if text.get("curve")]


def _mark_budget(axis: Axes, report: Report) -> None:
    """Draw a vertical line at the visible budget."""
    if budget := report.get("visible_budget"):
        axis.axvline(budget, color="0.5", linestyle="--", linewidth=1)
        axis.text(
            budget, 0.98, " budget", transform=axis.get_xaxis_transform(), va="top", fontsize=8, color="0.5"
        )


def _context_axis(axis: Axes, label: str = "tokens of context") -> None:
    """Give an axis of token counts a logarithmic scale."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)


def _perplexity(report: Report) -> Plot | None:
    """Return the perplexity of both kinds of attention against position, one panel per text."""

    def panel(text: Mapping[str, Any]) -> Panel:
        def draw(axis: Axes) -> None:
            x = [row["context_end"] for row in text["curve"]]
            for mode in ("dense", "sparse"):
                values = [row[f"{mode}_ppl"] for row in text["curve"]]
                axis.plot(x, values, color=COLOURS[mode], linestyle=LINES[mode], marker=".", label=mode)

            _context_axis(axis)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.set_ylabel("perplexity")
            _mark_budget(axis, report)
            legend(axis)

        return Panel(title=f"{text['name']} ({text['tokens']} tokens)", draw=draw)

    return plot_of(
        "perplexity",
        "Perplexity by position",
        [panel(text) for text in _texts(report)],
        "positions.csv",
        "Lower is better. Left of the budget both are the same by construction. Compare lines, not texts.",
    )


def _kl(report: Report) -> Plot | None:
    """Return mean and 95th percentile of the KL against position, one panel per text."""

    def panel(text: Mapping[str, Any]) -> Panel:
        def draw(axis: Axes) -> None:
            x = [row["context_end"] for row in text["curve"]]
            axis.plot(x, [r["kl_mean"] for r in text["curve"]], color=SPARSE, marker=".", label="mean")
            high = [r["kl_p95"] for r in text["curve"]]
            axis.plot(x, high, color=THIRD, linestyle=":", label="95th percentile")

            _context_axis(axis)
            axis.set_ylim(bottom=0)
            axis.set_ylabel("KL, nats per token")
            _mark_budget(axis, report)
            legend(axis)

        return Panel(title=text["name"], draw=draw)

    return plot_of(
        "kl",
        "Distance from the dense model",
        [panel(t) for t in _texts(report)],
        "positions.csv",
        "KL of the next-token distributions, dense from sparse. 0 means the same distribution.",
    )


def _layers(report: Report) -> Plot | None:
    """Return captured mass, oracle, recall and density of each layer, one panel per text."""

    def panel(text: Mapping[str, Any], rows: list[dict[str, Any]]) -> Panel:
        def draw(axis: Axes) -> None:
            x = [row["layer"] for row in rows]
            axis.plot(x, [r["oracle"] for r in rows], color=DENSE, marker=".", label="best possible blocks")
            axis.plot(x, [r["captured"] for r in rows], color=SPARSE, marker=".", label="captured")
            # Recall is not known for every pattern.
            if all(row.get("recall") is not None for row in rows):
                label = "recall of the best blocks"
                axis.plot(x, [r["recall"] for r in rows], color=FOURTH, linestyle="--", label=label)
            axis.plot(x, [r["density"] for r in rows], color=THIRD, linestyle=":", label="share of keys read")

            axis.set_ylim(0, 1.02)
            axis.set_xlabel("layer")
            axis.grid(alpha=0.3)
            axis.xaxis.get_major_locator().set_params(integer=True)
            legend(axis, loc="lower right")

        return Panel(title=text["name"], draw=draw)

    # Rows with an oracle: those of patterns that choose keys.
    panels = []
    for text in report.get("texts", []):
        rows = [row for row in text["layers"] if row["oracle"] is not None]
        panels += [panel(text, rows)] if rows else []

    return plot_of(
        "layers",
        "Dense attention mass captured beyond the budget, by layer",
        panels,
        "layers.csv",
        "Captured far below the best possible: the scores choose badly. Best possible low: small budget.",
    )


def _gates(report: Report) -> Plot | None:
    """Return the mean gate of each branch against the layer, one panel per text."""

    def panel(text: Mapping[str, Any], rows: list[dict[str, Any]]) -> Panel:
        def draw(axis: Axes) -> None:
            names = dict.fromkeys(name for row in rows for name in row["gates"])
            # Each line has its own width and dashes: those of closed branches lie on each other.
            looks = ((THIRD, 4.0, "-"), (SPARSE, 1.8, "-"), (DENSE, 1.8, "--"))
            for name, (colour, width, dashes) in zip(names, looks, strict=False):
                mine = [row for row in rows if name in row["gates"]]
                x = [row["layer"] for row in mine]
                y = [row["gates"][name] for row in mine]
                axis.plot(x, y, color=colour, marker=".", linewidth=width, linestyle=dashes, label=name)

            axis.axhline(0, color="0.5", linewidth=0.8)
            axis.set_xlabel("layer")
            axis.set_ylabel("mean gate")
            axis.grid(alpha=0.3)
            axis.xaxis.get_major_locator().set_params(integer=True)
            legend(axis)

        return Panel(title=text["name"], draw=draw)

    # The gates are the same in the rows of all patterns of a layer: one row for each is enough.
    panels = []
    for text in report.get("texts", []):
        rows = [row for row in text["layers"] if row["gates"] is not None]
        rows = list({(row["layer"], str(row.get("heads"))): row for row in rows}.values())
        panels += [panel(text, rows)] if rows else []

    return plot_of(
        "gates",
        "Branch use by layer",
        panels,
        "layers.csv",
        "The mean gate of each branch. Untrained NSA uses the selected branch alone: 1, the others 0.",
    )


def _needles(report: Report) -> Plot | None:
    """Return the share of needles found by length and depth, one panel per kind of attention."""
    cases = {mode: rows for mode, rows in report.get("needles", {}).items() if rows}
    both = [row for rows in cases.values() for row in rows]
    lengths, depths = (sorted({row[key] for row in both}) for key in ("length", "depth"))

    def panel(mode: str, rows: Sequence[Mapping[str, Any]]) -> Panel:
        def draw(axis: Axes) -> None:
            import numpy as np

            # [depths, lengths] shares of hits; NaN where there is no case.
            hits = np.full((len(depths), len(lengths)), np.nan)
            for i, depth in enumerate(depths):
                for j, length in enumerate(lengths):
                    found = [float(r["hit"]) for r in rows if (r["length"], r["depth"]) == (length, depth)]
                    hits[i, j] = sum(found) / len(found) if found else np.nan

            # The number of a cell is white on the dark ends of the colour scale.
            axis.pcolormesh(hits, cmap="RdYlBu", vmin=0, vmax=1, edgecolors="0.5", linewidth=0.6)
            for (i, j), value in np.ndenumerate(hits):
                dark = value < 0.2 or value > 0.85
                text = "" if np.isnan(value) else f"{value:.0%}"
                colour = "white" if dark else "black"
                axis.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=8, color=colour)

            axis.set_xticks(np.arange(len(lengths)) + 0.5, [str(length) for length in lengths])
            axis.set_yticks(np.arange(len(depths)) + 0.5, [f"{depth:.0%}" for depth in depths])
            axis.invert_yaxis()
            axis.set_xlabel("prompt length, tokens")
            axis.set_ylabel("depth of the needle")

        return Panel(title=mode, draw=draw)

    return plot_of(
        "needles",
        "Needles found",
        [panel(mode, cases[mode]) for mode in COLOURS if mode in cases],
        "needles.csv",
        "Share of hidden numbers read back, teacher-forced. 0 % is the start of the prompt.",
    )


def _speed(report: Report) -> Plot | None:
    """Return times against length: reading a prompt, and one decoding step."""
    rows = report.get("speed", [])

    def panel(title: str, key: str, unit: str) -> Panel:
        def draw(axis: Axes) -> None:
            _lines_by_length(axis, rows, key, unit)

        return Panel(title=title, draw=draw)

    panels = [panel("reading a prompt", "prefill_s", "seconds"), panel("one more token", "decode_ms", "ms")]
    return plot_of(
        "speed",
        "Time against length",
        panels if rows else [],
        "speed.csv",
        "Median of the repeats on the machine named above, both attentions in one run. Lower is better.",
    )


def _cache(report: Report) -> Plot | None:
    """Return the size of the cache against length."""
    rows = [{**row, "cache_mb": row["cache_bytes"] / 1e6} for row in report.get("speed", [])]
    panel = Panel(title="cache", draw=lambda axis: _lines_by_length(axis, rows, "cache_mb", "MB"))
    return plot_of(
        "cache",
        "Memory of the cache against length",
        [panel] if rows else [],
        "speed.csv",
        "Keys and values of one sequence, and what the method keeps beside them.",
    )


def _lines_by_length(axis: Axes, rows: Sequence[Mapping[str, Any]], key: str, unit: str) -> None:
    """Draw a figure of both kinds of attention against length, on logarithmic axes."""
    for mode in ("dense", "sparse"):
        mine = sorted((row["length"], row[key]) for row in rows if row["attention"] == mode)
        x = [a for a, _ in mine]
        y = [b for _, b in mine]
        axis.plot(x, y, color=COLOURS[mode], linestyle=LINES[mode], marker=".", label=mode)

    _context_axis(axis, "tokens")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.set_ylabel(unit)
    legend(axis)
