"""The warm-up of a learned index: the base frozen and dense, the index trained by KL alone."""

from __future__ import annotations

import pytest
import torch

from nsa_convert.evaluation.metrics.mass import MassProbe
from nsa_convert.methods.parts.training_mode import TrainingMode
from nsa_convert.patch.patching import patch_model
from tests.models import dense_model, plan, tokens

LENGTH = 192
SETTINGS = {
    "dsa": {"method": "dsa", "index_key": "shared", "num_tokens": 48, "window_size": 8},
    "msa": {"method": "msa", "index_key": "shared", "block_size": 8, "num_blocks": 6},
}
QUERY_HEADS = {"dsa": 2, "msa": 1}  # random heads of a group share nothing that one block index could learn
STEPS = 400


def captured_over_oracle(model: torch.nn.Module) -> list[float]:
    """Return captured mass over the best possible at the same budget, layer by layer, on unseen tokens."""
    probe = MassProbe(48, num_queries=64)
    with torch.no_grad(), probe.watch():
        model(tokens(1, LENGTH, seed=99), use_cache=False)
    return [row.captured / row.oracle for row in probe.rows]


@pytest.mark.slow
@pytest.mark.parametrize("method", list(SETTINGS))
def test_warm_up_finds_the_mass_and_leaves_the_base_alone(method: str) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": QUERY_HEADS[method], "head_dim": 16}
    dense = dense_model("llama", num_key_value_heads=1, **sizes).float()
    model = patch_model(dense, plan(SETTINGS[method]))
    for name, parameter in model.named_parameters():
        if ".index.q" in name or ".index.k" in name:
            torch.nn.init.normal_(parameter, std=0.02)  # as published: from nothing
    before = {name: p.clone() for name, p in model.named_parameters() if ".sparse." not in name}
    start = captured_over_oracle(model)
    new = [p for name, p in model.named_parameters() if ".sparse." in name]
    optimizer = torch.optim.Adam(new, lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    mode = TrainingMode(stream="teacher", losses=("index_kl",), weights=(1.0,))
    model.train()
    for step in range(STEPS):
        loss = model(input_ids=tokens(1, LENGTH, seed=step), training_mode=mode).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    after = captured_over_oracle(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert max(start) < 0.6, start
    assert min(after) >= 0.9, (start, after)
