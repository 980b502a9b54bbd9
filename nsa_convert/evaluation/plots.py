"""The plots of an evaluation, drawn from its JSON: PNG files, and SVG panels for the HTML report."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa_convert.errors import MachineError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Report = Mapping[str, Any]

# Okabe-Ito (the blue a little lighter, for dark pages), told apart by colour-blind readers too.
DENSE, SPARSE, THIRD = "#1F83C6", "#D55E00", "#009E73"
COLOURS = {"dense": DENSE, "sparse": SPARSE}
LINES = {"dense": "-", "sparse": ":"}
INK = "#010203"
"""Stands for the colour of the surrounding text in an SVG."""

PANEL = (3.9, 3.0)
"""Inches: readable on a phone, where panels stand below each other."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes.

    Attributes:
        title: Above it.
        draw: Draws on axes.
    """

    title: str
    draw: Callable[[Axes], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    """Panels that belong together.

    Attributes:
        name: Of the PNG file, without its ending.
        title: What is shown.
        note: How to read it.
        table: The CSV file with the same numbers.
        panels: Side by side.
    """

    name: str
    title: str
    note: str
    table: str
    panels: tuple[Panel, ...]


def require_matplotlib() -> None:
    """Raise MachineError when plots cannot be made."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MachineError(
            "plots need matplotlib", code="CL11", hint="pip install 'nsa-convert[eval]'"
        ) from error


def plots_of(report: Report) -> list[Plot]:
    """Return the plots that a report has data for."""
    drawers = (_needles, _perplexity, _kl, _layers, _gates, _speed, _cache)
    return [plot for drawer in drawers if (plot := drawer(report)) is not None]


def write_plots(report: Report, folder: Path) -> list[Path]:
    """Write every plot as a PNG file.

    Raises:
        MachineError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for plot in plots_of(report):
        # No pyplot, so no global state.
        figure = Figure(figsize=(PANEL[0] * len(plot.panels), PANEL[1] + 0.4), layout="constrained")
        figure.suptitle(plot.title, fontsize=11)
        axes = figure.subplots(1, len(plot.panels), squeeze=False)[0]
        for axis, panel in zip(axes, plot.panels, strict=True):
            axis.set_title(panel.title, fontsize=10)
            panel.draw(axis)
        figure.savefig(folder / f"{plot.name}.png", dpi=120)
        written.append(folder / f"{plot.name}.png")
    return written


def panel_svg(panel: Panel, name: str) -> str:
    """Return a panel as inline SVG whose text takes the colour of the page.

    Args:
        panel: What to draw.
        name: Unique in the page; keeps the ids of several drawings apart.
    """
    import matplotlib
    from matplotlib.figure import Figure

    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    ink = dict.fromkeys(keys, INK)
    style = {**ink, "svg.fonttype": "none", "svg.hashsalt": name, "axes.facecolor": "none"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=PANEL, layout="constrained")
        figure.patch.set_alpha(0)
        axis = figure.subplots()
        panel.draw(axis)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    ids = set(re.findall(r'\bid="([^"]+)"', svg))
    for found in sorted(ids, key=len, reverse=True):
        svg = re.sub(rf'(id="|#){re.escape(found)}(?=["\)])', rf"\g<1>{name}-{found}", svg)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', svg, count=1)


def _texts(report: Report) -> list[dict[str, Any]]:
    return [text for text in report.get("texts", []) if text.get("curve")]


def _mark_budget(axis: Axes, report: Report) -> None:
    if budget := report.get("visible_budget"):
        axis.axvline(budget, color="0.5", linestyle="--", linewidth=1)
        axis.text(
            budget, 0.98, " budget", transform=axis.get_xaxis_transform(), va="top", fontsize=8, color="0.5"
        )


def _context_axis(axis: Axes, label: str = "tokens of context") -> None:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)


def _legend(axis: Axes, **options: Any) -> None:
    axis.legend(fontsize=8, framealpha=0, **options)


def _perplexity(report: Report) -> Plot | None:
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
            _legend(axis)

        return Panel(title=f"{text['name']} ({text['tokens']} tokens)", draw=draw)

    return _plot(
        "perplexity", "Perplexity by position", [panel(text) for text in _texts(report)], "positions.csv",
        "Lower is better. Left of the budget both are the same by construction. Compare lines, not texts.",
    )


def _kl(report: Report) -> Plot | None:
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
            _legend(axis)

        return Panel(title=text["name"], draw=draw)

    return _plot(
        "kl", "Distance from the dense model", [panel(t) for t in _texts(report)], "positions.csv",
        "KL of the next-token distributions, dense from sparse. 0 means the same distribution.",
    )


def _layers(report: Report) -> Plot | None:
    def panel(text: Mapping[str, Any], rows: list[dict[str, Any]]) -> Panel:
        def draw(axis: Axes) -> None:
            x = [row["layer"] for row in rows]
            axis.plot(x, [r["oracle"] for r in rows], color=DENSE, marker=".", label="best possible blocks")
            axis.plot(x, [r["captured"] for r in rows], color=SPARSE, marker=".", label="captured")
            if all(row.get("recall") is not None for row in rows):
                label = "recall of the best blocks"
                axis.plot(x, [r["recall"] for r in rows], color="#CC79A7", linestyle="--", label=label)
            axis.plot(x, [r["density"] for r in rows], color=THIRD, linestyle=":", label="share of keys read")
            axis.set_ylim(0, 1.02)
            axis.set_xlabel("layer")
            axis.grid(alpha=0.3)
            axis.xaxis.get_major_locator().set_params(integer=True)
            _legend(axis, loc="lower right")

        return Panel(title=text["name"], draw=draw)

    panels = []
    for text in report.get("texts", []):
        rows = [row for row in text["layers"] if row["oracle"] is not None]
        panels += [panel(text, rows)] if rows else []
    return _plot(
        "layers", "Dense attention mass captured beyond the budget, by layer", panels, "layers.csv",
        "Captured far below the best possible: the scores choose badly. Best possible low: small budget.",
    )


def _gates(report: Report) -> Plot | None:
    def panel(text: Mapping[str, Any], rows: list[dict[str, Any]]) -> Panel:
        def draw(axis: Axes) -> None:
            names = dict.fromkeys(name for row in rows for name in row["gates"])
            # Lines of their own width and dashes: closed branches lie on one another.
            looks = ((THIRD, 4.0, "-"), (SPARSE, 1.8, "-"), (DENSE, 1.8, "--"))
            for name, (colour, width, dashes) in zip(names, looks, strict=False):
                mine = [row for row in rows if name in row["gates"]]
                x, y = [row["layer"] for row in mine], [row["gates"][name] for row in mine]
                axis.plot(x, y, color=colour, marker=".", linewidth=width, linestyle=dashes, label=name)
            axis.axhline(0, color="0.5", linewidth=0.8)
            axis.set_xlabel("layer")
            axis.set_ylabel("mean gate")
            axis.grid(alpha=0.3)
            axis.xaxis.get_major_locator().set_params(integer=True)
            _legend(axis)

        return Panel(title=text["name"], draw=draw)

    panels = []
    for text in report.get("texts", []):
        rows = [row for row in text["layers"] if row["gates"] is not None]
        rows = list({(row["layer"], str(row.get("heads"))): row for row in rows}.values())  # not each pattern
        panels += [panel(text, rows)] if rows else []
    return _plot(
        "gates", "Branch use by layer", panels, "layers.csv",
        "The mean gate of each branch. Untrained NSA uses the selected branch alone: 1, the others 0.",
    )


def _needles(report: Report) -> Plot | None:
    cases = {mode: rows for mode, rows in report.get("needles", {}).items() if rows}
    both = [row for rows in cases.values() for row in rows]
    lengths, depths = (sorted({row[key] for row in both}) for key in ("length", "depth"))

    def panel(mode: str, rows: Sequence[Mapping[str, Any]]) -> Panel:
        def draw(axis: Axes) -> None:
            import numpy as np

            hits = np.full((len(depths), len(lengths)), np.nan)
            for i, depth in enumerate(depths):
                for j, length in enumerate(lengths):
                    found = [float(r["hit"]) for r in rows if (r["length"], r["depth"]) == (length, depth)]
                    hits[i, j] = sum(found) / len(found) if found else np.nan
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

    return _plot(
        "needles", "Needles found", [panel(mode, cases[mode]) for mode in COLOURS if mode in cases],
        "needles.csv", "Share of hidden numbers read back, teacher-forced. 0 % is the start of the prompt.",
    )


def _speed(report: Report) -> Plot | None:
    rows = report.get("speed", [])

    def panel(title: str, key: str, unit: str) -> Panel:
        def draw(axis: Axes) -> None:
            _lines_by_length(axis, rows, key, unit)

        return Panel(title=title, draw=draw)

    panels = [panel("reading a prompt", "prefill_s", "seconds"), panel("one more token", "decode_ms", "ms")]
    return _plot(
        "speed", "Time against length", panels if rows else [], "speed.csv",
        "Median of the repeats on the machine named above, both attentions in one run. Lower is better.",
    )


def _cache(report: Report) -> Plot | None:
    rows = [{**row, "cache_mb": row["cache_bytes"] / 1e6} for row in report.get("speed", [])]
    panel = Panel(title="cache", draw=lambda axis: _lines_by_length(axis, rows, "cache_mb", "MB"))
    return _plot(
        "cache", "Memory of the cache against length", [panel] if rows else [], "speed.csv",
        "Keys and values of one sequence, and what the method keeps beside them.",
    )


def _lines_by_length(axis: Axes, rows: Sequence[Mapping[str, Any]], key: str, unit: str) -> None:
    for mode in ("dense", "sparse"):
        mine = sorted((row["length"], row[key]) for row in rows if row["attention"] == mode)
        x, y = [a for a, _ in mine], [b for _, b in mine]
        axis.plot(x, y, color=COLOURS[mode], linestyle=LINES[mode], marker=".", label=mode)
    _context_axis(axis, "tokens")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.set_ylabel(unit)
    _legend(axis)


def _plot(name: str, title: str, panels: Sequence[Panel], table: str, note: str) -> Plot | None:
    return Plot(name=name, title=title, note=note, table=table, panels=tuple(panels)) if panels else None
