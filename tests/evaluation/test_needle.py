import hashlib

import pytest
import torch
from torch import nn

from nsa_convert.errors import CheckFailedError, ConfigError
from nsa_convert.evaluation.tasks.needle import NOISE, build_case, build_needles, hits_by_length, score_case
from tests.evaluation.tiny import byte_tokenizer, tiny_dense


class Oracle(nn.Module):
    """A model whose argmax is the true next token, except at chosen distances from the end."""

    def __init__(self, ids, wrong=(), fill=0.0):
        super().__init__()
        self.one = nn.Parameter(torch.zeros(1))
        self.ids, self.wrong, self.fill = ids, wrong, fill
        self.config, self.cache, self.seen = None, None, 0

    def forward(self, input_ids, past_key_values, use_cache, logits_to_keep=0):
        if past_key_values is not self.cache:
            self.cache, self.seen = past_key_values, 0
        begin, self.seen = self.seen, self.seen + input_ids.shape[1]
        assert tuple(self.ids[begin : self.seen]) == tuple(input_ids[0].tolist())
        logits = torch.full((1, len(self.ids), 256), self.fill)
        for position, token in enumerate(self.ids[1:]):
            miss = len(self.ids) - 1 - position in self.wrong
            logits[0, position, (token + 1) % 256 if miss else token] = 5.0
        logits = logits[:, begin : self.seen]
        return type("Output", (), {"logits": logits[:, -logits_to_keep:]})


@pytest.fixture
def case():
    return build_case(byte_tokenizer(), 800, 0.5)


def test_a_hit_needs_every_answer_token(case):
    ids = case.prompt_ids + case.answer_ids
    full = score_case(Oracle(ids), case)
    assert (full.hit, full.correct_tokens, full.answer_tokens, full.tokens) == (True, 7, 7, len(ids))
    missed = score_case(Oracle(ids, wrong=(3,)), case)
    assert (missed.hit, missed.correct_tokens) == (False, 6)
    assert score_case(Oracle(ids, wrong=(8,)), case).hit  # the last prompt token is not scored
    right = 255 * torch.exp(torch.tensor(-5.0))
    assert full.nll == pytest.approx(torch.log1p(right).item(), rel=1e-5)


def test_scores_equal_a_plain_forward_of_the_whole_sequence(case):
    model, ids = tiny_dense(), torch.tensor([case.prompt_ids + case.answer_ids])
    with torch.inference_mode():
        logp = model(ids).logits[0].double().log_softmax(-1)
    start = len(case.prompt_ids)
    expected = -sum(logp[start - 1 + i, token].item() for i, token in enumerate(case.answer_ids)) / 7
    hits = sum(int(logp[start - 1 + i].argmax()) == token for i, token in enumerate(case.answer_ids))
    score = score_case(model, case)
    assert score.nll == pytest.approx(expected, abs=1e-4)
    assert (score.correct_tokens, score.hit) == (hits, hits == 7)


def test_non_finite_logits_are_an_error_and_no_miss(case):
    with pytest.raises(CheckFailedError, match="not finite"):
        score_case(Oracle(case.prompt_ids + case.answer_ids, fill=float("nan")), case)


@pytest.mark.parametrize("length", [500, 801, 1500])
@pytest.mark.parametrize("depth", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("haystack", [None, "A sentence here. Another one\nthere. And a third one."])
def test_prompts_fill_the_length_and_hold_the_needle_at_its_depth(length, depth, haystack):
    tokenizer = byte_tokenizer()
    case = build_case(tokenizer, length, depth, haystack=haystack)
    used = len(case.prompt_ids) + len(case.answer_ids)
    assert length - len(NOISE) - 2 <= used <= length
    text = tokenizer.decode(case.prompt_ids)
    assert text.endswith(f"The special magic number for {case.key} mentioned in the provided text is ")
    assert tokenizer.decode(case.answer_ids) == case.value
    needle = f"One of the special magic numbers for {case.key} is: {case.value}."
    context = text.split("afterwards.\n")[1].split("\nWhat is the special")[0]
    assert context.count(needle) == 1
    place = context.index(needle) / max(1, len(context) - len(needle))
    assert place == pytest.approx(depth, abs=len(NOISE) / (len(context) - len(needle)))


def test_prompts_are_the_same_everywhere_and_do_not_depend_on_the_grid():
    tokenizer = byte_tokenizer()
    cases = build_needles(tokenizer, [500, 700], [0.0, 0.5])
    assert cases[2:] == build_needles(tokenizer, [700], [0.0, 0.5])
    assert len({case.value for case in cases}) == 4
    assert build_case(tokenizer, 500, 0.0, seed=1) != cases[0]
    digest = hashlib.sha256(repr([(c.prompt_ids, c.answer_ids) for c in cases]).encode()).hexdigest()
    assert digest[:16] == "e3944051b0133dc3"


def test_a_length_without_room_for_the_frame_is_refused():
    with pytest.raises(ConfigError, match="a needle prompt needs [0-9]+ tokens at least, 100 were allowed"):
        build_case(byte_tokenizer(), 100, 0.5)


def test_chat_puts_the_question_into_the_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<bot>"
    case = build_case(tokenizer, 700, 0.5, chat=True)
    text = tokenizer.decode(case.prompt_ids)
    assert text.startswith("<user>A special magic number is hidden")
    assert f"provided text?</><bot>The special magic number for {case.key}" in text


def test_hits_are_counted_by_length(case):
    ids = case.prompt_ids + case.answer_ids
    scores = [score_case(Oracle(ids), case), score_case(Oracle(ids, wrong=(1,)), case)]
    assert hits_by_length(scores) == {800: (1, 2)}
