"""PEFT and TRL at their defaults: bfloat16, gradient checkpointing, fused heads, generation inside."""

from __future__ import annotations

import copy
import importlib
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nsa_convert.families import FAMILIES as TABLE
from nsa_convert.patch.patching import patch_model
from nsa_convert.training.run.models import fresh_tokenizer
from tests.marks import slow, these_quick
from tests.models import DSA, NSA, QUICK, SIZES, SSA, VARIANTS, plan, tokens, trained_model
from tests.training.recipes import recipe

peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

METHODS = {
    "nsa": NSA,
    "dsa": {**DSA, "index_key": "shared"},
    "ssa": {**SSA, "key_compressor": "token_mlp"},
}
TEXT = "The quick brown fox jumps over the lazy dog. " * 4
QUESTION = "What is the sum of two and three, and why is it so? " * 3
PREFERENCES = [{"prompt": QUESTION, "chosen": "five " * 8, "rejected": "six " * 9}] * 8


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    return fresh_tokenizer(recipe(folder / "run"), folder)


def model(tokenizer: Any, settings: dict, ending: str = "ForCausalLM", **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(tokenizer), "num_hidden_layers": 2, "initializer_range": 0.1}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.LlamaConfig(**{**sizes, **ids, **changes})
    return patch_model(getattr(transformers, f"Llama{ending}")(config), plan(settings))


def arguments(kind: type, out: Path, **changes: Any) -> Any:
    values = {
        "output_dir": str(out),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return kind(**{**values, **changes})


def run(trainer: Any) -> list[float]:
    """Train; return the losses. Precision and checkpointing are the trainer's own defaults."""
    assert trainer.args.bf16
    assert trainer.args.gradient_checkpointing
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    return losses


def chosen_by(model: Any) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if ".index" in n or "compress_key" in n}


@pytest.mark.parametrize("packing", [False, slow(True)], ids=["rows", "packed"])
@pytest.mark.parametrize("method", list(METHODS))
def test_sft_teaches_what_chooses(method: str, packing: bool, tokenizer: Any, tmp_path: Path) -> None:
    """TRL makes its loss of log-probabilities of its own fused head; the auxiliary losses follow it."""
    sparse = model(tokenizer, METHODS[method])
    before = {name: p.detach().clone() for name, p in chosen_by(sparse).items()}
    more = {"packing": True, "max_length": 128} if packing else {}
    trainer = trl.SFTTrainer(
        sparse,
        args=arguments(trl.SFTConfig, tmp_path, learning_rate=1e-3, **more),
        train_dataset=datasets.Dataset.from_list([{"text": TEXT}] * 8),
        processing_class=tokenizer,
    )
    run(trainer)
    still = [n for n, p in chosen_by(sparse).items() if torch.equal(p, before[n]) and "position" not in n]
    assert not still


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_share_of_a_fused_likelihood_is_that_of_its_tokens(compiled: bool, tokenizer: Any) -> None:
    """One step of TRL's fused loss has the gradients of the ordinary loss, whatever divides it."""
    add_fused_lm_head = getattr(importlib.import_module("trl.trainer.utils"), "add_fused_lm_head", None)
    if add_fused_lm_head is None:
        pytest.skip("this TRL has no fused head")
    plain, ids = model(tokenizer, METHODS["dsa"]).double().train(), tokens(2, 60)
    labels = ids.masked_fill(torch.arange(60) < 20, -100)
    fused = copy.deepcopy(plain)
    add_fused_lm_head(fused)
    plain(ids, labels=labels, num_items_in_batch=200).loss.backward()
    call = torch.compile(fused, backend="eager") if compiled else fused
    (-call(ids, labels=labels, fused_lm_head=True).log_probs.sum() / 200).backward()
    want, got = ({n: p.grad for n, p in m.named_parameters()} for m in (plain, fused))
    for name in chosen_by(plain):
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-9, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("kind", ["sft-lora", "dpo", "grpo", "reward"])
def test_trl_trains(kind: str, method: str, tokenizer: Any, tmp_path: Path) -> None:
    settings = METHODS[method]
    if kind == "sft-lora":
        rows = datasets.Dataset.from_list([{"text": TEXT}] * 8)
        with pytest.warns(UserWarning, match="are frozen and learn nothing"):
            run(
                trl.SFTTrainer(
                    model(tokenizer, settings),
                    args=arguments(trl.SFTConfig, tmp_path),
                    train_dataset=rows,
                    processing_class=tokenizer,
                    peft_config=peft.LoraConfig(),
                )
            )
        return
    rows = datasets.Dataset.from_list(PREFERENCES)
    if kind == "dpo":
        model(tokenizer, settings).save_pretrained(tmp_path / "model")
        args = arguments(trl.DPOConfig, tmp_path / "run")
        run(
            trl.DPOTrainer(str(tmp_path / "model"), args=args, train_dataset=rows, processing_class=tokenizer)
        )
    elif kind == "reward":
        scorer = model(tokenizer, settings, "ForSequenceClassification", num_labels=1)
        args = arguments(trl.RewardConfig, tmp_path)
        run(trl.RewardTrainer(scorer, args=args, train_dataset=rows, processing_class=tokenizer))
    else:
        args = arguments(trl.GRPOConfig, tmp_path, num_generations=2, max_completion_length=8)
        run(
            trl.GRPOTrainer(
                model(tokenizer, settings),
                reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
                args=args,
                train_dataset=rows.remove_columns(["chosen", "rejected"]),
                processing_class=tokenizer,
            )
        )


def test_peft_knows_the_layers_of_every_family() -> None:
    from peft.utils import constants

    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
            for family in TABLE.values():
                assert table.get(family.sparse_model_type) == table.get(family.model_type), (name, family)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(),
        pytest.param(peft.LoraConfig(target_modules=["q_proj", "v_proj"]), marks=pytest.mark.slow),
        peft.LoraConfig(target_modules="all-linear", modules_to_save=["sparse.gate"]),
        pytest.param(peft.IA3Config(), marks=pytest.mark.slow),
        pytest.param(peft.VeraConfig(), marks=pytest.mark.slow),
    ],
    ids=["lora", "lora-named", "lora-all-linear", "ia3", "vera"],
)
@pytest.mark.parametrize("variant", these_quick(VARIANTS, QUICK))
def test_adapters_train_and_generate_with_a_cache(variant: str, config: Any) -> None:
    """Beyond the budget, with the cache on as a plain loop has it; cached and uncached texts are the same."""
    if config.modules_to_save and variant not in ("nsa", "hybrid"):
        pytest.skip("this plan has no gate")
    base, ids = trained_model("llama", VARIANTS[variant]).float(), tokens(2, 60)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "these weights that conversion added are frozen")
        adapted = peft.get_peft_model(base, copy.deepcopy(config)).train()
        for _ in range(2):
            adapted(input_ids=ids, labels=ids, use_cache=True).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    adapted.eval()
    options = {"max_new_tokens": 4, "do_sample": False}
    cached = adapted.generate(input_ids=ids[:, :50], **options)
    assert torch.equal(cached, adapted.generate(input_ids=ids[:, :50], use_cache=False, **options))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_add_adapter_of_transformers(variant: str) -> None:
    base, ids = trained_model("llama", VARIANTS[variant]).float(), tokens(1, 60)
    with torch.no_grad():
        want = base(ids).logits
    base.add_adapter(peft.LoraConfig())
    with torch.no_grad():
        torch.testing.assert_close(base(ids).logits, want)  # an adapter starts at zero
    assert any("lora_A" in name and p.requires_grad for name, p in base.named_parameters())
