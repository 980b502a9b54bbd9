"""Models for evaluation: what their config says, their loading, and dense attention in converted ones."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from nsa_convert.config import LayerRule, SparseAttentionConfig
from nsa_convert.errors import CheckpointError, ConfigError
from nsa_convert.families import FAMILIES, family_of_sparse, geometry_of
from nsa_convert.loading import load_causal_model
from nsa_convert.methods.parts.base import SparseMethod
from nsa_convert.methods.parts.mix import leaves_of
from nsa_convert.methods.parts.phases import PhaseMix
from nsa_convert.methods.parts.registry import build_method
from nsa_convert.patch.attention import SparseAttention
from nsa_convert.patch.patching import patch_model, unpatch_model
from nsa_convert.plan import resolve_plan
from nsa_convert.strict_files import read_json_mapping

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = {name: getattr(torch, name) for name in get_args(Dtype)}
UNLIMITED = 1 << 40
"""A visible budget above this is no limit: the layer is dense."""
SCORED_TOKENS = 256
"""Tokens at the end of a text that are scored if the rest is a prompt; at most a quarter of the text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What config.json says of a model, before any weight is read.

    Attributes:
        path: Folder of the checkpoint.
        model_type: ``model_type`` of the config.
        max_positions: Longest sequence that the model was made for; None if the config does not say.
        vocab_size: Rows of the embedding matrix.
        methods: Name of the method of each layer; empty for a dense model.
        visible_budget: Longest context within which every layer is dense; None for a dense model.
        plan: Sparse plan with which the dense checkpoint is converted in memory; None if it runs as it is.
        one_pass: Whether reading a text in one pass shows what the methods do. It does not if later tokens
            choose keys, or a method is for decoding only.
    """

    path: Path
    model_type: str
    max_positions: int | None
    vocab_size: int | None
    methods: tuple[str, ...]
    visible_budget: int | None
    plan: SparseAttentionConfig | None = None
    one_pass: bool = True

    def prompt_of(self, tokens: int) -> int:
        """Return the number of tokens of a text to read as a prompt before the scored ones; 0: score all."""
        return 0 if self.one_pass else prompt_tokens(tokens)


def prompt_tokens(tokens: int) -> int:
    """Return the number of tokens to read as a prompt, where only the rest is scored."""
    return tokens - min(SCORED_TOKENS, tokens // 4)


def read_model_facts(path: str | Path, plan: SparseAttentionConfig | None = None) -> ModelFacts:
    """Read the config of a dense or converted checkpoint.

    Args:
        path: Folder of the checkpoint.
        plan: Sparse plan with which a dense checkpoint is to run.

    Raises:
        CheckpointError: There is no such folder, or no readable config.json.
        ConfigError: The sparse plan is wrong, or the checkpoint has one already.
        UnsupportedModelError: The architecture is not supported.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"no model at {str(path)!r}: " + ("it has no config.json" if path.is_dir() else "no such folder"),
            code="CF24",
            where=str(path),
        )

    # The methods of the layers: from the stored plan of a converted checkpoint, or from the given one.
    config = read_json_mapping(path / "config.json")
    model_type = str(config.get("model_type"))
    methods: list[SparseMethod] = []
    if model_type not in FAMILIES:
        if plan is not None:
            raise ConfigError(
                f"{str(path)!r} is converted already", code="CK35", where=str(path), hint="leave out --method"
            )
        geometry = geometry_of(config, family_of_sparse(model_type))
        stored = SparseAttentionConfig.from_dict(config.get("sparse_attention", {}))
        methods = resolve_plan(stored, config["num_hidden_layers"], geometry)
    elif plan is not None:
        methods = resolve_plan(plan, config["num_hidden_layers"], geometry_of(config))

    budgets = [method.reach().visible_budget for method in methods]
    return ModelFacts(
        path=path,
        model_type=model_type,
        max_positions=config.get("max_position_embeddings"),
        vocab_size=config.get("vocab_size"),
        methods=tuple(method.spec.name for method in methods),
        visible_budget=min(budgets) if budgets and min(budgets) < UNLIMITED else None,
        plan=plan,
        one_pass=all(map(reads_texts, leaves_of(methods))),
    )


def read_both_facts(
    path: str | Path, plan: SparseAttentionConfig | None, against: str | Path | None
) -> list[ModelFacts]:
    """Return the facts of a model, followed by those of the dense checkpoint it is compared with, if any."""
    return [read_model_facts(path, plan), *([] if against is None else [read_model_facts(against)])]


def reads_texts(method: SparseMethod) -> bool:
    """Return whether reading a text in one pass shows, causally, everything that a method does."""
    in_prompts = "prefill" in method.spec.phases and not isinstance(method, PhaseMix)
    return method.reach().is_causal and in_prompts


def load_model(
    path: str | Path,
    dtype: str = "float32",
    device: str = "cpu",
    plan: SparseAttentionConfig | None = None,
) -> nn.Module:
    """Load a dense or converted checkpoint for inference with this package's own classes.

    Code files inside the checkpoint are not run. With a ``plan`` a dense model is converted in memory.

    Raises:
        CheckpointError: The folder is damaged or unsafe.
    """
    model = load_causal_model(Path(path), DTYPES[dtype]).to(device).eval()
    return model if plan is None else patch_model(model, plan)


@contextlib.contextmanager
def patched_in(model: nn.Module, plan: SparseAttentionConfig | None) -> Iterator[nn.Module]:
    """Convert a dense model with a plan inside the block; None leaves it dense."""
    if plan is None:
        yield model
        return
    patch_model(model, plan)
    try:
        yield model
    finally:
        unpatch_model(model)


@contextlib.contextmanager
def dense_attention_in(model: nn.Module) -> Iterator[nn.Module]:
    """Give every layer of a converted model dense attention over the same weights, inside the block.

    The sparse modules are kept aside and put back afterwards. In a model that was trained after conversion
    this is dense attention with the trained weights, not the original dense model.
    """
    layers = [module for module in model.modules() if isinstance(module, SparseAttention)]
    if not layers:
        raise ConfigError("this is no converted model: its attention is dense already", code="CF12")

    methods = [layer.sparse for layer in layers]
    full = LayerRule(method="full")

    try:
        for layer, method in zip(layers, methods, strict=True):
            layer.sparse = build_method(full, method.geometry, method.layer_index)
        yield model
    finally:
        for layer, method in zip(layers, methods, strict=True):
            layer.sparse = method
