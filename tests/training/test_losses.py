"""Auxiliary losses and their gradients against formulas written out independently, in float64."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from nsa_convert.methods.parts.training_mode import TrainingMode
from nsa_convert.patch.patching import patch_model, sparse_methods
from nsa_convert.settings import read_settings
from nsa_convert.training.losses import StageLosses, loss_problems, stage_losses, uniform
from nsa_convert.training.recipe.schema import Stage
from nsa_convert.training.run.flops import flops_per_token
from tests.models import MOBA, NSA, SSA, VARIANTS, dense_model, plan, tokens, trained_model
from tests.training.recipes import recipe, stage

LENGTH = 53


def block_mask(q, k, settings, scale):
    """SSA's choice, query by query: mean keys of complete blocks, softmax, summed over the group."""
    size, count = settings["block_size"], settings["num_blocks"]
    heads, group, length = k.shape[0], q.shape[0] // k.shape[0], k.shape[1]
    mask = torch.zeros(heads * group, length, length, dtype=torch.bool)
    for head in range(heads):
        for t in range(length):
            own, complete = t // size, (t + 1) // size
            scores = torch.zeros(own + 1, dtype=q.dtype)
            if complete:
                means = k[head, : complete * size].unflatten(0, (complete, size))
                keys = means.mean(1)
                for g in range(head * group, (head + 1) * group):
                    if settings.get("scorer") == "second_order":
                        spread = 0.5 * means.var(1, unbiased=False)
                        logits = scale * (keys @ q[g, t]) + scale**2 * (spread @ q[g, t] ** 2)
                    else:
                        logits = scale * (keys @ q[g, t])
                    p = logits.softmax(0)
                    scores[:complete] += p
            scores[0] = scores[own] = math.inf
            for block in scores.argsort(descending=True, stable=True)[:count].tolist():
                mask[head * group : (head + 1) * group, t, block * size : min((block + 1) * size, t + 1)] = (
                    True
                )
    return mask


def rotate(x, angles):
    a, b = x.chunk(2, -1)
    cos, sin = (y[0, :, : x.shape[-1] // 2] for y in angles)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def masked_attention(q, k, v, mask, scale):
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    return ((q @ k.mT) * scale).masked_fill(~mask, -math.inf).softmax(-1) @ v


def independent_loss(model, ids, settings, stream, alpha):
    """Llama with SSA's dual stream, for one sequence, from the paper's formulas.

    Norms and angles are the model's own: transformers computes them in float32 whatever the weights are.
    """
    p, config = dict(model.named_parameters()), model.config
    heads, dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    scale, angles = dim**-0.5, model.model.rotary_emb(ids[None].double(), torch.arange(len(ids))[None])
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    h, align = p["model.embed_tokens.weight"][ids], []
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        x = model.model.layers[layer].input_layernorm(h)
        q, k, v = (
            (x @ p[f"{name}self_attn.{n}_proj.weight"].T).unflatten(1, (-1, dim)).transpose(0, 1)
            for n in "qkv"
        )
        q, k = rotate(q, angles), rotate(k, angles)
        full = masked_attention(q, k, v, causal, scale)
        sparse = masked_attention(q, k, v, block_mask(q.detach(), k.detach(), settings, scale), scale)
        align.append(
            functional.smooth_l1_loss(full, sparse.detach())
            + functional.smooth_l1_loss(full.detach(), sparse)
        )
        o = (sparse if stream == "sparse" else full).transpose(0, 1)  # [T, HQ, D]
        if settings.get("gate") == "signed":
            o = o * (2 * torch.sigmoid(x @ p[name + "self_attn.sparse.gate.weight"].T)).unflatten(
                1, (heads, 1)
            )
        h = h + o.flatten(1) @ p[name + "self_attn.o_proj.weight"].T
        x = model.model.layers[layer].post_attention_layernorm(h)
        gate, up, down = (p[f"{name}mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        h = h + (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    logits = (model.model.norm(h) @ p["lm_head.weight"].T).float()
    return functional.cross_entropy(logits[:-1], ids[1:]) + alpha * torch.stack(align).mean()


def model_loss(model, ids, stream, alpha, **inputs):
    weights = (alpha / len(model.model.layers),)
    mode = TrainingMode(stream=stream, losses=("alignment",), weights=weights)
    return model(
        input_ids=ids, labels=inputs.pop("labels", ids), training_mode=mode, use_cache=False, **inputs
    ).loss


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stream", ["sparse", "full"])
@pytest.mark.parametrize("variant", ["ssa", "ssa-gated"])
def test_ssa_loss_and_gradients_are_those_of_the_formula(variant, stream):
    model, ids = trained_model("llama", VARIANTS[variant]).train(), tokens(1, LENGTH)
    expected = independent_loss(model, ids[0], VARIANTS[variant], stream, 10.0)
    loss = model_loss(model, ids, stream, 10.0)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    without = independent_loss(model, ids[0], VARIANTS[variant], stream, 0.0)
    assert abs(expected - without) > 1e-3
    want, got = gradients(model, expected), gradients(model, loss)
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("variant", ["ssa-gated", "nsa-learned-before-rope"])
def test_checkpointing_keeps_the_auxiliary_losses(variant, reentrant):
    model, ids = trained_model("qwen3", VARIANTS[variant]).train(), tokens(2, 45)
    name = "alignment" if variant.startswith("ssa") else "output_error"

    def run():
        mode = TrainingMode(losses=(name,), weights=(10 / len(model.model.layers),))
        out = model(input_ids=ids, labels=ids, training_mode=mode, use_cache=False)
        torch.testing.assert_close(out.loss, out.cross_entropy + 10 * out.auxiliary.mean())
        return gradients(model, out.loss)

    plain = run()
    model.model.embed_tokens.register_forward_hook(lambda *a: a[2].requires_grad_())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = run()
    assert plain.keys() == again.keys()
    for key in plain:
        torch.testing.assert_close(again[key], plain[key], rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("variant", ["ssa-gated", "nsa", "nsa-learned-before-rope"])
def test_packed_documents_are_separate_documents(variant):
    model = trained_model("llama", VARIANTS[variant]).train()
    lengths, name = (37, 16, 51), "alignment" if variant.startswith("ssa") else "output_error"
    documents = [tokens(1, n, seed=n) for n in lengths]
    labels = [torch.cat([torch.full((1, 1), -100), ids[:, 1:]], 1) for ids in documents]
    mode, total = TrainingMode(losses=(name,)), sum(lengths) - len(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]

    def run(ids, label, **more):
        """Return the next-token loss in float64 (the model's own is float32) and the auxiliary losses."""
        out = model(input_ids=ids, training_mode=mode, use_cache=False, **more)
        logits = out.logits[0, :-1]
        return functional.cross_entropy(logits, label[0, 1:], reduction="sum") / total, out.auxiliary

    alone = [run(*pair) for pair in zip(documents, labels, strict=True)]
    want_loss = sum(loss for loss, _ in alone)
    loss, auxiliary = run(torch.cat(documents, 1), torch.cat(labels, 1), position_ids=positions)
    torch.testing.assert_close(loss, want_loss, rtol=1e-12, atol=0)
    want, got = (gradients(model, value) for value in (want_loss, loss))
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-9, atol=1e-12, msg=key)
    if name == "alignment":  # a mean over tokens, so documents count by their length
        parts = sum(n / sum(lengths) * losses for n, (_, losses) in zip(lengths, alone, strict=True))
        torch.testing.assert_close(auxiliary, parts, rtol=1e-9, atol=1e-14)


def brute_block_kl(q, k, settings, scale, queries, starts):
    """KL of the block scores to the true mass over the blocks that are free to choose, in loops.

    A query counts by the mass of these blocks.
    """
    width, stride, size = (
        settings["compression_block"],
        settings["compression_stride"],
        settings["block_size"],
    )
    heads, group, totals, weights = k.shape[1], q.shape[1] // k.shape[1], {}, {}
    for t in queries:
        begin = starts[t]
        cells = [begin + c for c in range(0, t + 1 - begin - width + 1, stride)]
        own = (t - begin) // size
        free = list(range(1, own + 1 - settings.get("num_local_blocks", 2)))
        if len(free) < 2:
            continue
        for head in range(heads):
            mass, score = [0.0] * (own + 1), [0.0] * (own + 1)
            for g in range(head * group, (head + 1) * group):
                p = (scale * (k[begin : t + 1, head] @ q[t, g])).softmax(0)
                for i, value in enumerate(p.tolist()):
                    mass[i // size] += value / group
                means = torch.stack([k[c : c + width, head].mean(0) for c in cells])
                for c, value in zip(cells, (scale * (means @ q[t, g])).softmax(0).tolist(), strict=True):
                    for part in range(0, width, stride):
                        score[(c - begin + part) // size] += value
            m, s = sum(mass[j] for j in free), sum(score[j] for j in free)
            kl = sum(mass[j] / m * math.log((mass[j] / m) / (score[j] / s)) for j in free)
            totals[head] = totals.get(head, 0.0) + m * kl
            weights[head] = weights.get(head, 0.0) + m
    return sum(totals[head] / weights[head] for head in range(heads)) / heads


@pytest.mark.parametrize("name", ["nsa", "ssa"])
@pytest.mark.parametrize("packed", [False, True])
def test_score_kl_is_that_of_the_formula(packed, name):
    model = trained_model("llama", VARIANTS[name])
    size = VARIANTS[name]["block_size"]
    blocks = {"compression_block": size, "compression_stride": size, "num_local_blocks": 1}
    settings = VARIANTS[name] if name == "nsa" else {**blocks, **VARIANTS[name]}
    lengths = (41, 60) if packed else (101,)
    ids = tokens(1, 101)
    seen = {}
    method = sparse_methods(model)[1]
    original = method.train_forward
    method.train_forward = lambda x, mode: seen.update(x=x) or original(x, mode)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    out = model(
        input_ids=ids, position_ids=positions, training_mode=TrainingMode(losses=("score_kl",), draw=3)
    )
    x = seen["x"]
    starts = [begin for begin, n in zip((0, 41), lengths, strict=False) for _ in range(n)]
    want = brute_block_kl(x.q[0], x.k[0], settings, x.scale, range(101), starts)
    assert out.auxiliary[1, 0].item() == pytest.approx(want, rel=1e-6)
    assert want > 0.01


@pytest.mark.parametrize(
    "variant", ["ssa-learned", "nsa-learned-before-rope", "hybrid-learned", "phases-learned"]
)
def test_score_kl_teaches_the_compressor_alone(variant):
    learned = {**NSA, "key_compressor": "token_mlp"}
    more = {
        "hybrid-learned": {**learned, "rules": [{**SSA, "layers": [0], "heads": [1]}]},
        "phases-learned": {**learned, "rules": [{"method": "full", "phase": "decode"}]},
    }
    model, ids = trained_model("llama", {**VARIANTS, **more}[variant]).train(), tokens(1, LENGTH)
    out = model(input_ids=ids, training_mode=TrainingMode(losses=("score_kl",)))
    last = gradients(model, out.auxiliary[-1, 0])
    moved = {name for name, grad in last.items() if grad.abs().max() > 0}
    assert moved
    assert all(f"layers.{len(model.model.layers) - 1}." in name for name in moved)
    assert all("compress_key" in name for name in moved)
    wanted = {n for n, _ in model.model.layers[-1].self_attn.sparse.named_parameters() if "compress_key" in n}
    assert len(moved) == len(wanted)


def test_score_kl_moves_queries_and_keys_where_nothing_else_can_learn():
    model, ids = trained_model("llama", VARIANTS["ssa"]).train(), tokens(1, LENGTH)
    out = model(input_ids=ids, training_mode=TrainingMode(losses=("score_kl",)))
    last = f"model.layers.{len(model.model.layers) - 1}.self_attn."
    moved = gradients(model, out.auxiliary[-1, 0])
    assert all(moved[f"{last}{name}_proj.weight"].abs().max() > 0 for name in "qk")


def test_align_reaches_new_weights_only_and_layers_see_the_dense_model():
    model = trained_model("llama", VARIANTS["nsa-learned-before-rope"]).train()
    for name, p in model.named_parameters():
        p.requires_grad_(".sparse." in name)
    mode = TrainingMode(stream="teacher", losses=("output_error", "score_kl"))
    out = model(input_ids=tokens(1, LENGTH), training_mode=mode)
    assert out.loss is None
    rows = [gradients(model, loss) for loss in [out.auxiliary[0].sum()]]
    touched = {name.split(".")[2] for name in rows[0] if rows[0][name].abs().max() > 0}
    assert touched == {"0"}, "the loss of a layer reaches its own weights only"
    with torch.no_grad():
        for method in sparse_methods(model):
            for p in method.parameters():
                p.add_(torch.randn_like(p))
        again = model(input_ids=tokens(1, LENGTH), training_mode=mode)
    torch.testing.assert_close(again.logits, out.logits, rtol=0, atol=0)
    assert not torch.equal(again.auxiliary, out.auxiliary)


def test_streams_are_drawn_evenly_and_reproducibly():
    plan = StageLosses(
        cross_entropy=1.0,
        names=(),
        weights=(),
        layers=(),
        dual_stream=True,
        full_ratio=0.25,
        teacher=False,
        seed=11,
    )
    streams = [plan.mode(step).stream for step in range(2000)]
    assert streams == [plan.mode(step).stream for step in range(2000)]
    assert 0.22 < streams.count("full") / 2000 < 0.28
    assert [plan.mode(s).stream for s in range(50)] != [
        dataclasses.replace(plan, seed=12).mode(s).stream for s in range(50)
    ]
    assert uniform(1, 2) != uniform(12)


def test_nsa_refuses_the_full_stream():
    model = trained_model("llama", VARIANTS["nsa"])
    with pytest.raises(ValueError, match="nsa cannot run as dense attention"):
        model(input_ids=tokens(1, 40), training_mode=TrainingMode(stream="full"))


@pytest.mark.slow
def test_auxiliary_losses_of_packed_documents_compile():
    """Also in a graph that must not know how many cells each document has."""
    torch._dynamo.reset()
    settings = {**SSA, "key_compressor": "token_mlp"}
    model = trained_model("llama", settings, num_hidden_layers=1).train()
    ids = tokens(1, LENGTH)
    ends = torch.tensor([0, 2, LENGTH // 2, LENGTH - 1, LENGTH], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in ends.diff().tolist()])[None]
    mode = TrainingMode(losses=("score_kl",), weights=(3.0,))

    def call(run):
        return run(input_ids=ids, position_ids=positions, cu_seq_lens_q=ends, labels=ids, training_mode=mode)

    eager = gradients(model, call(model).loss)
    got = gradients(model, call(torch.compile(model, backend="aot_eager", fullgraph=True)).loss)
    for key in eager:
        torch.testing.assert_close(got[key], eager[key], rtol=1e-9, atol=1e-12, msg=key)


def test_auxiliary_losses_compile():
    model = trained_model("llama", VARIANTS["ssa-gated"], num_hidden_layers=1).train()
    ids, mode = tokens(1, LENGTH), TrainingMode(losses=("alignment",), weights=(3.0,))
    eager = gradients(model, model(input_ids=ids, labels=ids, training_mode=mode).loss)
    compiled = torch.compile(model, backend="aot_eager")
    got = gradients(model, compiled(input_ids=ids, labels=ids, training_mode=mode).loss)
    for key in eager:
        torch.testing.assert_close(got[key], eager[key], rtol=1e-9, atol=1e-12, msg=key)


def read_stage(**changes: object) -> Stage:
    given = {key: value for key, value in stage(**changes).items() if value is not None}
    return read_settings(Stage, given, "stage")


def test_a_method_that_also_runs_dense_can_end_on_dense_steps() -> None:
    def draws(stage_ratio: float | None, settings: dict) -> set[str]:
        model = patch_model(dense_model("llama"), plan(settings))
        chosen = read_stage(full_ratio=stage_ratio)
        made = stage_losses(chosen, sparse_methods(model), seed=0, stage_index=0)
        return {made.mode(step).stream for step in range(30)}

    assert draws(None, MOBA) == {"sparse"}
    assert draws(1.0, MOBA) == {"full"}
    assert draws(None, SSA) == {"sparse", "full"}
    assert draws(0.0, SSA) == {"sparse"}


def test_full_steps_are_refused_where_the_method_has_none() -> None:
    methods = sparse_methods(patch_model(dense_model("llama"), plan(NSA)))
    assert "nsa cannot" in loss_problems(read_stage(full_ratio=0.1), methods)[0]
    assert not loss_problems(read_stage(full_ratio=0.0), methods)


@pytest.mark.parametrize("method", ["xattention", "minference"])
def test_a_selection_that_looks_ahead_is_not_trained(method: str) -> None:
    methods = sparse_methods(patch_model(dense_model("llama"), plan({"method": method})))
    assert f"{method} chooses keys by later tokens" in loss_problems(read_stage(), methods)[0]
    assert not loss_problems(read_stage(full_ratio=1.0), methods)


@pytest.mark.parametrize("tied", [False, True])
def test_flops_count_every_matrix_and_the_visible_keys(tmp_path: Path, tied: bool) -> None:
    model = dense_model("llama", tie_word_embeddings=tied)
    sizes = model.config
    matrices = sum(p.numel() for layer in model.model.layers for p in layer.parameters() if p.dim() > 1)
    matrices += sizes.vocab_size * sizes.hidden_size  # the LM head, tied or not
    attention = 12 * sizes.num_hidden_layers * 64 / 2 * sizes.num_attention_heads * sizes.head_dim
    (row,) = recipe(tmp_path, None, stage(seq_len=64)).stages
    assert flops_per_token(model, row) == pytest.approx(6 * matrices + attention)
