"""Every op of the torch backend against dense attention on this machine's CPU.

    python benchmarks/ops_cpu.py [--geometry 14/2/64] [--lengths 8192,32768] [--phases prefill,decode]
                                 [--inputs FILE] [--repeats 3] [--compile] [--csv FILE]

Beyond what `nsa_convert.bench` times, it runs block lists shared by tiles of 64 queries and independent
random lists (the worst case for the union of neighbouring queries), and prints how many blocks that union
holds. FILE is a .safetensors file with q [T, HQ, D] and k [T, H, D] of a real model, as
benchmarks/capture_qk.py writes it; without it the inputs drift like those of a model.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from nsa_convert import bench
from nsa_convert.kernels import block_topk, sparse_attention
from nsa_convert.kernels.union.torch_backend import union_sizes
from nsa_convert.methods.nsa import NSASettings
from nsa_convert.patterns import DENSE_LAYOUT, BlockSelection, SequenceLayout

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Check, measure, print and write."""
    options = parse_arguments()
    sizes = bench.parse_geometry(options.geometry)
    dtype = bench.parse_dtype(options.dtype)

    lengths = [int(x) for x in options.lengths.split(",")]
    source = None if options.inputs is None else load_file(options.inputs)

    # Captured inputs have the geometry of their model.
    if source is not None:
        heads, dim = source["q"].shape[1:]
        sizes = bench.parse_geometry(f"{heads}/{source['k'].shape[1]}/{dim}")

    rows: list[bench.BenchRow] = []
    with torch.inference_mode():
        bench.check_ops(sizes, dtype, "cpu")
        for length in lengths:
            if source is None:
                x = bench.OpInputs.drifting(sizes, length, dtype, "cpu")
            else:
                x = real(source, length, dtype)

            print(f"{length} tokens, blocks in the union over W queries: {unions(x)}", flush=True)
            if "prefill" in options.phases:
                cases = [*bench.prefill_cases(x, not options.no_dense), *list_cases(x)]
                rows += bench.time_cases("prefill", length, cases, options.repeats, "cpu")
            if "decode" in options.phases:
                cases = list(bench.decode_cases(x, not options.no_dense))
                cases += list(compiled(x, cases)) if options.compile else []
                rows += bench.time_cases("decode", length, cases, 30 * options.repeats, "cpu")

    kind = "drifting" if source is None else "real"
    place = bench.environment("cpu") | {"commit": commit(), "inputs": kind}
    geometry = f"{sizes.num_query_heads}/{sizes.num_kv_heads}/{sizes.head_dim}"
    report = bench.BenchReport(geometry=geometry, dtype=options.dtype, environment=place, rows=tuple(rows))

    print(report.to_table())
    file = options.csv or RESULTS / f"ops_cpu_{geometry.replace('/', '-')}_{place['inputs']}.csv"
    report.write_csv(file)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", default="14/2/64")
    parser.add_argument("--lengths", default="8192,32768")
    parser.add_argument("--phases", default="prefill,decode")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--inputs", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-dense", action="store_true")
    parser.add_argument("--compile", action="store_true", help="time decode through torch.compile too")
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


def real(source: dict[str, torch.Tensor], length: int, dtype: torch.dtype) -> bench.OpInputs:
    """Return the first tokens of captured queries and keys, with random values."""
    if len(source["q"]) < length:
        raise SystemExit(f"the file holds {len(source['q'])} tokens, {length} are needed")
    q, k = (source[name][None, :length].to(dtype).contiguous() for name in "qk")
    return bench.OpInputs.of(q, k, torch.randn(k.shape, generator=torch.Generator().manual_seed(0)).to(dtype))


def selection(x: bench.OpInputs) -> BlockSelection:
    """Choose blocks as NSA does."""
    s = NSASettings()
    return block_topk(x.q, x.cell_keys, width=s.compression_block, stride=s.compression_stride, rule=s.rule)


def unions(x: bench.OpInputs) -> dict[int, float]:
    """Return the mean union over W neighbouring queries of the second half of the sequence."""
    lists = selection(x).block_indices[0]  # [H, T, S]

    # Runs of 64 queries, the widest of the unions.
    half = lists[:, lists.shape[1] // 2 // 64 * 64 :]
    half = half[:, : half.shape[1] // 64 * 64]

    means = {}
    for width in (1, 4, 8, 16, 32, 64):
        sizes = union_sizes(half.unflatten(1, (-1, width)).flatten(2).flatten(0, 1))
        means[width] = round(sizes.double().mean().item(), 1)
    return means


def list_cases(x: bench.OpInputs) -> Iterator[bench.Case]:
    """Yield the selected branch on lists shared by tiles of 64 queries and on independent random lists."""
    size = NSASettings().block_size
    count = NSASettings().num_blocks
    length, heads = x.k.shape[1:3]

    # The list of a tile is that of its last query.
    last = torch.arange(63, length + 63, 64).clamp(max=length - 1)
    tiles = BlockSelection(
        block_indices=selection(x).block_indices[:, :, last], block_size=size, query_block=64
    )

    own = torch.arange(length)[:, None] // size

    # Random blocks among those that a query may see.
    g = torch.Generator().manual_seed(1)
    rank = torch.rand(1, heads, length, -(-length // size), generator=g)
    rank = rank.masked_fill(torch.arange(rank.shape[3]) > own, -1.0)
    best = rank.topk(min(count, rank.shape[3]), -1)
    random = BlockSelection(block_indices=best.indices.masked_fill(best.values < 0, -1), block_size=size)

    yield "selected, tiles of 64", lambda: sparse_attention(x.q, x.k, x.v, tiles, layout=DENSE_LAYOUT)
    yield "selected, random lists", lambda: sparse_attention(x.q, x.k, x.v, random, layout=DENSE_LAYOUT)


def compiled(x: bench.OpInputs, cases: list[bench.Case]) -> Iterator[bench.Case]:
    """Yield decode steps through torch.compile: dense ones, and sparse ones in a graph for any position."""
    cached = x.as_cached()
    q = x.q[:, -1:]
    offset = torch.tensor(x.k.shape[1] - 1)

    for name, options in (("compiled", {}), ("compiled, C++ wrapper", {"cpp_wrapper": True})):
        for case, run in cases:
            if case.startswith(bench.DENSE) and "rows" in case:
                yield f"{case}, {name}", torch.compile(run, options=options)
        for case, step in (("nsa", bench.nsa), ("ssa", bench.ssa)):
            yield f"{case}, {name}", any_position(step, cached, q, offset, options)


def any_position(
    step: Callable, cached: bench.OpInputs, q: torch.Tensor, offset: torch.Tensor, options: dict[str, bool]
) -> Callable:
    """Return a compiled step that reads its position from a tensor, as with a static cache."""
    graph = torch.compile(lambda q, offset: step(cached, q, SequenceLayout(offset=offset)), options=options)
    return lambda: graph(q, offset)


def commit() -> str:
    """Return the commit of the working tree, or "unknown" outside of git."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
