import itertools

import pytest
import torch

from nsa_convert.evaluation.metrics.mass import MassProbe, captured_mass, spaced_queries
from nsa_convert.evaluation.metrics.perplexity import read_out
from nsa_convert.evaluation.models import dense_attention_in
from nsa_convert.methods.parts.base import observe
from nsa_convert.patch.patching import patch_model
from nsa_convert.patterns import BlockSelection, SinkWindow, TokenSelection
from tests.evaluation.tiny import BUDGET, random_ids, tiny_dense
from tests.models import NSA, SSA, plan

LENGTH = 75


def attention(record):
    """Dense attention probabilities, [HQ, T, T] float64, all queries and heads at once."""
    group = record.q.shape[2] // record.k.shape[2]
    q = record.q[0].double().transpose(0, 1)
    k = record.k[0].double().transpose(0, 1).repeat_interleave(group, 0)
    scores = q @ k.mT * record.scale
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


INFLLM = {
    "method": "infllm", "num_sinks": 4, "window_size": 9, "block_size": 6, "num_blocks": 3, "query_block": 11,
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "patterns"),
    [(NSA, 2), (SSA, 1), ({**SSA, "gate": "sigmoid"}, 1), (INFLLM, 3)],
    ids=["nsa", "ssa", "ssa-gated", "infllm"],
)
def test_captured_mass_and_density_equal_the_dense_mask(settings, patterns):
    model, ids = patch_model(tiny_dense(), plan(settings)), random_ids(LENGTH)
    records, probe = [], MassProbe(BUDGET, num_queries=10)
    with observe(records.append):
        read_out(model, ids)
    with probe.watch():
        read_out(model, ids)
    queries = spaced_queries(LENGTH, BUDGET, 10)
    expected = [(record, name, pattern) for record in records for name, pattern in record.patterns.items()]
    assert len(probe.rows) == len(expected) == 3 * patterns
    for row, (record, name, pattern) in zip(probe.rows, expected, strict=True):
        mask = pattern.to_dense_mask(LENGTH, LENGTH, 4)[0].expand(4, -1, -1)
        by_head = (attention(record) * mask).sum(-1)[:, queries].mean(1)
        assert (row.layer, row.pattern) == (record.layer_index, name)
        assert row.captured == pytest.approx(by_head.mean().item(), abs=1e-5)
        assert row.captured_by_head == pytest.approx(by_head.view(2, 2).mean(1).tolist(), abs=1e-5)
        assert row.density == pytest.approx(mask.sum().item() / (4 * LENGTH * (LENGTH + 1) / 2), abs=1e-6)
    gates = {"compressed": 0.0, "selected": 1.0, "window": 0.0} if settings is NSA else None
    if settings.get("gate") == "sigmoid":
        gates = {"selected": torch.sigmoid(torch.tensor(4.0)).item()}
    assert all(row.gates == (gates and pytest.approx(gates)) for row in probe.rows)


def test_oracle_is_the_best_choice_of_as_many_blocks_for_the_whole_group():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(2, 3, 20, generator=generator).softmax(-1)  # 2 query heads, 3 queries, 5 blocks of 4
    queries = torch.tensor([17, 18, 19])
    indices = torch.full((1, 1, 20, 3), -1)
    indices[0, 0, 17:, 0], indices[0, 0, 18:, 1] = 0, 4
    pattern = BlockSelection(block_indices=indices, block_size=4)
    captured, oracle, recall = captured_mass(p, pattern, queries, 0, 1)
    mass = p.unflatten(2, (5, 4)).sum(-1)
    best, found = torch.zeros(2), 0.0
    for n, count in enumerate((1, 2, 2)):
        choices = [list(c) for c in itertools.combinations(range(5), count)]
        top = max(choices, key=lambda c: mass[:, n, c].sum().item())
        best += mass[:, n, top].sum(1) / 3
        found += len({0, 4} & set(top) if n else {0} & set(top)) / count / 3
    given = (mass[:, 0, 0] + mass[:, 1, [0, 4]].sum(1) + mass[:, 2, [0, 4]].sum(1)) / 3
    assert torch.allclose(captured, given)
    assert torch.allclose(oracle, best)
    assert recall.tolist() == pytest.approx([found] * 2)


def test_selections_per_query_head_and_of_tokens():
    p = torch.eye(8)[None].expand(2, -1, -1) * 0.75 + torch.eye(8)[[0] * 8][None] * 0.25  # own key and key 0
    queries = torch.arange(8)
    per_head = torch.stack([torch.zeros(8, 1), torch.arange(8)[:, None] // 4])[None].long()
    pattern = BlockSelection(block_indices=per_head, block_size=4)
    captured, oracle, _ = captured_mass(p, pattern, queries, 0, 1)
    assert captured.tolist() == pytest.approx([(4 + 4 * 0.25) / 8, (4 + 4 * 0.75) / 8])
    assert oracle.tolist() == pytest.approx([(4 + 4 * 0.75) / 8] * 2)
    tokens = TokenSelection(token_indices=torch.arange(8).view(1, 1, 8, 1))
    assert captured_mass(p, tokens, queries, 0, 1)[0].tolist() == pytest.approx([(1 + 7 * 0.75) / 8] * 2)
    window = SinkWindow(num_sinks=1, window_size=1)
    assert captured_mass(p, window, queries, 0, 1)[0].tolist() == pytest.approx([1, 1])


def test_sampled_queries_lie_beyond_the_budget_and_include_the_last():
    assert spaced_queries(100, 40, 4).tolist() == [40, 60, 79, 99]
    assert spaced_queries(45, 40, 64).tolist() == [40, 41, 42, 43, 44]
    assert spaced_queries(30, 40, 8).tolist() == [29]


def test_nothing_is_recorded_within_the_budget():
    model = patch_model(tiny_dense(), plan(NSA))
    with (probe := MassProbe(BUDGET)).watch():
        read_out(model, random_ids(BUDGET))
    assert probe.rows == []


def test_dense_attention_in_a_converted_model_is_the_dense_model():
    ids = torch.tensor([random_ids(LENGTH)])
    with torch.inference_mode():
        dense = tiny_dense()(ids).logits
        model = patch_model(tiny_dense(), plan(NSA))
        sparse = model(ids).logits
        with dense_attention_in(model):
            inside = model(ids).logits
        after = model(ids).logits
    assert (dense - sparse).abs().max() > 1e-3
    assert torch.allclose(inside, dense, atol=1e-9)
    assert torch.equal(after, sparse)
