"""Two processes on gloo compute what one process does: FSDP2, tensor parallel, context parallel."""

from __future__ import annotations

import json

import pytest

from nsa_convert.methods.parts.registry import METHODS as REGISTRY
from nsa_convert.training.run.parallel import can_shard
from tests.models import NSA, SSA, VARIANTS, trained_model
from tests.training.processes import PLAIN, launch

METHODS = {
    "nsa": {**NSA, "key_compressor": "linear", "value_compressor": "weighted"},
    "ssa": {**SSA, "gate": "signed"},
}
CONTEXT = ("hybrid", "moba", "infllm_v2-coarse", "dsa-shared", "msa-reuse", "nsa-learned-before-rope")
"""Further variants whose rows are shared."""
FURTHER = tuple(dict.fromkeys((*CONTEXT, *PLAIN, "phases")))
CHECKS = [
    *(f"{kind} {method}" for kind in ("fsdp", "tensor") for method in METHODS),
    *(f"tensor {method}" for method in PLAIN),
    *(f"fsdp {method}" for method in FURTHER),
    *(f"refused {method}" for method in ("dsa-shared", "hybrid")),
    *(f"fsdp {method}{how}" for method in METHODS for how in (" tied", ", aligned")),
    *(f"context {method}, one document" for method in METHODS),
    *(f"context {method}" for method in (*METHODS, *CONTEXT)),
]
LIMIT = 1e-5


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("models")
    further = {name: VARIANTS[name] for name in FURTHER}
    tied = {f"{name} tied": settings for name, settings in METHODS.items()}
    for name, settings in {**METHODS, **further, **tied}.items():
        model = trained_model(
            "qwen3", settings, initializer_range=0.1, tie_word_embeddings=name.endswith(" tied")
        )
        model.save_pretrained(folder / name)
    launch(["-m", "tests.training.worker", str(folder)], 2)
    return json.loads((folder / "result.json").read_text())


def test_two_processes_equal_one(result):
    """One test for all checks: they share one start of two processes, whichever test process runs it."""
    expected = [check for check in CHECKS if can_shard() or not check.startswith("fsdp")]
    assert expected == [check for check in CHECKS if check in result]
    wrong = {check: {k: v for k, v in result[check].items() if not v < LIMIT} for check in expected}
    assert {check: values for check, values in wrong.items() if values} == {}


def test_all_processes_draw_the_same_streams(result):
    assert result["streams"]["differs"] == 0


def test_fsdp_is_checked_for_every_trainable_method():
    checked = {check.removeprefix("fsdp ") for check in CHECKS if check.startswith("fsdp ")}
    settings = [VARIANTS[name] for name in checked if name in VARIANTS]
    rules = [rule for default in settings for rule in (default, *default.get("rules", ()))]
    trainable = {name for name, method in REGISTRY.items() if method.spec.trainable}
    assert trainable <= {rule["method"] for rule in rules}
