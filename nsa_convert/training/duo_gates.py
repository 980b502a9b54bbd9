"""DuoAttention's gates (Xiao et al. 2024, arXiv 2410.10819): which heads may stream, learned on passkeys.

Every key/value head gets one gate alpha; its output is ``alpha * dense + (1 - alpha) * streaming``. The model
is frozen. The gates start at 1 and learn to reproduce the dense model's last hidden state where passkeys are
repeated; ``penalty`` weighs the mean gate, so that heads close where they are not needed (section 2.2). The
model is left unchanged: the gates become a head profile.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_convert.config import LayerRule, SparseAttentionConfig
from nsa_convert.heads.profile import HeadProfile
from nsa_convert.methods.parts.base import dense_model_output
from nsa_convert.notices import Say, silent
from nsa_convert.patch.patching import patch_model, unpatch_model
from nsa_convert.settings import raise_problems

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Encode = Callable[[str], Sequence[int]]
LENGTHS = 50
"""Number of different case lengths, evenly spaced."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateSettings:
    """Settings of the training of the gates.

    Defaults are the authors', except the lengths, which are theirs for models with a context of 32k.

    Attributes:
        steps: Optimizer steps, one case each.
        lr: Peak learning rate; it rises over the first fifth of the steps and falls to a tenth over the last.
        penalty: Weight of the mean gate.
        num_sinks: First tokens that streaming heads see.
        window_size: Last tokens that streaming heads see.
        min_length: Tokens of the shortest case.
        max_length: Tokens of the longest case.
        num_passkeys: Number of passkeys hidden in a case.
        passkey_tokens: Tokens of a passkey.
        seed: Seed of lengths, places and passkeys.
    """

    steps: int = 2000
    lr: float = 0.02
    penalty: float = 0.05
    num_sinks: int = 128
    window_size: int = 256
    min_length: int = 1000
    max_length: int = 32000
    num_passkeys: int = 10
    passkey_tokens: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least {least}, got {getattr(self, name)}"
            for name, least in (("steps", 1), ("num_passkeys", 1), ("passkey_tokens", 1), ("min_length", 1))
            if getattr(self, name) < least
        ]

        if self.max_length < self.min_length:
            problems.append(f"max_length {self.max_length} is less than min_length {self.min_length}")
        if self.lr <= 0 or self.penalty < 0:
            problems.append(f"lr must be > 0 and penalty >= 0, got {self.lr:g} and {self.penalty:g}")
        raise_problems(problems, code="CF22")

    def factor(self, step: int) -> float:
        """Return the learning rate of a step as a share of ``lr``."""
        fifth = max(1, self.steps // 5)
        rise = (step + 1) / fifth
        fall = (self.steps - step) / fifth
        return max(0.1, min(1.0, rise, fall))


def passkey_case(
    haystack: Sequence[int], encode: Encode, length: int, settings: GateSettings, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Make a text with hidden passkeys and their repetition at its end.

    Args:
        haystack: Tokens of a text of any length; repeated as often as needed.
        encode: Text to tokens, without special tokens.
        length: Tokens of the case.
        settings: Number and size of the passkeys.
        generator: Source of the random places and passkeys.

    Returns:
        ``(ids [length] int64, labelled [length] bool)``: the repeated passkeys' own tokens are labelled.

    Raises:
        ConfigError: The passkeys alone are longer than the case (CF22).
    """
    # Passkeys of random tokens of the text, each with a sentence that names it.
    words = torch.tensor(sorted(set(haystack)))
    size = settings.passkey_tokens
    count = settings.num_passkeys
    keys = words[torch.randint(len(words), (count, size), generator=generator)].tolist()
    told = [[*encode(f"\nPasskey {i + 1} is:"), *key] for i, key in enumerate(keys)]

    # The text fills what the passkeys leave; it starts at a random token.
    room = length - 2 * sum(map(len, told))
    if room < 0:
        raise_problems(
            [f"{count} passkeys of {size} tokens, told twice, do not fit into {length} tokens"], code="CF22"
        )

    first = int(torch.randint(len(haystack), (1,), generator=generator))
    hay = [haystack[(first + i) % len(haystack)] for i in range(room)]

    # The passkeys go to random places of the text, in their order.
    places = torch.randint(room + 1, (count,), generator=generator).sort().values.tolist()
    ids: list[int] = []
    for begin, end, key in zip([0, *places], places, told, strict=False):
        ids += [*hay[begin:end], *key]
    ids += hay[places[-1] :]

    # All are repeated at the end; of each sentence only the passkey itself is labelled.
    labelled = [False] * len(ids)
    for key in told:
        ids += key
        labelled += [False] * (len(key) - size) + [True] * size

    return torch.tensor(ids), torch.tensor(labelled)


def passkey_cases(
    haystack: Sequence[int], encode: Encode, settings: GateSettings
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one case for each step; its length is drawn from :data:`LENGTHS` lengths within the settings."""
    generator = torch.Generator().manual_seed(settings.seed)
    lengths = torch.linspace(settings.min_length, settings.max_length, LENGTHS).round().long()

    for _ in range(settings.steps):
        length = int(lengths[torch.randint(LENGTHS, (1,), generator=generator)])
        yield passkey_case(haystack, encode, length, settings, generator)


def train_gates(
    model: PreTrainedModel,
    cases: Iterator[tuple[Tensor, Tensor]],
    settings: GateSettings,
    say: Say = silent,
) -> HeadProfile:
    """Learn one gate for each layer and key/value head; runs on the model's device.

    Args:
        model: A dense causal model; it is converted during the training and restored afterwards.
        cases: ``(ids [T], labelled [T] bool)`` for each step, as from :func:`passkey_cases`.
        settings: Steps, rates and the streaming heads.
        say: Called with the loss and the mean gate, about ten times.

    Returns:
        The gates as scores ``[layers, KV heads]``, with threshold 0.5: heads below it stream.
    """
    rule = {"method": "streaming", "num_sinks": settings.num_sinks, "window_size": settings.window_size}
    config = model.config
    wanted = [p for p in model.parameters() if p.requires_grad]

    # alpha [layers, KV heads]: all heads start dense.
    gates = torch.ones(config.num_hidden_layers, config.num_key_value_heads, device=model.device)
    gates.requires_grad_(True)

    optimizer = torch.optim.AdamW([gates], lr=settings.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.factor)

    # Patched, every layer computes streaming attention; the hooks of _mixed blend it with dense attention.
    patch_model(model, SparseAttentionConfig(default=LayerRule.from_dict(rule)))
    model.requires_grad_(False)

    try:
        with _mixed(model, gates) as switch:
            for step, (ids, labelled) in zip(range(settings.steps), cases, strict=False):
                loss = _loss(model, ids.to(model.device), labelled.to(model.device), switch)
                total = loss + settings.penalty * gates.abs().mean()

                optimizer.zero_grad()
                total.backward()
                optimizer.step()
                schedule.step()
                # Gates stay in [0, 1].
                with torch.no_grad():
                    gates.clamp_(0.0, 1.0)

                if (step + 1) % max(1, settings.steps // 10) == 0:
                    say(f"step {step + 1}: loss {loss.item():.3g}, mean gate {gates.mean().item():.3f}")
    finally:
        unpatch_model(model)
        for parameter in wanted:
            parameter.requires_grad_(True)

    meta = {
        "kind": "duo",
        "source": f"gates learned on passkeys, {settings.steps} steps",
        "settings": dataclasses.asdict(settings),
        "threshold": 0.5,
        "rule": rule,
        "model_type": config.model_type,
    }

    return HeadProfile(scores=gates.detach().cpu(), meta=meta)


def _loss(model: PreTrainedModel, ids: Tensor, labelled: Tensor, switch: dict[str, bool]) -> Tensor:
    """Return the mean squared difference between the last hidden states with gates and of the dense model.

    Only labelled tokens count.

    Args:
        model: The patched model, inside :func:`_mixed`.
        ids: ``[T]`` int64.
        labelled: ``[T]`` bool.
        switch: Of :func:`_mixed`.
    """
    with torch.no_grad():
        switch["dense"] = True
        # [labelled tokens, hidden]
        dense = model.model(ids[None], use_cache=False).last_hidden_state[0, labelled]
        switch["dense"] = False

    mixed = model.model(ids[None], use_cache=False).last_hidden_state[0, labelled]
    return (mixed.float() - dense.float()).square().mean()


@contextlib.contextmanager
def _mixed(model: PreTrainedModel, gates: Tensor) -> Iterator[dict[str, bool]]:
    """Blend each head's streaming output with dense attention by its gate.

    Yields:
        A switch: while ``switch["dense"]`` is True all heads are dense.
    """
    switch = {"dense": False}

    def mix(method: Any, args: tuple, streaming: Tensor) -> Tensor:
        dense = dense_model_output(method, args[0])
        if switch["dense"]:
            return dense

        # One gate per KV head -> one per query head, [HQ, 1] to go with [..., HQ, D].
        alpha = gates[method.layer_index].repeat_interleave(method.geometry.group_size)[:, None]
        return (alpha * dense + (1 - alpha) * streaming).to(dense.dtype)

    hooks = [layer.self_attn.sparse.register_forward_hook(mix) for layer in model.model.layers]
    try:
        yield switch
    finally:
        for hook in hooks:
            hook.remove()
