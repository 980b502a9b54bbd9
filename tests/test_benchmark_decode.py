"""A whole small run of benchmarks/decode_model.py, and that its steps are those of generation."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import decode_model
from nsa_convert import bench
from nsa_convert.config import SparseAttentionConfig
from nsa_convert.patch.patching import patch_model


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--geometry", "4/2/16", "--length", "2200", "--layers", "2", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["decode_model", *words, "--csv", str(tmp_path / "x.csv")])
    decode_model.main()
    with (tmp_path / "x.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows[3:]] == list(decode_model.METHODS)
    assert all(float(row["speedup"]) > 0 and row["commit"] and row["layers"] == "2" for row in rows)


@pytest.mark.slow
def test_compiled_steps() -> None:
    """A compiled step says what the same step says eagerly, with grouped query heads too."""
    sizes, kv = bench.parse_geometry("4/2/16"), torch.randn(2, 1, 2, 700, 16).bfloat16()
    with torch.inference_mode():
        runs = [dict(decode_model.step_cases(sizes, [kv], ["nsa"], compiled)) for compiled in (False, True)]
        for name, run in runs[0].items():
            expected, got = run().logits, runs[1][name]().logits
            torch.testing.assert_close(got, expected, rtol=0, atol=2**-7 * expected.abs().max().item())


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["nsa", "ssa", "quest", "msa"])
def test_a_filled_cache_is_what_a_prompt_leaves(name: str, static: bool) -> None:
    """Keys and values of a real prompt, put into the cache by hand, continue as the prompt itself does."""
    sizes = bench.parse_geometry("4/2/16")
    plan = SparseAttentionConfig.from_dict({"default": {"method": name, "block_size": 16, "num_blocks": 4}})
    model = patch_model(decode_model.dense_model(sizes, 1, "sdpa"), plan)
    ids = torch.arange(200)[None] % 97
    with torch.inference_mode():
        prompt = model(ids[:, :-1], use_cache=True).past_key_values
        expected = model(ids[:, -1:], past_key_values=prompt).logits
        cache = decode_model.StaticCache(model.config, 256) if static else decode_model.DynamicCache()
        k, v = (x[:, :, :199].clone() for x in (prompt.layers[0].keys, prompt.layers[0].values))
        decode_model.remember(model, cache, 0, k, v)
        got = model(ids[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
