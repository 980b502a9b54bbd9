"""Seconds that torch.compile takes for the forward of converted models, beside the dense one.

    python -m benchmarks.compile_time [--methods nsa,ssa,...] [--length 2048] [--layers 3] [--rounds 1]

One prompt without a cache, inductor, nothing kept of earlier compilations; the time of the first call less
that of the second. Every model is the same dense one, converted in memory; a round compiles all of them. The
dense model is compiled once before, not counted: it pays for what the compiler itself has to start.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.train_step import DENSE, METHODS, converted
from nsa_convert import bench


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "vocab_size": 4096}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16384}
    dense = LlamaForCausalLM(LlamaConfig(num_hidden_layers=options.layers, **sizes, **heads)).eval()
    ids = torch.randint(0, 4096, (1, options.length))

    compile_seconds(converted(dense, DENSE), ids)

    # All models in turn, so that a slower machine is so for all.
    names = [DENSE, *options.methods]
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            found[name].append(compile_seconds(converted(dense, name), ids))
            print(f"{name:12} {found[name][-1][0]:7.1f} s", flush=True)

    base = statistics.median(seconds for seconds, _ in found[DENSE])
    print(f"\n{'method':12} {'seconds':>8} {'of dense':>9} {'graphs':>7}")
    for name in names:
        seconds = statistics.median(seconds for seconds, _ in found[name])
        print(f"{name:12} {seconds:8.1f} {seconds / base:9.1f} {found[name][0][1]:7}")
    print(", ".join(f"{key} {value}" for key, value in bench.environment("cpu").items()))


@torch.no_grad()
def compile_seconds(model: PreTrainedModel, ids: torch.Tensor) -> tuple[float, int]:
    """Return the seconds of compilation, and the number of graphs."""
    torch._dynamo.reset()
    counters.clear()
    forward = torch.compile(model.forward)
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        forward(input_ids=ids, use_cache=False)
        times.append(time.perf_counter() - begin)
    return times[0] - times[1], counters["stats"]["unique_graphs"]


if __name__ == "__main__":
    torch._inductor.config.force_disable_caches = True
    main()
