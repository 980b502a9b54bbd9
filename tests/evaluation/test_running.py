import json

import pytest
import torch
from transformers import DynamicCache

from nsa_convert.errors import CheckFailedError, MachineError
from nsa_convert.evaluation.models import dense_attention_in
from nsa_convert.evaluation.suites.finished_cells import CELLS, CellStore
from nsa_convert.evaluation.tasks.cases import Case
from nsa_convert.evaluation.tasks.scoring import cache_bytes, run_case
from nsa_convert.patch.patching import patch_model
from tests.evaluation.tiny import byte_tokenizer, random_ids, tiny_dense
from tests.models import NSA, SSA, plan

PROMPT = random_ids(120)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module", params=["nsa", "ssa", "dense"])
def model(request):
    dense = tiny_dense().float()
    return (
        dense
        if request.param == "dense"
        else patch_model(dense, plan({"nsa": NSA, "ssa": SSA}[request.param]))
    )


def case_of(answer, gold=(), max_new=0, spans=None):
    return Case(
        task="t",
        length=200,
        index=0,
        prompt_ids=tuple(PROMPT),
        answer_ids=tuple(answer),
        spans=spans or ((0, len(answer)),),
        gold=gold,
        max_new=max_new,
    )


def test_forced_scores_equal_one_plain_pass(model, tokenizer):
    answer = random_ids(9, seed=5)
    out = run_case(model, tokenizer, case_of(answer, spans=((1, 4), (6, 9))))
    with torch.no_grad():
        logits = (
            model(torch.tensor([PROMPT + answer]), use_cache=False).logits[0, len(PROMPT) - 1 : -1].float()
        )
    nll = -logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
    right = logits.argmax(-1) == torch.tensor(answer)
    scored = [1, 2, 3, 6, 7, 8]
    assert out.nll == pytest.approx(nll[scored].mean().item(), abs=1e-4)
    assert out.forced_tokens == pytest.approx(right[scored].float().mean().item())
    assert (out.tokens, out.spans, out.score, out.text) == (120, 2, None, None)


def test_generation_behind_the_forced_answer_is_what_generate_gives(model, tokenizer):
    with torch.no_grad():
        ids = torch.tensor([PROMPT])
        whole = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    greedy = whole[0, len(PROMPT) :].tolist()
    out = run_case(model, tokenizer, case_of(greedy, gold=("never said",), max_new=6))
    assert (out.forced, out.forced_tokens) == (1, 1)
    assert out.text == tokenizer.decode(greedy, skip_special_tokens=True)
    assert out.score == 0
    assert out.decode_ms > 0
    wrong = run_case(model, tokenizer, case_of([(greedy[0] + 1) % 256, *greedy[1:]]))
    assert wrong.forced == 0


def test_the_cache_is_measured_and_dense_attention_is_really_dense(tokenizer):
    sparse = patch_model(tiny_dense().float(), plan(NSA))
    case = case_of(random_ids(4))
    with dense_attention_in(sparse):
        dense = run_case(sparse, tokenizer, case)
    plain = run_case(tiny_dense().float(), tokenizer, case)
    assert dense.nll == pytest.approx(plain.nll, abs=1e-4)
    assert dense.nll != pytest.approx(run_case(sparse, tokenizer, case).nll, abs=1e-3)
    keys = 2 * 3 * 120 * 2 * 16 * 4  # K and V, layers, tokens, heads, head dim, bytes
    assert plain.cache_bytes == dense.cache_bytes == keys
    cache = DynamicCache(config=sparse.config)
    with torch.no_grad():
        sparse(torch.tensor([PROMPT]), past_key_values=cache, use_cache=True)
    assert cache_bytes(cache) > keys


def test_ev04_a_broken_model_is_no_bad_score(tokenizer):
    model = tiny_dense().float()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(CheckFailedError, match="not finite"):
        run_case(model, tokenizer, case_of([1]))


def test_cells_survive_a_cut_last_line(tmp_path):
    store = CellStore(tmp_path, {"a": 1})
    assert [store.get(name, lambda name=name: {"v": name}) for name in "abc"][0] == {"v": "a"}
    path = tmp_path / CELLS
    path.write_bytes(path.read_bytes()[:-4])
    again = CellStore(tmp_path, {"a": 1})
    done = []
    values = [again.get(name, lambda name=name: done.append(name) or {"v": name}) for name in "abc"]
    assert [value["v"] for value in values] == ["a", "b", "c"]
    assert (done, again.reused) == (["c"], 2)
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 3


def test_cells_of_another_run_are_not_used(tmp_path):
    CellStore(tmp_path, {"a": 1}).get("x", lambda: 1)
    with (tmp_path / CELLS).open("a") as file:
        file.write("not json\n[]\n")
    assert CellStore(tmp_path, {"a": 2}).get("x", lambda: 2) == 2
    assert CellStore(tmp_path, {"a": 1}).get("x", lambda: 3) == 1


def test_cells_that_cannot_be_written_are_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError) as caught:
        CellStore(tmp_path / "file" / "x", {}).get("x", lambda: 1)
    assert caught.value.code == "SV03"
