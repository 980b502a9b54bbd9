import math

import pytest
import torch

from nsa_convert.errors import CheckFailedError, ConfigError
from nsa_convert.evaluation.metrics.divergence import compare
from nsa_convert.evaluation.metrics.perplexity import (
    Bucket,
    Readout,
    perplexity,
    position_buckets,
    read_out,
    token_nll,
)
from tests.evaluation.tiny import random_ids, tiny_dense


def readout(logits):
    return Readout(states=logits, head=lambda states: states)


def test_nll_equals_the_log_softmax_of_the_models_logits():
    model, ids = tiny_dense(), random_ids(300)  # more than one chunk
    logits = model(torch.tensor([ids])).logits[0].double()
    expected = [-(logits[t] - logits[t].logsumexp(0))[ids[t + 1]].item() for t in range(299)]
    assert token_nll(read_out(model, ids), ids).tolist() == pytest.approx(expected, abs=1e-4)


def test_buckets_cut_at_the_budget_and_cover_every_prediction():
    assert position_buckets(100, 32) == [Bucket(0, 16), Bucket(16, 32), Bucket(32, 64), Bucket(64, 100)]
    assert position_buckets(1500) == [Bucket(0, 512), Bucket(512, 1024), Bucket(1024, 1500)]
    assert position_buckets(8, 1024) == [Bucket(0, 8)]
    assert Bucket(16, 32).label == "17-32"


def test_bucket_perplexity_averages_the_predictions_with_that_much_context():
    nll = torch.arange(10.0) / 7
    # The prediction at index i has i + 1 tokens of context: contexts 4, 5, 6 are indices 3, 4, 5.
    assert perplexity(Bucket(3, 6).of(nll)) == pytest.approx(math.exp((3 + 4 + 5) / 3 / 7))


@pytest.mark.parametrize("length", [5, 300])
def test_divergence_equals_its_formulas(length):
    generator = torch.Generator().manual_seed(1)
    dense = 3 * torch.randn(length, 40, generator=generator)
    sparse = dense + torch.randn(length, 40, generator=generator)
    ids = torch.randint(40, (length,), generator=generator).tolist()
    result = compare(readout(dense), readout(sparse), ids)
    p, q = dense.double().softmax(1)[:-1], sparse.double().softmax(1)[:-1]
    assert torch.allclose(result.kl.double(), (p * (p / q).log()).sum(1), atol=1e-5)
    targets = torch.tensor(ids[1:])[:, None]
    assert torch.allclose(result.dense_nll.double(), -p.gather(1, targets)[:, 0].log(), atol=1e-5)
    assert torch.allclose(result.sparse_nll.double(), -q.gather(1, targets)[:, 0].log(), atol=1e-5)
    for t in range(length - 1):
        best_p, best_q = (set(x[t].argsort(descending=True)[:5].tolist()) for x in (p, q))
        assert result.top5[t].item() == pytest.approx(len(best_p & best_q) / 5)
        assert result.top1[t].item() == float(p[t].argmax() == q[t].argmax())


def test_summary_of_a_bucket_uses_that_bucket_alone():
    logits = torch.zeros(9, 4)
    other = logits.clone()
    other[6:, 0] = 2.0  # the models differ from context 7 on
    summary = compare(readout(logits), readout(other), [1] * 9)
    same, differ = summary.summary(Bucket(0, 6)), summary.summary(Bucket(6, 8))
    assert (same["kl_mean"], same["ppl_ratio"], same["tokens"]) == (0, 1, 6)
    q = math.exp(2) / (math.exp(2) + 3), 1 / (math.exp(2) + 3)
    kl = 0.25 * math.log(0.25 / q[0]) + 0.75 * math.log(0.25 / q[1])
    assert differ["kl_mean"] == pytest.approx(kl, abs=1e-6)
    assert differ["kl_max"] == pytest.approx(kl, abs=1e-6)
    assert differ["sparse_ppl"] == pytest.approx(1 / q[1], rel=1e-5)
    assert differ["dense_ppl"] == pytest.approx(4, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits_are_an_error_and_no_number(bad):
    logits = torch.zeros(4, 3)
    logits[2, 1] = bad
    with pytest.raises(CheckFailedError, match="not finite") as caught:
        token_nll(readout(logits), [0, 1, 2, 0])
    assert caught.value.exit_status == 4


def test_models_with_different_vocabularies_are_not_compared():
    with pytest.raises(ConfigError, match="3 and 4 tokens"):
        compare(readout(torch.zeros(4, 3)), readout(torch.zeros(4, 4)), [0, 1, 2, 0])
