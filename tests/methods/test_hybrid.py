"""Layers whose heads run different methods."""

from __future__ import annotations

import pytest
import torch

from nsa_convert.config import AttentionGeometry
from nsa_convert.estimate import context_costs
from nsa_convert.evaluation.metrics.mass import MassProbe
from nsa_convert.methods.parts.mix import HeadMix, neighbours
from nsa_convert.methods.parts.registry import build_layer
from nsa_convert.methods.parts.training_mode import TrainingMode
from nsa_convert.patch.patching import patch_model, set_mode, sparse_methods, with_full_budget
from tests.models import DSA, MOBA, MSA, NSA, SSA, VARIANTS, dense_model, plan, tokens

FOUR_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
GEOMETRY = AttentionGeometry(hidden_size=64, num_query_heads=8, num_kv_heads=4, head_dim=16)


@pytest.mark.parametrize("name", ["nsa", "nsa-independent", "ssa", "moba", "infllm_v2", "msa", "streaming"])
def test_splitting_one_method_over_parts_changes_nothing(name: str) -> None:
    settings, ids = VARIANTS[name], tokens(1, 90)
    outs = []
    split = [{**settings, "layers": [0], "heads": [0, 2]}, {**settings, "layers": [1], "heads": [1, 2]}]
    for rules in ([], split):
        dense = dense_model("qwen2", num_hidden_layers=2, **FOUR_HEADS)
        model = patch_model(dense, plan(settings, *rules))
        with torch.no_grad():
            outs.append(model(ids).logits)
    assert isinstance(sparse_methods(model)[0], HeadMix)
    assert (outs[0] - outs[1]).abs().max() < 1e-12


def test_parts_run_their_own_method() -> None:
    """A head that is full sees everything, whatever the others do."""
    ids = tokens(1, 90)
    model = dense_model("llama", num_hidden_layers=1, **FOUR_HEADS)
    outs = {}

    def keep(name: str) -> None:
        hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
            lambda _, args: outs.__setitem__(name, args[0].unflatten(-1, (8, 16)))
        )
        with torch.no_grad():
            model(ids)
        hook.remove()

    keep("dense")
    patch_model(model, plan(SSA, {"method": "full", "layers": [0], "heads": [1, 3]}))
    keep("mixed")
    gap = (outs["mixed"] - outs["dense"]).abs().amax((0, 1, 3))
    assert gap[[2, 3, 6, 7]].max() < 1e-12
    assert gap[[0, 1, 4, 5]].min() > 1e-3


def test_projections_of_a_part_start_from_its_heads() -> None:
    rule = {**NSA, "branch_kv": "independent", "layers": [1], "heads": [1, 3]}
    shared = {**MSA, "index_key": "shared", "layers": [2], "heads": [2]}
    model = patch_model(dense_model("qwen2", **FOUR_HEADS), plan({"method": "full"}, rule, shared))
    attention = model.model.layers[1].self_attn
    parts = dict(zip(("0", "1", "2", "3"), attention.sparse.parts, strict=True))
    for head in (1, 3):
        dense = attention.k_proj.weight.view(4, 16, 64)[head]
        assert torch.equal(parts[str(head)].branch_k_proj.weight, torch.cat([dense, dense]))
    attention = model.model.layers[2].self_attn
    index = next(part for part in attention.sparse.parts if part.spec.name == "msa").index
    assert torch.allclose(index.q.weight, attention.q_proj.weight.view(4, 2, 16, 64)[2].mean(0), atol=1e-6)
    assert torch.equal(index.k.weight, attention.k_proj.weight.view(4, 16, 64)[2])


def test_methods_that_choose_for_all_heads_stay_whole() -> None:
    layer = build_layer(plan(NSA, {**DSA, "layers": [0], "heads": [0, 2]}), GEOMETRY, 0)
    assert [(part.method.spec.name, part.heads) for part in layer.settings] == [
        ("dsa", (0, 2)),
        ("nsa", (1,)),
        ("nsa", (3,)),
    ]
    assert neighbours((0, 1, 3, 4, 7)) == [(0, 1), (3, 4), (7,)]


def test_cost_of_a_mix_is_the_sum_of_its_parts() -> None:
    def cost(*rules: dict) -> object:
        return context_costs([build_layer(plan(SSA, *rules), GEOMETRY, 0)], GEOMETRY, 2, [4096])[0]

    whole, full = cost(), cost({"method": "full", "layers": [0]})
    half = cost({"method": "full", "layers": [0], "heads": [0, 3]})
    for name in ("sparse_kv_bytes", "sparse_prefill_flops", "sparse_decode_bytes", "density"):
        middle = (getattr(whole, name) + getattr(full, name)) / 2
        assert getattr(half, name) == pytest.approx(middle, rel=1e-6), name


def test_losses_are_means_over_the_heads_that_have_them() -> None:
    model = patch_model(dense_model("llama", **FOUR_HEADS), plan(SSA, {**MSA, "layers": [1], "heads": [3]}))
    method = sparse_methods(model)[1]
    assert method.training_spec.dual_stream
    assert method.training_spec.stage_losses["align"] == {"output_error": 1.0, "index_kl": 1.0}
    seen = {}
    original = method.train_forward

    def watch(x: object, mode: TrainingMode) -> tuple:
        o, losses = original(x, mode)
        seen["mix"] = losses
        pairs = zip(method.parts, method._split(x), strict=True)
        seen["parts"] = [part.train_forward(inputs, mode)[1] for part, inputs in pairs]
        return o, losses

    method.train_forward = watch
    model.train()
    model(tokens(1, 90), training_mode=TrainingMode(losses=("output_error", "index_kl")))
    ssa, msa = seen["parts"]
    expected = (3 * ssa["output_error"] + msa["output_error"]) / 4
    assert torch.allclose(seen["mix"]["output_error"], expected)
    assert torch.equal(seen["mix"]["index_kl"], msa["index_kl"])


def test_switches_reach_the_parts() -> None:
    model = patch_model(dense_model("llama", **FOUR_HEADS), plan(MOBA, {**MSA, "layers": [0], "heads": [3]}))
    ids = tokens(1, 90)
    with torch.no_grad():
        sparse = model(ids).logits
        with with_full_budget(model, 90):
            dense = model(ids).logits
        set_mode(model, "full")
        full = model(ids).logits
    assert (dense - sparse).abs().max() > 0.1
    assert (dense - full).abs().max() < 1e-10


def test_the_mass_probe_names_the_heads() -> None:
    model = patch_model(dense_model("llama", **FOUR_HEADS), plan(SSA, {**MOBA, "layers": [0], "heads": [2]}))
    probe = MassProbe(32)
    with torch.no_grad(), probe.watch():
        model(tokens(1, 90))
    heads = [(row.layer, row.heads, len(row.captured_by_head)) for row in probe.rows]
    assert heads == [(0, (0, 1), 2), (0, (2,), 1), (0, (3,), 1), (1, None, 4), (2, None, 4)]
