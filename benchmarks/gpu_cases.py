"""What benchmarks/gpu.py times: our ops, dense attention, and peers, with the work each must do at least."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nsa_convert import bench
from nsa_convert.kernels import block_topk, compressed_attention, sparse_attention
from nsa_convert.kernels.compressed.cells import CellGrid
from nsa_convert.methods.nsa import NSASettings
from nsa_convert.patterns import DENSE_LAYOUT, BlockSelection, Pattern, SequenceLayout, SinkWindow

TILE = 128
"""Queries and keys of a block in the comparison with FlexAttention, its own default."""

FLEX_LENGTHS = (16384, 65536)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to time.

    Attributes:
        name: Dense formulations begin with ``"dense: "``.
        run: The forward; returns one tensor.
        inputs: What to differentiate; empty where only the forward is timed.
        flops: Operations of the forward that no implementation can avoid; None where nobody counted.
        bytes: Bytes that must be read and written at least once.
        ours: Whether an error is a fault of this package.
    """

    name: str
    run: Callable[[], Tensor]
    inputs: tuple[Tensor, ...] = ()
    flops: float | None = None
    bytes: float = 0.0
    ours: bool = True


def pairs_of(pattern: Pattern, num_queries: int, layout: SequenceLayout = DENSE_LAYOUT) -> float:
    """Return the visible (query, key) pairs of one selecting head."""
    offset = int(layout.offset)
    causal = num_queries * offset + num_queries * (num_queries + 1) / 2
    return pattern.density(num_queries, offset + num_queries, layout) * causal


def forward_cases(x: bench.OpInputs, device: str) -> Iterator[Case]:
    """Yield what is timed forward and backward."""
    s = NSASettings()
    length, heads, dim = x.q.shape[1:]
    product = 4 * heads * dim  # operations of a (query, key) pair: two products of all query heads
    moved = 2 * (x.q.nbytes + x.k.nbytes)
    causal = length * (length + 1) / 2

    cells = {"width": s.compression_block, "stride": s.compression_stride, "rule": s.rule}
    window = SinkWindow(window_size=s.window_size)
    grid = CellGrid(width=s.compression_block, stride=s.compression_stride)
    cell_pairs = float(grid.complete(torch.arange(1, length + 1)).sum())

    with torch.no_grad():
        chosen = block_topk(x.q, x.cell_keys, **cells)
    selected = product * pairs_of(chosen, length)
    # The cells are scored once more than they are attended to: block scores need the softmax's denominator.
    compressed = 1.5 * product * cell_pairs
    banded = product * pairs_of(window, length)
    leaves = (x.q, x.k, x.v)

    yield Case(
        name="nsa",
        run=lambda: bench.nsa(x, x.q, DENSE_LAYOUT),
        bytes=3 * moved,
        inputs=(*leaves, x.cell_keys, x.cell_values),
        flops=selected + compressed + banded,
    )

    yield Case(
        name="nsa: compressed + top-k",
        flops=compressed,
        bytes=moved,
        inputs=(x.q, x.cell_keys, x.cell_values),
        run=lambda: compressed_attention(x.q, x.cell_keys, x.cell_values, **cells).o,
    )

    yield Case(
        name="nsa: selected",
        flops=selected,
        bytes=moved,
        inputs=leaves,
        run=lambda: sparse_attention(*leaves, chosen)[0],
    )

    yield Case(
        name="nsa: window",
        flops=banded,
        bytes=moved,
        inputs=leaves,
        run=lambda: sparse_attention(*leaves, window)[0],
    )

    yield Case(name="ssa", run=lambda: bench.ssa(x, x.q, DENSE_LAYOUT), inputs=leaves)

    random = random_blocks(x, chosen)
    yield Case(
        name="selected, random lists",
        flops=product * pairs_of(random, length),
        bytes=moved,
        inputs=leaves,
        run=lambda: sparse_attention(*leaves, random)[0],
    )

    yield from dense_cases(x, product * causal, moved)
    yield from tile_cases(x, device, product)
    yield from fla_cases(x, chosen)


def dense_cases(x: bench.OpInputs, flops: float, moved: float) -> Iterator[Case]:
    """Yield torch's dense attention by each of its backends."""
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        yield Case(
            name=bench.DENSE + f"SDPA {backend.name.split('_')[0].lower()}",
            flops=flops,
            bytes=moved,
            run=functools.partial(dense, x, backend),
            inputs=(x.q, x.k, x.v),
            ours=False,
        )


def dense(x: bench.OpInputs, backend: SDPBackend) -> Tensor:
    q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def random_blocks(x: bench.OpInputs, like: BlockSelection) -> BlockSelection:
    """Return lists as long as these, chosen independently: the worst case for tiles of neighbours."""
    batch, heads, length, size = like.block_indices.shape

    own = torch.arange(length, device=x.q.device) // like.block_size

    # Draws among the blocks each query may see; a block drawn twice counts once.
    draws = torch.rand(batch, heads, length, size, device=x.q.device)
    drawn = (draws * (own[:, None] + 1)).long().sort(-1).values
    drawn[..., 1:].masked_fill_(drawn[..., 1:] == drawn[..., :-1], -1)
    return BlockSelection(block_indices=drawn, block_size=like.block_size)


def tile_cases(x: bench.OpInputs, device: str, product: float) -> Iterator[Case]:
    """Yield one list for each tile of 128 queries and query head: ours, and FlexAttention with the same."""
    length = x.q.shape[1]
    tiles = length // TILE
    if length % TILE or tiles < 8:
        return

    g = torch.Generator(device).manual_seed(1)

    # The own block and seven random ones before it.
    rank = torch.rand(1, x.q.shape[2], tiles, tiles, generator=g, device=device)
    own = torch.arange(tiles, device=device)
    later = own > own[:, None]
    rank = rank.masked_fill(own == own[:, None], 2.0).masked_fill(later, -1.0)
    best = rank.topk(min(8, tiles), -1)
    lists = best.indices.masked_fill(best.values < 0, -1)
    pattern = BlockSelection(block_indices=lists, block_size=TILE, query_block=TILE)
    flops = product * pairs_of(pattern, length)

    yield Case(
        name="block mask, tiles of 128",
        flops=flops,
        bytes=2 * (x.q.nbytes + x.k.nbytes),
        run=lambda: sparse_attention(x.q, x.k, x.v, pattern)[0],
        inputs=(x.q, x.k, x.v),
    )

    if device.startswith("cuda") and length in FLEX_LENGTHS:
        yield Case(
            name="block mask, FlexAttention",
            flops=flops,
            bytes=2 * (x.q.nbytes + x.k.nbytes),
            ours=False,
            run=functools.partial(flex, x, lists),
            inputs=(x.q, x.k, x.v),
        )


@functools.cache
def compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex(x: bench.OpInputs, lists: Tensor) -> Tensor:
    """Run FlexAttention over lists ``[1, HQ, tiles, S]``; the last block of a tile is its own."""
    from torch.nn.attention.flex_attention import BlockMask

    counts = (lists >= 0).sum(-1).int()
    tiles = lists.shape[2]
    padded = torch.full((*lists.shape[:3], tiles), 0, dtype=torch.int32, device=lists.device)

    # FlexAttention takes lists in order, padded to the number of tiles.
    order = lists.masked_fill(lists < 0, tiles).sort(-1).values  # unused last
    padded[..., : lists.shape[3]] = order.masked_fill(order == tiles, 0).int()

    mask = BlockMask.from_kv_blocks(counts, padded, BLOCK_SIZE=TILE, mask_mod=lambda b, h, q, k: q >= k)
    q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))
    return compiled_flex()(q, k, v, block_mask=mask, enable_gqa=True)


def fla_cases(x: bench.OpInputs, chosen: BlockSelection) -> Iterator[Case]:
    """Yield the selected branch of fla-core where it is installed and takes the shape (groups of 16)."""
    if importlib.util.find_spec("fla") is None or x.q.shape[2] // x.k.shape[2] % 16:
        return
    indices = chosen.block_indices.transpose(1, 2).contiguous().long()  # [B, T, H, S]

    def run() -> Tensor:
        from fla.ops.nsa import parallel_nsa

        ones = torch.ones(x.q.shape[:3], device=x.q.device, dtype=x.q.dtype)
        return parallel_nsa(
            x.q, x.k, x.v, g_slc=ones, block_indices=indices, block_size=chosen.block_size, window_size=0
        )

    yield Case(name="fla-core: selected", run=run, inputs=(x.q, x.k, x.v), ours=False)


def decode_cases(x: bench.OpInputs, batch: int) -> Iterator[Case]:
    """Yield one decode step on caches ``[B, H, T, D]`` with the offset on the device."""
    length, heads, dim = x.q.shape[1:]

    def cached(y: Tensor) -> Tensor:
        return y.expand(batch, -1, -1, -1).transpose(1, 2).contiguous().transpose(1, 2)

    parts = {f.name: getattr(x, f.name).detach() for f in dataclasses.fields(bench.OpInputs)}
    cache = bench.OpInputs(**{n: y if n == "q" else cached(y) for n, y in parts.items()})
    q = x.q[:, -1:].detach().expand(batch, -1, -1, -1).contiguous()
    layout = SequenceLayout(offset=torch.tensor(length - 1, device=q.device))

    product = 4 * heads * dim * batch
    s = NSASettings()
    token = 2 * x.k[:, :1].nbytes * batch  # a key and a value of all heads
    read = s.rule.budget + s.window_size + 1.5 * length / s.compression_stride
    yield Case(name="nsa", run=lambda: bench.nsa(cache, q, layout), flops=product * read, bytes=token * read)
    yield Case(name="ssa", run=lambda: bench.ssa(cache, q, layout))

    k, v = (y.transpose(1, 2) for y in (cache.k, cache.v))
    rows = q.view(batch, k.shape[1], -1, dim)
    for name, queries, grouped in (("enable_gqa", q.transpose(1, 2), True), ("group as rows", rows, False)):
        yield Case(
            name=bench.DENSE + f"SDPA {name}",
            flops=product * length,
            bytes=token * length,
            ours=False,
            run=functools.partial(scaled_dot_product_attention, queries, k, v, enable_gqa=grouped),
        )
