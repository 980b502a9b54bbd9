"""Every class a family has, every way to patch it, and flags that say what holds."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from nsa_convert import SparseAttentionConfig, patch_model, unpatch_model
from nsa_convert.errors import ConfigError, UnsupportedModelError
from nsa_convert.families import FAMILIES as TABLE
from nsa_convert.patch.modeling import ATTENTION_NAME
from nsa_convert.patch.models import model_classes
from nsa_convert.plan import AUTO_CLASSES
from tests.models import DSA, FAMILIES, NSA, PREFIX, SIZES, VARIANTS, dense_model, plan, tokens, trained_model

ROOT = Path(__file__).parents[2]
HEADS = {auto: end for auto, end in AUTO_CLASSES.items() if end not in ("Model", "ForCausalLM")}


def dense_class(family: str, ending: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {**copy.deepcopy(SIZES), **({"sliding_window": None} if family == "mistral" else {})}
    sizes |= {"pad_token_id": 0, "classifier_dropout": 0.0}
    config = getattr(transformers, f"{PREFIX[family]}Config")(**sizes)
    return getattr(transformers, f"{PREFIX[family]}{ending}")(config).double().eval()


def targets(ending: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    if ending == "ForQuestionAnswering":
        return {"start_positions": torch.tensor([3, 5]), "end_positions": torch.tensor([7, 9])}
    if ending == "ForTokenClassification":
        return {"labels": ids % 2}
    return {"labels": torch.tensor([0, 1])}


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_classes_know_every_head(family: str) -> None:
    config = transformers.AutoConfig.for_model(
        TABLE[family].sparse_model_type, **SIZES, sliding_window=None, sparse_attention={"default": NSA}
    )
    for auto, ending in AUTO_CLASSES.items():
        made = getattr(transformers, auto).from_config(config)
        assert type(made) is model_classes(TABLE[family])[ending]
        assert type(made.base_model) is model_classes(TABLE[family])["Model"]
        dense = getattr(transformers, f"{PREFIX[family]}{ending}")
        wanted = inspect.signature(dense.forward).parameters.keys()
        assert wanted - inspect.signature(made.forward).parameters.keys() <= {"self", "kwargs"}


@pytest.mark.parametrize("ending", [*HEADS.values(), "Model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_head_is_the_dense_one_within_the_budget_and_goes_back(family: str, ending: str) -> None:
    model, ids = dense_class(family, ending), tokens(2, 30)
    with torch.no_grad():
        want = model(ids)[0]
        patch_model(model, "nsa", **{key: value for key, value in NSA.items() if key != "method"})
        assert type(model) is model_classes(TABLE[family])[ending]
        torch.testing.assert_close(model(ids)[0], want, rtol=0, atol=1e-10)
        assert (model(tokens(2, 120))[0] - unpatch_model(model)(tokens(2, 120))[0]).abs().max() > 1e-3
        assert torch.equal(model(ids)[0], want)


@pytest.mark.parametrize("ending", list(HEADS.values()))
def test_a_head_teaches_what_chooses(ending: str) -> None:
    model, ids = patch_model(dense_class("llama", ending), DSA), tokens(2, 60)
    alone = model(ids, **targets(ending, ids)).loss
    out = model.train()(ids, **targets(ending, ids))
    assert out.aux_loss > 0
    torch.testing.assert_close(out.loss, alone + out.aux_loss)
    out.loss.backward()
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if ".index" in name)
    assert isinstance(model(ids, **targets(ending, ids), return_dict=False), tuple)


def test_a_head_loads_from_a_converted_language_model(tmp_path: Path) -> None:
    model, ids = trained_model("llama", VARIANTS["nsa"]).float(), tokens(1, 90)
    model.save_pretrained(tmp_path)
    head = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    with torch.no_grad():
        want = model.model(ids).last_hidden_state
        torch.testing.assert_close(head.model(ids).last_hidden_state, want, rtol=0, atol=0)
        assert head(ids).logits.shape == (1, 3)
    head.save_pretrained(tmp_path / "head")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "head")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, head(ids).logits)


def test_every_form_of_a_plan_gives_the_same_model() -> None:
    ids, settings = tokens(1, 90), {key: value for key, value in NSA.items() if key != "method"}
    forms = (
        (plan(NSA), {}),
        ({"default": NSA}, {}),
        (NSA, {}),
        ("nsa", settings),
        (SparseAttentionConfig.from_dict({"default": NSA}), {}),
    )
    with torch.no_grad():
        logits = [patch_model(dense_model("llama"), form, **more)(ids).logits for form, more in forms]
    assert all(torch.equal(logits[0], other) for other in logits[1:])


@pytest.mark.parametrize(
    ("given", "settings", "error", "says"),
    [
        (plan(NSA), {"num_blocks": 3}, ConfigError, "settings (num_blocks) go with the name of a method"),
        ({"methods": "nsa"}, {}, ConfigError, "methods"),
        ("nsaa", {}, ConfigError, "did you mean 'nsa'"),
        ("nsa", {"num_block": 3}, ConfigError, "num_blocks"),
        (7, {}, ConfigError, "got int"),
    ],
)
def test_a_wrong_plan_is_refused_before_anything_changes(
    given: object, settings: dict, error: type, says: str
) -> None:
    model = dense_model("llama")
    before = (type(model), model.config, [layer.self_attn for layer in model.model.layers])
    with pytest.raises(error) as caught:
        patch_model(model, given, **settings)
    assert says in caught.value.message
    assert before == (type(model), model.config, [layer.self_attn for layer in model.model.layers])


def test_what_cannot_be_patched_is_refused_before_anything_changes() -> None:
    model = dense_model("llama")
    weight = model.model.layers[1].self_attn.q_proj.weight
    model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"quantised \(model\.layers\.1\.self_attn\.q_proj"):
        patch_model(model, "nsa")
    assert type(model) is transformers.LlamaForCausalLM

    class Wrapped(transformers.LlamaForCausalLM):
        pass

    with pytest.raises(UnsupportedModelError, match="a Wrapped cannot be patched"):
        patch_model(Wrapped(dense_model("llama").config), "nsa")
    with pytest.raises(UnsupportedModelError, match="already converted"):
        patch_model(trained_model("llama", NSA), "nsa")


def test_attention_weights_are_refused_not_left_out() -> None:
    model, ids = trained_model("llama", NSA), tokens(1, 20)
    with pytest.raises(NotImplementedError, match="observe"):
        model(ids, output_attentions=True)
    with pytest.raises(NotImplementedError, match="observe"):
        model.generate(ids, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    assert model(ids, output_attentions=False).logits.shape == (1, 20, 128)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_another_attention_changes_nothing_and_says_so(name: str, tmp_path: Path) -> None:
    trained_model("llama", NSA).float().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"'{name}' changes nothing"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    assert model.config._attn_implementation == ATTENTION_NAME
    with pytest.warns(UserWarning, match=f"'{name}' changes nothing"):
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == ATTENTION_NAME


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "vllm", "paged|sdpa"])
def test_an_attention_that_cannot_run_is_refused(name: str, tmp_path: Path) -> None:
    model = trained_model("llama", NSA).float()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot run in a converted model"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    with pytest.raises(ValueError, match="cannot run in a converted model"):
        model.set_attn_implementation(name)


def test_no_warning_where_nothing_was_asked(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    trained_model("llama", NSA).float().save_pretrained(tmp_path)
    for more in ({}, {"attn_implementation": ATTENTION_NAME}):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **more)
    assert not [warning for warning in recwarn if "attn_implementation" in str(warning.message)]


def test_backends_are_promised_only_where_they_run() -> None:
    for family in TABLE.values():
        for made in model_classes(family).values():
            assert not made._supports_attention_backend
            assert not made.is_backend_compatible()


@pytest.mark.parametrize("call", ["generate_batch", "init_continuous_batching"])
def test_continuous_batching_is_refused_before_it_allocates(call: str) -> None:
    model = trained_model("llama", NSA)
    with pytest.raises(NotImplementedError, match="continuous batching"):
        getattr(model, call)([[1, 2, 3]])


SPAWNED = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    config = pickle.load(file)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):
    print(type(auto.from_config(config)).__name__)
"""


@pytest.mark.slow
def test_a_config_unpickled_in_a_new_process_is_known_there(tmp_path: Path) -> None:
    path = tmp_path / "config.pkl"
    path.write_bytes(pickle.dumps(trained_model("llama", NSA).config))
    done = subprocess.run(
        [sys.executable, "-c", SPAWNED, str(path)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["NSALlamaForCausalLM", "NSALlamaForSequenceClassification"]


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_model_can_be_pickled(variant: str) -> None:
    model, ids = trained_model("llama", VARIANTS[variant]), tokens(1, 60)
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("mistral", {"sliding_window": 16}, "sliding_window must be null"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, "layer_types"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type 'dynamic' is not supported",
        ),
    ],
)
def test_a_model_that_conversion_refuses_is_refused_in_memory_too(
    family: str, changes: dict, says: str
) -> None:
    model = dense_model(family, **changes)
    kept = type(model)
    with pytest.raises(ConfigError, match=says):
        patch_model(model, plan(NSA))
    assert type(model) is kept
    config = trained_model(family, NSA).config
    for name in model.config.to_dict().keys() & {*changes, "layer_types"}:
        setattr(config, name, getattr(model.config, name))
    with pytest.raises(ConfigError, match=says):
        transformers.AutoModelForCausalLM.from_config(config)
