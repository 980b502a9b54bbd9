"""Reading a prompt with each training-free block method against dense attention, at one density, on this CPU.

    python -m benchmarks.prefill_methods [--geometry 14/2/64] [--length 16384] [--density 0.25]
                                         [--inputs FILE] [--repeats 3] [--csv FILE]

One layer of attention. Each method's budget is searched until it keeps about the asked share of the pairs of
dense causal attention; the time is that of choosing and attending together, beside the dense formulations, in
turns in one run. Inputs drift like those of a model, or come from FILE (see ops_cpu.py).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.ops_cpu import RESULTS, commit, real
from nsa_convert import bench
from nsa_convert.config import AttentionGeometry, LayerRule
from nsa_convert.evaluation.metrics.density import search_density
from nsa_convert.methods.parts.base import AttentionInputs
from nsa_convert.methods.parts.prefill import PrefillMethod
from nsa_convert.methods.parts.registry import build_method
from nsa_convert.patterns import DENSE_LAYOUT

STEPS = 7
"""Halvings of the searched interval."""


@dataclasses.dataclass(frozen=True)
class Search:
    """A method and how its density is set: ``settings(x)`` keeps more for larger x in 0 .. 1."""

    method: str
    settings: Callable[[float, int], dict[str, Any]]


SEARCHES = (
    Search("xattention", lambda x, n: {"threshold": x, "stride": 16}),
    Search("xattention", lambda x, n: {"threshold": x, "stride": 8}),
    Search("spargeattn", lambda x, n: {"top": x}),
    Search("spargeattn", lambda x, n: {"budget": "mass", "mass": x}),
    Search("flexprefill", lambda x, n: {"gamma": x, "min_budget": 256}),
    Search("minference", lambda x, n: {"head_patterns": [], "vertical_size": 500,
                                       "slash_size": max(100, round(x * n))}),
)  # fmt: skip


def main() -> None:
    """Search, measure, print and write."""
    options = parse_arguments()
    sizes = bench.parse_geometry(options.geometry)
    dtype = bench.parse_dtype(options.dtype)

    if options.inputs is None:
        source = bench.OpInputs.drifting(sizes, options.length, dtype, "cpu")
    else:
        source = real(load_file(options.inputs), options.length, dtype)
        heads, dim = source.q.shape[2:]
        sizes = bench.parse_geometry(f"{heads}/{source.k.shape[2]}/{dim}")

    cases = list(bench.prefill_cases(source)) if options.length <= options.dense_up_to else []
    cases = [case for case in cases if case[0].startswith(bench.DENSE)]

    # Every method at the settings whose density comes nearest to the asked one.
    with torch.inference_mode():
        for search in SEARCHES:
            layer, density, settings = find(search, sizes, inputs_of(source), options.density)
            name = f"{search.method} {settings}, density {density:.3f}"
            print(name, flush=True)
            cases.append((name, lambda layer=layer: layer(inputs_of(source))))
        rows = bench.time_cases("prefill", options.length, cases, options.repeats, "cpu")

    kind = "drifting" if options.inputs is None else "real"
    place = bench.environment("cpu") | {"commit": commit(), "inputs": kind}
    geometry = f"{sizes.num_query_heads}/{sizes.num_kv_heads}/{sizes.head_dim}"
    report = bench.BenchReport(geometry=geometry, dtype=options.dtype, environment=place, rows=tuple(rows))

    print(report.to_table())
    report.write_csv(options.csv or RESULTS / f"prefill_methods_{geometry.replace('/', '-')}.csv")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", default="14/2/64")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--inputs", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dense-up-to", type=int, default=1 << 20)
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


def inputs_of(x: bench.OpInputs) -> AttentionInputs:
    """Return what a layer would hand to its method."""
    hidden = x.q.new_zeros(*x.q.shape[:2], 1)
    scale = x.q.shape[3] ** -0.5
    return AttentionInputs(q=x.q, k=x.k, v=x.v, hidden=hidden, pooled={}, layout=DENSE_LAYOUT, scale=scale)


def find(
    search: Search, sizes: AttentionGeometry, x: AttentionInputs, wanted: float
) -> tuple[PrefillMethod, float, dict[str, Any]]:
    """Return the method whose density is nearest to what is wanted, among those tried by halving."""
    length = x.q.shape[1]
    settings, density = search_density(
        search.method, lambda share: search.settings(share, length), [x], wanted, STEPS
    )

    return build_method(LayerRule(method=search.method, settings=settings), sizes, 0), density, settings


if __name__ == "__main__":
    main()
