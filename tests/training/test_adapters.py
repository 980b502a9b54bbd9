"""LoRA and chats: adapters save, reload, merge and resume; TRL packs and masks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from nsa_convert.errors import ConfigError
from nsa_convert.loading import load_causal_model, load_tokenizer
from nsa_convert.training.data.sources import recall_text
from nsa_convert.training.run.runner import Interrupted, train_recipe
from tests.models import tokens
from tests.training.recipes import FRESH, NSA, losses, recipe, stage
from tests.training.test_run import SLOW

pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]
LORA = stage(train="lora", lora={"rank": 2, "alpha": 4.0, "targets": ["q_proj", "o_proj", "down_proj"]})


def test_tr21_adapter_saves_reloads_and_merges_to_the_same_logits(tmp_path):
    from peft import PeftModel

    # The adapter belongs to the converted model, so that one is written first.
    align = stage("align", kind="align", train="new", tokens=64)
    train_recipe(recipe(tmp_path / "base", NSA, align), None, base=ROOT)
    converted = tmp_path / "base" / "align" / "model"
    report = train_recipe(recipe(tmp_path / "run", None, LORA, model=str(converted)), converted, base=ROOT)
    adapter = tmp_path / "run" / "pretrain" / "adapter"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert any(name.endswith("self_attn.sparse.gate") for name in settings["modules_to_save"])
    ids = tokens(2, 60)
    with torch.no_grad():
        dense, merged = (load_causal_model(Path(f), torch.float32).eval() for f in (converted, report.model))
        before, want = dense(ids).logits, merged(ids).logits
        again = PeftModel.from_pretrained(dense, adapter).eval()
        unmerged = again(ids).logits
        remerged = again.merge_and_unload()
        remerged.save_pretrained(tmp_path / "exported")
        exported = load_causal_model(tmp_path / "exported", torch.float32).eval()(ids).logits
    assert (before - want).abs().max() > 1e-3, "training changed the model"
    torch.testing.assert_close(unmerged, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(exported, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_tr21_adapter_runs_resume_exactly(tmp_path):
    import os
    import signal

    def stop(line: str) -> None:
        if line.startswith("pretrain 3/"):
            os.kill(os.getpid(), signal.SIGTERM)

    train_recipe(recipe(tmp_path / "whole", NSA, LORA), None, base=ROOT)
    with pytest.raises(Interrupted):
        train_recipe(recipe(tmp_path / "cut", NSA, LORA), None, base=ROOT, say=stop)
    train_recipe(recipe(tmp_path / "cut", NSA, LORA), None, base=ROOT, resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize("train", ["all", pytest.param("lora", marks=SLOW)])
def test_chats_are_packed_and_only_answers_count(tmp_path, train):
    pytest.importorskip("trl")
    rows = [
        {
            "messages": [
                {"role": "user", "content": "say"},
                {"role": "assistant", "content": recall_text(i, 2)},
            ]
        }
        for i in range(40)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [{"kind": "jsonl", "path": "chats.jsonl", "column": "messages"}]
    chats = stage(
        "sft",
        kind="sft",
        train=train,
        seq_len=256,
        batch_tokens=512,
        tokens=512 * 3,
        micro_batch=2,
        data=data,
    )
    longer = {**FRESH, "config": {**FRESH["config"], "max_position_embeddings": 256}}
    seen = []
    from nsa_convert.patch.modeling import SparseCausalLMMixin

    forward = SparseCausalLMMixin.forward

    def spy(self, *args, **kwargs):
        seen.append(kwargs)
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseCausalLMMixin, "forward", spy)
        report = train_recipe(recipe(tmp_path / "run", NSA, chats, model=longer), None, base=tmp_path)
    assert report.stages["sft"]["steps"] == 3
    batch = seen[0]
    restarts = int((batch["position_ids"] == 0).sum())
    assert restarts > 2, "several chats share a row"
    labels = batch["labels"]
    assert 0.2 < (labels == -100).float().mean() < 0.8
    text = load_tokenizer(Path(report.model)).decode(batch["input_ids"][labels != -100])
    assert text.startswith("set ")
    assert "im_start" not in text


def test_chats_without_an_answer_in_reach_are_left_out(tmp_path):
    """A row in which nothing counts has no loss; its mean is not a number."""
    pytest.importorskip("trl")
    turns = [("say", "yes"), ("say " + "so " * 90, "yes")]
    chats = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in turns * 4
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    data = [{"kind": "jsonl", "path": "chats.jsonl", "column": "messages"}]
    sizes = {"batch_tokens": 64, "tokens": 64 * 2, "micro_batch": 1, "data": data}
    said = []
    chat = stage("sft", kind="sft", seq_len=64, **sizes)
    train_recipe(recipe(tmp_path / "run", NSA, chat), None, base=tmp_path, say=said.append)
    assert any("have no answer within seq_len" in line for line in said)
    assert all(math.isfinite(loss) for _, _, loss in losses(tmp_path / "run"))
    short = stage("sft", kind="sft", seq_len=16, **{**sizes, "batch_tokens": 16, "tokens": 32})
    with pytest.raises(ConfigError, match="within its first 16 tokens"):
        train_recipe(recipe(tmp_path / "short", NSA, short), None, base=tmp_path)
