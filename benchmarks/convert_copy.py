"""Converting a sharded checkpoint against a plain copy of it: time and extra memory.

    python benchmarks/convert_copy.py [--gib 1] [--repeats 5] [--folder DIR] [--csv FILE]

Each round copies the folder, then converts it with linked and with copied weights, each in a process of its
own, in turn, so that all meet the same machine. Time is that of the call, imports not counted; memory is the
peak of the process minus what it held before the call. A conversion that copies flushes its files to disk, so
the copy is also timed with that.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LAYER = {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16, "num_key_value_heads": 4}
LAYER_BYTES = 2 * 2048 * (2 * 2048 + 2 * 512 + 3 * 5504)
VOCABULARY = 32000


def write_checkpoint(folder: Path, gib: float) -> int:
    """Write a bf16 Llama of about this size in one shard per layer; return its bytes."""
    import torch
    from safetensors.torch import save_file

    from nsa_convert.checkpoint.source_config import dense_tensor_shapes
    from nsa_convert.families import FAMILIES

    layers = max(1, round((gib * 2**30 - 4 * VOCABULARY * LAYER["hidden_size"]) / LAYER_BYTES))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "dtype": "bfloat16",
        **LAYER,
    }

    folder.mkdir(parents=True)

    shards: dict[str, dict] = {}
    generator = torch.Generator().manual_seed(0)

    # Small random weights, so that no value is infinite or suspicious; one shard per layer, one for the rest.
    for name, shape in dense_tensor_shapes(config, FAMILIES["llama"]).items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(part, {})[name] = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
    total = 0
    where = {}

    for index, tensors in enumerate(shards.values(), 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())

    (folder / "config.json").write_text(json.dumps(config))
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index_text)
    return total


CHILD = """
import json, os, re, shutil, sys, time
from pathlib import Path
from nsa_convert.config import LayerRule, SparseAttentionConfig
from nsa_convert.convert import convert_checkpoint

what, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is held now
held = lambda key: int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before, start = held("VmRSS"), time.perf_counter()
if what == "plain copy":
    shutil.copytree(source, out)
elif what == "copy, flushed":
    shutil.copytree(source, out)
    for path in out.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
else:
    sparse = SparseAttentionConfig(default=LayerRule(method="nsa"))
    convert_checkpoint(source, out, sparse, copy=what == "convert, copied")
print(json.dumps({"seconds": time.perf_counter() - start, "extra_mib": held("VmHWM") - before}))
"""


def measure(what: str, source: Path, out: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, what, str(source), str(out)], capture_output=True, text=True, check=True
    )
    shutil.rmtree(out)

    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder when left out")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()

    root = Path(tempfile.mkdtemp(prefix="nsa-bench-", dir=options.folder))
    kinds = ("plain copy", "copy, flushed", "convert, linked", "convert, copied")

    # All kinds in turn, and the disk at rest before each.
    try:
        total = write_checkpoint(root / "source", options.gib)
        os.sync()
        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for _ in range(options.repeats):
            for kind in kinds:
                runs[kind].append(measure(kind, root / "source", root / "out"))
                os.sync()
    finally:
        shutil.rmtree(root)

    report(runs, total, options.csv)


def report(runs: dict[str, list[dict[str, float]]], total: int, path: Path | None) -> None:
    from importlib.metadata import version

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    facts = {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "device": platform.processor() or "cpu",
        "cores": os.cpu_count(),
        "torch": version("torch"),
        "gib": round(total / 2**30, 3),
    }

    # Times are told as multiples of the plain copy's.
    base = statistics.median(run["seconds"] for run in runs["plain copy"])
    rows = []
    for kind, results in runs.items():
        seconds = sorted(run["seconds"] for run in results)
        median = statistics.median(seconds)
        extra = max(run["extra_mib"] for run in results)
        rows.append(
            {
                **facts,
                "what": kind,
                "median_s": round(median, 3),
                "min_s": round(seconds[0], 3),
                "max_s": round(seconds[-1], 3),
                "times_copy": round(median / base, 2),
                "extra_mib": round(extra, 1),
            }
        )
        print(
            f"{kind:16} {median:6.2f} s ({seconds[0]:.2f}-{seconds[-1]:.2f})  {median / base:5.2f} x copy  "
            f"+{extra:.0f} MiB"
        )

    if path is not None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
