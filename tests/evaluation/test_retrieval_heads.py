"""Probes of heads against full matrices of probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from nsa_convert.cli import main
from nsa_convert.evaluation.heads.retrieval import (
    ECHO_SHARE,
    INDUCTION_SHARE,
    distance_probe,
    razor_probe,
    repeat_scores,
)
from nsa_convert.heads.profile import HeadProfile
from tests.evaluation.tiny import save, tiny_dense
from tests.models import dense_model, tokens


@pytest.mark.parametrize("begin", [0, 1])
def test_repeat_scores_equal_the_full_matrix(begin: int) -> None:
    generator = torch.Generator().manual_seed(0)
    period, length = 7, begin + 28
    q, k = (torch.randn(length, heads, 8, generator=generator) for heads in (6, 2))
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(3, 1)).double() * 0.5
    future = torch.ones(length, length).triu(1).bool()
    p = scores.masked_fill(future, -torch.inf).softmax(-1)
    for shift, found in enumerate(repeat_scores(q, k, 0.5, period, begin)):
        cells = [
            (i, i - n * period + shift)
            for i in range(begin + period, length)
            for n in range(1, 5)
            if i - n * period + shift >= begin
        ]
        expected = torch.stack([p[:, i, j] for i, j in cells]).mean(0)
        assert (found - expected).abs().max() < 1e-6


def test_razor_probe_equals_eager_attention() -> None:
    model = dense_model("llama").float()
    made = razor_probe(model, period=20, seed=3)
    assert made.scores.shape == (3, 2)
    assert made.meta["threshold"] == 1.0
    ids = torch.randint(25, 32, (20,), generator=torch.Generator().manual_seed(3)).repeat(4)[None]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        probabilities = model(ids, output_attentions=True).attentions
    for layer, p in enumerate(probabilities):
        pairs = [(i, i - n * 20) for i in range(20, 80) for n in range(1, 4) if i >= n * 20]
        echo = torch.stack([p[0, :, i, j] for i, j in pairs]).mean(0).unflatten(0, (2, 2)).amax(1)
        assert (torch.tensor(made.meta["echo"][layer]) - echo).abs().max() < 1e-6


def test_shares_of_heads_reach_the_threshold() -> None:
    """Of 100 heads, the best echo head and the best 14 induction heads retrieve."""
    sizes = {"num_attention_heads": 100, "num_key_value_heads": 100, "head_dim": 4, "hidden_size": 400}
    model = dense_model("llama", num_hidden_layers=1, **sizes).float()
    made = razor_probe(model, period=8)
    echo, induction = (torch.tensor(made.meta[name])[0] for name in ("echo", "induction"))
    best = set(echo.topk(round(100 * ECHO_SHARE)).indices.tolist())
    best |= set(induction.topk(round(100 * INDUCTION_SHARE)).indices.tolist())
    assert set((made.scores[0] >= 1).nonzero()[:, 0].tolist()) == best


def test_an_induction_head_is_found() -> None:
    """A head whose queries are the next token's keys looks behind the earlier copies."""
    period, count = 10, 40
    generator = torch.Generator().manual_seed(1)
    vectors = torch.nn.functional.normalize(torch.randn(period, 16, generator=generator), dim=-1).repeat(4, 1)
    flat = torch.zeros_like(vectors)
    k = torch.stack([vectors, vectors], 1)
    q = torch.stack([vectors, flat], 1)  # looks at equal keys; looks everywhere
    echo, induction = repeat_scores(q, k, 30.0, period, 0)
    assert echo[0] > 5 * echo[1]
    behind = torch.stack([vectors.roll(-1, 0), flat], 1)
    echo, induction = repeat_scores(behind, k, 30.0, period, 0)
    assert induction[0] > 5 * induction[1]
    assert echo[0] < echo[1] < 1 / count * 4


def test_distance_probe_equals_the_definition() -> None:
    model, ids = dense_model("qwen3").float(), tokens(1, 30)[0].tolist()
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(layer: int):
        def see(module, args, kwargs):
            x = kwargs["hidden_states"][0]
            q = module.q_norm(module.q_proj(x).unflatten(-1, (4, -1)))
            k = module.k_norm(module.k_proj(x).unflatten(-1, (2, -1)))
            seen[layer] = q.mean(0), k.mean(0)

        return see

    handles = [
        layer.self_attn.register_forward_pre_hook(hook(i), with_kwargs=True)
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    made = distance_probe(model, ids, length=40)
    angles = torch.arange(40)[:, None] * model.model.rotary_emb.inv_freq
    for layer, (q, k) in seen.items():
        half, expected = q.shape[-1] // 2, torch.zeros(2)
        pairs_q, pairs_k = (torch.complex(x[:, :half], x[:, half:]) for x in (q, k))
        for h in range(4):
            turned_q = pairs_q[h] * torch.exp(1j * angles[-1])
            turned_k = pairs_k[h // 2] * torch.exp(1j * angles)
            logits = (turned_q.conj() * turned_k).real.sum(-1) * model.model.layers[0].self_attn.scaling
            expected[h // 2] += logits.softmax(0).cumsum(0).mean() / 2
        assert (made.scores[layer] - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("settings", "options", "methods"),
    [
        (["kind=razor", "period=16"], [], {"razor", "full"}),
        (["kind=distance", "length=50", "tokens=64"], ["--density", "0.5"], {"streaming", "full"}),
        (
            ["kind=duo", "steps=2", "min_length=150", "max_length=200", "num_passkeys=2", "passkey_tokens=4"],
            ["--density", "0.5", "--method", "ssa"],
            {"ssa", "full"},
        ),
    ],
    ids=["razor", "distance", "duo"],
)
def test_on_the_command_line(tmp_path: Path, settings: list, options: list, methods: set) -> None:
    source, file, out = (
        save(tiny_dense().float(), tmp_path / "dense"),
        tmp_path / "h.safetensors",
        tmp_path / "out",
    )
    pairs = [word for pair in settings for word in ("--set", pair)]
    measured = CliRunner().invoke(main, ["inspect", str(source), "--measure", str(file), *pairs, "--json"])
    assert measured.exit_code == 0, measured.output
    assert len(json.loads(measured.stdout)["scores"]) == 3
    words = ["convert", str(source), str(out), "--profile", str(file), *options, "--json"]
    converted = CliRunner().invoke(main, words)
    assert converted.exit_code == 0, converted.output
    plan = json.loads((out / "config.json").read_text())["sparse_attention"]
    assert {plan["default"]["method"], *(rule["method"] for rule in plan["rules"])} == methods


def test_import_on_the_command_line(tmp_path: Path) -> None:
    source, file = save(tiny_dense().float(), tmp_path / "dense"), tmp_path / "h.safetensors"
    (tmp_path / "heads.json").write_text('{"1": [0]}')
    words = ["inspect", str(source), "--measure", str(file), "--set", "kind=import"]
    done = CliRunner().invoke(main, [*words, "--set", f"file={tmp_path / 'heads.json'}"])
    assert done.exit_code == 0, done.output
    assert "1 of 6 key/value heads keep everything" in done.output
    assert HeadProfile.load(file).scores[1, 0] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["kind=razr"], "there is no kind 'razr'; did you mean 'razor'?"),
        (["kind=razor", "perod=9"], "unknown key 'perod'; did you mean 'period'?"),
        (["kind=razor", "period=long"], "--set: period must be a whole number, got 'long'"),
        (["kind=import"], "kind=import needs --set file=FILE"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, settings: list, message: str) -> None:
    source = save(tiny_dense().float(), tmp_path / "dense")
    pairs = [word for pair in settings for word in ("--set", pair)]
    done = CliRunner().invoke(main, ["inspect", str(source), "--measure", str(tmp_path / "h"), *pairs])
    assert message in " ".join(done.output.split()), done.output
    assert done.exit_code in (2, 3)
    assert not (tmp_path / "h").exists()
