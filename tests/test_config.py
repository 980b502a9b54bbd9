"""Plans are checked at birth, every problem at once, the nearest name suggested."""

from __future__ import annotations

import pytest

from nsa_convert.config import AttentionGeometry, LayerRule, SparseAttentionConfig, number_ranges
from nsa_convert.errors import ConfigError


def test_round_trip() -> None:
    values = {"default": {"method": "nsa", "block_size": 32}, "rules": [{"method": "full", "layers": [0, 3]}]}
    plan = SparseAttentionConfig.from_dict(values)
    assert plan.to_dict() == values
    assert [rule.method for rule in plan.for_layer(3, 2)] == ["full"]
    assert [rule.settings for rule in plan.for_layer(1, 2)] == [{"block_size": 32}]


def test_rules_for_heads_leave_the_rest_to_the_default() -> None:
    values = {
        "default": {"method": "nsa"},
        "rules": [
            {"method": "full", "layers": [0, -1], "heads": [2, 0]},
            {"method": "ssa", "layers": [0], "heads": [3]},
            {"method": "moba", "layers": [1], "heads": [0, 1, 2, 3]},
        ],
    }
    plan = SparseAttentionConfig.from_dict(values)
    assert plan.to_dict() == values
    plan = plan.resolved(3, 4)
    assert [(r.method, r.heads) for r in plan.for_layer(0, 4)] == [
        ("full", (0, 2)),
        ("nsa", (1,)),
        ("ssa", (3,)),
    ]
    assert [(r.method, r.heads) for r in plan.for_layer(1, 4)] == [("moba", None)]
    assert [(r.method, r.heads) for r in plan.for_layer(2, 4)] == [("full", (0, 2)), ("nsa", (1, 3))]


def test_the_narrowest_rule_is_run() -> None:
    rules = [
        {"method": "quest", "phase": "decode"},
        {"method": "full", "layers": [0]},
        {"method": "h2o", "layers": [1, 2], "phase": "decode"},
        {"method": "ssa", "layers": [2], "heads": [1]},
        {"method": "moba", "heads": [0], "phase": "prefill"},
    ]
    values = {"default": {"method": "nsa"}, "rules": rules}
    plan = SparseAttentionConfig.from_dict(values)
    assert plan.to_dict() == values
    run = [[(r.method, r.heads, r.phase) for r in plan.for_layer(layer, 2)] for layer in range(4)]
    moba = ("moba", (0,), "prefill")
    assert run == [
        [("full", None, None)],
        [moba, ("h2o", (0,), "decode"), ("nsa", (1,), "prefill"), ("h2o", (1,), "decode")],
        [moba, ("h2o", (0,), "decode"), ("ssa", (1,), None)],
        [moba, ("quest", (0,), "decode"), ("nsa", (1,), "prefill"), ("quest", (1,), "decode")],
    ]


def test_older_plans_name_both_phases_in_one_rule() -> None:
    pair = {"method": "phases", "prefill": "xattention", "decode": {"method": "quest", "num_blocks": 8}}
    heads = {"layers": [1], "heads": [0]}
    rules = [{"method": "full", "layers": [0]}, {"method": "phases", "decode": "h2o", **heads}]
    plan = SparseAttentionConfig.from_dict({"default": pair, "rules": rules})
    assert plan.to_dict() == {
        "default": {"method": "xattention"},
        "rules": [
            {"method": "full", "layers": [0]},
            {"method": "full", **heads, "phase": "prefill"},
            {"method": "quest", "num_blocks": 8, "phase": "decode"},
            {"method": "h2o", **heads, "phase": "decode"},
        ],
    }
    settings = {key: pair[key] for key in ("prefill", "decode")}
    built = SparseAttentionConfig(default=LayerRule(method="phases", settings=settings))
    assert built.to_dict() == {"default": plan.default.to_dict(), "rules": [plan.rules[2].to_dict()]}


def test_a_layer_named_from_both_ends_is_refused() -> None:
    plan = SparseAttentionConfig(
        default=LayerRule(method="nsa"), rules=(LayerRule(method="full", layers=(2, -1)),)
    )
    assert plan.resolved(4, 2).rules[0].layers == (2, 3)
    with pytest.raises(ConfigError, match="listed twice"):
        plan.resolved(3, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "'default' is missing"),
        ([], "expected a mapping"),
        ({"default": {"method": "nsa"}, "rule": []}, "did you mean 'rules'"),
        ({"default": {"block_size": 64}}, "'method' is missing"),
        ({"default": {"method": 3}}, "method must be a text, got 3"),
        ({"default": {"method": "nsa", "layers": [1]}}, "belongs in a rule"),
        (
            {"default": {"method": "nsa"}, "rules": [{"method": "full", "layer": 3}]},
            "'layers', 'heads' or 'phase' is missing, it has method, layer",
        ),
        ({"default": {"method": "nsa"}, "rules": {"method": "full"}}, "rules must be a list, got"),
        ({"default": {"method": "nsa"}, "rules": [{"method": "full", "layers": []}]}, "layers is empty"),
        (
            {"default": {"method": "nsa"}, "rules": [{"method": "full", "layers": "0-3"}]},
            "layers must be a list of whole numbers, got '0-3'",
        ),
        (
            {"default": {"method": "nsa"}, "rules": [{"method": "full", "layers": [1.5]}]},
            "layers must be a list of whole numbers",
        ),
        ({"default": {"method": "nsa", "heads": [0]}}, "belongs in a rule"),
        (
            {"default": {"method": "nsa"}, "rules": [{"method": "full", "layers": [1], "heads": [-1]}]},
            "heads must be >= 0, got -1",
        ),
        (
            {
                "default": {"method": "nsa"},
                "rules": [
                    {"method": "full", "layers": [1], "heads": [0, 1]},
                    {"method": "ssa", "layers": [1], "heads": [1]},
                ],
            },
            "layer 1 is named by",
        ),
        ({"default": {"method": "nsa"}, "rules": [{"method": "full", "layers": [1, 1]}]}, "listed twice"),
        (
            {
                "default": {"method": "nsa"},
                "rules": [{"method": "full", "layers": [1]}, {"method": "ssa", "layers": [1]}],
            },
            "layer 1 is named by",
        ),
        ({"default": {"method": "nsa", "phase": "decode"}}, "'phase' belongs in a rule"),
        (
            {"default": {"method": "nsa"}, "rules": [{"method": "full", "phase": "prompt"}]},
            "phase must be one of prefill, decode, got 'prompt'",
        ),
        (
            {"default": {"method": "nsa"}, "rules": [{"method": name, "phase": "decode"} for name in "ab"]},
            r"every layer is named by rules\[0\] and rules\[1\]",
        ),
        ({"default": {"method": "phases", "prefil": "nsa"}}, "did you mean 'prefill'"),
        ({"default": {"method": "phases", "phase": "decode"}}, "names both phases; leave out 'phase'"),
    ],
)
def test_bad_plans(values: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SparseAttentionConfig.from_dict(values)


def test_layers_outside_the_model() -> None:
    plan = SparseAttentionConfig(
        default=LayerRule(method="nsa"), rules=(LayerRule(method="full", layers=(2, 9)),)
    )
    plan.resolved(10, 2)
    with pytest.raises(ConfigError, match=r"layers 9 do not exist: the model has layers 0-3"):
        plan.resolved(4, 2)
    heads = SparseAttentionConfig(
        default=LayerRule(method="nsa"), rules=(LayerRule(method="full", layers=(2,), heads=(1, 2)),)
    )
    with pytest.raises(ConfigError, match=r"heads 2 do not exist: the model has heads 0-1"):
        heads.resolved(4, 2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 3), (0, 1), (4, True), (4, "2"), (-4, 2), (4, 8)])
def test_bad_geometry(heads: object, kv_heads: object) -> None:
    with pytest.raises(ConfigError, match="multiple|must be a whole number|must be >= 1"):
        AttentionGeometry(hidden_size=8, num_query_heads=heads, num_kv_heads=kv_heads, head_dim=2)


def test_number_ranges() -> None:
    assert number_ranges([7, 1, 0, 2, 9, 10]) == "0-2, 7, 9-10"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": (1.0,)}, r"layers must be a list of whole numbers, got \(1.0,\)"),
        ({"heads": (0, 2.0)}, r"heads must be a list of whole numbers, got \(0, 2.0\)"),
        ({"method": ""}, "method is empty"),
    ],
)
def test_a_built_rule_holds_whole_numbers_and_a_name(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LayerRule(**{"method": "nsa", **values})
    assert LayerRule.from_dict({"method": "nsa", "layers": [1.0]}).layers == (1,)
