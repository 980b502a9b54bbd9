"""One token through a whole model with a long cache: converted models beside the dense one.

    python -m benchmarks.decode_model [--geometry 14/2/64] [--length 65536] [--layers 4]
                                      [--methods nsa,ssa,...] [--repeats 20] [--compile] [--csv FILE]

A Qwen2 model with random weights and a small feed-forward part, bfloat16, transformers' own dynamic cache, or
with --compile its static one and one graph for all positions. It is filled with random keys and values, and
with the cells and token states that layers keep: no time here depends on what was said. `NAME:KEY=VALUE`
gives a method a setting. Beside the dense model as transformers runs it stands one whose query heads of a
group are the rows of one product. Times are those of a whole step over the number of layers.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    Cache,
    DynamicCache,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from benchmarks.ops_cpu import RESULTS, commit
from nsa_convert import bench
from nsa_convert.cli.options import parse_settings
from nsa_convert.config import AttentionGeometry, SparseAttentionConfig
from nsa_convert.methods.parts.inputs import select_heads
from nsa_convert.patch.cache import sparse_cache_layer
from nsa_convert.patch.layout import SparseContext
from nsa_convert.patch.patching import patch_model
from nsa_convert.patch.pooling import grow_cells, grow_states
from nsa_convert.patterns import SequenceLayout

METHODS = (
    "nsa", "nsa:scorer=second_order", "ssa", "ssa:scorer=second_order", "moba", "infllm_v2:dense_len=0",
    "dsa", "msa", "quest",
)  # fmt: skip
GROUPED = "group_on_rows"
ROOM = 1024
"""Tokens a static cache holds beyond the given ones."""


def main() -> None:
    """Measure, print and write."""
    options = parse_arguments()

    sizes = bench.parse_geometry(options.geometry)

    # Keys and values of each layer, [2, 1, H, T, D].
    g = torch.Generator().manual_seed(0)
    shape = (2, 1, sizes.num_kv_heads, options.length, sizes.head_dim)
    kv = [torch.randn(shape, generator=g).bfloat16() for _ in range(options.layers)]

    with torch.inference_mode():
        cases = list(step_cases(sizes, kv, options.methods.split(","), options.compile))
        rows = bench.time_cases("decode", options.length, cases, options.repeats, "cpu")

    rows = [per_layer(row, options.layers) for row in rows]
    place = bench.environment("cpu") | {"commit": commit(), "layers": str(options.layers)}
    report = bench.BenchReport(
        geometry=options.geometry, dtype="bfloat16", environment=place, rows=tuple(rows)
    )

    print(report.to_table())
    kind = "compiled_" if options.compile else ""
    report.write_csv(options.csv or RESULTS / f"decode_model_{kind}{options.geometry.replace('/', '-')}.csv")


def per_layer(row: bench.BenchRow, layers: int) -> bench.BenchRow:
    """Return the row with times of one layer."""
    times = {name: getattr(row, name) / layers for name in ("median_ms", "min_ms", "max_ms")}
    return dataclasses.replace(row, **times)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", default="14/2/64")
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="time compiled steps on a static cache")
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


def step_cases(
    sizes: AttentionGeometry, kv: list[Tensor], methods: list[str], compiled: bool
) -> Iterator[bench.Case]:
    """Yield name and run of a decoding step of the dense models and of each method."""
    AttentionInterface.register(GROUPED, group_on_rows)
    if compiled:  # a static cache holds slots that nobody may see; for a dynamic one there is no mask
        AttentionMaskInterface.register(GROUPED, eager_mask)
    for name, attention in (("SDPA", "sdpa"), ("eager", "eager"), ("bmm, group as rows", GROUPED)):
        yield bench.DENSE + name, step(dense_model(sizes, len(kv), attention), kv, compiled)
    for text in methods:
        name, *pairs = text.split(":")
        plan = SparseAttentionConfig.from_dict({"default": {"method": name} | parse_settings(pairs)})
        yield text, step(patch_model(dense_model(sizes, len(kv), "sdpa"), plan), kv, compiled)


def dense_model(sizes: AttentionGeometry, layers: int, attention: str) -> PreTrainedModel:
    """Return a Qwen2 model with random weights."""
    config = Qwen2Config(
        vocab_size=512, hidden_size=sizes.hidden_size, intermediate_size=256, num_hidden_layers=layers,
        num_attention_heads=sizes.num_query_heads, num_key_value_heads=sizes.num_kv_heads,
        max_position_embeddings=1 << 20, attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).to(torch.bfloat16).eval()


def group_on_rows(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: object
) -> tuple[Tensor, None]:
    """Attend with one query ``[1, HQ, 1, D]`` to all keys ``[1, H, T, D]``, as bench's fastest dense case."""
    # The query heads of a group as the rows of one product per KV head, [H, G, D].
    rows = q.view(k.shape[1], -1, q.shape[3])
    scores = torch.bmm(rows, k[0].mT).mul_(scaling)
    p = (scores if mask is None else scores.add_(mask[0])).softmax(-1)
    return torch.bmm(p, v[0]).view(1, 1, q.shape[1], -1), None


def step(model: PreTrainedModel, kv: list[Tensor], compiled: bool) -> Callable[[], object]:
    """Return a run of one token on a cache that holds ``kv``; the cache grows by it."""
    length = kv[0].shape[3]
    cache = StaticCache(model.config, max_cache_len=length + ROOM) if compiled else DynamicCache()
    token = torch.tensor([[7]])

    for index, (k, v) in enumerate(kv):
        remember(model, cache, index, k, v)
    run = torch.compile(model.forward, options={"cpp_wrapper": True}) if compiled else model.forward
    return lambda: run(token, past_key_values=cache, use_cache=True)


def remember(model: PreTrainedModel, cache: Cache, index: int, k: Tensor, v: Tensor) -> None:
    """Put keys and values ``[1, H, T, D]`` into a layer's cache, and what a sparse layer keeps of them."""
    sparse = getattr(model.model.layers[index].self_attn, "sparse", None)

    # The layer's entry in the cache has to be of the sparse kind before the first update.
    if sparse is not None:
        sparse_cache_layer(cache, index).open(sparse, None, 0)
    cache.update(k, v, index)
    if sparse is None:
        return

    # The cells of a layer, computed from all keys and values at once.
    context = SparseContext(layout=SequenceLayout(), starts=None, rotary=model.model.rotary_emb)
    sources = {"key": k.transpose(1, 2), "value": v.transpose(1, 2)}
    for pool in sparse.cache_needs().pools:
        source = select_heads(sources[pool.source], pool.heads)
        grow_cells(sparse, pool, cache.layers[index], source, k.shape[2], context, tracked=False)

    # The token states, such as index keys, from random hidden states.
    hidden = torch.randn(1, k.shape[2], sparse.geometry.hidden_size, dtype=k.dtype)
    states = sparse.project(hidden, lambda x: x).token_states
    for name in sparse.cache_needs().token_states:
        grow_states(cache.layers[index], name, states[name], 0)

    cache.layers[index].settle()


if __name__ == "__main__":
    main()
