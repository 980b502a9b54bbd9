from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from nsa_convert.card.facts import read_facts
from nsa_convert.checkpoint.scan import LARGE_WEIGHT, magnitude_bits
from nsa_convert.config import LayerRule, SparseAttentionConfig
from nsa_convert.convert import convert_checkpoint
from nsa_convert.inspection import inspect_checkpoint
from nsa_convert.strict_files import read_mapping
from tests.checkpoints import FAMILY_OPTIONS, SETTINGS, dense_model, shard_paths, tree_hash, write_dense

NSA = SparseAttentionConfig(default=LayerRule(method="nsa", settings=SETTINGS))
SSA = SparseAttentionConfig(default=LayerRule(method="ssa", settings={"block_size": 8, "num_blocks": 4}))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense") / "model")


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in shard_paths(folder):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def load(folder: Path):
    from transformers import AutoModelForCausalLM

    from nsa_convert.patch.registration import register

    register()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("model_type", FAMILY_OPTIONS)
@pytest.mark.parametrize("sparse", [NSA, SSA], ids=["nsa", "ssa"])
def test_starts_at_the_dense_model(tmp_path, model_type, sparse):
    source = write_dense(tmp_path / "dense", model_type, shards=model_type != "qwen2")
    before = tree_hash(source)
    report = convert_checkpoint(source, tmp_path / "out", sparse)
    assert tree_hash(source) == before
    ids = torch.randint(64, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (load(tmp_path / "out")(ids).logits - load(source)(ids).logits).abs().max()
    assert difference <= 1e-4
    kept, out = all_tensors(source), all_tensors(tmp_path / "out")
    assert all(torch.equal(kept[name], out[name]) for name in kept)
    assert set(out) - set(kept) == {tensor.name for tensor in report.new_tensors}
    assert all(".self_attn.sparse." in name for name in set(out) - set(kept))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]


def test_report_and_index_count_everything(tmp_path, source):
    report = convert_checkpoint(source, tmp_path / "out", NSA)
    tensors = all_tensors(tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert report.kept_parameters + report.new_parameters == index["metadata"]["total_parameters"]
    assert report.dense_until == 32
    assert report.placed == "linked"
    assert {tensor.init for tensor in report.new_tensors} == {"constant 0"}
    stored = json.loads((tmp_path / "out/conversion_report.json").read_text())
    assert str(tmp_path) not in json.dumps(stored)
    assert set(stored["source"]["files"]) == {path.name for path in shard_paths(source)}


def test_linked_shards_share_the_inode_and_copies_do_not(tmp_path, source):
    convert_checkpoint(source, tmp_path / "linked", NSA)
    report = convert_checkpoint(source, tmp_path / "copied", NSA, copy=True)
    assert report.placed == "copied"
    for path in shard_paths(source):
        assert path.samefile(tmp_path / "linked" / path.name)
        assert not path.samefile(tmp_path / "copied" / path.name)
        assert (tmp_path / "copied" / path.name).read_bytes() == path.read_bytes()


def test_falls_back_to_copying(tmp_path, source, monkeypatch):
    monkeypatch.setattr(
        os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link"))
    )
    assert convert_checkpoint(source, tmp_path / "out", NSA).placed == "copied"


def test_single_file_gets_a_number(tmp_path):
    source = write_dense(tmp_path / "dense", shards=False)
    convert_checkpoint(source, tmp_path / "out", NSA)
    names = {path.name for path in shard_paths(tmp_path / "out")}
    assert names == {"model-00001-of-00001.safetensors", "model-sparse.safetensors"}


def test_method_without_new_tensors_keeps_the_single_file(tmp_path):
    source = write_dense(tmp_path / "dense", shards=False)
    report = convert_checkpoint(source, tmp_path / "out", SSA)
    assert report.new_tensors == []
    assert [path.name for path in shard_paths(tmp_path / "out")] == ["model.safetensors"]
    assert not (tmp_path / "out/model.safetensors.index.json").exists()


@pytest.mark.parametrize("model_type", FAMILY_OPTIONS)
def test_every_learned_part(tmp_path, model_type):
    """Own projections start as copies (qwen2 has biases), MLP compressors the same in every run."""
    learned = {"branch_kv": "independent", "key_compressor": "mlp", "value_compressor": "linear"}
    plan = SparseAttentionConfig(default=LayerRule(method="nsa", settings={**SETTINGS, **learned}))
    source = write_dense(tmp_path / "dense", model_type)
    report = convert_checkpoint(source, tmp_path / "first", plan)
    convert_checkpoint(source, tmp_path / "second", plan)
    assert tree_hash(tmp_path / "first") == tree_hash(tmp_path / "second")
    tensors = all_tensors(tmp_path / "first")
    for new in report.new_tensors:
        assert tuple(tensors[new.name].shape) == new.shape
        if new.init.startswith("copy of"):
            dense = tensors[new.name.split("sparse.")[0] + new.init.removeprefix("copy of ")]
            assert torch.equal(tensors[new.name], torch.cat([dense, dense]))
    assert any(new.init == "copy of k_proj.weight" for new in report.new_tensors)


def test_recipe_repeats_the_conversion(tmp_path, source):
    plan = SparseAttentionConfig(
        default=LayerRule(method="full"), rules=(LayerRule(method="nsa", settings=SETTINGS, layers=(1,)),)
    )
    convert_checkpoint(source, tmp_path / "first", plan)
    recipe = read_mapping(tmp_path / "first/recipe.yaml")
    again = SparseAttentionConfig.from_dict(recipe["sparse_attention"])
    convert_checkpoint(source, tmp_path / "second", again)
    assert tree_hash(tmp_path / "first") == tree_hash(tmp_path / "second")
    assert again.for_layer(0, 2)[0].method == "full"
    assert again.for_layer(1, 2)[0].settings["block_score"] == "sum"


def test_dry_run_writes_nothing(tmp_path, source):
    before = tree_hash(source)
    report = convert_checkpoint(source, tmp_path / "out", NSA, dry_run=True, contexts=(64, 4096))
    real = convert_checkpoint(source, tmp_path / "real", NSA, contexts=(64, 4096))
    assert report.out is None
    assert not (tmp_path / "out").exists()
    assert tree_hash(source) == before
    assert (report.new_tensors, report.costs, report.layers) == (real.new_tensors, real.costs, real.layers)
    assert [cost.context for cost in report.costs] == [64, 4096]


def test_costs_of_dense_layers_are_equal(tmp_path, source):
    full = SparseAttentionConfig(default=LayerRule(method="full"))
    for cost in convert_checkpoint(source, tmp_path / "out", full, dry_run=True).costs:
        assert cost.dense_kv_bytes == cost.sparse_kv_bytes
        assert cost.dense_prefill_flops == cost.sparse_prefill_flops
        assert cost.density == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_costs_count_the_bytes_of_the_checkpoints_dtype(tmp_path, dtype):
    source = tmp_path / "dense"
    dense_model().to(dtype).save_pretrained(source)
    inspected = inspect_checkpoint(source, "nsa", (4096,)).methods[0].costs
    out = tmp_path / "out"
    nsa = SparseAttentionConfig(default=LayerRule(method="nsa"))
    report = convert_checkpoint(source, out, nsa, contexts=(4096,))
    assert report.costs == inspected
    assert read_facts(out)[0]["costs"] == [dataclasses.asdict(cost) for cost in inspected]
    assert (
        inspected[0].dense_kv_bytes == 2 * 2 * 2 * 8 * 4096 * dtype.itemsize
    )  # layers, k and v, heads, D, T


@pytest.mark.parametrize("shards", [True, False])
def test_tied_embeddings(tmp_path, shards):
    source = write_dense(tmp_path / "dense", tie_word_embeddings=True, shards=shards)
    assert "lm_head.weight" not in all_tensors(source)
    convert_checkpoint(source, tmp_path / "out", NSA)
    model = load(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_cf12_mha_is_allowed(tmp_path):
    source = write_dense(tmp_path / "dense", num_key_value_heads=4)
    convert_checkpoint(source, tmp_path / "out", NSA)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert (load(tmp_path / "out")(ids).logits - load(source)(ids).logits).abs().max() <= 1e-4


def test_biases_of_llama(tmp_path):
    source = write_dense(tmp_path / "dense", attention_bias=True, mlp_bias=True)
    assert "model.layers.0.self_attn.o_proj.bias" in all_tensors(source)
    convert_checkpoint(source, tmp_path / "out", NSA)


def test_magnitude_bits_order_like_numbers():
    for dtype, kind in (("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)):
        bits = torch.tensor(LARGE_WEIGHT, dtype=kind).view(torch.int32 if kind.itemsize == 4 else torch.int16)
        assert magnitude_bits(LARGE_WEIGHT, dtype) == int(bits)


def test_progress_counts_every_shard(tmp_path, source):
    seen = []
    convert_checkpoint(
        source, tmp_path / "out", NSA, progress=lambda name, done, total: seen.append((done, total))
    )
    count = len(shard_paths(source))
    assert sorted(seen) == [(i, count) for i in range(1, count + 1)]


def test_a_hybrid_is_told_and_stored_head_by_head(tmp_path):
    plan = SparseAttentionConfig.from_dict(
        {
            "default": {"method": "nsa", **SETTINGS},
            "rules": [
                {"method": "msa", "block_size": 8, "num_blocks": 4, "layers": [-1], "heads": [1]},
                {"method": "full", "layers": [0], "heads": [0]},
            ],
        }
    )
    source = write_dense(tmp_path / "dense", "qwen2")
    report = convert_checkpoint(source, tmp_path / "out", plan)
    assert "layers 1, KV heads 1: msa" in report.to_text()
    assert "layers 0, KV heads 0: full" in report.to_text()
    rules = json.loads((tmp_path / "out" / "config.json").read_text())["sparse_attention"]["rules"]
    assert [(rule["method"], rule["layers"], rule["heads"]) for rule in rules] == [
        ("msa", [1], [1]),
        ("full", [0], [0]),
    ]
    new = {name for name in all_tensors(tmp_path / "out") if ".sparse." in name}
    assert {name.split(".sparse.")[1] for name in new if ".layers.1." in name} == {
        "parts.0.gate.weight",
        "parts.1.index.q.weight",
    }
