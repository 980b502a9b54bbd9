"""A training step of transformers' own Trainer on converted models beside the dense one.

    python -m benchmarks.train_step [--model tiny|FOLDER|FILE.gguf] [--lengths 1024,4096] [--batch 1]
                                    [--methods nsa,ssa,...] [--steps 3] [--rounds 3] [--precision bf16|fp32]
                                    [--csv FILE]

Every model is the same dense one, converted in memory, on the same random tokens: no time here depends on
what is said. A step is forward, backward and AdamW, with the losses that teach what chooses. Each round runs
all models, so that a machine that is slower for a while is so for all; the first step of a round is not
counted. `NAME:KEY=VALUE` gives a method a setting.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.ops_cpu import RESULTS, commit
from nsa_convert import bench
from nsa_convert.checkpoint.gguf import is_gguf, load_gguf_model
from nsa_convert.cli.options import parse_settings
from nsa_convert.loading import load_causal_model
from nsa_convert.patch.patching import patch_model

METHODS = ("nsa", "ssa", "moba", "infllm_v2", "dsa", "msa")
DENSE = "dense"


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step, from its first forward to its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begin = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Note the time."""
        self._begin = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note how long the step took."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._begin)


def main() -> None:
    """Measure, print and write."""
    options = parse_arguments()
    dense = load(options.model)
    config = dense.config

    rows = [row for length in options.lengths for row in measure(dense, length, options)]

    heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads[0]
    geometry = "/".join(map(str, (*heads, head_dim)))

    place = bench.environment("cuda" if torch.cuda.is_available() else "cpu")
    place |= {"commit": commit(), "model": Path(options.model).name, "batch": str(options.batch)}
    dtype = {"bf16": "bfloat16 autocast", "fp32": "float32"}[options.precision]
    report = bench.BenchReport(geometry=geometry, dtype=dtype, environment=place, rows=tuple(rows))

    print(report.to_table())
    report.write_csv(options.csv or RESULTS / f"train_step_{Path(options.model).stem}.csv")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--lengths", type=lambda text: list(map(int, text.split(","))), default=[1024, 4096])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


def load(name: str) -> PreTrainedModel:
    """Return the dense model in float32: a checkpoint, a GGUF file, or a small one with random weights."""
    if name != "tiny":
        path = Path(name)
        return load_gguf_model(path, "float32") if is_gguf(path) else load_causal_model(path, torch.float32)

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "vocab_size": 4096}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16384}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def measure(dense: PreTrainedModel, length: int, options: argparse.Namespace) -> Iterator[bench.BenchRow]:
    """Yield a row for the dense model and for each method."""
    names = [DENSE, *options.methods]
    seconds: dict[str, list[float]] = {name: [] for name in names}

    # All models in turn, so that a slower machine is so for all.
    for _ in range(options.rounds):
        for name in names:
            seconds[name] += step_seconds(converted(dense, name), length, options)
            print(f"{length:>7} {name:12} {1000 * seconds[name][-1]:9.1f} ms", flush=True)

    base = statistics.median(seconds[DENSE])
    for name in names:
        times = [1000 * x for x in seconds[name]]
        middle = statistics.median(times)
        yield bench.BenchRow(
            phase="train", length=length, name=name, median_ms=middle, min_ms=min(times), max_ms=max(times),
            speedup=1000 * base / middle,
        )  # fmt: skip


def converted(dense: PreTrainedModel, text: str) -> PreTrainedModel:
    """Return a copy of the dense model, converted as ``NAME:KEY=VALUE`` says."""
    model = copy.deepcopy(dense)
    if text == DENSE:
        return model
    name, *pairs = text.split(":")
    return patch_model(model, name, **parse_settings(pairs))


def step_seconds(model: PreTrainedModel, length: int, options: argparse.Namespace) -> list[float]:
    """Return the seconds of the steps of one round."""
    g = torch.Generator().manual_seed(0)
    count = options.batch * (options.steps + 1)
    rows = torch.randint(0, model.config.vocab_size, (count, length), generator=g)

    data = [{"input_ids": row, "labels": row} for row in rows]

    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=options.steps + 1, per_device_train_batch_size=options.batch, report_to="none",
            save_strategy="no", disable_tqdm=True, bf16=options.precision == "bf16", learning_rate=1e-5,
            logging_strategy="no",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data, callbacks=[times]).train()

    return times.seconds[1:]


if __name__ == "__main__":
    main()
