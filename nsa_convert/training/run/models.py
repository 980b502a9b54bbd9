"""The model that a recipe starts from: loaded, converted in memory, or fresh with random weights."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nsa_convert.config import FULL, AttentionGeometry, SparseAttentionConfig
from nsa_convert.errors import CheckpointError, ConfigError
from nsa_convert.families import FAMILIES, family_of, family_of_sparse, geometry_of
from nsa_convert.loading import load_causal_model, quiet
from nsa_convert.methods.parts.base import SparseMethod
from nsa_convert.patch.chunked_loss import compute_in_chunks
from nsa_convert.patch.patching import patch_model, sparse_methods
from nsa_convert.plan import resolve_plan
from nsa_convert.strict_files import read_json_mapping
from nsa_convert.training.recipe.schema import Recipe, Stage
from nsa_convert.training.recipe.sections import FreshModel, RopeScaling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

END_TOKEN = "<|end|>"
TOKENIZER_TEXTS = 400
"""Number of documents of each source that the tokenizer of a fresh model is trained on."""
DTYPES = {"fp32": torch.float32, "bf16-mixed": torch.float32, "bf16": torch.bfloat16}
"""Precision of a recipe -> dtype of the weights."""
SAVED_DTYPES = {str(x).removeprefix("torch."): x for x in (torch.float32, torch.bfloat16, torch.float16)}
"""Name -> dtype that a trained model can be written in."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """What is known of the first model before any weight is read.

    Attributes:
        folder: Dense or converted checkpoint; None for a fresh model.
        config: Content of its config.json.
        plan: The sparse plan; None for a model that stays dense.
        convert: Whether the plan still has to be applied to a dense model.
    """

    folder: Path | None
    config: Mapping[str, Any]
    plan: SparseAttentionConfig | None
    convert: bool

    @property
    def geometry(self) -> AttentionGeometry:
        """Sizes of an attention layer, as the methods take them."""
        return geometry_of(self.config, self.family)

    @property
    def family(self) -> Any:
        """The model family."""
        model_type = self.config["model_type"]
        return family_of(self.config) if model_type in FAMILIES else family_of_sparse(model_type)

    def methods(self) -> list[SparseMethod]:
        """Return one method per layer, without storage; empty for a dense model."""
        if self.plan is None:
            return []
        return resolve_plan(self.plan, self.config["num_hidden_layers"], self.geometry)


def read_start(recipe: Recipe, folder: Path | None) -> Start:
    """Read the config of the model a recipe starts from.

    Raises:
        ConfigError: The plan does not fit, or differs from the one the checkpoint was converted with.
        CheckpointError: There is no config.json.
        UnsupportedModelError: The architecture cannot be trained here.
    """
    # A fresh model: its config is written in the recipe.
    if isinstance(recipe.model, FreshModel):
        config = _fresh_config(recipe.model).to_dict()
        plan = _sparse_plan(recipe.plan)
        start = Start(folder=None, config=config, plan=plan, convert=plan is not None)
    else:
        # A checkpoint: a plan stored in it must be the recipe's, or the recipe has none.
        assert folder is not None
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"no model at {str(folder)!r}: it has no config.json", code="CF24", where=str(folder)
            )

        config = read_json_mapping(folder / "config.json")
        stored = config.get("sparse_attention")
        plan = _sparse_plan(recipe.plan)

        if stored is not None:
            given = recipe.plan
            plan = SparseAttentionConfig.from_dict(stored)

            if given is not None and given.to_dict() != plan.to_dict():
                raise ConfigError(
                    "the checkpoint is converted already, with another plan than the recipe has",
                    code="RC11",
                    expected=json.dumps(plan.to_dict()),
                    found=json.dumps(given.to_dict()),
                    hint="leave sparse_attention out, or start from the dense checkpoint",
                )

        start = Start(folder=folder, config=config, plan=plan, convert=stored is None and plan is not None)

    # Both raise where the architecture is not supported or the plan does not fit it.
    start.geometry, start.methods()
    return start


def _sparse_plan(plan: SparseAttentionConfig | None) -> SparseAttentionConfig | None:
    """Return None for a plan that keeps every layer dense: the model then stays an ordinary one."""
    if plan is None or (plan.default.method == FULL and all(rule.method == FULL for rule in plan.rules)):
        return None
    return plan


def _fresh_config(fresh: FreshModel) -> Any:
    """Return transformers' config of a fresh model; ConfigError (RC08) names what it does not know."""
    from transformers import AutoConfig

    values = {"vocab_size": fresh.vocab, "attention_dropout": 0.0, **copy.deepcopy(dict(fresh.config))}

    # Mistral's default config limits attention to a sliding window; a fresh model sees all keys.
    if fresh.family == "mistral":
        values.setdefault("sliding_window", None)

    # transformers accepts any key and ignores those it does not know.
    known = set(AutoConfig.for_model(fresh.family).to_dict())
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"model.config: {fresh.family} has no {', '.join(unknown)}", code="RC08")

    try:
        return AutoConfig.for_model(fresh.family, **values)
    except Exception as error:
        # why: transformers refuses a config by many kinds of errors; raised with the key
        raise ConfigError(f"model.config: {str(error).splitlines()[0]}", code="RC08") from error


def load_first(recipe: Recipe, start: Start) -> PreTrainedModel:
    """Return the model that the first stage trains, converted where the recipe has a plan."""
    from transformers import AutoModelForCausalLM

    dtype = DTYPES[recipe.precision]

    # A fresh model has the same random weights in every process and after every resume.
    if start.folder is None:
        assert isinstance(recipe.model, FreshModel)
        torch.manual_seed(recipe.seed)
        model = AutoModelForCausalLM.from_config(_fresh_config(recipe.model)).to(dtype)
    else:
        model = load_causal_model(start.folder, dtype)

    if start.convert:
        assert start.plan is not None
        patch_model(model, start.plan)
        object.__delattr__(model, "_dense_state")  # holds the dense layers for unpatching; not needed here
    return model


def save_dtype(recipe: Recipe, start: Start) -> torch.dtype:
    """Return the dtype in which the trained model is written: the recipe's, or else the checkpoint's own.

    A fresh model, and a checkpoint whose config names no floating point dtype, keep the dtype of training.
    """
    name: str = recipe.save_dtype
    if name == "auto":
        own = {} if start.folder is None else start.config
        name = str(own.get("dtype") or own.get("torch_dtype"))
    return SAVED_DTYPES.get(name.removeprefix("torch."), DTYPES[recipe.precision])


def is_trained(name: str, train: str) -> bool:
    """Return whether a weight of this name is trained; LoRA's own weights are added by peft.

    Args:
        name: Full name of the parameter.
        train: ``all``, ``attention``, ``new`` or ``lora``; weights added by conversion are always trained.
    """
    if ".self_attn.sparse." in name:
        return True
    return train == "all" or (train == "attention" and ".self_attn." in name)


def prepare_model(model: Any, stage: Stage) -> nn.Module:
    """Return a model as a stage trains it: frozen weights, losses in chunks, checkpointing, adapters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, stage.train))

    # A converted model computes in chunks by its training mode.
    if not methods_of(model):
        compute_in_chunks(model)

    if stage.checkpointing:
        # transformers 5.23 renamed the method; a non-reentrant recompute needs no gradient on its inputs.
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})

    if stage.train != "lora":
        return model
    from nsa_convert.training.run.lora import add_adapters

    return add_adapters(model, stage.adapters)


def fresh_tokenizer(recipe: Recipe, base: Path) -> Any:
    """Train a byte-level BPE tokenizer on the first documents of the first stage; the same in every run."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from nsa_convert.training.data.sources import open_source

    assert isinstance(recipe.model, FreshModel)
    stage = recipe.readers[0]
    sources = [open_source(source, base, chats=stage.kind == "sft") for source in stage.data]

    # One training for each vocabulary size and data.
    key = (recipe.model.vocab, *(documents.fingerprint() for documents in sources))
    if key not in _TOKENIZERS:
        _TOKENIZERS[key] = _train_tokenizer(recipe.model.vocab, sources).to_str()
    tokenizer = Tokenizer.from_str(_TOKENIZERS[key])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_TOKEN, pad_token=END_TOKEN)


_TOKENIZERS: dict[tuple[Any, ...], str] = {}
"""Tokenizers trained by this process: the checks before a run and its first stage need the same one."""


def _train_tokenizer(vocab: int, sources: Sequence[Any]) -> Any:
    """Return a trained byte-level BPE tokenizer of the ``tokenizers`` library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()

    # All 256 bytes are in the vocabulary, so every text can be encoded.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_TOKEN],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )

    def texts() -> Iterator[str]:
        for documents in sources:
            for text in documents.first(TOKENIZER_TEXTS):
                chat = None if isinstance(text, str) else "\n".join(str(turn.get("content")) for turn in text)
                yield (chat or text)[:20_000]

    # A vocabulary of the 256 bytes and the end token has nothing to learn from text.
    tokenizer.train_from_iterator(texts() if vocab > 257 else (), trainer)
    return tokenizer


def scaled_rope(config: Mapping[str, Any], scaling: RopeScaling) -> tuple[dict[str, Any], int]:
    """Return the ``rope_parameters`` of a scaled model and its new ``max_position_embeddings``.

    Raises:
        ConfigError: The model already uses another type of scaling (CF09).
    """
    # Newer configs have rope_parameters; older ones rope_scaling with rope_theta beside it.
    old = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = old.get("rope_theta", config.get("rope_theta", 10000.0))

    before = old.get("rope_type", "default")
    if before not in ("default", scaling.type):
        raise ConfigError(
            f"the model's RoPE is of type {before}; it cannot be scaled as {scaling.type}", code="CF09"
        )

    # The length before any scaling: the factor always refers to it.
    original = (
        scaling.original or old.get("original_max_position_embeddings") or config["max_position_embeddings"]
    )

    new: dict[str, Any] = {"rope_theta": theta, "rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type != "linear":
        new["original_max_position_embeddings"] = original
    if scaling.type == "llama3":
        new |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    return new, int(original * scaling.factor)


def set_rope(model: PreTrainedModel, scaling: RopeScaling) -> None:
    """Replace the RoPE of a loaded model in place."""
    parameters, positions = scaled_rope(model.config.to_dict(), scaling)

    # The model and its inner part may share one config object, or have two.
    for config in {id(c): c for c in (model.config, model.model.config)}.values():
        config.rope_parameters = parameters
        config.max_position_embeddings = positions

    # The frequencies are computed from the config when the module is made.
    old = model.model.rotary_emb
    model.model.rotary_emb = type(old)(config=model.config).to(old.inv_freq.device)


def save_model(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write a model with its tokenizer to an existing, empty folder."""
    with quiet():
        model.save_pretrained(folder)  # why: a stage's model, inside the staging folder of the caller
        tokenizer.save_pretrained(folder)


def methods_of(model: nn.Module) -> list[SparseMethod]:
    """Return the sparse methods of a loaded model, with or without adapters; empty for a dense model."""
    return sparse_methods(model)
