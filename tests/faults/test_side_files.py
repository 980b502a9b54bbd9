"""Tokenizer, chat template, licence, and whatever else lies in a stranger's folder."""

from __future__ import annotations

import json
import os
import time

import pytest
from transformers import PreTrainedTokenizerFast

from nsa_convert import chat
from nsa_convert.chat import render_chat
from nsa_convert.errors import ConfigError
from tests.checkpoints import edit_json
from tests.faults.checks import converted, error_of, refused, run, snapshot, warned

TURNS = [{"role": "user", "content": "hello"}]


def test_tk01_without_tokenizer(source):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    out = warned(source, "TK01", "no tokenizer")
    for words in (["generate", out, "--prompt", "a"], ["eval", out, "--out", source.parent / "report"]):
        error = error_of(run(*words, "--json"), 3)
        assert error["code"] == "TK01"
        assert "tokenizer.json" in error["hint"]
    assert not (source.parent / "report").exists()


TK01 = {
    "not JSON": b"{",
    "no model": b"{}",
    "list": b"[]",
    "text as id": b'{"model": {"vocab": {"a": "x"}}}',
    "fraction as id": b'{"model": {"vocab": {"a": 1.5}}}',
    "added without id": b'{"model": {"vocab": {}}, "added_tokens": [{"content": "a"}]}',
    "vocabulary is a number": b'{"model": {"vocab": 3}}',
    "twice": b'{"model": {"vocab": {"a": 1, "a": 2}}}',
}


@pytest.mark.parametrize("content", TK01.values(), ids=TK01)
def test_tk01_damaged_tokenizer(source, content):
    (source / "tokenizer.json").write_bytes(content)
    code = "CF19" if content.count(b'"a"') == 2 else "TK01"
    refused(source, code, "tokenizer.json", inspect=False)


def test_tk01_no_length_limit(source):
    """What transformers writes for a tokenizer without a limit is no number too large."""
    edit_json(source / "tokenizer_config.json", model_max_length=int(1e30))
    converted(source)


@pytest.mark.parametrize("part", ["added_tokens", "vocab"])
def test_tk02_tokenizer_beyond_the_embeddings(source, part):
    content = json.loads((source / "tokenizer.json").read_text())
    if part == "vocab":
        content["model"]["vocab"]["<new>"] = 64
    else:
        content["added_tokens"] = [{"id": 64, "content": "<new>"}]
    (source / "tokenizer.json").write_text(json.dumps(content))
    refused(source, "TK02", "token 64", "64 rows", "resize", inspect=False)


@pytest.mark.parametrize("key", ["vocab_file", "merges_file", "tokenizer_file"])
@pytest.mark.parametrize("value", ["../../.env", "/etc/passwd", "..\\secret"])
def test_tk03_tokenizer_names_a_file_outside(source, key, value):
    edit_json(source / "tokenizer_config.json", **{key: value})
    refused(source, "TK03", f"{key} {value!r}", "leaves the checkpoint directory")
    error_of(run("generate", source, "--prompt", "a", "--json"), 3)


def test_tk03_side_file_links_outside(source, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (source / "generation_config.json").unlink()
    (source / "generation_config.json").symlink_to(tmp_path / "secret")
    refused(source, "CK14", "generation_config.json")


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    inner = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="b")
    tokenizer.chat_template = template
    return tokenizer


GOOD = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_tk04_a_good_template_gives_the_same_text_as_in_this_process():
    tokenizer = tokenizer_with(GOOD)
    text = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert render_chat(tokenizer, TURNS) == text == "<|im_start|>user\nhellob<|im_start|>assistant\n"
    long = [{"role": "user", "content": "é" * 200_000}]
    assert "é" * 200_000 in render_chat(tokenizer, long)


TEMPLATES = {
    "a gigabyte": ("{{ 'x' * (10 ** 9) }}", "takes more than"),
    "a gigabyte in pieces": ("{% for i in range(100000) %}{{ 'x' * 10000 }}{% endfor %}", "takes more than"),
    "range": ("{% for i in range(10 ** 9) %}x{% endfor %}", "fails"),
    "syntax": ("{% if %}", "fails: TemplateSyntaxError"),
    "python": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails: SecurityError"),
    "own error": ("{{ raise_exception('no') }}", "fails: TemplateError: no"),
}


@pytest.mark.parametrize(("template", "told"), TEMPLATES.values(), ids=TEMPLATES)
def test_tk04_hostile_template(template, told):
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=told) as caught:
        render_chat(tokenizer_with(template), TURNS)
    assert (caught.value.code, caught.value.exit_status) == ("TK04", 3)
    assert time.monotonic() - begin < 5


def test_tk04_endless_template(monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 1)
    loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    begin = time.monotonic()
    with pytest.raises(ConfigError, match="takes more than 1 s"):
        render_chat(tokenizer_with(loop), TURNS)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("sent", [b"", b'{"text": "hal'])
def test_tk04_a_child_that_dies_while_it_answers(monkeypatch, sent):
    def die(writer, *_):
        os.write(writer, sent)
        os._exit(1)

    monkeypatch.setattr(chat, "_render_and_exit", die)
    with pytest.raises(ConfigError, match="takes more than"):
        render_chat(tokenizer_with("{{ 1 }}"), TURNS)


def test_tk04_no_template():
    with pytest.raises(ConfigError, match="has no chat template"):
        render_chat(tokenizer_with(None), TURNS)


def test_tk04_convert_copies_and_never_renders(source):
    (source / "chat_template.jinja").write_text(TEMPLATES["a gigabyte"][0])
    begin = time.process_time()
    out, _ = converted(source)
    assert time.process_time() - begin < 2
    assert (out / "chat_template.jinja").read_text() == TEMPLATES["a gigabyte"][0]
    result = run("generate", out, "--prompt", "<1>", "--chat", "--json")
    error = error_of(result, 3)
    assert error["code"] == "TK04"
    assert "takes more than" in error["message"]


def test_tk05_foreign_files_stay_behind(source):
    foreign = (".env", "modeling_evil.py", "optimizer.pt", "training_args.bin", "id_rsa", "notes.txt")
    for name in foreign:
        (source / name).write_text("secret")
    (source / "wandb").mkdir()
    with (source / "extra.bin").open("wb") as file:
        file.truncate(5_000_000_000)
    begin = time.process_time()
    result = run("convert", source, source.parent / "out", "--method", "nsa", "--json")
    assert result.exit_code == 0, result.stderr
    assert time.process_time() - begin < 5
    warning = next(line for line in json.loads(result.stdout)["warnings"] if "not carried over" in line)
    gone = {*foreign, "wandb", "extra.bin"}
    assert all(name in warning for name in gone)
    assert gone & {path.name for path in (source.parent / "out").rglob("*")} == set()


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": NaN}'])
def test_tk06_invalid_generation_config(source, content):
    (source / "generation_config.json").write_text(content)
    out = warned(source, "TK06", "generation_config.json")
    assert (out / "generation_config.json").read_text() == content


def test_tk07_licence_and_card_of_the_source(source):
    (source / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/base\n---\n# A model\n")
    (source / "LICENSE").write_text("Apache-2.0, in full")
    before = snapshot(source)
    out, _ = converted(source)
    assert (out / "LICENSE").read_text() == "Apache-2.0, in full"
    assert (out / "source/README.md").read_text() == (source / "README.md").read_text()
    result = run("card", out, "--base-model", "org/dense", "--json")
    assert result.exit_code == 0, result.stderr
    text = (out / "README.md").read_text()
    assert "license: apache-2.0" in text
    assert "org/dense" in text
    assert snapshot(source) == before
