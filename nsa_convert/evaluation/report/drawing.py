"""Panels and plots: the parts that the drawings of all suites are made of."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa_convert.errors import MachineError
from nsa_convert.extras import pip_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe-Ito (the blue a little lighter, for dark pages): colour-blind readers can tell them apart.
DENSE = "#1F83C6"
SPARSE = "#D55E00"
THIRD = "#009E73"
FOURTH = "#CC79A7"
INK = "#010203"
"""Placeholder for the colour of the surrounding text, replaced in the SVG."""

PANEL = (3.9, 3.0)
"""Width and height in inches: readable on a phone, where panels are below each other."""
ABREAST = 3
"""Largest number of panels side by side in a PNG file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes.

    Attributes:
        title: Title above the axes.
        draw: Draws on the axes it is given.
        height: Height in inches.
    """

    title: str
    draw: Callable[[Axes], None]
    height: float = PANEL[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    """Panels that belong together.

    Attributes:
        name: Name of the PNG file, without its ending.
        title: What is shown.
        note: How to read it.
        table: Name of the CSV file with the same numbers.
        panels: The panels, side by side.
    """

    name: str
    title: str
    note: str
    table: str
    panels: tuple[Panel, ...]


def require_matplotlib() -> None:
    """Raise MachineError (CL11) if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MachineError("plots need matplotlib", code="CL11", hint=pip_line("eval")) from error


def save_plots(plots: Sequence[Plot], folder: Path) -> list[Path]:
    """Write plots as PNG files.

    Raises:
        MachineError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)  # why: the folder of --out, which may not exist yet
    written = []
    for plot in plots:
        height = max(panel.height for panel in plot.panels)
        lines = -(-len(plot.panels) // ABREAST)  # rounded up
        size = (PANEL[0] * min(ABREAST, len(plot.panels)), height * lines + 0.4)
        figure = Figure(figsize=size, layout="constrained")  # no pyplot, so no global state
        figure.suptitle(plot.title, fontsize=11)

        for number, panel in enumerate(plot.panels, 1):
            axis = figure.add_subplot(lines, min(ABREAST, len(plot.panels)), number)
            axis.set_title(panel.title, fontsize=10)
            panel.draw(axis)

        figure.savefig(folder / f"{plot.name}.png", dpi=120)  # why: a plot in the folder of --out
        written.append(folder / f"{plot.name}.png")
    return written


def panel_svg(panel: Panel, name: str) -> str:
    """Return a panel as inline SVG, whose text has the colour of the page.

    Args:
        panel: What to draw.
        name: Unique within the page; prefix of the ids in the drawing.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # Text and lines get the placeholder colour; text stays text, and equal drawings have equal ids.
    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    ink = dict.fromkeys(keys, INK)
    style = {**ink, "svg.fonttype": "none", "svg.hashsalt": name, "axes.facecolor": "none"}

    with matplotlib.rc_context(style):
        figure = Figure(figsize=(PANEL[0], panel.height), layout="constrained")
        figure.patch.set_alpha(0)
        axis = figure.subplots()
        panel.draw(axis)
        out = io.StringIO()
        # why: into memory; the caller puts it into the page
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)

    # The page has its own text colour and fonts, and needs no metadata.
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)

    # Ids of several drawings in one page must differ, and so must the references to them.
    ids = set(re.findall(r'\bid="([^"]+)"', svg))
    for found in sorted(ids, key=len, reverse=True):
        svg = re.sub(rf'(id="|#){re.escape(found)}(?=["\)])', rf"\g<1>{name}-{found}", svg)

    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', svg, count=1)


def legend(axis: Axes, **options: Any) -> None:
    """Draw a legend that hides nothing behind it."""
    axis.legend(fontsize=8, framealpha=0, **options)


def plot_of(name: str, title: str, panels: Sequence[Panel], table: str, note: str) -> Plot | None:
    """Return a plot, or None if there are no panels."""
    return Plot(name=name, title=title, note=note, table=table, panels=tuple(panels)) if panels else None
