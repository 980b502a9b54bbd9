"""Head profiles: the file, and the budgets that are chosen from it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from nsa_convert.config import LayerRule
from nsa_convert.errors import ConfigError
from nsa_convert.evaluation.heads.profile import measure_heads
from nsa_convert.heads.profile import FORMAT, HeadProfile, allocate, density_of, plan_of
from nsa_convert.patch.patching import patch_model
from tests.models import dense_model, tokens


def profile(error: torch.Tensor, budgets: list[int]) -> HeadProfile:
    meta, spread = {"made": "by a test"}, torch.tensor(budgets)
    return HeadProfile(scores=error[..., 0], meta=meta, budgets=spread, captured=1 - error, error=error)


def test_density_counts_pairs() -> None:
    for budget, length in ((1, 7), (3, 7), (7, 7), (9, 7)):
        seen = sum(min(budget, t) for t in range(1, length + 1))
        assert density_of(budget, length) == pytest.approx(seen / (length * (length + 1) / 2))


def test_round_trip(tmp_path: Path) -> None:
    made = profile(torch.rand(3, 2, 4).sort(-1).values, [8, 16, 32, 64])
    made.save(tmp_path / "heads.safetensors")
    read = HeadProfile.load(tmp_path / "heads.safetensors")
    assert read.meta == made.meta
    for name in ("scores", "budgets", "captured", "error"):
        assert torch.equal(getattr(read, name), getattr(made, name))


def test_what_is_not_a_profile_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(ConfigError, match="cannot read head profile"):
        HeadProfile.load(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("heads")
    with pytest.raises(ConfigError, match="cannot read head profile"):
        HeadProfile.load(tmp_path / "text.safetensors")
    save_file({"scores": torch.zeros(1, 1)}, tmp_path / "plain.safetensors")
    with pytest.raises(ConfigError, match="is not a head profile"):
        HeadProfile.load(tmp_path / "plain.safetensors")
    for notes in ({}, {"meta": "{"}, {"meta": "[]"}):
        path = tmp_path / "notes.safetensors"
        save_file({"scores": torch.zeros(1, 1)}, path, metadata={"format": FORMAT, **notes})
        with pytest.raises(ConfigError, match="is not a head profile"):
            HeadProfile.load(path)
    with pytest.raises(ConfigError, match=r"(?s)captured must be \(2, 2, 1\).*"):
        HeadProfile(
            scores=torch.zeros(2, 2),
            meta={},
            budgets=torch.tensor([4]),
            captured=torch.zeros(2, 2, 3),
            error=torch.zeros(2, 2, 1),
        )
    with pytest.raises(ConfigError, match="finite"):
        HeadProfile(scores=torch.full((2, 2), torch.nan), meta={})


def test_allocation_is_the_best_for_convex_curves() -> None:
    torch.manual_seed(0)
    budgets, length = [8, 16, 32], 64
    costs = [density_of(b, length) for b in [*budgets, length]]
    for _ in range(20):
        widths = torch.tensor([after - before for before, after in itertools.pairwise(costs)])
        slopes = torch.rand(1, 3, 3).sort(-1, descending=True).values * widths
        error = slopes.flip(-1).cumsum(-1).flip(-1)  # convex in the cost, 0 at the full length
        target = 0.6
        chosen = allocate(profile(error, budgets), target, length)
        grid = [*budgets, length]
        curve = torch.cat([error, torch.zeros(1, 3, 1)], -1)[0]
        best = min(
            sum(curve[h, i].item() for h, i in enumerate(pick))
            for pick in itertools.product(range(4), repeat=3)
            if sum(costs[i] for i in pick) <= 3 * target + 1e-9
        )
        got = sum(curve[h, grid.index(int(b))].item() for h, b in enumerate(chosen[0]))
        spent = sum(density_of(int(b), length) for b in chosen[0]) / 3
        assert spent <= target + 1e-9
        worst_step = (curve[:, :-1] - curve[:, 1:]).max().item()
        assert best - 1e-6 <= got <= best + worst_step + 1e-6


def test_heads_that_need_more_get_more() -> None:
    error = torch.tensor([[[0.7, 0.5, 0.1], [0.05, 0.03, 0.01]]])
    chosen = allocate(profile(error, [8, 16, 32]), 0.5, 64)
    assert chosen[0, 0] > chosen[0, 1]
    assert allocate(profile(error, [8, 16, 32]), 1.0, 64).tolist() == [[64, 64]]
    with pytest.raises(ConfigError, match="density 0.01 is outside"):
        allocate(profile(error, [8, 16, 32]), 0.01, 64)
    with pytest.raises(ConfigError, match="scores only"):
        allocate(HeadProfile(scores=torch.zeros(1, 2), meta={}), 0.5, 64)


def test_plan_of_budgets() -> None:
    budgets = torch.tensor([[16, 64, 16], [16, 64, 16], [32, 32, 32]])
    plan = plan_of(budgets, 64, {"method": "ssa", "block_size": 8}, 8)
    rules = {(r.method, r.layers, r.heads): dict(r.settings) for r in plan.rules}
    assert rules == {
        ("ssa", (0, 1), (0, 2)): {"block_size": 8, "num_blocks": 2},
        ("full", (0, 1), (1,)): {},
        ("ssa", (2,), None): {"block_size": 8, "num_blocks": 4},
    }


def test_measured_heads_become_a_plan_that_runs() -> None:
    model, ids = dense_model("llama"), tokens(1, 120)[0].tolist()
    before = {name: p.clone() for name, p in model.named_parameters()}
    rule = LayerRule(method="ssa", settings={"block_size": 8})
    made = measure_heads(model, {"random": ids}, rule, [16, 32, 64])
    assert made.captured.shape == (3, 2, 3)
    assert (made.captured.diff(dim=-1) > -0.05).all()
    assert ((made.captured > 0) & (made.captured < 1)).all()
    assert (made.error.diff(dim=-1) < 0).all()
    assert (made.error > 0).all()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    plan = plan_of(allocate(made, 0.6, 120), 120, rule.to_dict(), 8)
    with torch.no_grad():
        assert patch_model(model, plan)(torch.tensor([ids])).logits.isfinite().all()
