"""The picture of the README: perplexity and time by context, dense and sparse, from what was measured.

    python -m benchmarks.overview docs/overview.png

The left half reads the tables of the report that the published card shows, the right half the prefill
results. Nothing is measured here.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import re
import sys
from pathlib import Path

from nsa_convert.evaluation.report.drawing import DENSE, SPARSE

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "model_cards/SmolLM2-135M-Instruct-NSA/evaluation/long/report.html"
TIMES = [ROOT / f"benchmarks/results/{name}.csv" for name in ("prefill_14-2-64", "prefill_64k_14-2-64")]
BUDGET = 1024
MARKS = {"code": "o", "prose": "s"}


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Perplexity of the predictions whose context has ``first`` to ``last`` tokens."""

    first: int
    last: int
    dense: float
    sparse: float


def read_quality(report: Path) -> dict[str, list[Bucket]]:
    """Return text -> perplexities by context, from the tables of an evaluation report."""
    found = {}
    for name, body in re.findall(r"<h2>(\w+): \d+ tokens</h2>(.*?)</table>", report.read_text(), re.DOTALL):
        rows = re.findall(r"<tr><td>(\d+)-(\d+)</td><td>([\d.]+)</td><td>([\d.]+)</td>", body)
        found[name] = [Bucket(int(a), int(b), float(dense), float(sparse)) for a, b, dense, sparse in rows]
    assert found, f"{report} has no table of perplexities"
    assert all(found.values()), f"a table of {report} has no rows"
    return found


def read_times(files: list[Path]) -> dict[int, tuple[float, float]]:
    """Return length -> seconds of the fastest dense formulation and of NSA."""
    rows = [row for file in files for row in csv.DictReader(file.open()) if row["phase"] == "prefill"]
    times = {}
    for length in sorted({int(row["length"]) for row in rows}):
        seconds = {r["name"]: float(r["median_ms"]) / 1000 for r in rows if int(r["length"]) == length}
        dense = min(time for name, time in seconds.items() if name.startswith("dense"))
        times[length] = (dense, seconds["nsa"])
    return times


def fingerprint() -> str:
    """Return a hash of everything the picture is drawn from; the file carries it."""
    files = (REPORT, *TIMES, Path(__file__))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def draw(out: Path) -> None:
    """Draw both halves into one PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.1))
    for text, buckets in read_quality(REPORT).items():
        ends = [bucket.last + 1 if bucket.last % 2 else bucket.last for bucket in buckets]
        style = {"marker": MARKS[text], "markersize": 5}
        left.plot(ends, [b.dense for b in buckets], color=DENSE, label=f"dense, {text}", **style)
        left.plot(ends, [b.sparse for b in buckets], ":", color=SPARSE, label=f"nsa, {text}", **style)
        last = buckets[-1]
        left.annotate(
            f"x{last.sparse / last.dense:.3f}", (ends[-1], last.sparse), (0, 7), fontsize=8, color=SPARSE,
            textcoords="offset points", ha="center",
        )  # fmt: skip
    left.axvline(BUDGET, color="0.5", linestyle="--", linewidth=1)
    left.text(BUDGET, 0.03, " visible budget", transform=left.get_xaxis_transform(), fontsize=8, color="0.4")
    left.set_title("Perplexity, untrained conversion (lower is better)", fontsize=9)

    times = read_times(TIMES)
    right.plot(list(times), [dense for dense, _ in times.values()], color=DENSE, marker="o", label="dense")
    right.plot(list(times), [nsa for _, nsa in times.values()], ":", color=SPARSE, marker="o", label="nsa")
    for length, (dense, nsa) in times.items():
        right.annotate(
            f"{dense / nsa:.1f}x", (length, nsa), (0, -14 if nsa < dense else 7), fontsize=8, color=SPARSE,
            textcoords="offset points", ha="center",
        )  # fmt: skip
    right.set_yscale("log")
    right.set_ylim(bottom=0.5)
    right.yaxis.set_major_formatter("{x:g} s")
    right.set_title("One layer reads a prompt, 2 CPU cores", fontsize=9)

    for axis, ticks in ((left, [512, 1024, 2048, 4096]), (right, list(times))):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.set_xlabel("tokens of context", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, framealpha=0.9)
    left.margins(x=0.08, y=0.15)
    right.margins(x=0.08)
    figure.tight_layout()
    figure.savefig(out, dpi=100, metadata={"Comment": fingerprint()})


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
