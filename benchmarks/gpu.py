"""What only a GPU can tell about the kernels: are they right, how fast, how near to what the hardware allows.

    make bench-gpu
    python -m benchmarks.gpu [--seconds 440] [--out benchmarks/results]

First every op is compared with the reference, values and gradients (a wrong one ends the run). Then copying
and multiplying are timed: they bound what is possible. Then, for each geometry and length, forward, backward
and decode of NSA, its branches and SSA beside dense attention and the peers that are installed. Cases run in
the order of PLAN until the time is up; what was left out is said. One CSV, one PNG and one table come out.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.gpu_cases import Case, decode_cases, forward_cases
from nsa_convert import bench
from nsa_convert.kernels.selftest import checks_table, self_test

RESULTS = Path(__file__).parent / "results"

PLAN = (
    ("32/8/128", (8192, 65536, 16384, 32768, 4096, 131072)),
    ("64/4/128", (65536, 131072, 8192)),
    ("28/4/128", (65536, 16384)),
    ("14/2/64", (65536, 16384)),
    ("16/8/128", (65536, 16384)),
    ("9/3/64", (32768, 8192)),
)
DECODE_BATCHES = (1, 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What the device does at most: bytes copied and floating-point operations per second."""

    bytes_per_s: float
    flops_per_s: float

    @classmethod
    def measure(cls, device: str, megabytes: int = 1024, size: int = 8192) -> Limits:
        """Time a large copy and a large bfloat16 matrix product."""
        source = torch.zeros(megabytes << 18, dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        copy = min(timed(lambda: target.copy_(source), device, 10))

        a, b = torch.randn(2, size, size, device=device).bfloat16()
        product = min(timed(lambda: a @ b, device, 10))

        # A copy reads and writes every byte; a product of square matrices has 2 * size^3 operations.
        return cls(bytes_per_s=2e3 * source.nbytes / copy, flops_per_s=2e3 * size**3 / product)

    def floor_ms(self, case: Case, phase: str) -> float | None:
        """Return the least time this hardware could take."""
        if case.flops is None:
            return None
        # The backward computes the scores again and has four products where the forward has two.
        factor = 2.5 if phase == "backward" else 1.0
        return 1e3 * max(factor * case.flops / self.flops_per_s, factor * case.bytes / self.bytes_per_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement; ``share`` is the least possible time over the measured one."""

    geometry: str
    phase: str
    length: int
    batch: int
    name: str
    median_ms: float
    min_ms: float
    max_ms: float
    peak_mib: float | None
    share: float | None
    speedup: float | None = None


def timed(run: Callable[[], object], device: str, repeats: int, seconds: float = 1.0) -> list[float]:
    """Return the times of up to ``repeats`` calls in ms, after a warm-up; at least three, or one second."""
    run()
    times: list[float] = []
    while len(times) < repeats and (len(times) < 3 or sum(times) < 1e3 * seconds):
        times.append(bench.elapsed_ms(run, device))
    return times


Tell = Callable[[str], None]


def measure(
    case: Case, phase: str, where: tuple[str, int, int], device: str, limits: Limits, tell: Tell
) -> Row | None:
    """Time one case in one phase; None, with a word, when it does not run here."""
    try:
        run = case.run if phase != "backward" else backward_of(case)
        peak = bench.peak_memory(run, device)  # the first call also compiles and tunes
        if phase == "decode":
            run = graphed(run, device)
        times = timed(run, device, 50 if phase == "decode" else 10)
    except Exception as error:  # a peer that refuses a shape must not end the run
        if case.ours:
            raise
        why = f"{type(error).__name__}: {str(error)[:120]}"
        tell(f"{where[0]} {where[1]} {phase} {case.name}: left out, {why}")
        return None
    median = statistics.median(times)
    floor = limits.floor_ms(case, phase)
    geometry, length, batch = where

    return Row(
        geometry=geometry,
        phase=phase,
        length=length,
        batch=batch,
        name=case.name,
        median_ms=median,
        min_ms=min(times),
        max_ms=max(times),
        peak_mib=peak,
        share=None if floor is None else floor / median,
    )


def backward_of(case: Case) -> Callable[[], object]:
    """Return a call of the backward alone."""
    leaves = [x.requires_grad_() for x in case.inputs]
    out = case.run()
    grad = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True, allow_unused=True)


def graphed(run: Callable[[], object], device: str) -> Callable[[], object]:
    """Return a replay of a CUDA graph of the call: a step is shorter than launching its kernels in turn."""
    if not device.startswith("cuda"):
        return run

    # The recipe of torch: warm up on a stream of its own, then record.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def run_plan(plan: tuple, device: str, limits: Limits, deadline: float, tell: Tell) -> Iterator[Row]:
    """Yield rows in the order of the plan until the deadline."""
    for geometry, lengths in plan:
        sizes = bench.parse_geometry(geometry)
        for length in lengths:
            if time.monotonic() > deadline:
                tell(f"{geometry} at {length}: left out, the time is up")
                continue

            begin = time.monotonic()
            inputs = bench.OpInputs.drifting(sizes, length, torch.bfloat16, device)
            rows = []

            # Forward and backward.
            for case in forward_cases(inputs, device):
                with torch.no_grad():
                    rows.append(measure(case, "forward", (geometry, length, 1), device, limits, tell))
                if rows[-1] is not None and case.inputs and time.monotonic() < deadline:
                    rows.append(measure(case, "backward", (geometry, length, 1), device, limits, tell))

            # Decode, while the cache of a batch stays of a size that fits.
            with torch.inference_mode():
                for batch in DECODE_BATCHES:
                    if time.monotonic() < deadline and batch * length <= 1 << 20:
                        for case in decode_cases(inputs, batch):
                            rows.append(
                                measure(case, "decode", (geometry, length, batch), device, limits, tell)
                            )

            yield from with_speedups([row for row in rows if row is not None])
            tell(f"{geometry} at {length}: {time.monotonic() - begin:.0f} s")


def with_speedups(rows: list[Row]) -> list[Row]:
    """Fill in the time of the best dense attention over that of each row."""
    best: dict[tuple, float] = {}
    for row in rows:
        if row.name.startswith(bench.DENSE):
            key = row.phase, row.batch
            best[key] = min(best.get(key, float("inf")), row.median_ms)

    speeds = (best.get((row.phase, row.batch), float("nan")) / row.median_ms for row in rows)
    filled = zip(rows, speeds, strict=True)
    return [dataclasses.replace(row, speedup=x if x == x else None) for row, x in filled]


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown."""
    head = ("heads", "phase", "tokens", "batch", "what", "ms", "x best dense", "peak MiB", "of roofline")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        cells = [r.geometry, r.phase, str(r.length), str(r.batch), r.name, f"{r.median_ms:.3g}"]
        cells += ["" if x is None else form.format(x) for x, form in (
            (r.speedup, "{:.2f}"), (r.peak_mib, "{:.0f}"), (r.share, "{:.0%}"),
        )]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path, tell: Tell) -> None:
    """Draw time and speed-up against length, one line for each method."""
    if not rows:
        return
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        tell("matplotlib is missing: no plot")
        return

    geometries = list(dict.fromkeys(row.geometry for row in rows))
    figure, axes = pyplot.subplots(
        len(geometries), 2, figsize=(11, 3.6 * len(geometries)), squeeze=False, layout="constrained"
    )

    for line, geometry in zip(axes, geometries, strict=True):
        own = [row for row in rows if row.geometry == geometry and row.phase == "forward"]
        for name in dict.fromkeys(row.name for row in own):
            points = sorted((r.length, r.median_ms, r.speedup) for r in own if r.name == name)
            line[0].plot([p[0] for p in points], [p[1] for p in points], marker="o", label=name)
            line[1].plot([p[0] for p in points], [p[2] or float("nan") for p in points], marker="o")
        line[0].set(title=f"{geometry} forward", xscale="log", yscale="log", xlabel="tokens", ylabel="ms")
        line[1].set(title="over the best dense", xscale="log", xlabel="tokens", ylabel="times faster")
        line[1].axhline(1, color="grey", linewidth=1)
        line[0].legend(fontsize="x-small")

    figure.savefig(path, dpi=120)


def commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return found.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    try:
        import triton
    except ImportError:
        return {"triton": "missing"}
    return {"triton": triton.__version__}


def main(
    arguments: list[str] | None = None, plan: tuple = PLAN, sizes: tuple[int, int] = (1024, 8192)
) -> int:
    """Check, measure, print and write; return 4 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=440, help="start no new length after this time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu runs the same path on the torch backend", file=sys.stderr)
        return 5

    begin = time.monotonic()

    def tell(line: str) -> None:
        print(f"[{time.monotonic() - begin:4.0f} s] {line}", file=sys.stderr, flush=True)

    place = bench.environment(options.device) | versions() | {"commit": commit()}
    print(", ".join(f"{k} {v}" for k, v in place.items()))

    # Nothing is timed that is wrong.
    try:
        print(checks_table(self_test(options.device)))
    except Exception as error:
        print(f"the self-test failed: {error}", file=sys.stderr)
        return 4
    tell("all ops agree with the reference")

    limits = Limits.measure(options.device, *sizes)
    print(f"copy {limits.bytes_per_s / 1e9:.0f} GB/s, bfloat16 {limits.flops_per_s / 1e12:.1f} TFLOP/s")
    rows = list(run_plan(plan, options.device, limits, begin + options.seconds, tell))
    print(table(rows))

    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "gpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*place, *(field.name for field in dataclasses.fields(Row))])
        writer.writeheader()
        writer.writerows(place | dataclasses.asdict(row) for row in rows)

    plot(rows, options.out / "gpu.png", tell)
    return 0


if __name__ == "__main__":
    sys.exit(main())
