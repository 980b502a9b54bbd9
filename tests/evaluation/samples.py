"""The JSON of a made-up evaluation that has a value for everything a report can show."""

from __future__ import annotations

from typing import Any


def summary(ratio: float = 1.25) -> dict[str, Any]:
    return {
        "tokens": 64,
        "dense_ppl": 8.0,
        "sparse_ppl": 8.0 * ratio,
        "ppl_ratio": ratio,
        "kl_mean": 0.125,
        "kl_p50": 0.1,
        "kl_p95": 0.5,
        "kl_p99": 0.75,
        "kl_max": 1.0,
        "top1": 0.875,
        "top5": 0.9,
    }


def text(name: str) -> dict[str, Any]:
    layers = [
        {
            "layer": layer,
            "pattern": pattern,
            "budget": 1024,
            "density": 0.25,
            "captured": 0.8 - 0.01 * layer,
            "captured_by_head": [0.8, 0.7],
            "oracle": 0.9 if pattern == "selected" else None,
            "recall": 0.6 if pattern == "selected" else None,
            "gates": {"compressed": 0.0, "selected": 1.0, "window": 0.0},
        }
        for layer in range(4)
        for pattern in ("selected", "window")
    ]
    curve = [{"context_end": 128 * i, **summary(1 + 0.01 * i)} for i in range(1, 33)]
    buckets = [{"context": "1-1024", **summary(1.0)}, {"context": "1025-4095", **summary()}]
    return {
        "name": name,
        "kind": "file",
        "source": f"file {name}.txt",
        "sha256": "ab" * 32,
        "tokens": 4096,
        "all": summary(),
        "beyond": summary(),
        "buckets": buckets,
        "curve": curve,
        "layers": layers,
    }


def sample_report(name: str = "tiny-nsa") -> dict[str, Any]:
    depths, lengths = (0.1, 0.35, 0.6, 0.85), (1024, 2048, 4096, 8192)
    cases = {
        "dense": [{"length": n, "depth": d, "hit": True, "nll": 0.1} for n in lengths for d in depths],
        "sparse": [
            {"length": n, "depth": d, "hit": n < 4096 or d > 0.5, "nll": 0.2} for n in lengths for d in depths
        ],
    }
    speed = [
        {
            "attention": mode,
            "length": n,
            "prefill_s": n / 1000 * factor,
            "prefill_max_s": n / 900 * factor,
            "decode_ms": n / 400 * factor,
            "decode_max_ms": n / 300 * factor,
            "cache_bytes": 46_000 * n,
        }
        for mode, factor in (("dense", 1.0), ("sparse", 0.5))
        for n in lengths
    ]
    tasks = [
        {"task": task, "length": n, "attention": mode, "index": i, "score": float(i < right)}
        for task in ("niah_single_1", "vt")
        for n in (2048, 4096)
        for mode, right in (("dense", 4), ("sparse", 3))
        for i in range(4)
    ]
    return {
        "schema": 1,
        "ok": True,
        "suite": "long",
        "command": f"nsa-convert eval {name} --suite long",
        "model": {"name": name, "model_type": "nsa_llama", "layers_by_method": {"nsa": 4}},
        "against": {"name": name, "attention": "dense, over the weights of the evaluated model"},
        "visible_budget": 1024,
        "texts": [text("code"), text("prose")],
        "needles": cases,
        "tasks": tasks,
        "speed": speed,
        "warnings": ["a warning with <tags> & signs"],
        "settings": {"seed": 0},
        "environment": {
            "device_name": "a machine",
            "threads": 2,
            "torch": "2",
            "transformers": "5",
            "python": "3",
            "date": "2026-01-01",
        },
    }
