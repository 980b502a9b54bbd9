"""DSA and MSA against float64 loops over single queries, and what trains their index."""

from __future__ import annotations

import math

import pytest
import torch

from nsa_convert.config import AttentionGeometry, LayerRule
from nsa_convert.errors import ConfigError
from nsa_convert.kernels.indexed import block_max_topk, token_topk
from nsa_convert.methods.parts.base import AttentionInputs, observe
from nsa_convert.methods.parts.registry import build_method
from nsa_convert.methods.parts.training_mode import TrainingMode
from nsa_convert.patterns import BlockTopK, SequenceLayout

TOTAL, DIM = 83, 6
HEADS = [(4, 2), (6, 1), (2, 2)]
F64 = torch.float64


def layer_and_inputs(method: str, settings: dict, heads: int, kv_heads: int) -> tuple:
    torch.manual_seed(heads)
    geometry = AttentionGeometry(hidden_size=10, num_query_heads=heads, num_kv_heads=kv_heads, head_dim=DIM)
    layer = build_method(LayerRule(method=method, settings=settings), geometry, 0).double()
    for parameter in layer.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    q, k, v = (2 * torch.randn(1, TOTAL, n, DIM, dtype=F64) for n in (heads, kv_heads, kv_heads))
    hidden = torch.randn(1, TOTAL, 10, dtype=F64)
    inputs = AttentionInputs(
        q=q,
        k=k,
        v=v,
        hidden=hidden,
        pooled={},
        layout=SequenceLayout(),
        scale=DIM**-0.5,
        # Any map of positions will do for RoPE.
        token_states=layer.project(hidden, lambda x: x.flip(1) * 0.5).token_states,
    )
    return layer, inputs


def index_vectors(layer: torch.nn.Module, x: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return index queries ``[T, h, D]`` and keys ``[T, h, D]`` from the parameters, written out."""
    heads = layer.index.num_heads
    learned = (x.hidden[0] @ layer.index.q.weight.T).view(TOTAL, heads, DIM).flip(0) * 0.5
    if layer.index.k is None:
        group = x.q.shape[2] // heads
        mean = torch.stack([x.q[0, :, h * group : (h + 1) * group].mean(1) for h in range(heads)], 1)
        return mean + learned, x.k[0]
    k = x.hidden[0] @ layer.index.k.weight.T
    k = (k - k.mean(-1, keepdim=True)) / (k.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    k = (k * layer.index.norm.weight + layer.index.norm.bias)[None].flip(1)[0] * 0.5
    return learned, k[:, None].expand(-1, heads, -1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    return torch.softmax(k[tokens] @ q / math.sqrt(DIM), 0) @ v[tokens]


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("key", ["cached", "shared"])
def test_dsa_equals_the_oracle(heads: int, kv_heads: int, key: str) -> None:
    count, sinks, window = 17, 2, 5
    settings = {"num_tokens": count, "num_sinks": sinks, "window_size": window, "index_key": key}
    layer, x = layer_and_inputs("dsa", settings, heads, kv_heads)
    records = []
    with torch.no_grad(), observe(records.append):
        out = layer(x)[0]
        q, k = index_vectors(layer, x)
        w = x.hidden[0] @ layer.index_weights.weight.T + layer.index_weights.bias
    lists = records[0].patterns["selected"].token_indices[0, 0]
    for t in range(TOTAL):
        score = [
            sum((w[t, j] * torch.relu(q[t, j] @ k[s, j] / math.sqrt(DIM))).item() for j in range(q.shape[1]))
            for s in range(t + 1)
        ]
        forced = {s for s in range(t + 1) if s < sinks or s > t - window}
        free = sorted((s for s in range(t + 1) if s not in forced), key=lambda s: (-score[s], s))
        tokens = sorted([*forced, *free[: count - len(forced)]])
        assert [s for s in lists[t].tolist() if s >= 0] == tokens
        for h in range(heads):
            g = h // (heads // kv_heads)
            assert (out[t, h] - attend(x.q[0, t, h], x.k[0, :, g], x.v[0, :, g], tokens)).abs().max() < 1e-12


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("key", ["cached", "shared"])
def test_msa_equals_the_oracle(heads: int, kv_heads: int, key: str) -> None:
    size, kept = 8, 4
    layer, x = layer_and_inputs(
        "msa", {"block_size": size, "num_blocks": kept, "index_key": key}, heads, kv_heads
    )
    records = []
    with torch.no_grad(), observe(records.append):
        out = layer(x)[0]
        q, k = index_vectors(layer, x)
    lists = records[0].patterns["selected"].block_indices[0]
    for t in range(TOTAL):
        own = t // size
        for h in range(kv_heads):
            score = [
                max((q[t, h] @ k[s, h]).item() for s in range(j * size, min((j + 1) * size, t + 1)))
                for j in range(own + 1)
            ]
            forced = {0, own}
            free = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: (-score[j], j))
            blocks = sorted([*forced, *free[: kept - len(forced)]])
            assert [j for j in lists[h, t].tolist() if j >= 0] == blocks
            tokens = [s for j in blocks for s in range(j * size, (j + 1) * size) if s <= t]
            for g in range(heads // kv_heads):
                head = h * (heads // kv_heads) + g
                expected = attend(x.q[0, t, head], x.k[0, :, h], x.v[0, :, h], tokens)
                assert (out[t, head] - expected).abs().max() < 1e-12


def test_equal_scores_go_to_the_lower_item_in_both_precisions() -> None:
    for dtype in (torch.float32, F64):
        q, k = torch.ones(1, 9, 1, 2, dtype=dtype), torch.ones(1, 9, 1, 2, dtype=dtype)
        weights = torch.ones(1, 9, 1, dtype=dtype)
        lists = token_topk(q, k, weights, num_tokens=3, window_size=1).token_indices
        assert lists[0, 0, 8].tolist() == [0, 1, 8]
        assert lists[0, 0, 1].tolist() == [0, 1, -1]
        rule = BlockTopK(block_size=2, num_blocks=3)
        assert block_max_topk(q, -k, rule=rule).block_indices[0, 0, 8].tolist() == [0, 3, 4]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, w = torch.randn(2, 70, 4, 8), torch.randn(2, 70, 2, 8), torch.rand(2, 70, 4)
    whole = token_topk(q, k, w, num_tokens=9).token_indices
    monkeypatch.setattr("nsa_convert.kernels.indexed.lists.CHUNK_BYTES", 1)
    assert torch.equal(token_topk(q, k, w, num_tokens=9).token_indices, whole)


@pytest.mark.parametrize("stream", ["teacher", "sparse"])
@pytest.mark.parametrize("key", ["cached", "shared"])
@pytest.mark.parametrize("method", ["dsa", "msa"])
def test_index_loss_is_the_kl_and_moves_only_the_index(method: str, key: str, stream: str) -> None:
    small = {"num_tokens": 17, "window_size": 5} if method == "dsa" else {"block_size": 8, "num_blocks": 4}
    layer, x = layer_and_inputs(method, {**small, "index_key": key}, 4, 2)
    for name in ("q", "k", "v", "hidden"):
        getattr(x, name).requires_grad_()
    out, losses = layer.train_forward(x, TrainingMode(stream=stream, losses=("index_kl",)))
    losses["index_kl"].backward()
    assert all(getattr(x, name).grad is None for name in ("q", "k", "v", "hidden"))
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())

    with torch.no_grad():
        q, k = index_vectors(layer, x)
        w = x.hidden[0] @ layer.index_weights.weight.T + layer.index_weights.bias if method == "dsa" else None
        pattern = layer.choose(x)
        seen = pattern.to_dense_mask(TOTAL, TOTAL, 4)[0]  # [HQ, T, T]
        total, count = 0.0, 0
        for t in range(1, TOTAL):  # 83 queries are few enough that every one is in the sample
            mass = torch.stack(
                [torch.softmax(x.k[0, : t + 1, h // 2] @ x.q[0, t, h] / math.sqrt(DIM), 0) for h in range(4)]
            )
            products = torch.stack([k[: t + 1, j] @ q[t, j] / math.sqrt(DIM) for j in range(2)])
            rows = (
                [(mass.mean(0), (w[t, :, None] * products.relu()).sum(0), 0)]
                if method == "dsa"
                else [(mass[2 * h : 2 * h + 2].mean(0), products[h], 2 * h) for h in range(2)]
            )
            for p, logits, head in rows:
                kept = seen[head, t, : t + 1] if stream == "sparse" else torch.ones(t + 1, dtype=torch.bool)
                p, logits = p[kept] / p[kept].sum(), logits[kept]
                total += (p * (p.log() - logits.log_softmax(0))).sum().item()
                count += 1
    assert losses["index_kl"].item() == pytest.approx(total / count, rel=1e-6)
    assert out.shape == x.q.shape


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("dsa", {"num_tokens": 10}, "smaller than the forced tokens"),
        ("dsa", {"window_size": 0}, "window_size >= 1"),
        ("dsa", {"index_heads": 2}, 'belongs to index_key "shared"'),
        ("dsa", {"index_key": "shared", "index_heads": 3}, "must divide the 4 query heads"),
        ("msa", {"index_key": "own"}, "one of cached, shared"),
        ("msa", {"num_blocks": 1}, "forced blocks"),
    ],
)
def test_bad_settings_are_named(method: str, settings: dict, message: str) -> None:
    geometry = AttentionGeometry(hidden_size=10, num_query_heads=4, num_kv_heads=2, head_dim=DIM)
    with pytest.raises(ConfigError, match=message):
        build_method(LayerRule(method=method, settings=settings), geometry, 0)


def test_the_index_starts_at_the_attention_it_serves() -> None:
    from nsa_convert.patch.patching import patch_model
    from tests.models import DSA, MSA, dense_model, plan

    for settings in (MSA, DSA):
        model = patch_model(dense_model("qwen2"), plan({**settings, "index_key": "shared"}))
        attention = model.model.layers[1].self_attn
        heads = attention.q_proj.weight.view(2, 2, 16, 64).mean(1).flatten(0, 1)
        assert torch.allclose(attention.sparse.index.q.weight, heads, atol=1e-6)
        keys = attention.k_proj.weight.view(2, 16, 64).mean(0)
        assert torch.allclose(attention.sparse.index.k.weight, keys, atol=1e-6)
        bias = attention.k_proj.bias.view(2, 16).mean(0)
        assert torch.allclose(attention.sparse.index.k.bias, bias, atol=1e-6)
        cached = patch_model(dense_model("qwen2"), plan(settings)).model.layers[1].self_attn.sparse
        assert not cached.index.q.weight.any()


def test_the_index_counts_in_the_estimate() -> None:
    from nsa_convert.estimate import context_costs

    geometry = AttentionGeometry(hidden_size=64, num_query_heads=4, num_kv_heads=2, head_dim=16)
    rules = [LayerRule(method="msa", settings={"index_key": key}) for key in ("cached", "shared")]
    own, shared = (context_costs([build_method(r, geometry, 0)], geometry, 2, [8192])[0] for r in rules)
    assert own.sparse_kv_bytes == own.dense_kv_bytes
    assert shared.sparse_kv_bytes == own.dense_kv_bytes + 8192 * 16 * 2
    assert own.sparse_decode_bytes == 2048 * 2 * 2 * 16 * 2 + 8192 * 2 * 16 * 2


class TestReuse:
    def test_a_layer_attends_to_what_an_earlier_one_chose(self) -> None:
        from nsa_convert.patch.patching import patch_model
        from tests.models import VARIANTS, dense_model, plan, tokens

        model = patch_model(dense_model("llama"), plan(VARIANTS["msa-reuse"]))
        records = []
        with torch.no_grad(), observe(records.append):
            model(tokens(1, 90))
        lists = [record.patterns["selected"].block_indices for record in records]
        assert torch.equal(lists[0], lists[1])
        assert torch.equal(lists[0], lists[2])
        assert not any(".layers.1.self_attn.sparse" in name for name, _ in model.named_parameters())

    @pytest.mark.parametrize(
        "rule",
        [
            {"layers": [1], "reuse_from": 2},
            {"layers": [2], "reuse_from": 0, "num_blocks": 5},
            {"layers": [0], "reuse_from": 0},
        ],
    )
    def test_only_an_earlier_equal_layer_can_be_reused(self, rule: dict) -> None:
        from nsa_convert.plan import resolve_plan
        from tests.models import MSA, plan

        geometry = AttentionGeometry(hidden_size=64, num_query_heads=4, num_kv_heads=2, head_dim=16)
        with pytest.raises(ConfigError, match="must name an earlier layer that chooses"):
            resolve_plan(plan(MSA, {**MSA, **rule}), 3, geometry)
