"""MoBA, InfLLM-v2 and streaming heads against float64 loops over single queries, written from the papers."""

from __future__ import annotations

import math

import pytest
import torch

from nsa_convert.config import AttentionGeometry, LayerRule
from nsa_convert.errors import ConfigError
from nsa_convert.methods.infllm_v2 import from_sparse_config, to_sparse_config
from nsa_convert.methods.parts.base import AttentionInputs, observe
from nsa_convert.methods.parts.registry import build_method
from nsa_convert.patterns import SequenceLayout

TOTAL, DIM = 83, 6
HEADS = [(4, 2), (7, 1), (2, 2)]


def run(method: str, settings: dict, heads: int, kv_heads: int) -> tuple:
    """Return the inputs, the output ``[T, HQ, D]`` and the record of one layer on random inputs."""
    torch.manual_seed(heads)
    geometry = AttentionGeometry(hidden_size=10, num_query_heads=heads, num_kv_heads=kv_heads, head_dim=DIM)
    layer = build_method(LayerRule(method=method, settings=settings), geometry, 0).double()
    q, k, v = (2 * torch.randn(1, TOTAL, n, DIM, dtype=torch.float64) for n in (heads, kv_heads, kv_heads))
    pooled = {
        p.name: layer.compress(p.name, k.unfold(1, p.width, p.stride).permute(0, 1, 4, 2, 3))
        for p in layer.cache_needs().pools
    }
    hidden = torch.randn(1, TOTAL, 10, dtype=torch.float64)
    inputs = AttentionInputs(
        q=q, k=k, v=v, hidden=hidden, pooled=pooled, layout=SequenceLayout(), scale=DIM**-0.5
    )
    records = []
    with torch.no_grad(), observe(records.append):
        out = layer(inputs)
    return q[0], k[0], v[0], out[0], records[0]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    return torch.softmax(k[tokens] @ q / math.sqrt(DIM), 0) @ v[tokens]


def pool(keys: torch.Tensor, cells: list[int], width: int, stride: int) -> torch.Tensor:
    return torch.stack([keys[i * stride : i * stride + width].mean(0) for i in cells])


def tokens_of(blocks: list[int], size: int, t: int) -> list[int]:
    return [i for j in blocks for i in range(j * size, (j + 1) * size) if i <= t]


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("sinks", [0, 1])
def test_moba_ranks_blocks_by_query_head(heads: int, kv_heads: int, sinks: int) -> None:
    size, kept, group = 8, 4, heads // kv_heads
    settings = {"block_size": size, "num_blocks": kept, "num_sink_blocks": sinks}
    q, k, v, out, record = run("moba", settings, heads, kv_heads)
    listed = record.patterns["selected"].block_indices[0]
    assert listed.shape[0] == heads
    for t in range(TOTAL):
        for h in range(heads):
            keys, own = k[:, h // group], t // size
            score = {j: (keys[j * size : (j + 1) * size].mean(0) @ q[t, h]).item() for j in range(own)}
            forced = {own, *range(min(sinks, own))}
            free = sorted((j for j in score if j not in forced), key=lambda j: (-score[j], j))
            blocks = sorted([*forced, *free[: kept - len(forced)]])
            assert [j for j in listed[h, t].tolist() if j >= 0] == blocks
            expected = attend(q[t, h], keys, v[:, h // group], tokens_of(blocks, size, t))
            assert (out[t, h] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("lse", ["exact", "coarse"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_infllm_v2_max_pools_overlapping_cells(heads: int, kv_heads: int, lse: str) -> None:
    l, d, size, topk, window, group = 2, 1, 4, 3, 8, heads // kv_heads
    settings = {"kernel_size": l, "kernel_stride": d, "block_size": size, "topk": topk, "window_size": window}
    settings["lse"] = lse
    q, k, v, out, record = run("infllm_v2", settings, heads, kv_heads)
    listed = record.patterns["selected"].block_indices[0]
    for t in range(TOTAL):
        for h in range(kv_heads):
            cells = [i for i in range(TOTAL) if i * d + l - 1 <= t]
            group_p = torch.zeros(max(len(cells), 1), dtype=torch.float64)
            for g in range(group if cells else 0):
                scores = pool(k[:, h], cells, l, d) @ q[t, h * group + g] / math.sqrt(DIM)
                coarse = [i for i in range(TOTAL) if 4 * i * d + 4 * l - 1 <= t]
                if lse == "exact":
                    group_p += torch.softmax(scores, 0)
                elif coarse:
                    far = pool(k[:, h], coarse, 4 * l, 4 * d) @ q[t, h * group + g] / math.sqrt(DIM)
                    group_p += torch.exp(scores - far.logsumexp(0))
            own = t // size
            # Max-pooling with kernel 5, stride 4, padding 1 over the cells of stride size / 4.
            p = {c: group_p[c].item() for c in cells}
            score = [max(p.get(c, 0.0) for c in range(4 * j - 1, 4 * j + 4)) for j in range(own + 1)]
            forced = {j for j in range(own + 1) if j < 1 or j > own - window // size}
            free = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: (-score[j], j))
            blocks = sorted([*forced, *free[: topk + window // size - len(forced)]])
            assert [j for j in listed[h, t].tolist() if j >= 0] == blocks
            for g in range(group):
                head = h * group + g
                expected = attend(q[t, head], k[:, h], v[:, h], tokens_of(blocks, size, t))
                assert (out[t, head] - expected).abs().max() < 1e-12


@pytest.mark.parametrize(("heads", "kv_heads"), [*HEADS, (3, 1), (8, 2)])
def test_quest_ranks_pages_by_the_bound_of_their_products(heads: int, kv_heads: int) -> None:
    size, kept, group = 8, 4, heads // kv_heads
    settings = {"block_size": size, "num_blocks": kept, "prefill": "sparse"}
    q, k, v, out, record = run("quest", settings, heads, kv_heads)
    listed = record.patterns["selected"].block_indices[0]
    for t in range(TOTAL):
        for h in range(heads):
            keys, own = k[:, h // group], t // size
            bound = {}
            for j in range(own):
                page = keys[j * size : (j + 1) * size]
                bound[j] = torch.maximum(q[t, h] * page.amin(0), q[t, h] * page.amax(0)).sum().item()
                assert bound[j] >= (page @ q[t, h]).max().item() - 1e-12
            best = sorted(bound, key=lambda j: (-bound[j], j))[: kept - 1]
            blocks = sorted([own, *best])
            assert [j for j in listed[h, t].tolist() if j >= 0] == blocks
            expected = attend(q[t, h], keys, v[:, h // group], tokens_of(blocks, size, t))
            assert (out[t, h] - expected).abs().max() < 1e-12


def test_quest_reads_the_prompt_densely_and_pages_while_decoding() -> None:
    from nsa_convert.patch.patching import patch_model
    from tests.models import QUEST, dense_model, plan, tokens

    model, ids = dense_model("llama"), tokens(1, 90)
    with torch.no_grad():
        dense = model(ids).logits
        patch_model(model, plan({**QUEST, "prefill": "dense"}))
        prompt = model(ids[:, :89], use_cache=True)
        step = model(ids[:, 89:], past_key_values=prompt.past_key_values)
    assert (prompt.logits - dense[:, :89]).abs().max() < 1e-10
    assert (step.logits - dense[:, 89:]).abs().max() > 1e-3


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_streaming_sees_sinks_and_window(heads: int, kv_heads: int) -> None:
    q, k, v, out, _ = run("streaming", {"num_sinks": 3, "window_size": 11}, heads, kv_heads)
    for t in range(TOTAL):
        tokens = sorted({*range(min(3, t + 1)), *range(max(0, t - 10), t + 1)})
        for h in range(heads):
            g = heads // kv_heads
            assert (out[t, h] - attend(q[t, h], k[:, h // g], v[:, h // g], tokens)).abs().max() < 1e-12


def test_moba_decodes_densely_when_asked() -> None:
    geometry = AttentionGeometry(hidden_size=10, num_query_heads=4, num_kv_heads=2, head_dim=DIM)
    rule = LayerRule(method="moba", settings={"block_size": 8, "num_blocks": 2, "decode": "dense"})
    layer = build_method(rule, geometry, 0).double()
    q, k, v = (torch.randn(1, n, h, DIM, dtype=torch.float64) for n, h in ((1, 4), (TOTAL, 2), (TOTAL, 2)))
    step = AttentionInputs(
        q=q,
        k=k,
        v=v,
        hidden=q.new_zeros(1, 1, 10),
        pooled={"key": k.new_zeros(1, TOTAL // 8, 2, DIM)},
        layout=SequenceLayout(offset=TOTAL - 1),
        scale=DIM**-0.5,
    )
    out = layer(step)
    for h in range(4):
        expected = attend(q[0, 0, h], k[0, :, h // 2], v[0, :, h // 2], list(range(TOTAL)))
        assert (out[0, 0, h] - expected).abs().max() < 1e-12
    assert layer.reach().decode_keys is None


class TestSparseConfig:
    MINICPM4 = {
        "kernel_size": 32,
        "kernel_stride": 16,
        "init_blocks": 1,
        "block_size": 64,
        "window_size": 2048,
        "topk": 64,
        "use_nope": False,
        "dense_len": 8192,
    }

    def test_round_trip(self) -> None:
        settings = from_sparse_config(self.MINICPM4)
        assert settings.rule.budget == 6144
        assert to_sparse_config(settings) == self.MINICPM4

    def test_what_cannot_be_honoured_is_refused_at_once(self) -> None:
        with pytest.raises(ConfigError, match=r"(?s)topp.*topk.*use_nope") as error:
            from_sparse_config({**self.MINICPM4, "use_nope": True, "topp": 3})
        assert error.value.code == "CF22"


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("moba", {"num_blocks": 1}, "forced blocks"),
        ("moba", {"share": "all"}, "one of none, group"),
        ("infllm_v2", {"kernel_stride": 12}, "kernel_size 32 must be a positive multiple"),
        ("infllm_v2", {"window_size": 100}, "window_size 100 must be a positive multiple of block_size 64"),
        ("infllm_v2", {"topk": 0}, "topk at least init_blocks"),
        ("infllm_v2", {"dense_len": -1}, "dense_len must be >= 0"),
        ("streaming", {"window_size": 0}, "window_size must be >= 1"),
        ("streaming", {"num_sinks": -1}, "num_sinks must be >= 0"),
    ],
)
def test_bad_settings_are_named(method: str, settings: dict, message: str) -> None:
    geometry = AttentionGeometry(hidden_size=10, num_query_heads=4, num_kv_heads=2, head_dim=DIM)
    with pytest.raises(ConfigError, match=message):
        build_method(LayerRule(method=method, settings=settings), geometry, 0)


@pytest.mark.parametrize("taps", [2, 5])
def test_moba_mixes_the_keys_of_the_tokens_before(taps: int) -> None:
    geometry = AttentionGeometry(hidden_size=10, num_query_heads=4, num_kv_heads=2, head_dim=DIM)
    layer = build_method(LayerRule(method="moba", settings={"key_conv": taps}), geometry, 0).double()
    keys = torch.randn(1, 9, 2, DIM, dtype=torch.float64)
    shifted = [torch.nn.functional.pad(keys, (0, 0, 0, 0, lag, 0))[:, :9] for lag in range(taps)]
    assert torch.equal(layer.mix_keys(shifted), keys)
    weight = layer.key_conv.weight
    weight.data.normal_()
    mixed = layer.mix_keys(shifted)
    for t in range(9):
        total = sum(weight[:, :, lag] * keys[0, t - lag] for lag in range(min(taps, t + 1)))
        assert (mixed[0, t] - keys[0, t] - torch.nn.functional.silu(total)).abs().max() < 1e-12


def test_the_teacher_of_mixed_keys_is_the_dense_model() -> None:
    from nsa_convert.methods.parts.training_mode import TrainingMode
    from nsa_convert.patch.patching import patch_model
    from nsa_convert.patch.training_pass import TrainingPass
    from tests.models import MOBA, dense_model, plan, tokens

    model, ids = dense_model("llama"), tokens(1, 60)
    with torch.no_grad():
        dense = model.model(ids)[0]
        patch_model(model, plan({**MOBA, "key_conv": 3}))
        for layer in model.model.layers:
            layer.self_attn.sparse.key_conv.weight.normal_()
        outputs = {
            stream: model.model(
                ids, training_pass=TrainingPass(TrainingMode(stream=stream), joined=True), use_cache=False
            )[0]
            for stream in ("teacher", "full", "sparse")
        }
    assert (outputs["teacher"] - dense).abs().max() < 1e-10
    assert (outputs["full"] - dense).abs().max() > 1e-3
    assert (outputs["sparse"] - outputs["full"]).abs().max() > 1e-3


def test_a_convolution_of_one_token_is_refused() -> None:
    geometry = AttentionGeometry(hidden_size=10, num_query_heads=4, num_kv_heads=2, head_dim=DIM)
    with pytest.raises(ConfigError, match="key_conv must be 0 or 2 to 16, got 1"):
        build_method(LayerRule(method="moba", settings={"key_conv": 1}), geometry, 0)
