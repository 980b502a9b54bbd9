"""Training runs the family's own forward, and auxiliary losses have the gradients of a sum, in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from nsa_convert import families
from nsa_convert.methods.parts.training_mode import TrainingMode
from nsa_convert.patch import models
from nsa_convert.patch.model_classes import sparse_config_class, sparse_model_classes
from nsa_convert.patch.patching import patch_model, set_mode
from tests.marks import these_quick
from tests.models import (
    DSA,
    MSA,
    NSA,
    PAIRS,
    QUICK_PAIRS,
    SIZES,
    SSA,
    VARIANTS,
    plan,
    tokens,
    trained_model,
)

LENGTH = 60
LEARNED = {
    "nsa": {**NSA, "key_compressor": "token_mlp"},
    "ssa": {**SSA, "key_compressor": "token_mlp"},
    "dsa": DSA,
    "msa-shared": {**MSA, "index_key": "shared"},
    "hybrid": {**DSA, "rules": [{**SSA, "key_compressor": "token_mlp", "layers": [1]}]},
}
"""Plans in which something that chooses has weights."""


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], rtol: float = 1e-9) -> None:
    """Compare in float64; the family's next-token loss itself is float32 and rounds."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    size = max(x.abs().max() for x in want.values())
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=rtol, atol=rtol * float(size), msg=name)


def chooses(name: str) -> bool:
    return ".index" in name or "compress_key" in name


@pytest.mark.parametrize(("family", "variant"), these_quick(PAIRS, QUICK_PAIRS))
def test_ordinary_and_training_losses_are_one_function(family: str, variant: str) -> None:
    model, ids = trained_model(family, VARIANTS[variant]), tokens(2, 45)
    ordinary = model(ids, labels=ids, use_cache=False)
    training = model(ids, labels=ids, training_mode=TrainingMode())
    torch.testing.assert_close(training.loss, ordinary.loss, rtol=0, atol=0)
    torch.testing.assert_close(training.logits, ordinary.logits, rtol=0, atol=0)


def test_a_family_with_multipliers_trains_the_function_it_evaluates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row added to the table is enough: Granite scales embeddings, residuals, scores and logits."""
    row = families.ModelFamily(
        model_type="granite", title="Granite", class_prefix="Granite", qkv_bias="attention_bias"
    )
    monkeypatch.setitem(families.FAMILIES, "granite", row)
    config = sparse_config_class(row, models.__name__)
    monkeypatch.setitem(models._CONFIGS, "granite", config)
    monkeypatch.setitem(models._MODELS, "granite", sparse_model_classes(row, config, models.__name__))
    factors = {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.5,
    }
    torch.manual_seed(0)
    dense = transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES, **factors)).double().eval()
    ids = tokens(2, 30)
    with torch.no_grad():
        want = dense(ids, labels=ids).loss
        model = patch_model(dense, plan(NSA))
        for stream in ("sparse", "teacher"):
            got = model(ids, labels=ids, training_mode=TrainingMode(stream=stream, teacher_kl=1.0))
            torch.testing.assert_close(got.cross_entropy, want, rtol=1e-12, atol=0)
            assert got.teacher_kl.abs() < 1e-12


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("variant", list(LEARNED))
def test_gradients_are_those_of_the_sum(variant: str, checkpointing: bool | None) -> None:
    model, ids = trained_model("qwen3", LEARNED[variant]).train(), tokens(2, LENGTH)
    names = (
        "output_error",
        *sorted({n for m in model.model.layers for n in m.self_attn.sparse.training_spec.choice_losses()}),
    )
    weights = tuple(0.3 * (k + 1) for k in range(len(names)))
    plain = model(ids, labels=ids, training_mode=TrainingMode(losses=names))
    total = plain.loss + sum(w * plain.auxiliary[:, k].sum() for k, w in enumerate(weights))
    want = gradients(model, total)

    if checkpointing is not None:
        model.model.embed_tokens.register_forward_hook(lambda *a: a[2].requires_grad_())
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    out = model(ids, labels=ids, training_mode=TrainingMode(losses=names, weights=weights))
    torch.testing.assert_close(out.loss, total, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.aux_loss, total - plain.loss, rtol=1e-9, atol=1e-12)
    check_same(gradients(model, out.loss), want)


@pytest.mark.parametrize(
    ("compiled", "checkpointing"),
    [
        pytest.param(compiled, checkpointing, marks=() if checkpointing is kept else pytest.mark.slow)
        for compiled, kept in (("model", None), ("decoder", None), ("layers", True))
        for checkpointing in (None, False, True)
    ],
)
def test_compiled_parts_of_a_model_have_the_same_gradients(compiled: str, checkpointing: bool | None) -> None:
    """A graph knows nothing of a gradient that is noted outside of it, as TRL's heads and regions do."""
    torch._dynamo.reset()
    model, ids = trained_model("llama", DSA).train(), tokens(2, LENGTH)
    want_loss = model(ids, labels=ids)
    want = gradients(model, 3 * want_loss.loss)
    model.auxiliary_draw = 0
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    parts = {"model": [model], "decoder": [model.model], "layers": model.model.layers}[compiled]
    for part in parts:
        part.compile(backend="eager")
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.aux_loss, want_loss.aux_loss, rtol=1e-9, atol=1e-12)
    check_same(gradients(model, 3 * out.loss), want)


@pytest.mark.parametrize("variant", list(LEARNED))
def test_losses_of_a_batch_are_the_mean_of_its_rows(variant: str) -> None:
    """So that micro-batches, accumulation and processes may cut a batch as they like."""
    model, ids = trained_model("llama", LEARNED[variant]).train(), tokens(3, LENGTH)

    def losses(rows: torch.Tensor) -> torch.Tensor:
        model.auxiliary_draw = 0
        return model(rows, labels=rows).auxiliary

    alone = torch.stack([losses(row[None]) for row in ids]).mean(0)
    torch.testing.assert_close(losses(ids), alone, rtol=1e-9, atol=1e-12)


def test_what_scales_the_loss_scales_its_parts() -> None:
    model, ids = trained_model("llama", DSA).train(), tokens(1, LENGTH)
    want = gradients(model, model(ids, labels=ids).loss)
    model.auxiliary_draw = 0
    scaled = gradients(model, 512 * model(ids, labels=ids).loss)
    check_same({name: grad / 512 for name, grad in scaled.items()}, want)


def test_passes_that_are_minimised_together_keep_their_own_weights() -> None:
    model, first, second = trained_model("llama", DSA).train(), tokens(1, LENGTH), tokens(1, 50, seed=7)
    alone = [gradients(model, model(ids, labels=ids).loss) for ids in (first, second)]
    both = 3 * model(first, labels=first).loss + 5 * model(second, labels=second).loss
    check_same(
        gradients(model, both), {name: 3 * alone[0][name] + 5 * alone[1][name] for name in alone[0]}, 1e-6
    )


def test_a_loss_that_is_not_used_teaches_nothing() -> None:
    model, ids = trained_model("llama", DSA).train(), tokens(1, LENGTH)
    got = gradients(model, model(ids, labels=ids).logits.square().mean())
    assert not [name for name in got if chooses(name)]


@pytest.mark.parametrize("variant", list(LEARNED))
def test_an_ordinary_training_forward_teaches_what_chooses(variant: str) -> None:
    model, ids = trained_model("llama", LEARNED[variant]).train(), tokens(2, LENGTH)
    plain = model.eval()(ids, labels=ids).loss
    out = model.train()(ids, labels=ids)
    assert out.aux_loss > 0
    torch.testing.assert_close(out.loss, plain + out.aux_loss, check_dtype=False)
    got = gradients(model, out.loss)
    learners = [name for name, _ in model.named_parameters() if chooses(name)]
    assert learners
    assert not [name for name in learners if not got[name].abs().max() > 0]

    model.config.sparse_aux_loss_coef = 0.25
    model.auxiliary_draw = 0
    quarter = model(ids, labels=ids)
    torch.testing.assert_close(quarter.aux_loss, out.aux_loss / 4, rtol=1e-9, atol=0)
    model.config.sparse_aux_loss_coef = 0.0
    off = model(ids, labels=ids)
    torch.testing.assert_close(off.loss, plain, rtol=0, atol=0)
    if variant != "nsa":  # there the compressed branch attends to what the compressor makes
        assert not [name for name in gradients(model, off.loss) if chooses(name)]


@pytest.mark.parametrize("variant", list(LEARNED))
def test_elsewhere_an_ordinary_forward_costs_and_returns_what_it_did(variant: str) -> None:
    model, ids = trained_model("llama", LEARNED[variant]), tokens(2, LENGTH)
    calls = []
    for layer in model.model.layers:
        layer.self_attn.sparse.train_forward = lambda *_: calls.append(1)
    wanted = transformers.modeling_outputs.CausalLMOutputWithPast
    assert type(model(ids, labels=ids)) is wanted
    model.train()
    assert type(model(ids)) is wanted
    with torch.no_grad():
        assert type(model(ids, labels=ids)) is wanted
    assert not calls
    assert isinstance(model.eval()(ids, labels=ids, return_dict=False), tuple)


def test_a_method_with_nothing_to_choose_by_has_the_ordinary_loss() -> None:
    for variant in ("nsa", "ssa", "moba", "infllm_v2", "streaming"):
        model = trained_model("llama", VARIANTS[variant]).train()
        methods = [layer.self_attn.sparse for layer in model.model.layers]
        assert not any(method.training_spec.choice_losses() for method in methods), variant
        assert not hasattr(model(tokens(1, 40), labels=tokens(1, 40)), "aux_loss")


@pytest.mark.parametrize("shifted", [False, True])
def test_passes_of_a_step_count_by_their_labels(shifted: bool) -> None:
    """Trainers hand ``num_items_in_batch`` to every pass of a step and add the losses up."""
    model, rows = trained_model("llama", DSA).train(), [tokens(1, n, seed=n) for n in (60, 45)]
    labels = [row.clone() for row in rows]
    labels[0][:, :20] = -100
    counts = [int((row[:, 1:] != -100).sum()) for row in labels]
    alone, passes = [], []
    for row, label, count in zip(rows, labels, counts, strict=True):
        model.auxiliary_draw = 4
        alone.append(count / sum(counts) * model(row, labels=label).loss)
        more = {"shift_labels": torch.nn.functional.pad(label[:, 1:], (0, 1), value=-100)} if shifted else {}
        model.auxiliary_draw = 4
        passes.append(model(row, labels=label, num_items_in_batch=sum(counts), **more).loss)
    torch.testing.assert_close(sum(passes), sum(alone), rtol=1e-6, atol=0)
    check_same(gradients(model, sum(passes)), gradients(model, sum(alone)), 1e-6)


def test_full_mode_trains_its_index_over_all_tokens() -> None:
    """The warm-up of the papers: dense attention, the index follows the whole mass."""
    model, ids = trained_model("llama", DSA).train(), tokens(1, LENGTH)
    set_mode(model, "full")
    ordinary = model(ids, labels=ids)
    warm = model(ids, labels=ids, training_mode=TrainingMode(stream="full", losses=("index_kl",)))
    torch.testing.assert_close(ordinary.loss, warm.loss + ordinary.aux_loss, check_dtype=False)
    torch.testing.assert_close(ordinary.aux_loss, warm.auxiliary[:, 0].mean(), rtol=1e-12, atol=0)


def test_ssa_in_full_mode_is_trained_as_it_runs() -> None:
    settings = {**SSA, "mode": "full", "rules": [{**DSA, "layers": [1]}]}
    model, ids = trained_model("llama", settings).train(), tokens(1, LENGTH)
    out = model(ids, labels=ids)
    assert out.aux_loss > 0
    plain = model.eval()(ids, labels=ids).loss
    torch.testing.assert_close(out.loss, plain + out.aux_loss, check_dtype=False)


def test_the_sample_of_queries_moves_on() -> None:
    model = trained_model("llama", DSA).train()
    modes = [model._ordinary_mode(tokens(1, 9), {}) for _ in range(3)]
    assert [mode.draw for mode in modes] == [0, 1, 2]
    assert {dataclasses.replace(mode, draw=0) for mode in modes} == {dataclasses.replace(modes[0], draw=0)}


def test_without_labels_a_training_mode_still_has_its_losses() -> None:
    model, ids = trained_model("llama", DSA).train(), tokens(1, LENGTH)
    out = model(ids, training_mode=TrainingMode(losses=("index_kl",), weights=(1.0,)))
    torch.testing.assert_close(out.loss, out.auxiliary.sum(), rtol=1e-12, atol=0)
    assert any(chooses(name) for name in gradients(model, out.loss))
