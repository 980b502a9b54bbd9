import collections
import json
import re

import pytest

from nsa_convert.errors import ConfigError
from nsa_convert.evaluation.tasks.cases import contained, fit_needle, hash_of
from nsa_convert.evaluation.tasks.fitting import encode_answer, largest_fit
from nsa_convert.evaluation.tasks.qa import build_qa, read_questions
from nsa_convert.evaluation.tasks.recall import QUERIES, build_recall
from nsa_convert.evaluation.tasks.ruler import RULER_TASKS, build_ruler
from tests.evaluation.tiny import byte_tokenizer

LENGTH = 4096


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def prompt_of(case, tokenizer):
    return tokenizer.decode(case.prompt_ids)


@pytest.mark.parametrize("task", RULER_TASKS)
def test_a_prompt_fills_its_length_and_holds_its_answer(tokenizer, task):
    case = build_ruler(tokenizer, task, LENGTH, 0)
    size = len(case.prompt_ids) + max(len(case.answer_ids), case.max_new)
    assert 0.9 * LENGTH < size <= LENGTH
    text = prompt_of(case, tokenizer)
    assert all(part in text for part in case.gold)
    answer = tokenizer.decode(case.answer_ids)
    assert contained(case.gold, answer) == 1
    assert case.spans == ((0, len(case.answer_ids)),)


@pytest.mark.parametrize("task", RULER_TASKS)
def test_samples_differ_and_depend_on_nothing_else(tokenizer, task):
    first, again, other = (build_ruler(tokenizer, task, 2048, i) for i in (0, 0, 1))
    assert first == again
    assert first.prompt_ids != other.prompt_ids
    assert build_ruler(tokenizer, task, 2048, 0, seed=1).prompt_ids != first.prompt_ids


def test_ev08_golden_prompts(tokenizer):
    """The tasks whose text does not come from Python; a change here makes old scores incomparable."""
    tasks = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "fwe")
    cases = [build_ruler(tokenizer, task, 2048, 0) for task in tasks]
    cases += [build_recall(tokenizer, 2048, 0), fit_needle(tokenizer, 1024, 0.5, haystack=None, seed=0)]
    assert hash_of(cases) == "09170fce2fbd9f027211154371abeca4eff1485a71ac45144ca95f9c036699d9"


def test_definitions(tokenizer):
    text = {task: prompt_of(build_ruler(tokenizer, task, 8192, 0), tokenizer) for task in RULER_TASKS}
    gold = {task: build_ruler(tokenizer, task, 8192, 0).gold for task in RULER_TASKS}
    needles = {task: len(re.findall(r"One of the special magic", text[task])) for task in text}
    assert [needles[f"niah_single_{i}"] for i in (1, 2, 3)] == [1, 1, 1]
    assert [needles[f"niah_{name}"] for name in ("multikey_1", "multivalue", "multiquery")] == [4, 4, 4]
    assert needles["niah_multikey_2"] > 50
    assert [len(gold[f"niah_{name}"]) for name in ("multikey_1", "multivalue", "multiquery")] == [1, 4, 4]
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", gold["niah_multikey_3"][0])
    keys = re.findall(r"magic numbers for (\S+) is", text["niah_multikey_2"])
    assert len(set(keys)) == len(keys)


def test_variables_form_one_chain_in_order(tokenizer):
    case = build_ruler(tokenizer, "vt", LENGTH, 3)
    lines = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", prompt_of(case, tokenizer))
    assert [name for name, _ in lines] == list(case.gold)
    assert [source for _, source in lines[1:]] == list(case.gold[:-1])
    assert lines[0][1].isdigit()


@pytest.mark.parametrize(("task", "count"), [("cwe", 10), ("fwe", 3)])
def test_the_answer_is_what_stands_most_often(tokenizer, task, count):
    case = build_ruler(tokenizer, task, LENGTH, 0)
    body = prompt_of(case, tokenizer).split("\n")[1]
    words = collections.Counter(re.findall(r"[a-z]+", body))
    top = [word for word, _ in words.most_common(count)]
    assert set(top) == set(case.gold)
    times = [words[word] for word in case.gold]
    rest = max(number for word, number in words.items() if word not in case.gold)
    assert min(times) > rest
    if task == "fwe":
        assert case.gold == tuple(top)


@pytest.mark.parametrize("task", [*RULER_TASKS, "recall"])
def test_ev02_a_prompt_that_cannot_fit_is_refused(tokenizer, task):
    build = build_recall if task == "recall" else lambda *words: build_ruler(words[0], task, *words[1:])
    with pytest.raises(ConfigError, match="tokens at least") as caught:
        build(tokenizer, 100, 0)
    assert caught.value.code == "EV02"


def test_recall_asks_for_pairs_from_all_over_the_list(tokenizer):
    case = build_recall(tokenizer, LENGTH, 0)
    assert 0.9 * LENGTH < len(case.prompt_ids) + len(case.answer_ids) <= LENGTH
    pairs = dict(re.findall(r"(\w+-\w+): (\d+)", prompt_of(case, tokenizer)))
    answer = tokenizer.decode(case.answer_ids)
    asked = re.findall(r"\n(\w+-\w+): (\d+)", answer)
    assert len(asked) == len(case.spans) == QUERIES
    assert all(pairs[name] == number for name, number in asked)
    values = [tokenizer.decode(case.answer_ids[a:b]).strip() for a, b in case.spans]
    assert values == [number for _, number in asked]
    places = sorted(list(pairs).index(name) / len(pairs) for name, _ in asked)
    assert places[0] < 0.1
    assert places[-1] > 0.9


def test_a_list_longer_than_there_are_names_ends(tokenizer):
    assert len(build_recall(tokenizer, 200_000, 0).prompt_ids) < 200_000


def test_the_answer_begins_at_its_first_own_token(tokenizer):
    prompt, answer = encode_answer(tokenizer, "the number is", "42")
    assert (tokenizer.decode(prompt), tokenizer.decode(answer)) == ("the number is ", "42")


def test_largest_fit():
    assert largest_fit(lambda n: 10 + 3 * n, 100) == 30
    assert largest_fit(lambda n: 10 + 3 * n, 100, least=7) == 30
    assert largest_fit(lambda n: 10 + 3 * n, 31, least=7) == 7
    with pytest.raises(ConfigError):
        largest_fit(lambda n: 10 + 3 * n, 30, least=7)


@pytest.mark.parametrize(("text", "share"), [("a 12 and B", 1.0), ("b", 0.5), ("", 0.0), ("12", 0.5)])
def test_the_share_of_gold_strings(text, share):
    assert contained(("12", "b"), text) == share


def questions_file(folder, count=5):
    rows = [
        {"question": f"What is the colour of stone {i}?", "answers": [f"shade-{i}", f"hue-{i}"],
         "context": f"Stone {i} is of colour shade-{i}. " * 3}
        for i in range(count)
    ]  # fmt: skip
    path = folder / "qa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_qa_hides_the_paragraph_among_others(tokenizer, tmp_path):
    rows = read_questions(questions_file(tmp_path))
    case = build_qa(tokenizer, rows, 2048, 0)
    text = prompt_of(case, tokenizer)
    assert 0.85 * 2048 < len(case.prompt_ids) + case.max_new <= 2048
    asked = re.search(r"colour of stone (\d)", text)[1]
    assert text.count(f"shade-{asked}") == 3
    assert text.count("Document ") > 5
    assert case.score(f"it is hue-{asked}") == case.score(f"SHADE-{asked}") == 1
    assert case.score("another") == 0
    assert {build_qa(tokenizer, rows, 2048, i).gold for i in range(5)} == {tuple(r["answers"]) for r in rows}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no questions"),
        ('{"question": "q", "context": "c", "answers": ["a"]}\n{"question": "q"}\n', "line 2"),
        ("nonsense\n", "line 1"),
        ('{"question": "q", "context": "c", "answers": []}\n', "line 1"),
    ],
)
def test_da01_bad_questions(tmp_path, text, message):
    path = tmp_path / "qa.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_questions(path)
    assert caught.value.code == "DA01"
