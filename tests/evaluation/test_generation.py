import json

import pytest
import torch
from click.testing import CliRunner

from nsa_convert.cli import main
from nsa_convert.errors import ConfigError, UsageError
from nsa_convert.generation import generate_text
from nsa_convert.patch.patching import patch_model
from tests.evaluation.tiny import byte_tokenizer, save_pair, tiny_dense
from tests.models import NSA, plan

PROMPT = "A prompt that is longer than the budget of four blocks."


@pytest.fixture(scope="module")
def model():
    return patch_model(tiny_dense(max_position_embeddings=128), plan(NSA))


def test_greedy_text_is_the_argmax_of_each_step(model):
    tokenizer = byte_tokenizer()
    ids = tokenizer(PROMPT)["input_ids"]
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    result = generate_text(model, tokenizer, PROMPT, max_new_tokens=12)
    assert result.text == tokenizer.decode(ids[-12:], skip_special_tokens=True)
    assert (result.prompt_tokens, result.new_tokens, result.stopped) == (len(PROMPT), 12, "length")


def test_streamed_pieces_join_to_the_text_and_nothing_is_printed(model, capsys):
    pieces = []
    result = generate_text(model, byte_tokenizer(), PROMPT, max_new_tokens=20, stream=pieces.append)
    assert "".join(pieces) == result.text
    assert capsys.readouterr().out == ""


def test_generation_stops_at_the_end_token(model):
    tokenizer = byte_tokenizer()
    ids = tokenizer(PROMPT)["input_ids"]
    end = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [end, 7]
    try:
        result = generate_text(model, tokenizer, PROMPT, max_new_tokens=12)
    finally:
        model.generation_config.eos_token_id = None
    assert (result.new_tokens, result.stopped) == (1, "end")


def test_draws_depend_on_the_seed_alone(model):
    def draw(seed):
        return generate_text(
            model, byte_tokenizer(), PROMPT, max_new_tokens=12, temperature=2.0, top_p=0.95, seed=seed
        ).text

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = draw(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert draw(1) == first
    assert draw(2) != first


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": 0}, UsageError, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0, "top_p": 2.0}, UsageError, "temperature .* top_p"),
        ({"prompt": ""}, UsageError, "prompt is empty"),
        ({"max_new_tokens": 100}, ConfigError, "beyond the 128 positions"),
        ({"chat": True}, ConfigError, "no chat template"),
    ],
)
def test_bad_requests(model, options, error, message):
    with pytest.raises(error, match=message):
        generate_text(model, byte_tokenizer(), **{"prompt": PROMPT, **options})


def test_chat_puts_the_prompt_into_the_template(model):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<bot>"
    result = generate_text(model, tokenizer, "Hello", max_new_tokens=2, chat=True)
    assert result.prompt == "<user>Hello<bot>"


def test_the_command_answers_through_the_chat_template(tmp_path):
    _, folder = save_pair(tmp_path)
    (folder / "chat_template.jinja").write_text("<{% for m in messages %}{{ m['content'] }}{% endfor %}>")
    words = ["generate", str(folder), "--prompt", "a question", "--max-new-tokens", "4"]
    result = CliRunner().invoke(main, [*words, "--chat", "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["prompt"] == "<a question>"
    streamed = CliRunner().invoke(main, [*words, "--chat"])
    assert streamed.stdout == json.loads(result.stdout)["text"] + "\n"
    (folder / "chat_template.jinja").unlink()
    refused = CliRunner().invoke(main, [*words, "--chat"])
    assert refused.exit_code == 3
    assert "TK04" in refused.stderr
