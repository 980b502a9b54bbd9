"""Learning DuoAttention's gates."""

from __future__ import annotations

import pytest
import torch

from nsa_convert.errors import ConfigError
from nsa_convert.training.duo_gates import GateSettings, passkey_case, passkey_cases, train_gates
from tests.models import dense_model, tokens

SMALL = GateSettings(
    steps=40, num_sinks=1, window_size=4, min_length=80, max_length=110, num_passkeys=2, passkey_tokens=3
)


def encode(text: str) -> list[int]:
    return [ord(char) for char in text]


def test_a_case_tells_every_passkey_twice_and_labels_the_second() -> None:
    hay, generator = list(range(200, 300)), torch.Generator().manual_seed(0)
    settings = GateSettings(num_passkeys=3, passkey_tokens=5)
    ids, labelled = passkey_case(hay, encode, 150, settings, generator)
    assert len(ids) == len(labelled) == 150
    assert int(labelled.sum()) == 15
    text = ids.tolist()
    for i, key in enumerate(ids[labelled].view(3, 5).tolist()):
        told = [*encode(f"\nPasskey {i + 1} is:"), *key]
        places = [at for at in range(150) if text[at : at + len(told)] == told]
        assert len(places) == 2
        assert not labelled[places[0] : places[0] + len(told)].any()
        assert labelled[places[1] + len(told) - 5 : places[1] + len(told)].all()


def test_lengths_stay_within_bounds_and_repeat_with_the_seed() -> None:
    first, again = (list(passkey_cases(range(50), encode, SMALL)) for _ in range(2))
    lengths = {len(ids) for ids, _ in first}
    assert len(first) == 40
    assert 110 >= max(lengths) > min(lengths) >= 80
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="told twice, do not fit into 20 tokens"):
        passkey_case([1, 2], encode, 20, GateSettings(), torch.Generator())
    with pytest.raises(
        ConfigError, match=r"steps must be at least 1, got 0; max_length 5 is less than min_length 9"
    ):
        GateSettings(steps=0, min_length=9, max_length=5)


def test_the_learning_rate_rises_and_falls() -> None:
    settings = GateSettings(steps=100)
    factors = [settings.factor(step) for step in range(100)]
    assert factors[0] == 0.1  # the floor
    assert factors[10] == pytest.approx(0.55)
    assert factors[19:81] == [1.0] * 62
    assert factors[95] == pytest.approx(0.25)
    assert factors[-1] == 0.1


def test_only_heads_that_matter_stay_open() -> None:
    """With the output of all other heads cut, their gates fall and the one that counts stays."""
    model = dense_model("llama").float()
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            kept = slice(32, 64) if index == 1 else slice(0, 0)  # key/value head 1 of layer 1
            weight = torch.zeros_like(layer.self_attn.o_proj.weight)
            weight[:, kept] = layer.self_attn.o_proj.weight[:, kept]
            layer.self_attn.o_proj.weight.copy_(weight)
    before = {name: p.clone() for name, p in model.named_parameters()}
    cases = passkey_cases(range(1, 128), encode, SMALL)
    made = train_gates(model, cases, SMALL)
    assert made.scores[1, 1] > 0.6
    others = made.scores.flatten()[torch.arange(6) != 3]
    assert others.max() < 0.5
    assert made.meta["rule"] == {"method": "streaming", "num_sinks": 1, "window_size": 4}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert type(model).__module__.startswith("transformers.")


def test_gates_that_are_open_change_nothing() -> None:
    """The first loss is 0 up to rounding: all gates start at 1."""
    lines: list[str] = []
    one = GateSettings(steps=1, num_sinks=1, window_size=2)
    ids = tokens(1, 50)[0]
    train_gates(dense_model("qwen3"), iter([(ids, ids > 0)]), one, lines.append)
    assert float(lines[0].split("loss ")[1].split(",")[0]) < 1e-12
