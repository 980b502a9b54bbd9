"""A trained model can be verified, evaluated, described and published like a converted one."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from nsa_convert.card import write_card
from nsa_convert.checkpoint.manifest import check_manifest, read_manifest
from nsa_convert.errors import CheckFailedError
from nsa_convert.evaluation.suites.quick import run_quick
from nsa_convert.methods.parts.registry import METHODS
from nsa_convert.patch.patching import patch_model
from nsa_convert.push import plan_push
from nsa_convert.training.recipe.schema import recipe_from_dict
from nsa_convert.training.run.runner import train_recipe
from nsa_convert.verification import revert_checkpoint, verify_checkpoint
from tests.marks import slow, these_quick
from tests.models import NSA, VARIANTS, plan, trained_model
from tests.publishable import converted
from tests.training.recipes import stage


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    source = converted(folder)
    data = folder / "text.txt"
    data.write_text("A text of one's own, in a place of one's own. " * 40)
    own = [{"kind": "text", "path": str(data)}]
    stages = [
        stage("align", kind="align", train="new", tokens=128, save_every=0, data=own),
        stage("pretrain", tokens=128, save_every=0, data=own),
    ]
    recipe = recipe_from_dict(
        {"model": str(source), "out": str(folder / "run"), "stages": stages, "report_to": "none"}
    )
    return train_recipe(recipe, source, base=folder), source, folder


@pytest.fixture(scope="module")
def model(trained):
    return Path(trained[0].model)


def test_the_folder_says_how_it_was_trained(model, trained):
    report = json.loads((model / "training_report.json").read_text())
    rows = [(row["name"], row["tokens"], row["steps"], row["seq_len"]) for row in report["stages"]]
    assert rows == [("align", 128, 2, 32), ("pretrain", 128, 2, 32)]
    assert report["tokens"] == 256
    origin = json.loads((trained[1] / "conversion_report.json").read_text())["source"]
    assert report["source"] == origin
    written = "".join(p.read_text() for p in model.rglob("*") if p.suffix in {".json", ".yaml"})
    assert str(trained[2]) not in written
    recipe = yaml.safe_load((model / "recipe.yaml").read_text())
    assert recipe["stages"][0]["data"][0]["path"] == "text.txt"


@pytest.mark.slow
def test_it_verifies_but_for_what_training_changes(model):
    checks = {check.name: check.ok for check in verify_checkpoint(model).checks}
    assert checks == {
        "files": True, "values": True, "kept tensors": None, "full budget = dense": True,
        "bare transformers": True,
    }  # fmt: skip


def test_a_changed_weight_is_still_found(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert not verify_checkpoint(copy).ok


def test_it_has_no_dense_form(model, tmp_path):
    with pytest.raises(Exception, match="conversion_report|changed"):
        revert_checkpoint(model, tmp_path / "dense")


def test_card_and_push(model):
    run_quick(model, length=80, out_dir=model / "evaluation")
    card = ModelCard.load(write_card(model).path)
    assert (card.data.base_model, card.data.license) == ("tiny/dense", "apache-2.0")
    text = str(card)
    assert "256 tokens: align (128 tokens), pretrain (128 tokens)" in text
    assert "bit-equal" not in text
    assert "block_size=8" in text
    names = {file.name for file in plan_push(model, "tester/tiny").files}
    assert {"training_report.json", "recipe.yaml", "model.safetensors", "modeling_nsa_llama.py"} <= names


def test_an_evaluation_from_before_the_training_does_not_count(model, trained, tmp_path):
    run_quick(trained[1], length=80, out_dir=tmp_path / "evaluation")
    text = (tmp_path / "evaluation" / "report.json").read_text()
    report = model / "evaluation" / "report.json"
    before = report.read_text() if report.is_file() else None
    report.parent.mkdir(exist_ok=True)
    report.write_text(text)
    with pytest.raises(CheckFailedError, match="of other files"):
        plan_push(model, "tester/tiny")
    if before is not None:
        report.write_text(before)


@pytest.mark.parametrize("source", ["converted", slow("trained"), slow("in memory")])
def test_what_another_trainer_saved_is_published_like_it(source, trained, model, tmp_path):
    if source == "in memory":
        dense = AutoModelForCausalLM.from_pretrained(trained[2] / "dense")
        subject = patch_model(dense, plan(NSA))
    else:
        subject = AutoModelForCausalLM.from_pretrained(trained[1] if source == "converted" else model)
    tokenizer = AutoTokenizer.from_pretrained(trained[1])
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=1, use_cpu=True, report_to="none", save_strategy="no"
    )
    rows = [{"input_ids": torch.arange(40), "labels": torch.arange(40)}] * 8
    trainer = Trainer(subject, arguments, default_data_collator, rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = tmp_path / "saved"
    checks = {check.name: check.ok for check in verify_checkpoint(saved).checks}
    assert checks == {
        "files": True, "values": True, "kept tensors": None, "full budget = dense": True,
        "bare transformers": True,
    }  # fmt: skip
    report = json.loads((saved / "training_report.json").read_text())
    before = json.loads((model / "training_report.json").read_text())
    assert report["tokens"] is None
    assert report["stages"] == (before["stages"] if source == "trained" else [])
    if source != "in memory":
        assert report["source"] == before["source"]
    written = "".join(path.read_text() for path in saved.rglob("*.json"))
    assert str(trained[2]) not in written
    text = write_card(saved, license="apache-2.0", base_model="tiny/dense").path.read_text()
    assert "an unknown number of tokens" in text
    assert "## Recipe" not in text
    names = {file.name for file in plan_push(saved, "tester/tiny", allow_unevaluated=True).files}
    assert {"training_report.json", "tokenizer.json", "model.safetensors", "nsa_manifest.json"} <= names
    assert "training_args.bin" not in names


def test_what_a_trainer_keeps_beside_a_model_is_no_part_of_it(trained, tmp_path):
    """Logs grow after the save, checkpoints go, and some trainers write the generation config again."""
    saved = tmp_path / "saved"
    (saved / "checkpoint-1").mkdir(parents=True)
    for name in ("checkpoint-1/optimizer.pt", "checkpoint-1/model.safetensors", "debug.log"):
        (saved / name).write_text("before")
    AutoModelForCausalLM.from_pretrained(trained[1]).save_pretrained(saved)
    (saved / "debug.log").write_text("before and after")
    (saved / "generation_config.json").write_text("{}")
    shutil.rmtree(saved / "checkpoint-1")
    assert check_manifest(saved) == []
    code = {path.name for path in saved.glob("*.py")}
    assert len(code) == 3
    weights = {"config.json", "model.safetensors", "training_report.json"}
    assert set(read_manifest(saved)) - {"source/README.md"} == {*code, *weights}


TRAINED = [name for name, settings in VARIANTS.items() if METHODS[settings["method"]].spec.trainable]


@pytest.mark.parametrize("variant", these_quick(TRAINED, ["nsa"]))
def test_trained_weights_equal_dense_attention_over_them(variant, tmp_path):
    """Also after the positions were scaled, as a stage that extends the context does."""
    model = trained_model("llama", VARIANTS[variant]).float()
    model.config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    model.save_pretrained(tmp_path / "model")
    checks = {check.name: check for check in verify_checkpoint(tmp_path / "model").checks}
    found = checks["full budget = dense"]
    if any(settings.get("key_conv") for settings in (VARIANTS[variant], *VARIANTS[variant].get("rules", ()))):
        assert found.ok is None
        assert "mix the keys" in found.detail
    else:
        assert found.ok, found.detail


def test_trained_weights_that_do_not_are_told(tmp_path, monkeypatch):
    model = trained_model("llama", NSA).float()
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("nsa_convert.equivalence.with_full_budget", lambda *_: contextlib.nullcontext())
    checks = {check.name: check for check in verify_checkpoint(tmp_path / "model").checks}
    assert checks["full budget = dense"].ok is False
    assert checks["kept tensors"].ok is None
