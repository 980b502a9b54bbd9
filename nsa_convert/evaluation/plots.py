"""Plots of an evaluation as PNG files; the numbers behind them are in the CSV files beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa_convert.errors import MachineError
from nsa_convert.evaluation.report import QuickReport, TextResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito, told apart by colour-blind readers too.
DENSE, SPARSE, THIRD = "#0072B2", "#D55E00", "#009E73"


def require_matplotlib() -> None:
    """Raise MachineError when plots cannot be made."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MachineError(
            "plots need matplotlib", code="CL11", hint="pip install 'nsa-convert[eval]'"
        ) from error


def write_plots(report: QuickReport, folder: Path) -> list[Path]:
    """Write ``perplexity.png``, ``kl.png`` and, where patterns hid something, ``layers.png``.

    Raises:
        MachineError: matplotlib is not installed.
    """
    require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"perplexity.png": _perplexity, "kl.png": _kl}
    if any(text.layers for text in report.texts):
        figures["layers.png"] = _layers
    written = []
    for name, draw in figures.items():
        figure = draw(report)
        figure.savefig(folder / name, dpi=120)
        written.append(folder / name)
    return written


def _panels(texts: Sequence[TextResult], title: str) -> tuple[Figure, list[Axes]]:
    """Return a figure with one panel per text side by side; no pyplot, so no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 4.5 * len(texts), 3.8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = list(figure.subplots(1, len(texts), squeeze=False)[0])
    for axis, text in zip(axes, texts, strict=True):
        axis.set_title(f"{text.text.name} ({text.tokens} tokens)", fontsize=10)
        axis.grid(alpha=0.3)
    return figure, axes


def _mark_budget(axis: Axes, report: QuickReport) -> None:
    if report.visible_budget:
        axis.axvline(report.visible_budget, color="0.4", linestyle="--", linewidth=1)
        axis.text(
            report.visible_budget, 0.98, " budget", transform=axis.get_xaxis_transform(), va="top",
            fontsize=8, color="0.3",
        )


def _positions(axis: Axes, curve: list[dict[str, Any]]) -> list[int]:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set_xlabel("tokens of context")
    return [row["context_end"] for row in curve]


def _perplexity(report: QuickReport) -> Figure:
    figure, axes = _panels(report.texts, "Perplexity by position")
    for axis, text in zip(axes, report.texts, strict=True):
        curve = text.curve()
        x = _positions(axis, curve)
        dense, sparse = ([row[key] for row in curve] for key in ("dense_ppl", "sparse_ppl"))
        axis.plot(x, dense, color=DENSE, marker=".", label="dense")
        axis.plot(x, sparse, color=SPARSE, marker=".", linestyle=":", label="sparse")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.set_ylabel("perplexity")
        _mark_budget(axis, report)
        axis.legend(fontsize=8)
    return figure


def _kl(report: QuickReport) -> Figure:
    figure, axes = _panels(report.texts, "KL(dense || sparse) by position, nats per token")
    for axis, text in zip(axes, report.texts, strict=True):
        curve = text.curve()
        x = _positions(axis, curve)
        axis.plot(x, [r["kl_mean"] for r in curve], color=SPARSE, marker=".", label="mean")
        axis.plot(x, [r["kl_p95"] for r in curve], color=THIRD, linestyle=":", label="95th percentile")
        axis.set_ylim(bottom=0)
        axis.set_ylabel("KL")
        _mark_budget(axis, report)
        axis.legend(fontsize=8)
    return figure


def _layers(report: QuickReport) -> Figure:
    texts = [text for text in report.texts if text.layers]
    figure, axes = _panels(texts, "Dense attention mass captured beyond the budget, by layer")
    for axis, text in zip(axes, texts, strict=True):
        rows = [row for row in text.layers if row.oracle is not None]
        x = [row.layer for row in rows]
        axis.plot(x, [row.oracle for row in rows], color=DENSE, marker=".", label="oracle, same budget")
        axis.plot(x, [row.captured for row in rows], color=SPARSE, marker=".", label="captured")
        axis.plot(x, [row.density for row in rows], color=THIRD, linestyle=":", label="density")
        axis.set_ylim(0, 1.02)
        axis.set_xlabel("layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8, loc="lower right")
    return figure
