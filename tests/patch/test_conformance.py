"""What every method must do on every family."""

from __future__ import annotations

import pytest
import torch

from nsa_convert.config import AttentionGeometry
from nsa_convert.kernels import use_backend
from nsa_convert.patch.patching import patch_model, unpatch_model, with_full_budget
from nsa_convert.plan import resolve_plan
from tests.marks import named, these_quick
from tests.models import PAIRS, QUICK, QUICK_PAIRS, VARIANTS, dense_model, plan, tokens, trained_model

BUDGET = 32
GEOMETRY = AttentionGeometry(hidden_size=64, num_query_heads=4, num_kv_heads=2, head_dim=16)


@pytest.fixture(params=these_quick(VARIANTS, QUICK))
def settings(request: pytest.FixtureRequest) -> dict:
    return VARIANTS[request.param]


@pytest.fixture(params=named(PAIRS, QUICK_PAIRS))
def pair(request: pytest.FixtureRequest) -> tuple[str, dict]:
    return request.param[0], VARIANTS[request.param[1]]


class TestConversion:
    @pytest.fixture
    def family(self, pair: tuple[str, dict]) -> str:
        return pair[0]

    @pytest.fixture
    def settings(self, pair: tuple[str, dict]) -> dict:
        return pair[1]

    def test_starts_at_the_dense_model_up_to_the_budget(self, family: str, settings: dict) -> None:
        if settings.get("gate") == "sigmoid":
            pytest.skip("a sigmoid gate starts near the dense model, not at it")
        model = dense_model(family)
        methods = resolve_plan(plan(settings), 3, GEOMETRY)
        budget = min(method.reach().visible_budget for method in methods)
        for length in (1, 7, budget - 1, budget):
            ids = tokens(2, length)
            with torch.no_grad():
                dense = model(ids).logits
                sparse = patch_model(model, plan(settings))(ids).logits
                unpatch_model(model)
            assert (sparse - dense).abs().max() < 1e-10, length

    def test_sparsity_shows_beyond_the_budget(self, family: str, settings: dict) -> None:
        model, ids = dense_model(family), tokens(1, 4 * BUDGET)
        with torch.no_grad():
            dense = model(ids).logits
            sparse = patch_model(model, plan(settings))(ids).logits
        assert (sparse - dense).abs().max() > 0.1

    def test_full_budget_is_dense(self, family: str, settings: dict) -> None:
        ids = tokens(2, 75)
        model = dense_model(family)
        with torch.no_grad():
            dense = model(ids).logits
        model = trained_model(family, settings)
        with torch.no_grad(), with_full_budget(model, 75):
            sparse = model(ids).logits
        assert (sparse - dense).abs().max() < 1e-10

    def test_unpatch_restores_the_dense_model_bit_for_bit(self, family: str, settings: dict) -> None:
        model, ids = dense_model(family), tokens(1, 90)
        names = [name for name, _ in model.named_parameters()]
        with torch.no_grad():
            before = model(ids).logits
            patch_model(model, plan(settings))(ids)
            unpatch_model(model)
            assert torch.equal(model(ids).logits, before)
        assert [name for name, _ in model.named_parameters()] == names
        assert type(model).__module__.startswith("transformers.")

    def test_dense_parameter_names_stay(self, family: str, settings: dict) -> None:
        model = dense_model(family)
        dense = dict(model.named_parameters())
        patch_model(model, plan(settings))
        patched = dict(model.named_parameters())
        assert all(patched[name] is parameter for name, parameter in dense.items())
        new = patched.keys() - dense.keys()
        assert all(".self_attn.sparse." in name for name in new)

    def test_gradients_reach_every_parameter(self, family: str, settings: dict) -> None:
        model, ids = trained_model(family, settings), tokens(1, 90)
        model.train()
        model(ids, labels=ids, use_cache=False).loss.backward()
        # What only chooses learns by a loss of its own: an index, and SSA's compressor.
        apart = (".index", ".compress_key") if settings["method"] == "ssa" else (".index",)
        learned = {n: p for n, p in model.named_parameters() if not any(part in n for part in apart)}
        silent = [n for n, p in learned.items() if p.grad is None or not p.grad.abs().max() > 0]
        assert not silent


class TestBehaviour:
    def test_backends_agree(self, settings: dict) -> None:
        model, ids = trained_model("qwen3", settings), tokens(2, 101)
        with torch.no_grad():
            fast = model(ids).logits
            with use_backend("reference"):
                slow = model(ids).logits
        assert (fast - slow).abs().max() < 1e-9

    def test_no_future_token_changes_an_output(self, settings: dict) -> None:
        model, ids = trained_model("llama", settings), tokens(1, 90)
        other = ids.clone()
        other[:, 53:] = tokens(1, 37, seed=9)
        with torch.no_grad():
            assert (model(ids).logits[:, :53] - model(other).logits[:, :53]).abs().max() < 1e-12

    def test_packed_documents_equal_separate_ones(self, settings: dict) -> None:
        model = trained_model("qwen3", settings)
        documents = [tokens(1, n, seed=n) for n in (61, 5, 90, 33)]
        packed = torch.cat(documents, 1)
        positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
        bounds = torch.tensor([0, 61, 66, 156, 189], dtype=torch.int32)
        hints = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 90, "max_length_k": 90}
        with torch.no_grad():
            alone = torch.cat([model(d).logits for d in documents], 1)
            for given in (
                {"position_ids": positions, "use_cache": False},
                {"position_ids": positions},
                hints,
            ):
                assert (model(packed, **given).logits - alone).abs().max() < 1e-10

    def test_documents_packed_in_two_rows(self, settings: dict) -> None:
        model = trained_model("llama", settings)
        a, b, c, d = (tokens(1, n, seed=n) for n in (90, 5, 61, 34))
        rows = torch.cat([torch.cat([a, b], 1), torch.cat([c, d], 1)])
        positions = torch.stack(
            [torch.cat([torch.arange(90), torch.arange(5)]), torch.cat([torch.arange(61), torch.arange(34)])]
        )
        with torch.no_grad():
            out = model(rows, position_ids=positions, use_cache=False).logits
            assert (out[:1, :90] - model(a).logits).abs().max() < 1e-10
            assert (out[1:, 61:] - model(d).logits).abs().max() < 1e-10

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padded_batch_equals_single_sequences(self, settings: dict, side: str) -> None:
        model = trained_model("qwen3", settings)
        rows = [tokens(1, n, seed=n) for n in (90, 61, 5, 59, 58)]
        sides = {"left": lambda n: (90 - n, 0), "right": lambda n: (0, 90 - n)}
        ids = torch.cat([torch.nn.functional.pad(r, sides[side](r.shape[1])) for r in rows])
        mask = torch.cat([torch.nn.functional.pad(torch.ones_like(r), sides[side](r.shape[1])) for r in rows])
        with torch.no_grad():
            out = model(ids, attention_mask=mask, use_cache=False).logits
            for i, row in enumerate(rows):
                assert (out[i : i + 1][:, mask[i].bool()] - model(row).logits).abs().max() < 1e-10

    def test_gradient_checkpointing_changes_nothing(self, settings: dict) -> None:
        model, ids = trained_model("llama", settings), tokens(1, 90)
        model.train()

        def gradients() -> dict[str, torch.Tensor]:
            model.zero_grad()
            model(ids, labels=ids, use_cache=False).loss.backward()
            return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

        plain = gradients()
        model.gradient_checkpointing_enable()
        again = gradients()
        assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_layers_follow_their_rules() -> None:
    model, ids = dense_model("llama"), tokens(1, 100)
    with torch.no_grad():
        dense = model(ids, output_hidden_states=True).hidden_states
        mixed = patch_model(model, plan(VARIANTS["nsa"], {"layers": [0, 1], "method": "full"}))
        hidden = mixed(ids, output_hidden_states=True).hidden_states
    assert (hidden[2] - dense[2]).abs().max() < 1e-10
    assert [layer.self_attn.sparse.spec.name for layer in mixed.model.layers] == ["full", "full", "nsa"]
