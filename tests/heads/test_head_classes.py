"""Plans from scores of heads, and published files of head classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nsa_convert.config import AttentionGeometry, SparseAttentionConfig
from nsa_convert.errors import ConfigError
from nsa_convert.heads.classes import import_profile, plan_of_classes
from nsa_convert.heads.profile import HeadProfile
from nsa_convert.methods.parts.mix import leaves, leaves_of
from nsa_convert.plan import resolve_plan

SCORES = torch.tensor([[0.1, 0.9], [0.8, 0.7], [0.2, 0.3]])
GEOMETRY = AttentionGeometry(hidden_size=64, num_query_heads=4, num_kv_heads=2, head_dim=16)
RULE = {"method": "streaming", "num_sinks": 2, "window_size": 9}


def profile(**meta: object) -> HeadProfile:
    return HeadProfile(scores=SCORES, meta={"rule": RULE, **meta})


def dense_heads(plan: SparseAttentionConfig) -> set[tuple[int, int]]:
    """Return (layer, head) of the dense heads, as the model would be built."""
    found = set()
    for layer, method in enumerate(resolve_plan(plan, 3, GEOMETRY)):
        for leaf in leaves(method):
            if leaf.spec.name == "full":
                found |= {(layer, head) for head in leaf.heads or range(2)}
    return found


def test_heads_at_the_threshold_stay_dense() -> None:
    assert dense_heads(plan_of_classes(profile(threshold=0.8))) == {(0, 1), (1, 0)}
    assert dense_heads(plan_of_classes(profile(threshold=0.7))) == {(0, 1), (1, 0), (1, 1)}
    assert dense_heads(plan_of_classes(profile(threshold=2.0))) == set()


@pytest.mark.parametrize(("share", "count"), [(0, 0), (0.5, 3), (0.34, 2), (1, 6)])
def test_a_share_takes_the_largest_scores(share: float, count: int) -> None:
    best = SCORES.flatten().argsort(descending=True)[:count].tolist()
    expected = {divmod(index, 2) for index in best}
    assert dense_heads(plan_of_classes(profile(threshold=0.8), share)) == expected


def test_the_other_heads_follow_the_rule() -> None:
    plan = plan_of_classes(profile(), 0.5, {"method": "razor", "window_size": 7})
    leaves = leaves_of(resolve_plan(plan, 3, GEOMETRY))
    others = [leaf for leaf in leaves if leaf.spec.name != "full"]
    assert {(leaf.spec.name, leaf.settings.window_size) for leaf in others} == {("razor", 7)}


@pytest.mark.parametrize(
    ("meta", "share", "message"),
    [
        ({"rule": RULE}, None, "no threshold"),
        ({"threshold": 1.0}, None, "names no method"),
        ({"rule": RULE}, 1.5, "between 0 and 1, got 1.5"),
    ],
)
def test_what_is_missing_is_said(meta: dict, share: float | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of_classes(HeadProfile(scores=SCORES, meta=meta), share)


def test_import_of_duo_gates(tmp_path: Path) -> None:
    (tmp_path / "full_attention_heads.tsv").write_text("0.25\t1.0\n0.5\t0.0\n1e-3\t0.75\n")
    (tmp_path / "config.json").write_text(json.dumps({"sink_size": 128, "recent_size": 512, "more": 1}))
    for given in (tmp_path, tmp_path / "full_attention_heads.tsv"):
        made = import_profile(given, 3, 2)
        assert torch.equal(made.scores, torch.tensor([[0.25, 1.0], [0.5, 0.0], [1e-3, 0.75]]))
        assert made.meta["rule"] == {"method": "streaming", "num_sinks": 128, "window_size": 512}
    assert dense_heads(plan_of_classes(made)) == {(0, 1), (1, 0), (2, 1)}
    (tmp_path / "config.json").unlink()
    assert import_profile(tmp_path, 3, 2).meta["rule"]["window_size"] == 256


def test_import_of_razor_heads(tmp_path: Path) -> None:
    file = tmp_path / "heads.json"
    file.write_text(json.dumps({"0": [1], "2": [0, 1]}))
    made = import_profile(file, 3, 2)
    assert dense_heads(plan_of_classes(made)) == {(0, 1), (2, 0), (2, 1)}
    made.save(tmp_path / "heads.safetensors")
    again = HeadProfile.load(tmp_path / "heads.safetensors")
    assert torch.equal(again.scores, made.scores)
    assert again.meta == made.meta


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "1 0\n1 0\n", "it has 2 layers of 2 heads, the model 3 of 2"),
        ("a.tsv", "1 0\n1 x\n1 0\n", "line 2 holds no numbers"),
        ("a.tsv", "1 0\n1\n1 0\n", "it has 3 layers of 1 or 2 heads"),
        ("a.tsv", "", "it has 0 layers of no heads"),
        ("a.tsv", "1 0\n1 nan\n1 0\n", "finite"),
        (
            "a.json",
            '{"7": [0], "1": [5], "0": 3}',
            r"layer '7' does not exist.*layer 1: heads.*layer 0: heads",
        ),
        ("a.bin", "x", "no file of head classes"),
        ("", "", "there is no file"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        import_profile(tmp_path / (name or "absent.tsv"), 3, 2)
