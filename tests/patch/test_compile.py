"""torch.compile of decoding with a static cache, one graph and no break."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from transformers import CompileConfig
from transformers.cache_utils import StaticLayer

from nsa_convert.patch.cache import write_cells
from tests.models import VARIANTS, tokens, trained_model

GREEDY = {"max_new_tokens": 14, "do_sample": False}


NSA_AND_SSA = ["nsa-learned-before-rope", "nsa-independent", "ssa-gated"]
OTHERS = ["moba", "moba-conv", "infllm_v2-coarse", "dsa-shared", "msa", "hybrid"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", NSA_AND_SSA + OTHERS)
def test_compiled_static_decode(variant: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    model, prompt = trained_model("qwen3", VARIANTS[variant]), tokens(1, 53)
    compiled = CompileConfig(fullgraph=True, dynamic=False, backend="inductor", mode=None)
    compiled._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compiled, **GREEDY}
    assert torch.equal(model.generate(prompt, **options), model.generate(prompt, use_cache=False, **GREEDY))
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] >= 1

    mask = torch.ones(2, 53, dtype=torch.long)
    mask[0, :33] = 0
    out = model.generate(torch.cat([prompt, prompt]), attention_mask=mask, **options)[:, 53:]
    alone = model.generate(prompt[:, 33:], use_cache=False, **GREEDY)[0, 20:]
    assert torch.equal(out[0], alone)


@pytest.mark.slow
def test_a_compiled_step_writes_its_cell_and_copies_no_buffer() -> None:
    layer = StaticLayer(max_cache_len=4096)
    layer.cells = {"cells": torch.randn(2, 2, 1024, 8)}
    before, cell, first = layer.cells["cells"].clone(), torch.randn(2, 1, 2, 8), torch.tensor([3, 700])

    def step(first: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
        return write_cells(layer, "cells", first, cell, 1024).sum()

    with torch.inference_mode():
        _, code = run_and_get_code(torch.compile(step), first, cell)
    assert "empty_strided_cpu((2, 2, 1024, 8)" not in "".join(code)
    before[0, :, 3], before[1, :, 700] = cell[0, 0], cell[1, 0]
    assert torch.equal(layer.cells["cells"], before)
