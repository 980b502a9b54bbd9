"""How many blocks neighbouring queries choose together, and what a tile that reads them once saves.

    python benchmarks/union.py [--model demo] [--text FILE] [--tokens 8192] [--layers 2,8,15,22,28]

Runs a dense model over a text, scores blocks from its queries and keys as NSA, SSA and InfLLM-v2 do, and
counts on the lists of the second half of the text: the blocks in the union over W neighbouring queries; the
tiles the kernels choose; keys and values moved; rows of matrix products, those of steps that are not full
included. The last two are over those of a kernel that loads the blocks of one query at a time and pads its
heads to 16 rows. Nothing is timed.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from nsa_convert import bench
from nsa_convert.config import LayerRule, SparseAttentionConfig
from nsa_convert.evaluation.models import load_model
from nsa_convert.evaluation.tasks.text import file_text, first_tokens, prose_text
from nsa_convert.hub import dense_folder, resolve_model
from nsa_convert.kernels.compressed import block_topk
from nsa_convert.kernels.union.torch_backend import union_sizes
from nsa_convert.kernels.union.triton_plan import Shape, choose_shape, readers_of
from nsa_convert.kernels.union.triton_steps import key_steps
from nsa_convert.loading import load_tokenizer
from nsa_convert.methods.parts.base import AttentionRecord, observe
from nsa_convert.patch.patching import patch_model
from nsa_convert.patterns import BlockTopK

RESULTS = Path(__file__).parent / "results"

WIDTHS = (1, 4, 8, 16, 32, 64)
GROUPS = (3, 4, 7, 8, 16)
FORMS = (".1f", ".1f", ".0f", ".1f", ".0f", ".3f", ".2f")
KEY_ROW = 256
"""Bytes of a key: 128 dims in bfloat16."""

PADDED_ROWS = 16
"""Rows that a kernel of one query pads its heads to."""

RULES = {
    "nsa": (32, 16, BlockTopK(block_size=64, num_blocks=16)),
    "infllm_v2": (32, 16, BlockTopK(block_size=64, num_blocks=16, num_local_blocks=8, reduce="max")),
    "ssa": (64, 64, BlockTopK(block_size=64, num_blocks=16)),
    "ssa, blocks of 16": (16, 16, BlockTopK(block_size=16, num_blocks=64, num_local_blocks=1)),
}
"""Name -> width and stride of a cell, and the block budget: 1024 keys a query in each.

NSA attends to its window in a branch of its own; InfLLM-v2's, half of the keys here, is among the blocks.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What the selected branch does with the lists of one layer at one group size.

    Attributes:
        rows: Rows of a tile.
        halves: 2 when it is walked in halves.
        width: Queries in a tile.
        union: Mean blocks in a tile.
        bytes_ratio: Keys and values moved, over those of the kernel of one query.
        matrix_ratio: Rows of matrix products, over those of the kernel of one query padded to 16.
        rows_per_useful: Rows of matrix products per (query, head, key) that some query listed.
    """

    rows: int
    halves: int
    width: int
    union: float
    bytes_ratio: float
    matrix_ratio: float
    rows_per_useful: float


def count(lists: Tensor, group: int, block_size: int = 64, shape: Shape | None = None) -> Counts:
    """Count loads and rows of a tile that walks the union of its lists.

    Args:
        lists: ``[H, T, S]`` block numbers, -1 where unused, one list for each query and KV head.
        group: Query heads that share a list.
        block_size: Keys in a block; small ones are taken together in steps.
        shape: Shape of the tiles; the kernels' own choice when None.
    """
    readers = readers_of((group, 1), 1)
    shape = choose_shape(lists[None], readers, 1) if shape is None else shape
    width = shape.width(readers)

    lists = lists[:, : lists.shape[1] // width * width]

    # Listed blocks are what a kernel of one query loads; a tile loads each block of its union once.
    sizes = tile_unions(lists, width)
    listed = int((lists >= 0).sum())
    blocks = int(sizes.sum())

    # In halves, blocks that both halves list take all rows, the others the rows of one half.
    groups = [(shape.rows, sizes)]
    if shape.halves == 2:
        first, second = tile_unions(lists, width // 2).unflatten(0, (-1, 2)).unbind(1)
        groups = [(shape.rows, first + second - sizes)]
        groups += [(shape.rows // 2, sizes - second), (shape.rows // 2, sizes - first)]

    # Steps of several small blocks that are not full are computed whole.
    join = key_steps(block_size, KEY_ROW)["JOIN"]
    work = sum(rows * join * int(((n + join - 1) // join).sum()) for rows, n in groups)

    padded = -(-group // PADDED_ROWS) * PADDED_ROWS
    return Counts(
        rows=shape.rows, halves=shape.halves, width=width, union=blocks / len(sizes),
        bytes_ratio=blocks / listed, matrix_ratio=work / (padded * listed),
        rows_per_useful=work / (group * listed),
    )  # fmt: skip


def tile_unions(lists: Tensor, width: int) -> Tensor:
    """Return the blocks in the union of each run of ``width`` queries, for lists ``[H, T, S]``."""
    return union_sizes(lists.unflatten(1, (-1, width)).flatten(2).flatten(0, 1))


def union_means(lists: Tensor) -> dict[int, float]:
    """Return the mean number of blocks in the union over W neighbouring queries, for lists ``[H, T, S]``."""
    means = {}
    for width in WIDTHS:
        whole = lists.shape[1] // width * width
        means[width] = tile_unions(lists[:, :whole], width).double().mean().item()
    return means


def choose(q: Tensor, k: Tensor, width: int, stride: int, rule: BlockTopK) -> Tensor:
    """Return the lists ``[H, T, S]`` of queries ``[1, T, HQ, D]`` that score mean-pooled keys."""
    cells = bench.mean_pool(k, width, stride)
    return block_topk(q, cells, width=width, stride=stride, rule=rule).block_indices[0]


def independent(like: Tensor, block_size: int) -> Tensor:
    """Return lists as long as these, with random blocks among those each query may see."""
    heads, length, size = like.shape
    g = torch.Generator().manual_seed(0)
    blocks = -(-2 * length // block_size)

    own = (torch.arange(length, 2 * length) // block_size)[:, None]

    parts = []
    for _ in range(heads):
        rank = torch.rand(length, blocks, generator=g).masked_fill(torch.arange(blocks) > own, -1.0)
        parts.append(rank.topk(size, -1).indices)
    return torch.stack(parts)


def captured(
    model: str, text: Path | None, tokens: int, layers: list[int]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield ``(layer, q [1, T, HQ, D], k [1, T, H, D])`` of a dense run."""
    folder = dense_folder(resolve_model(model, say=print), say=print)
    dense = load_model(folder)
    # SSA in full mode computes dense attention and lets an observer see it.
    patch_model(dense, SparseAttentionConfig(default=LayerRule(method="ssa", settings={"mode": "full"})))
    source = prose_text() if text is None else file_text(text)

    ids = torch.tensor([first_tokens(load_tokenizer(folder), source, tokens)])
    if ids.shape[1] < tokens:
        raise SystemExit(f"{source.source} has {ids.shape[1]} tokens, {tokens} are needed")

    kept: list[tuple[int, Tensor, Tensor]] = []

    def keep(record: AttentionRecord) -> None:
        if record.layer_index in layers:
            kept.append((record.layer_index, record.q.clone(), record.k.clone()))

    with torch.inference_mode(), observe(keep):
        dense.model(ids)
    yield from kept


def main() -> None:
    """Capture, choose, count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, help="by default the Python language reference")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", default="2,8,15,22,28")
    parser.add_argument("--csv", type=Path, default=RESULTS / "union.csv")
    options = parser.parse_args()

    layers = [int(x) for x in options.layers.split(",")]
    common = {
        "model": options.model,
        "text": options.text.name if options.text else "python reference",
        "tokens": options.tokens,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }

    rows: list[dict] = []
    for layer, q, k in captured(options.model, options.text, options.tokens, layers):
        for name, (width, stride, rule) in RULES.items():
            lists = choose(q, k, width, stride, rule)[:, options.tokens // 2 :]
            rows += table_rows(common | {"layer": layer, "scores": name, "block": rule.block_size}, lists)

    # Lists that nothing ties together, of 16 blocks each.
    lists = independent(lists[:, :, :16], 64)
    rows += table_rows(common | {"layer": "", "scores": "independent", "block": 64}, lists)

    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(summary(rows))


def table_rows(common: dict, lists: Tensor) -> list[dict]:
    """Return one row for each group size."""
    unions = {f"union_{w}": round(u, 2) for w, u in union_means(lists).items()}
    rows = []
    for group in GROUPS:
        counts = dataclasses.asdict(count(lists, group, common["block"]))
        rows.append(common | unions | {"group": group} | {n: round(x, 4) for n, x in counts.items()})
    return rows


def summary(rows: list[dict]) -> str:
    """Return the means over the layers as a Markdown table."""
    lines = [
        "| scores | G | union W=16 | W=32 | rows | halves | width | bytes moved | matrix work |",
        "|" + "---|" * 9,
    ]

    columns = ("union_16", "union_32", "rows", "halves", "width", "bytes_ratio", "matrix_ratio")
    for name in dict.fromkeys(row["scores"] for row in rows):
        for group in GROUPS:
            own = [row for row in rows if row["scores"] == name and row["group"] == group]
            means = (sum(row[n] for row in own) / len(own) for n in columns)
            cells = (f"{x:{form}}" for x, form in zip(means, FORMS, strict=True))
            lines.append(f"| {name} | {group} | {' | '.join(cells)} |")

    return "\n".join(lines)


if __name__ == "__main__":
    main()
