"""Caches of every kind: static, quantised, offloaded, of third parties, in other dtypes and processes."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    QuantizedLayer,
)

from nsa_convert.errors import CacheError
from nsa_convert.patch.cache import SparseDynamicLayer, SparseStaticLayer
from tests.marks import first_quick, slow
from tests.models import SSA, VARIANTS, dense_model, tokens, trained_model
from tests.patch.test_cache import ALL, MORE, PROMPT, forgets, needs_its_own, pairs_of, proceed, read, streams

CELLS = {"nsa-learned-before-rope": VARIANTS["nsa-learned-before-rope"], "ssa-gated": VARIANTS["ssa-gated"]}
STREAMS = {"dsa-shared": VARIANTS["dsa-shared"], "moba-conv": VARIANTS["moba-conv"]}

STEADY = ["nsa", "ssa-gated", "dsa-shared", "moba-conv"]
"""Of these the rounding of float32 changes no choice in this text."""


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return tokens(2, PROMPT + MORE)


@pytest.fixture
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def keeps_more(model: PreTrainedModel) -> bool:
    """Return whether a layer keeps more than keys and values."""
    return streams(model) or any(layer.self_attn.sparse.cache_needs().pools for layer in model.model.layers)


class Lossless(QuantizedLayer):
    """A quantised layer without quanto or hqq."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor

    def _dequantize(self, tensor: Tensor) -> Tensor:
        return tensor


class OwnLayer(DynamicLayer):
    """A layer of a third party, which transformers' table knows by a name."""

    _layer_type = "own_attention"


class Stream(contextlib.nullcontext):
    """Stands for a CUDA stream."""

    def wait_stream(self, _: object) -> None:
        """Wait for nothing."""


class TestKinds:
    @pytest.mark.parametrize(
        "name", ["dsa", "msa", "streaming", "tri_shape", "nsa", "dsa-shared", "moba-conv"]
    )
    def test_quantised(self, name, ids) -> None:
        model = trained_model("qwen3", ALL[name])
        cache = Cache(layers=[Lossless(residual_length=7) for _ in range(3)])
        if keeps_more(model):
            with pytest.raises(CacheError, match=r"quantised cache \(Lossless\)") as caught:
                model(ids, past_key_values=cache)
            assert caught.value.code == "CA02"
            return
        model(ids[:, :PROMPT], past_key_values=cache)
        expected = proceed(model, read(model, ids[:, :PROMPT]), ids)
        assert (proceed(model, cache, ids) - expected).abs().max() < 1e-9

    def test_a_quantised_cache_cannot_forget(self, ids) -> None:
        model, cache = trained_model("qwen3", ALL["h2o"]), Cache(layers=[Lossless() for _ in range(3)])
        with pytest.raises(CacheError, match="default dynamic cache"):
            model(ids, past_key_values=cache)

    @pytest.mark.parametrize("name", ["nsa", "dsa-shared", "moba-conv", "hybrid"])
    def test_offloaded(self, name, ids, monkeypatch) -> None:
        """Between its calls a layer's keys and values are elsewhere; the streams here wait for nothing."""
        model, moved = trained_model("qwen3", ALL[name]), []

        def move(layer: CacheLayerMixin) -> None:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
                moved.append(layer)

        for way in ("offload", "prefetch"):
            monkeypatch.setattr(CacheLayerMixin, way, move)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda _: Stream())
        cache = DynamicCache(config=model.config)
        cache.offloading, cache.only_non_sliding, cache.prefetch_stream = True, False, Stream()
        model(ids[:, :PROMPT], past_key_values=cache)
        out = proceed(model, cache, ids)
        assert len(moved) > 2 * 3 * 4
        assert (out - model(ids, use_cache=False).logits[:, PROMPT:]).abs().max() < 1e-9

    @pytest.mark.gpu
    @pytest.mark.parametrize("name", ["nsa", "dsa-shared", "moba-conv", "hybrid"])
    def test_offloaded_from_a_gpu(self, name, ids) -> None:
        model, ids = trained_model("qwen3", ALL[name]).cuda(), ids.cuda()
        cache = DynamicCache(config=model.config, offloading=True)
        model(ids[:, :PROMPT], past_key_values=cache)
        out = proceed(model, cache, ids)
        assert (out - model(ids, use_cache=False).logits[:, PROMPT:]).abs().max() < 1e-9

    @pytest.mark.parametrize("name", [*CELLS, *STREAMS])
    def test_of_a_third_party(self, name, ids) -> None:
        model, cache = trained_model("qwen3", ALL[name]), Cache(layers=[OwnLayer() for _ in range(3)])
        model(ids[:, :PROMPT], past_key_values=cache)
        again = pickle.loads(pickle.dumps(cache))
        assert DYNAMIC_LAYER_TYPE_MAPPING["own_attention"] is OwnLayer
        assert all(isinstance(layer, OwnLayer) and layer.is_sparse for layer in again.layers)
        expected = model(ids, use_cache=False).logits[:, PROMPT:]
        assert (proceed(model, cache, ids) - expected).abs().max() < 1e-9
        assert (proceed(model, again, ids) - expected).abs().max() < 1e-9

    def test_a_sliding_window(self, ids) -> None:
        model = trained_model("qwen3", SSA)
        cache = Cache(layers=[DynamicSlidingWindowLayer(sliding_window=16) for _ in range(3)])
        with pytest.raises(CacheError, match="keeps the last tokens only"):
            model(ids, past_key_values=cache)

    def test_layers_of_different_lengths(self, ids) -> None:
        model = trained_model("qwen3", SSA)
        cache = read(model, ids)
        cache.layers[1].keys, cache.layers[1].values = (
            x[:, :, 9:] for x in (cache.layers[1].keys, cache.layers[1].values)
        )
        with pytest.raises(CacheError, match="62 tokens where 71 are expected"):
            model(ids[:, :1], past_key_values=cache)

    def test_other_rows(self, ids) -> None:
        model = trained_model("qwen3", SSA)
        cache = read(model, ids)
        model(ids[:, :1], past_key_values=cache)
        with pytest.raises(CacheError, match="2 rows of 2 key/value heads, the new tokens have 1 rows of 2"):
            model(ids[:1, :1], past_key_values=cache)

    @pytest.mark.parametrize("name", [*CELLS, "streaming-absolute", "razor"])
    def test_padding_that_changes(self, name, ids) -> None:
        """A mask that is left out later makes the padding real, as for the dense model."""
        model, mask = trained_model("qwen3", ALL[name]), torch.ones_like(ids)
        mask[0, :23] = 0
        cache = read(model, ids[:, :PROMPT], attention_mask=mask[:, :PROMPT])
        if forgets(model):
            with pytest.raises(CacheError, match="padding of the rows"):
                proceed(model, cache, ids)
            return
        rebuilt = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])
        assert (proceed(model, cache, ids) - proceed(model, rebuilt, ids)).abs().max() < 1e-9

    @pytest.mark.parametrize("name", [*CELLS, *STREAMS, "streaming-beside-cells"])
    def test_padded_rows_rebuilt(self, name, ids) -> None:
        model, mask = trained_model("qwen3", ALL[name]), torch.ones_like(ids)
        mask[0, :23] = 0
        whole = model(ids, attention_mask=mask, use_cache=False).logits[:, PROMPT:]
        cache = read(model, ids[:, :PROMPT], attention_mask=mask[:, :PROMPT])
        assert (proceed(model, copy.deepcopy(cache), ids, attention_mask=mask) - whole).abs().max() < 1e-9
        if streams(model) or forgets(model):
            return
        rebuilt = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
        assert (proceed(model, rebuilt, ids, attention_mask=mask) - whole).abs().max() < 1e-9


class TestStatic:
    @pytest.mark.parametrize("name", [*CELLS, *STREAMS, "nsa-independent"])
    def test_filled_by_the_dense_model(self, name, ids) -> None:
        model, dense = trained_model("qwen3", ALL[name]), dense_model("qwen3")
        cache = StaticCache(model.config, max_cache_len=96)
        dense(ids[:, :PROMPT], past_key_values=cache)
        if needs_its_own(model):
            with pytest.raises(CacheError, match="read the prompt again"):
                proceed(model, cache, ids)
            return
        pairs = DynamicCache(pairs_of(dense, ids[:, :PROMPT]))
        assert (proceed(model, cache, ids) - proceed(model, pairs, ids)).abs().max() < 1e-9

    @pytest.mark.parametrize("name", [*CELLS, *STREAMS])
    def test_continued_by_the_dense_model_between(self, name, ids) -> None:
        model, dense = trained_model("qwen3", ALL[name]), dense_model("qwen3")
        cache = StaticCache(model.config, max_cache_len=96)
        model(ids[:, : PROMPT - 9], past_key_values=cache)
        dense(ids[:, PROMPT - 9 : PROMPT], past_key_values=cache)
        if streams(model):
            with pytest.raises(CacheError, match="read the prompt again"):
                proceed(model, cache, ids)
            return
        held = [(layer.keys[:, :, :PROMPT], layer.values[:, :, :PROMPT]) for layer in cache.layers]
        pairs = DynamicCache([(k.clone(), v.clone()) for k, v in held])
        assert (proceed(model, cache, ids) - proceed(model, pairs, ids)).abs().max() < 1e-9

    @pytest.mark.parametrize("name", [*CELLS, *STREAMS])
    def test_read_in_inference_mode(self, name, ids) -> None:
        model = trained_model("qwen3", ALL[name])
        with torch.inference_mode():
            cache = StaticCache(model.config, max_cache_len=96)
            model(ids[:, :PROMPT], past_key_values=cache)
        out = proceed(model, cache, ids)
        assert (out - model(ids, use_cache=False).logits[:, PROMPT:]).abs().max() < 1e-9

    @pytest.mark.parametrize("name", [*CELLS, *STREAMS])
    def test_copies(self, name, ids) -> None:
        model = trained_model("qwen3", ALL[name])
        cache = StaticCache(model.config, max_cache_len=96)
        model(ids[:, :PROMPT], past_key_values=cache)
        expected = model(ids, use_cache=False).logits[:, PROMPT:]
        for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache):
            assert (proceed(model, other, ids) - expected).abs().max() < 1e-9

    @pytest.mark.parametrize("name", first_quick([*CELLS, *STREAMS]))
    def test_compiled_steps_need_one_graph(self, name, ids, fresh) -> None:
        model = trained_model("qwen3", ALL[name])
        cache = StaticCache(model.config, max_cache_len=96)
        model(ids[:, :PROMPT], past_key_values=cache)
        step = torch.compile(model.forward, fullgraph=True, backend="eager", dynamic=False)
        steps = [step(ids[:, i : i + 1], past_key_values=cache).logits for i in range(PROMPT, PROMPT + MORE)]
        expected = model(ids, use_cache=False).logits[:, PROMPT:]
        assert (torch.cat(steps, 1) - expected).abs().max() < 1e-9
        assert counters["stats"]["unique_graphs"] == 1
        longer = torch.cat([ids, ids[:, :11]], 1)  # a second turn, eager again
        out = model(longer[:, PROMPT + MORE :], past_key_values=cache).logits
        expected = model(longer, use_cache=False).logits[:, PROMPT + MORE :]
        assert (out - expected).abs().max() < 1e-9

    @pytest.mark.slow
    @pytest.mark.parametrize("name", [*CELLS, "dsa-shared"])
    def test_a_compiled_step_after_the_dense_model(self, name, ids, fresh) -> None:
        """No value can be looked at in a graph: all cells are pooled in it, or it asserts an empty cache."""
        model, dense = trained_model("qwen3", ALL[name]), dense_model("qwen3")
        cache = StaticCache(model.config, max_cache_len=96)
        model(ids[:, :5], past_key_values=cache)
        cache.reset()
        dense(ids[:, :PROMPT], past_key_values=cache)
        step = torch.compile(model.forward, fullgraph=True, backend="eager", dynamic=False)
        if streams(model):
            with pytest.raises(RuntimeError, match="read the prompt again"):
                step(ids[:, PROMPT : PROMPT + 1], past_key_values=cache)
            return
        pairs = DynamicCache(pairs_of(dense, ids[:, :PROMPT]))
        for i in range(PROMPT, PROMPT + 3):
            out = step(ids[:, i : i + 1], past_key_values=cache).logits
            assert (out - model(ids[:, i : i + 1], past_key_values=pairs).logits).abs().max() < 1e-9


class TestPrecision:
    @pytest.mark.parametrize("name", [*STEADY, "dsa", "nsa-second-order", "streaming-beside-cells", "infllm"])
    @pytest.mark.parametrize(("made", "used"), [("float32", "float64"), ("float64", "float32")])
    def test_a_cache_keeps_its_dtype(self, name, ids, made, used) -> None:
        made, used = getattr(torch, made), getattr(torch, used)
        model = trained_model("qwen3", ALL[name])
        expected = proceed(model, read(model, ids[:, :PROMPT]), ids)
        cache = read(model.to(made), ids[:, :PROMPT])
        out = proceed(model.to(used), cache, ids)
        assert out.dtype == used
        assert (out.double() - expected).abs().max() < 2e-3
        for layer in cache.layers:
            held = [part.keys for part in (getattr(layer, "held", None) or {}).values()]
            beside = [layer.keys, layer.values, *(layer.cells or {}).values(), *held]
            assert {x.dtype for x in beside} == {made}

    @pytest.mark.parametrize("name", [*STEADY, "nsa-independent"])
    def test_a_static_cache_made_ahead_of_time(self, name, ids) -> None:
        model = trained_model("qwen3", ALL[name])
        cache = StaticCache(model.config, max_cache_len=96)
        cache.early_initialization(2, 2, model.config.head_dim, torch.float32, torch.device("cpu"))
        model(ids[:, :PROMPT], past_key_values=cache)
        out = proceed(model, cache, ids)
        assert out.dtype == torch.float64
        assert (out - model(ids, use_cache=False).logits[:, PROMPT:]).abs().max() < 2e-3
        assert {layer.keys.dtype for layer in cache.layers} == {torch.float32}


class TestProcesses:
    def test_classes_are_attributes_of_their_module(self) -> None:
        for cls in (SparseDynamicLayer, SparseStaticLayer):
            assert pickle.loads(pickle.dumps(cls)) is cls

    @pytest.mark.parametrize("name", ["nsa", slow("dsa-shared")])
    def test_in_a_spawned_process(self, name, ids, tmp_path) -> None:
        """The process loads the model from its folder: another object with the same weights."""
        model = trained_model("qwen3", ALL[name])
        model.save_pretrained(tmp_path)
        cache = read(model, ids[:, :PROMPT])
        expected = proceed(model, copy.deepcopy(cache), ids)
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=_continue, args=(cache, str(tmp_path), ids, expected))
        process.start()
        process.join(120)
        assert process.exitcode == 0

    def test_other_weights_are_not_the_same_model(self, ids) -> None:
        model, other = (
            trained_model("qwen3", ALL["dsa-shared"]),
            trained_model("qwen3", ALL["dsa-shared"], seed=5),
        )
        cache = pickle.loads(pickle.dumps(read(model, ids[:, :PROMPT])))
        with pytest.raises(CacheError, match="another model"):
            proceed(other, cache, ids)

    @pytest.mark.slow
    def test_without_the_package(self, ids, tmp_path) -> None:
        """The copy of the code that travels with a checkpoint has the same classes in other modules."""
        model = trained_model("qwen3", ALL["dsa-shared"])
        model.save_pretrained(tmp_path / "model")
        expected = model(ids, use_cache=False).logits[:, PROMPT:]
        torch.save({"ids": ids, "expected": expected}, tmp_path / "expected.pt")
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
        done = subprocess.run(
            [sys.executable, "-c", BARE, str(tmp_path)], capture_output=True, text=True, env=env, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr[-3000:]


BARE = f"""
import pickle, sys, torch
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nsa_convert":
            raise ImportError("nsa_convert is not installed here")
sys.meta_path.insert(0, Block())
from transformers import AutoModelForCausalLM, DynamicCache
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder + "/model", trust_remote_code=True, dtype=torch.float64)
saved, cache = torch.load(folder + "/expected.pt"), DynamicCache()
with torch.no_grad():
    model(saved["ids"][:, :{PROMPT}], past_key_values=cache)
    for other in (cache, pickle.loads(pickle.dumps(cache))):
        out = model(saved["ids"][:, {PROMPT}:], past_key_values=other).logits
        assert (out - saved["expected"]).abs().max() < 1e-9
"""


def _continue(cache: DynamicCache, folder: str, ids: Tensor, expected: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        assert (proceed(model, cache, ids) - expected).abs().max() < 1e-9
