"""torch.compile of whole forwards: as many graphs as the dense model's, no break, the numbers of eager."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedModel, StaticCache

from nsa_convert.kernels import dense_attention
from nsa_convert.kernels.common import custom_ops
from nsa_convert.methods.parts.registry import METHODS
from nsa_convert.patch.remote_code import write_code_files
from nsa_convert.patterns import SequenceLayout
from tests.kernels.utils import make_qkv
from tests.models import VARIANTS, dense_model, tokens, trained_model

TRAINABLE = [name for name, method in METHODS.items() if method.spec.trainable]
KINDS = ("training", "scoring", "padded", "packed", "prefill-dynamic", "prefill-static")
IDS = tokens(2, 70)
# Every trainable method has a variant of its own name; other variants differ from it in an option.
ALL_METHODS = {"method": TRAINABLE[0], **VARIANTS[TRAINABLE[0]]}
ALL_METHODS["rules"] = [{**VARIANTS[name], "layers": [i]} for i, name in enumerate(TRAINABLE)]
PLANS = {"one layer of each trainable method": ALL_METHODS} | {
    name: settings for name, settings in VARIANTS.items() if settings["method"] in TRAINABLE
}
QUICK = ("training",)
CASES = [
    pytest.param(plan, kind, marks=() if PLANS[plan] is ALL_METHODS and kind in QUICK else pytest.mark.slow)
    for plan in PLANS
    for kind in KINDS
]


def call(model: PreTrainedModel, forward, kind: str) -> list[torch.Tensor]:
    """Return what one kind of call computes: logits, and gradients or what is cached."""
    if kind == "training":
        model.zero_grad()
        out = forward(input_ids=IDS, labels=IDS, use_cache=False)
        out.loss.backward()
        return [out.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    with torch.no_grad():
        if kind == "scoring":
            return [forward(input_ids=IDS, use_cache=False).logits]
        mask = torch.ones_like(IDS)
        mask[0, :30] = 0
        if kind == "packed":
            numbers = torch.tensor([[1] * 30 + [2] * 40, [0] * 8 + [1] * 50 + [0] * 12])
            positions = torch.tensor([[*range(30), *range(40)], [*range(8), *range(50), *range(12)]])
            out = forward(input_ids=IDS, attention_mask=numbers, position_ids=positions, use_cache=False)
            return [out.logits[numbers > 0]]
        if kind == "padded":
            return [forward(input_ids=IDS, attention_mask=mask, use_cache=False).logits]
        cache = DynamicCache() if kind == "prefill-dynamic" else StaticCache(model.config, max_cache_len=96)
        out = forward(input_ids=IDS, attention_mask=mask, past_key_values=cache)
        held = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        step = model(IDS[:, :1], attention_mask=_grown(mask), past_key_values=cache)  # the cache is of use
        return [out.logits, step.logits, *held]


def _grown(mask: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(mask, (0, 1), value=1)


def compiled(model: PreTrainedModel, kind: str) -> tuple[list[torch.Tensor], int, int]:
    """Return what a compiled call computes, its graphs and its breaks."""
    torch._dynamo.reset()
    counters.clear()
    counting = CompileCounterWithBackend("aot_eager")
    values = call(model, torch.compile(model.forward, backend=counting), kind)
    return values, counting.frame_count, sum(counters["graph_break"].values())


@functools.cache
def dense_graphs(kind: str) -> tuple[int, int]:
    """Return graphs and breaks of the dense model."""
    model = dense_model("llama", num_hidden_layers=1).train(kind == "training")
    return compiled(model, kind)[1:]


@pytest.mark.parametrize(("plan", "kind"), CASES)
def test_as_many_graphs_as_the_dense_model(plan: str, kind: str) -> None:
    layers = len(TRAINABLE) if PLANS[plan] is ALL_METHODS else 3
    model = trained_model("llama", PLANS[plan], num_hidden_layers=layers)
    model.train(kind == "training")
    expected = call(model, model.forward, kind)
    values, *graphs = compiled(model, kind)
    assert tuple(graphs) == dense_graphs(kind) == (1, 0)
    for value, right in zip(values, expected, strict=True):
        assert torch.allclose(value, right, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.tensor([[1] * 30 + [2] * 40] * 2)}, "numbers of packed documents"),
        ({"attention_mask": torch.tensor([[1] * 30 + [0] * 5 + [1] * 35] * 2)}, "has a hole"),
        ({"position_ids": torch.arange(70)[None] + 5}, "PoSE"),
        ({"position_ids": torch.arange(70)[None] % 40, "past_key_values": None}, "neither fill"),
        ({"cu_seq_lens_q": torch.tensor([0, 40, 100])}, "rise from 0 to the 140 tokens"),
    ],
)
def test_a_graph_refuses_what_eager_refuses(arguments: dict, message: str) -> None:
    torch._dynamo.reset()
    model = trained_model("llama", VARIANTS["moba"], num_hidden_layers=1)
    forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    runs = [(forward, RuntimeError)]
    if "numbers" not in message:  # outside of a graph they keep documents apart
        runs.append((model.forward, ValueError))
    for run, error in runs:
        cached = {"past_key_values": DynamicCache()} if "past_key_values" in arguments else {}
        with torch.no_grad(), pytest.raises(error, match=message):
            run(input_ids=IDS, **{"use_cache": False, **arguments, **cached})


def test_dense_below_a_length_that_a_graph_cannot_read() -> None:
    torch._dynamo.reset()
    settings = {**VARIANTS["infllm_v2"], "dense_len": 50}
    model, ids = trained_model("llama", settings, num_hidden_layers=1), tokens(1, 80)
    forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    for bounds in ([0, 45, 80], [0, 20, 80]):
        packed = {"input_ids": ids, "cu_seq_lens_q": torch.tensor(bounds), "use_cache": False}
        with torch.no_grad():
            assert (forward(**packed).logits - model(**packed).logits).abs().max() < 1e-12


def test_export_of_a_forward() -> None:
    model = trained_model("llama", VARIANTS["nsa"], num_hidden_layers=1)
    given = {"input_ids": IDS, "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(model, (), given, strict=False)
        assert torch.allclose(program.module()(**given).logits, model(**given).logits, atol=1e-12)
    assert {"compressed_tiles", "pattern_tiles"} <= {
        node.target._schema.name.partition("::")[2]
        for node in program.graph.nodes
        if hasattr(node.target, "_schema")
    }


def test_copies_that_travel_with_checkpoints_have_operators_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    q, k, v = make_qkv(2, 40, 40, (4, 2))
    layout = SequenceLayout(start=torch.tensor([0, 7]))
    expected, names = dense_attention(q, k, v, layout=layout), {custom_ops.NAMESPACE}
    for name in ("first_copy", "second_copy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        plan = {"default": {"method": "full"}}
        write_code_files(tmp_path / name, {"model_type": "nsa_llama", "sparse_attention": plan})
        copied = importlib.import_module(f"{name}.sparse_attention_nsa_llama")
        names.add(copied.NAMESPACE)
        own = copied.SequenceLayout(start=layout.start)
        run = torch.compile(copied.dense_attention, fullgraph=True, backend="eager")
        assert torch.equal(run(q, k, v, layout=own), expected)
    assert len(names) == 3


def test_a_package_executed_again_leaves_the_operators_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As notebooks do. Defined under the same names, the first operators would be freed in use."""

    def operators() -> set[str]:
        modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "nsa_convert"]
        found = [value for module in modules for value in vars(module).values()]
        return {value._qualname for value in found if isinstance(value, torch.library.CustomOpDef)}

    q, k, v = make_qkv(2, 40, 40, (4, 2))
    first = operators()
    layout = SequenceLayout(start=torch.tensor([0, 7]))
    expected = dense_attention(q, k, v, layout=layout)
    for name in [name for name in sys.modules if name.split(".")[0] == "nsa_convert"]:
        monkeypatch.delitem(sys.modules, name)
    again = importlib.import_module("nsa_convert.kernels.attention")
    own = importlib.import_module("nsa_convert.patterns").SequenceLayout(start=layout.start)
    assert len(operators()) >= 3
    assert not operators() & first  # torch frees an operator whose name is taken again
    for run, given in ((dense_attention, layout), (again.dense_attention, own)):
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, backend="eager")
        assert torch.equal(compiled(q, k, v, layout=given), expected)
