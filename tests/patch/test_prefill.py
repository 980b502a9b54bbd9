"""What every method must do that is sparse while a prompt is read: on a whole model."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from nsa_convert.errors import ConfigError
from nsa_convert.kernels import use_backend
from nsa_convert.patch.patching import patch_model, sparse_methods, unpatch_model, with_full_budget
from nsa_convert.plan import resolve_plan
from tests.models import PREFILL, dense_model, plan, tokens
from tests.patch.test_conformance import GEOMETRY

LENGTH = 203
WHOLE = ("flexprefill", "minference", "minference-vertical-slash", "tri_shape")
"""They choose from the last queries of the prompt."""
FAMILY = dict(zip(PREFILL, ("llama", "qwen2", "qwen3", "mistral") * 2, strict=False))


@pytest.fixture(params=list(PREFILL))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str) -> PreTrainedModel:
    return patch_model(dense_model(FAMILY[name]), plan(PREFILL[name]))


def logits(model: PreTrainedModel, ids: torch.Tensor, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def test_budget_and_full_budget_are_dense(name: str) -> None:
    model = dense_model(FAMILY[name])
    budget = min(m.reach().visible_budget for m in resolve_plan(plan(PREFILL[name]), 3, GEOMETRY))
    ids = tokens(2, LENGTH)
    dense = logits(model, ids)
    patch_model(model, plan(PREFILL[name]))
    assert (logits(model, ids[:, :budget]) - dense[:, :budget]).abs().max() < 1e-10
    assert (logits(model, ids) - dense).abs().max() > 0.1
    with with_full_budget(model, LENGTH):
        assert (logits(model, ids) - dense).abs().max() < 1e-10
    assert torch.equal(logits(unpatch_model(model), ids), dense)


def test_backends_agree(model: PreTrainedModel) -> None:
    ids = tokens(2, LENGTH)
    fast = logits(model, ids)
    with use_backend("reference"):
        assert (fast - logits(model, ids)).abs().max() < 1e-9


@pytest.mark.parametrize("cached", [False, True])
def test_left_padded_batch_equals_single_sequences(model: PreTrainedModel, cached: bool) -> None:
    rows = [tokens(1, n, seed=n) for n in (LENGTH, 131, 5, 170)]
    ids = torch.cat([pad(r, (LENGTH - r.shape[1], 0)) for r in rows])
    mask = torch.cat([pad(torch.ones_like(r), (LENGTH - r.shape[1], 0)) for r in rows])
    out = logits(model, ids, attention_mask=mask, use_cache=cached)
    for i, row in enumerate(rows):
        assert (out[i : i + 1, -row.shape[1] :] - logits(model, row)).abs().max() < 1e-10


def test_right_padding_is_refused(model: PreTrainedModel) -> None:
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, -3:] = 0
    with pytest.raises(ConfigError, match="pad on the left|ends before the others") as error:
        logits(model, ids, attention_mask=mask)
    assert error.value.code == "CF25"


def test_packed_documents_equal_separate_ones(model: PreTrainedModel) -> None:
    documents = [tokens(1, n, seed=n) for n in (131, 5, LENGTH)]
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    packed = logits(model, torch.cat(documents, 1), position_ids=positions, use_cache=False)
    assert (packed - torch.cat([logits(model, d) for d in documents], 1)).abs().max() < 1e-10


def test_decoding_is_dense_over_what_the_prompt_left(model: PreTrainedModel) -> None:
    """The same cache, continued by the dense model, says the same."""
    ids = tokens(1, LENGTH + 20)
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :LENGTH], past_key_values=cache, use_cache=True)
    copied = DynamicCache()
    for i, layer in enumerate(cache.layers):
        copied.update(layer.keys.clone(), layer.values.clone(), i)
    pieces = ids[:, LENGTH:].split([1, 16, 3], 1)
    steps = [logits(model, piece, past_key_values=cache) for piece in pieces]
    unpatch_model(model)
    dense = logits(model, ids[:, LENGTH:], past_key_values=copied)
    assert (torch.cat(steps, 1) - dense).abs().max() < 1e-10


def test_generates(model: PreTrainedModel) -> None:
    prompt = tokens(2, 120)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(prompt, **greedy)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **greedy), expected)


def test_chunks_equal_one_pass_or_are_refused(name: str, model: PreTrainedModel) -> None:
    ids = tokens(1, LENGTH)
    cache = DynamicCache(config=model.config)
    whole = logits(model, ids)
    chunks = ids.split(80, 1)  # whole tiles, and a rest that is no decoding step
    parts = [logits(model, chunks[0], past_key_values=cache)]
    if name in WHOLE:
        with pytest.raises(ConfigError, match="chunks") as error:
            logits(model, chunks[1], past_key_values=cache)
        assert error.value.code == "CF25"
        return
    parts += [logits(model, chunk, past_key_values=cache) for chunk in chunks[1:]]
    if name == "spargeattn":  # a part of the blocks there are, which grow with each chunk
        assert torch.isfinite(torch.cat(parts, 1)).all()
        return
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-10


def test_no_query_sees_a_later_key(model: PreTrainedModel) -> None:
    """A tile may be chosen by its last query, but values of later tokens never reach an earlier one."""
    ids = tokens(1, LENGTH)
    first = sparse_methods(model)[0]
    assert not first.reach().is_causal
    seen = []
    forward = first.forward
    first.forward = lambda x: seen.append(x) or forward(x)
    logits(model, ids)
    x = seen[0]
    o = forward(x)
    x.v[:, 100:] += 5
    with torch.no_grad():
        assert torch.equal(forward(x)[:, :100], o[:, :100])
