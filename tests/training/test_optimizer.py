"""AdamW on bfloat16 weights: every published learning rate moves them as it moves float32 ones."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from nsa_convert.patch.patching import patch_model
from nsa_convert.training.recipe.library import known_recipes
from nsa_convert.training.recipe.schema import read_recipe, recipe_from_dict
from nsa_convert.training.run.optimizer import MasterAdamW, parameter_groups
from tests.training.recipes import NSA, recipe_values, stage

STEPS = 20


def published_rates() -> list[float]:
    """Return every learning rate of the recipes, those of new weights too."""
    stages = [stage for path in known_recipes().values() for stage in read_recipe(path).stages]
    return sorted({rate for stage in stages for rate in (stage.lr, stage.lr_new) if rate})


def layer(dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False).to(dtype)
    model.weight.data.copy_(0.02 * torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))
    return model


def train(model: nn.Linear, optimizer: torch.optim.Optimizer, first: int = 0, steps: int = STEPS) -> float:
    """Take steps along fixed random gradients; return the share of updates that change a weight."""
    changed = 0.0
    for step in range(first, first + steps):
        noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(10 + step))
        model.weight.grad = noise.bfloat16().to(model.weight.dtype)
        before = optimizer.state[model.weight].get("master", model.weight).clone()
        optimizer.step()
        after = optimizer.state[model.weight].get("master", model.weight)
        changed += (after != before).float().mean().item() / steps
    return changed


@pytest.mark.parametrize("rate", published_rates())
def test_published_rates_move_bfloat16_weights(rate, capsys):
    options = {"lr": rate, "betas": (0.9, 0.95), "weight_decay": 0.1}
    rounded, half, wide = layer(torch.bfloat16), layer(torch.bfloat16), layer(torch.bfloat16).float()
    lost = train(rounded, torch.optim.AdamW(rounded.parameters(), **options))
    optimizer = MasterAdamW(half.parameters(), **options)
    kept = train(half, optimizer)
    train(wide, torch.optim.AdamW(wide.parameters(), **options))

    with capsys.disabled():
        print(f"\nlearning rate {rate:g}: {kept:.1%} of updates survive, without masters {lost:.1%}")
    torch.testing.assert_close(optimizer.state[half.weight]["master"], wide.weight.data, rtol=1e-6, atol=1e-9)
    assert torch.equal(half.weight, optimizer.state[half.weight]["master"].bfloat16())
    # At 1e-6 float32 itself rounds 0.2 % of the updates of a weight of 0.02 away.
    assert kept > 0.995


def test_weight_decay_alone_survives():
    """At 2e-5 it is 2e-6 of a weight in a step, which bfloat16 cannot hold."""
    model = layer(torch.bfloat16)
    before = model.weight.detach().float()
    optimizer = MasterAdamW(model.parameters(), lr=2e-5, weight_decay=0.1)
    for _ in range(1000):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
    decayed = optimizer.state[model.weight]["master"] / before
    torch.testing.assert_close(decayed, torch.full_like(decayed, 0.998), rtol=1e-4, atol=0)


def test_a_state_is_loaded_as_it_was_saved():
    model = layer(torch.bfloat16)
    optimizer = MasterAdamW(model.parameters(), lr=1e-5)
    train(model, optimizer)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    assert {x.dtype for x in saved["state"][0].values()} == {torch.float32}
    train(model, optimizer, first=STEPS)

    other = layer(torch.bfloat16)
    other.load_state_dict(weights)
    resumed = MasterAdamW(other.parameters(), lr=1e-5)
    resumed.load_state_dict(saved)
    train(other, resumed, first=STEPS)
    assert torch.equal(other.weight, model.weight)
    for name, value in optimizer.state[model.weight].items():
        assert torch.equal(resumed.state[other.weight][name], value), name


def test_float32_weights_are_updated_as_torch_does():
    """Adapters of a bfloat16 model are float32."""
    one, two = layer(torch.float32), layer(torch.float32)
    train(one, MasterAdamW(one.parameters(), lr=1e-3))
    train(two, torch.optim.AdamW(two.parameters(), lr=1e-3))
    torch.testing.assert_close(one.weight, two.weight, rtol=1e-6, atol=1e-9)


def test_a_state_without_masters_goes_on():
    """One that was written before there were masters, in bfloat16."""
    model = layer(torch.bfloat16)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, plain)
    optimizer = MasterAdamW(model.parameters(), lr=1e-3)
    optimizer.load_state_dict(plain.state_dict())
    assert train(model, optimizer, first=STEPS) > 0.999


def groups_of(width: int, gate: str = "signed", **keys: float | None) -> dict[str, float]:
    """Return the rate of every new weight of an NSA model of some width."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    model = patch_model(LlamaForCausalLM(LlamaConfig(**sizes, **heads)), {"default": {**NSA, "gate": gate}})
    made = recipe_from_dict(recipe_values(Path("out"), NSA, stage(lr=1e-5, **keys))).stages[0]
    names = {id(p): name.split(".sparse.")[1] for name, p in model.named_parameters() if ".sparse." in name}
    groups = parameter_groups(model, made)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    return {names[id(p)]: group["lr"] for group in groups for p in group["params"] if id(p) in names}


def test_a_gate_learns_the_slower_the_wider_it_is():
    """A step of AdamW moves the logit by rate x sum of the inputs: as much at every width."""
    rates = {width: groups_of(width, lr_new=1e-2) for width in (32, 64, 128, 4096)}
    assert [found["gate.weight"] for found in rates.values()] == pytest.approx([1e-2, 1e-2, 5e-3, 1e-2 / 64])
    assert {rate for found in rates.values() for name, rate in found.items() if name != "gate.weight"} == {
        1e-2
    }

    # A bias has no inputs; the recipe's own rate comes first; without lr_new that of dense weights counts.
    assert groups_of(128, "sigmoid", lr_new=1e-2)["gate.bias"] == 1e-2
    assert groups_of(128, lr_new=1e-2, lr_gate=3e-4)["gate.weight"] == 3e-4
    assert groups_of(128, lr_new=None)["gate.weight"] == pytest.approx(5e-6)
