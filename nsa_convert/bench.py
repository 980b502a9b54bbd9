"""Speed and memory of the sparse ops against dense attention: prefill and decode, one table, one run.

Inputs are synthetic queries and keys that drift along the sequence, so that neighbouring queries choose
nearly the same blocks, as those of a language model do; or queries and keys from a file.
"""

from __future__ import annotations

import csv
import ctypes
import dataclasses
import datetime
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, scaled_dot_product_attention

from nsa_convert.config import AttentionGeometry, SparseAttentionConfig
from nsa_convert.errors import CheckFailedError, ConfigError
from nsa_convert.kernels.attention import sparse_attention
from nsa_convert.kernels.common.backend import use_backend
from nsa_convert.kernels.compressed import block_topk, compressed_attention
from nsa_convert.kernels.selftest import CheckRow, checks_table, self_test
from nsa_convert.methods.nsa import NSASettings
from nsa_convert.methods.parts.base import SparseMethod
from nsa_convert.methods.parts.registry import build_layer
from nsa_convert.methods.parts.standalone import prompt_case, step_cases
from nsa_convert.methods.ssa import SSASettings
from nsa_convert.patterns import DENSE_LAYOUT, SequenceLayout, SinkWindow

LENGTHS = (4096, 8192, 16384, 32768)
DENSE = "dense: "
WARM_MS = 20  # a decode step runs this long untimed first, so that its data are in the caches


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One measurement.

    Attributes:
        phase: ``"prefill"`` (all queries of the length) or ``"decode"`` (one query on that many tokens).
        length: Tokens.
        name: What ran; the dense formulations begin with ``"dense: "``.
        median_ms: Median time.
        min_ms: Shortest time.
        max_ms: Longest time.
        speedup: Median of the best dense formulation over this median; None where dense was not run.
        peak_mib: Memory above the inputs; None where it cannot be measured.
    """

    phase: str
    length: int
    name: str
    median_ms: float
    min_ms: float
    max_ms: float
    speedup: float | None = None
    peak_mib: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchReport:
    """All rows of one run and where it ran.

    Attributes:
        geometry: ``"HQ/H/D"``.
        dtype: Dtype of the inputs.
        environment: Device, versions, threads and date.
        rows: The measurements.
        checks: The self-test that ran before them, if it was asked for.
    """

    geometry: str
    dtype: str
    environment: dict[str, str]
    rows: tuple[BenchRow, ...]
    checks: tuple[CheckRow, ...] = ()

    def to_dict(self) -> dict:
        """Return a JSON-ready mapping."""
        return dataclasses.asdict(self)

    def to_table(self) -> str:
        """Return the rows as a Markdown table under a line that says where they were measured."""
        where = ", ".join(f"{key} {value}" for key, value in self.environment.items())
        checked = [checks_table(self.checks), ""] if self.checks else []
        head = ("phase", "tokens", "what", "median ms", "min", "max", "x best dense", "peak MiB")

        lines = [
            *checked,
            f"{self.geometry} heads/KV heads/head dim, {self.dtype}; {where}",
            "",
            "| " + " | ".join(head) + " |",
            "|" + "---|" * len(head),
        ]

        for row in self.rows:
            cells = [row.phase, str(row.length), row.name]
            cells += [f"{x:.4g}" for x in (row.median_ms, row.min_ms, row.max_ms)]
            cells += ["" if row.speedup is None else f"{row.speedup:.2f}"]
            cells += ["" if row.peak_mib is None else f"{row.peak_mib:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")

        return "\n".join(lines)

    def write_csv(self, path: Path | str) -> None:
        """Write one line per row; geometry, dtype and environment are repeated on each."""
        common = {"geometry": self.geometry, "dtype": self.dtype, **self.environment}
        with Path(path).open("w", newline="") as file:  # why: the file that --csv names
            names = [*common, *(field.name for field in dataclasses.fields(BenchRow))]
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(common | dataclasses.asdict(row) for row in self.rows)


def run_bench(
    geometry: str = "14/2/64",
    lengths: Sequence[int] = LENGTHS,
    device: str = "cpu",
    dtype: str = "bfloat16",
    repeats: int = 5,
    dense: bool = True,
    check: bool = False,
    plan: SparseAttentionConfig | None = None,
) -> BenchReport:
    """Check the ops against the reference, then time NSA, SSA and their parts against dense attention.

    Args:
        geometry: ``"HQ/H/D"``: query heads, key/value heads, head dim.
        lengths: Sequence lengths.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        repeats: Timed runs of a prefill; decode takes ten times as many.
        dense: Whether to time dense attention too.
        check: Whether to compare every op with the reference first: all group sizes, gradients, batches.
        plan: Its first layer is timed in place of NSA and SSA.

    Raises:
        ConfigError: A setting is malformed or there is no such device.
        CheckFailedError: An op differs from the reference.
    """
    sizes = parse_geometry(geometry)
    kind = parse_dtype(dtype)

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here", code="CF22", expected="cpu", found=device)
    if not lengths or min(lengths) < 128:
        raise ConfigError(f"lengths must be at least 128 tokens, got {list(lengths)}", code="CF22")

    # The self-test, and the method to time, if they are asked for.
    rows: list[BenchRow] = []
    checks = self_test(device) if check else ()
    layer = None if plan is None else build_layer(plan, sizes, 0).to(device, kind)

    # Prefill and decode of one length share their inputs.
    with torch.inference_mode():
        check_ops(sizes, kind, device)
        for length in lengths:
            inputs = OpInputs.drifting(sizes, length, kind, device)
            rows += time_cases("prefill", length, prefill_cases(inputs, dense, layer), repeats, device)
            rows += time_cases("decode", length, decode_cases(inputs, dense, layer), 10 * repeats, device)

    return BenchReport(
        geometry=geometry, dtype=dtype, environment=environment(device), rows=tuple(rows), checks=checks
    )


def parse_geometry(text: str) -> AttentionGeometry:
    """Read ``"HQ/H/D"``."""
    if not re.fullmatch(r"\d+/\d+/\d+", text):
        raise ConfigError(f"geometry must read HQ/H/D, for example 14/2/64, got {text!r}", code="CF22")
    heads, kv_heads, dim = (int(part) for part in text.split("/"))

    return AttentionGeometry(
        hidden_size=max(1, heads * dim), num_query_heads=heads, num_kv_heads=kv_heads, head_dim=dim
    )


def parse_dtype(name: str) -> torch.dtype:
    """Read the name of a floating dtype."""
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in known:
        raise ConfigError(f"dtype must be one of {', '.join(known)}, got {name!r}", code="CF22")
    return known[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpInputs:
    """Queries, keys and values ``[1, T, heads, D]``, and the compressed cells of NSA and SSA."""

    q: Tensor
    k: Tensor
    v: Tensor
    cell_keys: Tensor
    cell_values: Tensor
    block_keys: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> OpInputs:
        """Add the mean-pooled cells to q, k and v."""
        nsa = NSASettings()
        size = SSASettings().block_size

        cells = [mean_pool(x, nsa.compression_block, nsa.compression_stride) for x in (k, v)]
        return cls(
            q=q, k=k, v=v, cell_keys=cells[0], cell_values=cells[1], block_keys=mean_pool(k, size, size)
        )

    def as_cached(self) -> OpInputs:
        """Return the same values with keys, values and cells contiguous per head, as a cache holds them."""
        parts = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        cached = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in parts if name != "q"}
        return OpInputs(q=self.q, **cached)

    @classmethod
    def drifting(cls, sizes: AttentionGeometry, length: int, dtype: torch.dtype, device: str) -> OpInputs:
        """Make random queries and keys that drift, so that neighbours choose nearly the same blocks.

        With 16 blocks of 64, the union over 16 (64) neighbouring queries has about 27 (33) blocks; real
        queries of a small model have 23-29 (29-39).
        """
        g = torch.Generator(device).manual_seed(0)
        heads = sizes.num_kv_heads
        dim = sizes.head_dim

        # A slow drift that the query heads of a group share, and noise of each head's own.
        q = drift(length, 256, heads * dim, g).view(length, heads, 1, dim)
        q = q + 0.5 * torch.randn(length, heads, sizes.group_size, dim, generator=g, device=device)

        k = drift(length, 64, heads * dim, g).view(length, heads, dim)
        k = k + torch.randn(length, heads, dim, generator=g, device=device)

        v = torch.randn(length, heads, dim, generator=g, device=device)

        # Each with a batch of one: [1, T, heads, D].
        return cls.of(*(x[None].to(device, dtype).contiguous() for x in (q.flatten(1, 2), k, v)))


def drift(length: int, step: int, size: int, generator: torch.Generator) -> Tensor:
    """Return ``[length, size]``: random vectors every ``step`` tokens with straight lines between them."""
    knots = torch.randn(1, size, -(-length // step) + 1, generator=generator, device=generator.device)
    return interpolate(knots, size=knots.shape[2] * step, mode="linear")[0, :, :length].T


def mean_pool(x: Tensor, width: int, stride: int) -> Tensor:
    """Return the means of the complete windows of ``[B, T, H, D]``."""
    return x.unfold(1, width, stride).mean(-1, dtype=torch.float32).to(x.dtype)


def nsa(x: OpInputs, q: Tensor, layout: SequenceLayout) -> Tensor:
    """Return the sum of the three branches of NSA, every gate at 1."""
    s = NSASettings()

    # Compressed branch, which also chooses the blocks of the selected one.
    cells = compressed_attention(
        q,
        x.cell_keys,
        x.cell_values,
        width=s.compression_block,
        stride=s.compression_stride,
        rule=s.rule,
        layout=layout,
    )
    assert cells.o is not None
    assert cells.selection is not None

    selected, _ = sparse_attention(q, x.k, x.v, cells.selection, layout=layout)
    window, _ = sparse_attention(q, x.k, x.v, SinkWindow(window_size=s.window_size), layout=layout)
    return cells.o + selected + window


def ssa(x: OpInputs, q: Tensor, layout: SequenceLayout) -> Tensor:
    """Run SSA: block choice and one attention."""
    s = SSASettings()
    chosen = block_topk(q, x.block_keys, width=s.block_size, stride=s.block_size, rule=s.rule, layout=layout)
    return sparse_attention(q, x.k, x.v, chosen, layout=layout)[0]


Case = tuple[str, Callable[[], object]]


def sparse_cases(x: OpInputs, q: Tensor, layout: SequenceLayout) -> Iterator[Case]:
    """Yield NSA, its branches, and SSA."""
    s = NSASettings()
    cells: dict[str, Any] = {"width": s.compression_block, "stride": s.compression_stride}
    cells |= {"rule": s.rule, "layout": layout}
    window = SinkWindow(window_size=s.window_size)

    # The choice is made once here: the case of the selected branch times attention alone.
    chosen = block_topk(q, x.cell_keys, **cells)

    yield "nsa", lambda: nsa(x, q, layout)
    yield "nsa: compressed + top-k", lambda: compressed_attention(q, x.cell_keys, x.cell_values, **cells)
    yield "nsa: selected", lambda: sparse_attention(q, x.k, x.v, chosen, layout=layout)
    yield "nsa: window", lambda: sparse_attention(q, x.k, x.v, window, layout=layout)
    yield "ssa", lambda: ssa(x, q, layout)


def prefill_cases(x: OpInputs, dense: bool = True, layer: SparseMethod | None = None) -> Iterator[Case]:
    """Yield name and call of each prefill that is timed, dense ones first."""
    q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))
    if dense:
        group = q.shape[1] // k.shape[1]
        wide_k, wide_v = (y.repeat_interleave(group, 1) for y in (k, v))
        yield (
            DENSE + "SDPA enable_gqa",
            lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        )
        yield (
            DENSE + "SDPA, keys repeated",
            lambda: scaled_dot_product_attention(q, wide_k, wide_v, is_causal=True),
        )

    yield from sparse_cases(x, x.q, DENSE_LAYOUT) if layer is None else [prompt_case(layer, x.q, x.k, x.v)]


def decode_cases(x: OpInputs, dense: bool = True, layer: SparseMethod | None = None) -> Iterator[Case]:
    """Yield name and call of each decode step that is timed, dense ones first."""
    cached = x.as_cached()
    q = x.q[:, -1:]
    k = cached.k.transpose(1, 2)  # [1, H, T, D]
    v = cached.v.transpose(1, 2)

    if dense:
        rows = q.view(1, k.shape[1], -1, q.shape[3])  # the group on the rows
        yield (
            DENSE + "SDPA enable_gqa",
            lambda: scaled_dot_product_attention(q.transpose(1, 2), k, v, enable_gqa=True),
        )
        yield DENSE + "SDPA, group as rows", lambda: scaled_dot_product_attention(rows, k, v)
        yield (
            DENSE + "bmm, group as rows",
            lambda: torch.bmm(torch.bmm(rows[0], k[0].mT).mul_(q.shape[3] ** -0.5).softmax(-1), v[0]),
        )

    # The query is the last token of the cached sequence.
    last = SequenceLayout(offset=k.shape[2] - 1)
    yield from sparse_cases(cached, q, last) if layer is None else step_cases(layer, q, cached.k, cached.v)


def time_cases(phase: str, length: int, cases: Iterable[Case], repeats: int, device: str) -> list[BenchRow]:
    """Time the cases in turn, round after round, so that a machine that slows down slows all of them.

    A decode step runs for ``WARM_MS``, then ten times more with the clock, before the next case has its turn.
    """
    runs = dict(cases)
    peaks = {name: peak_memory(run, device) for name, run in runs.items()}  # also the warm-up
    times: dict[str, list[float]] = {name: [] for name in runs}

    # Decode steps are short: each case gets ten timed calls a round.
    burst = 10 if phase == "decode" else 1
    for _ in range(-(-repeats // burst)):
        for name, run in runs.items():
            warm = WARM_MS if phase == "decode" else 0.0
            while warm > 0:
                warm -= elapsed_ms(run, device)
            times[name] += [elapsed_ms(run, device) for _ in range(burst)]

    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min((m for name, m in medians.items() if name.startswith(DENSE)), default=None)

    return [
        BenchRow(
            phase=phase,
            length=length,
            name=name,
            median_ms=medians[name],
            min_ms=min(values),
            max_ms=max(values),
            speedup=None if best is None else best / medians[name],
            peak_mib=peaks[name],
        )
        for name, values in times.items()
    ]


def elapsed_ms(run: Callable[[], object], device: str) -> float:
    """Return the wall time of one call in milliseconds."""
    # A GPU runs asynchronously: nothing may be pending when the clock starts, nothing unfinished when it
    # stops.
    if device.startswith("cuda"):
        torch.cuda.synchronize()

    begin = time.perf_counter()
    run()

    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


def peak_memory(run: Callable[[], object], device: str) -> float | None:
    """Return how much memory one call held above what was held before, in MiB; None if unknown here."""
    # On a GPU torch counts its own allocations.
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - allocated) / 2**20

    # On Linux the kernel keeps a high-water mark of the resident memory.
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still resident would hide new allocations
        # why: sets the high-water mark back to the present size
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident_mib("VmRSS")
        run()
        return _resident_mib("VmHWM") - before
    except (OSError, AttributeError):  # why: without /proc there is no peak to report; the column says None
        run()
        return None


def _resident_mib(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1]) / 1024


def check_ops(sizes: AttentionGeometry, dtype: torch.dtype, device: str) -> None:
    """Compare NSA and SSA with the reference at a small odd length; raise CheckFailedError if they differ."""
    x = OpInputs.drifting(sizes, 1531, torch.float32, device)
    x = dataclasses.replace(x, **{f.name: getattr(x, f.name).to(dtype) for f in dataclasses.fields(x)})

    # Scores that differ in the last bit may choose another block, so the lists are made once.
    s = NSASettings()
    cells: dict[str, Any] = {"width": s.compression_block, "stride": s.compression_stride}

    # Prefill with all queries, and decode with the last one.
    for q, layout in ((x.q, DENSE_LAYOUT), (x.q[:, -1:], SequenceLayout(offset=1530))):
        chosen = block_topk(q, x.cell_keys, rule=s.rule, layout=layout, **cells)
        results = []
        for backend in ("auto", "reference"):
            with use_backend(backend):
                results.append(
                    [
                        compressed_attention(q, x.cell_keys, x.cell_values, layout=layout, **cells).o,
                        sparse_attention(q, x.k, x.v, chosen, layout=layout)[0],
                        sparse_attention(q, x.k, x.v, SinkWindow(window_size=s.window_size), layout=layout)[
                            0
                        ],
                    ]
                )

        # A few units in the last place of the dtype, relative to the largest value.
        allowed = 4 * torch.finfo(dtype).eps + 1e-5
        for name, fast, truth in zip(("compressed", "selected", "window"), *results, strict=True):
            error = (fast.float() - truth.float()).abs().max().item() / max(1.0, truth.abs().max().item())
            if not error <= allowed:
                raise CheckFailedError(
                    f"the {name} op differs from the reference by {error:.2g}; {allowed:.2g} is allowed"
                )


def environment(device: str) -> dict[str, str]:
    """Return what a figure is published with: device, threads, versions, date."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else _cpu_name()
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # why: without /proc the architecture stands for the processor's name
        found = None
    return found[1].strip() if found else platform.machine()
