"""Measurement of what each head loses at several budgets, for a :class:`HeadProfile`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nsa_convert.config import LayerRule, SparseAttentionConfig
from nsa_convert.errors import ConfigError
from nsa_convert.evaluation.metrics.mass import MassProbe
from nsa_convert.evaluation.models import load_model
from nsa_convert.evaluation.tasks.text import code_text, first_tokens, prose_text
from nsa_convert.heads.profile import HeadProfile
from nsa_convert.loading import load_tokenizer
from nsa_convert.methods.parts.base import dense_model_output
from nsa_convert.methods.parts.registry import METHODS, read_rule
from nsa_convert.notices import Say, silent
from nsa_convert.patch.patching import patch_model, unpatch_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FRACTIONS = (32, 16, 8, 4, 2)
"""The budgets are the length divided by these numbers."""


@torch.inference_mode()
def measure_heads(
    model: PreTrainedModel,
    texts: Mapping[str, Sequence[int]],
    rule: LayerRule,
    budgets: Sequence[int],
    say: Say = silent,
) -> HeadProfile:
    """Measure what every head of a dense model would lose with one method at several budgets.

    The residual stream stays that of the dense model: each layer computes its sparse output beside the dense
    one.

    Args:
        model: A dense causal model; it is patched for each budget and restored afterwards.
        texts: Name -> token ids; each longer than the largest budget.
        rule: A method with ``block_size`` and ``num_blocks``; the budget sets ``num_blocks``.
        budgets: Numbers of keys that a query sees, ascending multiples of the block size.
        say: Called with what is being measured.

    Returns:
        A profile whose scores are the errors of the heads at the smallest budget.

    Raises:
        ConfigError: The rule lacks these settings, or a budget is too small for its forced blocks.
    """
    config = model.config
    shape = (config.num_hidden_layers, config.num_key_value_heads, len(budgets))
    captured = torch.zeros(shape)
    error = torch.zeros(shape)
    size = rule.settings["block_size"]

    # Both are means over the texts, [layers, KV heads, budgets].
    for index, budget in enumerate(budgets):
        settings = {**rule.settings, "num_blocks": budget // size}
        patch_model(model, SparseAttentionConfig(default=dataclasses.replace(rule, settings=settings)))

        try:
            for name, ids in texts.items():
                say(f"{rule.method}, {budget} keys, {name}: {len(ids)} tokens")
                probe = MassProbe(0)  # the same queries for every budget

                with probe.watch(), _errors(model) as errors:
                    model.model(torch.tensor([list(ids)], device=model.device), use_cache=False)

                for row in probe.rows:
                    if row.pattern == "selected":
                        captured[row.layer, :, index] += torch.tensor(row.captured_by_head) / len(texts)
                error[..., index] += torch.stack(errors) / len(texts)
        finally:
            unpatch_model(model)

    meta: dict[str, Any] = {
        "source": "error of each head's output, and captured dense attention mass",
        "rule": rule.to_dict(),
        "texts": {name: len(ids) for name, ids in texts.items()},
        "length": max(len(ids) for ids in texts.values()),
        "model_type": config.model_type,
    }

    return HeadProfile(
        scores=error[..., 0].clone(),
        meta=meta,
        budgets=torch.tensor(list(budgets)),
        captured=captured,
        error=error,
    )


@contextlib.contextmanager
def _errors(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect ``[H]`` per layer: mean over tokens of |W_o (sparse - dense)|^2 / |residual|^2.

    The ratio is taken token by token: the first tokens of many models have a residual stream so large that it
    would dominate a ratio of sums. Layers return their dense output.
    """
    errors: list[Tensor] = []
    residual = torch.zeros(())

    def before_layer(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        """Note the squared norm of the residual stream that enters a layer."""
        nonlocal residual
        residual = (args[0] if args else kwargs["hidden_states"])[0].float().square().sum(-1)  # [T]

    def after_method(attention: Any, method: Any, args: tuple, sparse: Tensor) -> Tensor:
        """Note the error of each head, and replace the sparse output by the dense one."""
        dense = dense_model_output(method, args[0])
        gap = (sparse - dense)[0].float().transpose(0, 1)  # [HQ, T, D]

        # Columns of the output projection that belong to each head: [HQ, D, C].
        maps = attention.o_proj.weight.float().unflatten(1, (gap.shape[0], -1)).permute(1, 2, 0)
        by_head = torch.stack(
            [((x @ w).square().sum(-1) / residual).mean() for x, w in zip(gap, maps, strict=True)]
        )

        # Query heads of a KV head are added: [HQ] -> [H].
        errors.append(by_head.unflatten(0, (-1, method.geometry.group_size)).sum(1))
        return dense

    hooks = []
    for layer in model.model.layers:
        hooks.append(layer.register_forward_pre_hook(before_layer, with_kwargs=True))
        hook = functools.partial(after_method, layer.self_attn)
        hooks.append(layer.self_attn.sparse.register_forward_hook(hook))

    try:
        yield errors
    finally:
        for hook in hooks:
            hook.remove()


def profile_checkpoint(
    folder: str | Path,
    method: str,
    settings: Mapping[str, Any],
    *,
    length: int = 4096,
    dtype: str = "float32",
    say: Say = silent,
) -> HeadProfile:
    """Measure the heads of a dense checkpoint on a code and a prose text.

    Args:
        folder: Dense checkpoint.
        method: Method whose choice of blocks is measured; it has ``block_size`` and ``num_blocks``.
        settings: Settings of the method.
        length: Tokens of each text.
        dtype: Dtype of weights and activations.
        say: Called with what is being measured.

    Raises:
        ConfigError: The method has no block budget, a setting is wrong, or a text is too short.
        CheckpointError: The checkpoint cannot be read.
    """
    # The method must have a number of blocks to vary.
    rule = LayerRule(method=method, settings=dict(settings))
    checked = read_rule(rule, "--measure")[1]
    if not hasattr(checked, "block_size") or not hasattr(checked, "num_blocks"):
        usable = [name for name, cls in METHODS.items() if hasattr(cls.Settings, "num_blocks")]
        raise ConfigError(
            f"method '{method}' has no number of blocks to measure at",
            code="CF22",
            expected=", ".join(usable),
            found=method,
        )

    # Budgets are multiples of the block size, with room for forced blocks and a chosen one.
    size = checked.block_size
    least = size * (checked.num_sink_blocks + checked.num_local_blocks + 1)
    budgets = sorted({max(least, length // part // size * size) for part in FRACTIONS})
    if budgets[-1] >= length:
        raise ConfigError(
            f"length {length} is too short for blocks of {size}: the largest budget is {budgets[-1]}",
            code="CF22",
        )

    tokenizer = load_tokenizer(folder)
    texts = {text.name: first_tokens(tokenizer, text, length) for text in (code_text(), prose_text())}
    rule = LayerRule(method=method, settings=dataclasses.asdict(checked))
    return measure_heads(load_model(folder, dtype), texts, rule, budgets, say)
