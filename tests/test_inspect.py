from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from nsa_convert.checkpoint.headers import TensorEntry
from nsa_convert.config import AttentionGeometry, SparseAttentionConfig
from nsa_convert.convert import convert_checkpoint
from nsa_convert.errors import CheckpointError, ConfigError, NsaConvertError
from nsa_convert.estimate import context_costs
from nsa_convert.inspection import inspect_checkpoint
from nsa_convert.methods.parts.registry import METHODS
from nsa_convert.plan import resolve_plan
from tests.checkpoints import FAMILY_OPTIONS, dense_model, edit_json, write_dense
from tests.test_convert import NSA

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("model_type", FAMILY_OPTIONS)
def test_facts(tmp_path, model_type):
    source = write_dense(tmp_path / "dense", model_type)
    report = inspect_checkpoint(source, contexts=(64, 8192))
    assert report.parameters == sum(p.numel() for p in dense_model(model_type).parameters())
    assert (report.model_type, report.num_layers, report.group_size, report.head_dim) == (model_type, 2, 2, 8)
    assert {outlook.method for outlook in report.methods} == set(METHODS)
    assert all(outlook.reason is None for outlook in report.methods)
    assert not report.converted
    assert report.rope["rope_type"] == "default"
    json.dumps(report.to_dict())
    assert "no sparsity below" in report.to_text()


def test_costs_by_hand(tmp_path):
    """NSA's defaults on 2 layers, 4/2 heads, D 8, fp32, at 8192 tokens."""
    report = inspect_checkpoint(write_dense(tmp_path / "dense"), "nsa", (8192,))
    (outlook,) = report.methods
    (cost,) = outlook.costs
    cells = (8192 - 32) // 16 + 1
    row = 8 * 4
    assert cost.dense_kv_bytes == 2 * 2 * 2 * row * 8192
    assert cost.sparse_kv_bytes == cost.dense_kv_bytes + 2 * 2 * 2 * row * cells
    assert cost.dense_prefill_flops == 2 * 4 * 4 * 8 * 8192 * 8193 // 2
    seen = 16 * 64 + 512
    raw = seen * (seen + 1) // 2 + (8192 - seen) * seen
    pooled = sum(max(0, (t - 32) // 16 + 1) for t in range(1, 8193))
    assert cost.sparse_prefill_flops == 2 * (4 * 4 * 8 * raw + 2 * 2 * 4 * 8 * pooled)
    assert cost.density == pytest.approx(seen / 8192)
    assert outlook.dense_until == 1024


@pytest.mark.parametrize(
    ("method", "adapts"),
    [("xattention", True), ("flexprefill", True), ("spargeattn", True), ("minference", True), ("full", False),
     ("tri_shape", False), ("h2o", False), ("quest", False)],
)  # fmt: skip
def test_work_that_depends_on_the_text_is_said_to(tmp_path, method, adapts):
    report = inspect_checkpoint(write_dense(tmp_path / "dense"), method, (8192,))
    (cost,) = report.methods[0].costs
    assert cost.prefill_depends_on_text == adapts
    if adapts:
        assert cost.sparse_prefill_flops == cost.dense_prefill_flops
    assert ("<= 100.0%" in report.to_text()) == adapts
    assert ("depends on its text" in report.to_text()) == adapts
    assert (
        json.loads(json.dumps(report.to_dict()))["methods"][0]["costs"][0]["prefill_depends_on_text"]
        == adapts
    )


def test_dense_decoding_leaves_the_prompt_sparse():
    geometry = AttentionGeometry(hidden_size=32, num_query_heads=4, num_kv_heads=2, head_dim=8)
    costs = []
    for decode in ("dense", "sparse"):
        plan = SparseAttentionConfig.from_dict({"default": {"method": "moba", "decode": decode}})
        costs += context_costs(resolve_plan(plan, 2, geometry), geometry, 4, [65536])
    assert costs[0].sparse_prefill_flops == costs[1].sparse_prefill_flops < costs[0].dense_prefill_flops / 2
    assert costs[0].sparse_decode_bytes > costs[1].sparse_decode_bytes


def test_one_adapting_layer_makes_the_work_a_bound(tmp_path):
    rules = [{"method": "xattention", "phase": "prefill"}, {"method": "quest", "phase": "decode"}]
    rules = [{**rule, "layers": [1]} for rule in rules]
    plan = SparseAttentionConfig.from_dict({"default": {"method": "full"}, "rules": rules})
    geometry = AttentionGeometry(hidden_size=32, num_query_heads=4, num_kv_heads=2, head_dim=8)
    (cost,) = context_costs(resolve_plan(plan, 2, geometry), geometry, 4, [8192])
    assert cost.prefill_depends_on_text


def test_a_converted_model(tmp_path):
    source = write_dense(tmp_path / "dense")
    convert_checkpoint(source, tmp_path / "out", NSA)
    report = inspect_checkpoint(tmp_path / "out")
    assert report.converted
    assert report.parameters == inspect_checkpoint(source).parameters
    (outlook,) = report.methods
    assert outlook.method == "as converted"
    assert outlook.dense_until == 32


def test_a_converted_model_has_its_method_already(tmp_path):
    convert_checkpoint(write_dense(tmp_path / "dense"), tmp_path / "out", NSA)
    with pytest.raises(CheckpointError, match="converted already"):
        inspect_checkpoint(tmp_path / "out", method="ssa")


def test_unknown_method(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'nsa'"):
        inspect_checkpoint(write_dense(tmp_path / "dense"), "nsaa")


def test_no_weights_are_read(tmp_path, monkeypatch):
    """A tensor can be as large as it likes: only headers are looked at."""
    source = write_dense(tmp_path / "dense")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    inspect_checkpoint(source)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_inblock - before < 1000
    edit_json(source / "config.json", num_hidden_layers=10000)
    with pytest.raises(NsaConvertError):
        inspect_checkpoint(source)


def test_no_transformers_and_little_memory(tmp_path):
    source = write_dense(tmp_path / "dense")
    script = (
        "import re, sys\n"
        "from nsa_convert.inspection import inspect_checkpoint\n"
        "inspect_checkpoint(sys.argv[1])\n"
        "assert 'transformers' not in sys.modules\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    # Not ru_maxrss, which starts at the size of the process that started this one.
    command = [sys.executable, "-c", script, str(source)]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 500_000


def test_sizes_of_an_entry():
    entry = TensorEntry(name="x", dtype="BF16", shape=(3, 5), start=8, end=38)
    assert (entry.size, entry.nbytes) == (15, 30)
