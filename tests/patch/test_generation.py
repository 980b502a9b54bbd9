"""generate() with every kind of cache equals generate() without one."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from tests.marks import named, slow
from tests.models import QUICK, VARIANTS, dense_model, tokens, trained_model

GREEDY = {"max_new_tokens": 14, "do_sample": False}
CASES = [("qwen3", name) for name in VARIANTS] + [("llama", "nsa"), ("mistral", "ssa"), ("qwen2", "nsa")]


QUICK_CASES = {(family, name) for family, name in CASES if name in QUICK and family in ("qwen3", "llama")}


@pytest.fixture(params=named(CASES, QUICK_CASES), scope="module")
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    family, variant = request.param
    return trained_model(family, VARIANTS[variant])


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    return tokens(1, 53)


@pytest.fixture(scope="module")
def expected(model: PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor:
    return model.generate(prompt, use_cache=False, **GREEDY)


@pytest.fixture(scope="module")
def padded() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    prompts = [tokens(1, n, seed=n) for n in (53, 20, 37, 5)]
    ids = torch.cat([torch.nn.functional.pad(p, (53 - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (53 - p.shape[1], 0)) for p in prompts])
    return ids, mask, prompts


@pytest.fixture(scope="module")
def alone(model: PreTrainedModel, padded: tuple) -> list[torch.Tensor]:
    """Return what each of the padded prompts continues with by itself, without a cache."""
    return [model.generate(p, use_cache=False, **GREEDY)[0, p.shape[1] :] for p in padded[2]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"past_key_values": DynamicCache},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 7},
        {"prefill_chunk_size": 7, "cache_implementation": "static"},
    ],
    ids=["dynamic", "user-dynamic", "static", "chunked", "chunked-static"],
)
def test_greedy(model: PreTrainedModel, prompt: torch.Tensor, expected: torch.Tensor, options: dict) -> None:
    made = {key: value() if isinstance(value, type) else value for key, value in options.items()}
    assert torch.equal(model.generate(prompt, **made, **GREEDY), expected)


def test_user_static_cache(model: PreTrainedModel, prompt: torch.Tensor, expected: torch.Tensor) -> None:
    cache = StaticCache(model.config, max_cache_len=128)
    assert torch.equal(model.generate(prompt, past_key_values=cache, **GREEDY), expected)


@pytest.mark.parametrize("implementation", [None, slow("static")])
def test_beam_search(model: PreTrainedModel, prompt: torch.Tensor, implementation: str | None) -> None:
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    expected = model.generate(prompt, use_cache=False, **beams)
    assert torch.equal(model.generate(prompt, cache_implementation=implementation, **beams), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        slow({"use_cache": False}),
        slow({"cache_implementation": "static"}),
        {"prefill_chunk_size": 9},
        slow({"num_beams": 3}),
    ],
    ids=["dynamic", "uncached", "static", "chunked", "beam"],
)
def test_left_padded_batch(model: PreTrainedModel, padded: tuple, alone: list, options: dict) -> None:
    ids, mask, prompts = padded
    out = model.generate(ids, attention_mask=mask, **options, **GREEDY)[:, 53:]
    if "num_beams" in options:
        alone = [model.generate(p, use_cache=False, **options, **GREEDY)[0, p.shape[1] :] for p in prompts]
    for row, expected in zip(out, alone, strict=True):
        assert torch.equal(row, expected)


def test_assisted_decoding(model: PreTrainedModel, prompt: torch.Tensor, expected: torch.Tensor) -> None:
    assistant = dense_model("llama", seed=3, num_hidden_layers=1)
    assert torch.equal(model.generate(prompt, assistant_model=assistant, **GREEDY), expected)
    assert torch.equal(model.generate(prompt, assistant_model=model, **GREEDY), expected)


def test_prompt_lookup(model: PreTrainedModel, prompt: torch.Tensor) -> None:
    repeated = torch.cat([prompt[:, :20]] * 3, 1)
    expected = model.generate(repeated, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(repeated, prompt_lookup_num_tokens=5, **GREEDY), expected)


def test_second_turn_on_a_kept_cache(model: PreTrainedModel, prompt: torch.Tensor) -> None:
    cache = DynamicCache(config=model.config)
    first = model.generate(prompt, past_key_values=cache, **GREEDY)
    longer = torch.cat([first, tokens(1, 11, seed=4)], 1)
    expected = model.generate(longer, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(longer, past_key_values=cache, **GREEDY), expected)


class TestModesOfGenerate:
    """What transformers checks of every model that generates; those tests are in no source distribution."""

    @pytest.mark.parametrize("options", [{}, slow({"num_beams": 2})], ids=["one", "beams"])
    def test_sampling(self, model: PreTrainedModel, prompt: torch.Tensor, options: dict) -> None:
        outs = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            drawn = {"do_sample": True, "top_k": 10, "top_p": 0.9, "repetition_penalty": 1.2}
            outs.append(model.generate(prompt, max_new_tokens=9, use_cache=use_cache, **drawn, **options))
        assert torch.equal(*outs)

    @pytest.mark.parametrize("implementation", [None, slow("static")])
    def test_a_prompt_of_embeddings(
        self, model: PreTrainedModel, prompt: torch.Tensor, expected: torch.Tensor, implementation: str | None
    ) -> None:
        embeddings = model.get_input_embeddings()(prompt)
        out = model.generate(inputs_embeds=embeddings, cache_implementation=implementation, **GREEDY)
        assert torch.equal(out, expected[:, 53:])

    def test_outputs_of_every_step(self, model: PreTrainedModel, prompt: torch.Tensor) -> None:
        asked = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
        dense = dense_model(model.config.model_type.removeprefix("nsa_"))
        outs = [m.generate(prompt, return_dict_in_generate=True, **asked, **GREEDY) for m in (model, dense)]
        ours, stock = (
            {name: [x.shape for x in getattr(out, name)] for name in ("sequences", "scores", "logits")}
            | {"hidden": [[x.shape for x in step] for step in out.hidden_states]}
            for out in outs
        )
        assert ours == stock
        whole = model(outs[0].sequences[:, :-1], use_cache=False).logits[:, 52:]
        # generate() keeps logits in float32.
        assert torch.allclose(torch.stack(outs[0].logits, 1), whole.float(), rtol=1e-6, atol=1e-6)

    def test_the_last_logits_alone(self, model: PreTrainedModel, prompt: torch.Tensor) -> None:
        with torch.no_grad():
            few, whole = (model(prompt, logits_to_keep=n).logits for n in (3, 0))
        assert (few - whole[:, -3:]).abs().max() < 1e-12


class TestCells:
    """The cache holds the compressed cells and compresses each of them once."""

    def test_each_cell_is_compressed_once(
        self, monkeypatch: pytest.MonkeyPatch, prompt: torch.Tensor
    ) -> None:
        model = trained_model("llama", VARIANTS["nsa"])
        method = model.model.layers[0].self_attn.sparse
        counts = []
        compress = method.compress

        def counting(name: str, windows: torch.Tensor) -> torch.Tensor:
            counts.append(windows.shape[1])
            return compress(name, windows)

        monkeypatch.setattr(method, "compress", counting)
        cache = DynamicCache()
        model.generate(prompt, past_key_values=cache, **GREEDY)
        length = cache.get_seq_length()
        cells = (length - 8) // 4 + 1
        assert sum(counts) == 2 * cells
        assert cache.layers[0].cells["key"].shape[2] >= cells

    def test_wrong_cells_would_be_noticed(
        self, monkeypatch: pytest.MonkeyPatch, prompt: torch.Tensor
    ) -> None:
        model = trained_model("llama", VARIANTS["nsa"])
        expected = model.generate(prompt, use_cache=False, **GREEDY)
        cache = DynamicCache()
        with torch.no_grad():
            model(prompt[:, :-1], past_key_values=cache)
        for layer in cache.layers:
            layer.cells = {name: torch.zeros_like(x) for name, x in layer.cells.items()}
        assert not torch.equal(model.generate(prompt, past_key_values=cache, **GREEDY), expected)

    def test_cropped_cache_continues_exactly(self, prompt: torch.Tensor) -> None:
        model = trained_model("llama", VARIANTS["nsa"])
        cache = DynamicCache()
        with torch.no_grad():
            model(torch.cat([prompt, tokens(1, 30, seed=8)], 1), past_key_values=cache)
            cache.crop(-30)
            out = model(tokens(1, 20, seed=6), past_key_values=cache).logits
            expected = model(torch.cat([prompt, tokens(1, 20, seed=6)], 1), use_cache=False).logits[:, 53:]
        assert (out - expected).abs().max() < 1e-10

    def test_deep_copied_caches_do_not_share_memory(self, prompt: torch.Tensor) -> None:
        import copy

        model = trained_model("llama", VARIANTS["ssa"])
        cache = DynamicCache()
        with torch.no_grad():
            model(prompt, past_key_values=cache)
            model(tokens(1, 1), past_key_values=cache)  # from now on in place, in a buffer with room
            other = copy.deepcopy(cache)
            expected = model(tokens(1, 9, seed=5), past_key_values=copy.deepcopy(cache)).logits
            model(tokens(1, 9, seed=2), past_key_values=other)
            out = model(tokens(1, 9, seed=5), past_key_values=cache).logits
        assert torch.equal(out, expected)
