"""Impossible and misleading config.json, settings and tokenizers: refused before anything is allocated."""

from __future__ import annotations

import json
import time

import pytest

from nsa_convert.config import LayerRule, SparseAttentionConfig
from nsa_convert.convert import convert_checkpoint
from nsa_convert.errors import NsaConvertError
from tests.checkpoints import edit_json, write_dense
from tests.test_convert import NSA

CONFIGS = {
    "CF01-zero": ({"num_attention_heads": 0}, "CF01"),
    "CF01-negative": ({"num_attention_heads": -4}, "CF01"),
    "CF01-huge": ({"num_attention_heads": 2**40}, "CF01"),
    "CF02-zero": ({"num_key_value_heads": 0}, "CF02"),
    "CF02-3 of 4": ({"num_key_value_heads": 3}, "CF02"),
    "CF02-more than heads": ({"num_key_value_heads": 8}, "CF02"),
    "CF03": ({"hidden_size": 33, "head_dim": None}, "CF03"),
    "CF04-negative": ({"num_hidden_layers": -1}, "CF04"),
    "CF04-zero": ({"num_hidden_layers": 0}, "CF04"),
    "CF04-fewer": ({"num_hidden_layers": 1}, "CF04"),
    "CF04-more": ({"num_hidden_layers": 3}, "CF04"),
    "CF05": ({"num_hidden_layers": 10000}, "CF04"),
    "CF06-vocabulary -1": ({"vocab_size": -1}, "CF06"),
    "CF06-vocabulary + 1": ({"vocab_size": 65}, "CK25"),
    "CF06-vocabulary huge": ({"vocab_size": 2**33}, "CF06"),
    "CF06-inner huge": ({"intermediate_size": 2**40}, "CF06"),
    "CF06-hidden huge": ({"hidden_size": 2**20}, "CF06"),
    "CF06-pad token": ({"pad_token_id": 9999}, "CF06"),
    "CF07-odd": ({"head_dim": 7}, "CF09"),
    "CF07-not the weights'": ({"head_dim": 16}, "CK25"),
    "CF08-zero": ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "CF09"),
    "CF08-negative": ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "CF09"),
    "CF09-unknown": ({"rope_parameters": {"rope_type": "bogus", "rope_theta": 1e4}}, "CF09"),
    "CF09-factor": ({"rope_parameters": {"rope_type": "linear", "factor": -2.0, "rope_theta": 1e4}}, "CF09"),
    "CF10-eps": ({"rms_norm_eps": -1}, "CF10"),
    "CF10-dropout": ({"attention_dropout": 5.0}, "CF10"),
    "CF10-positions": ({"max_position_embeddings": 0}, "CF10"),
    "CF12-none": ({"model_type": None}, "CF12"),
    "CF12-MoE": ({"model_type": "mixtral"}, "CF12"),
    "CF12-encoder": ({"model_type": "bert"}, "CF12"),
    "CF16": ({"quantization_config": {"bogus": 1}}, "CK36"),
    "CF20-text": ({"hidden_size": "32"}, "CF20"),
    "CF20-float": ({"num_hidden_layers": 2.0}, "CF20"),
    "CF20-activation": ({"hidden_act": "bogus"}, "CF20"),
    "CF20-tie": ({"tie_word_embeddings": "yes"}, "CF20"),
    "CF21": ({"dtype": "float12"}, "CF21"),
    "CF23": ({"layer_types": ["full_attention", "sliding_attention"]}, "CF09"),
}


@pytest.mark.parametrize(("changes", "code"), CONFIGS.values(), ids=CONFIGS)
def test_refused(source, tmp_path, changes, code):
    edit_json(source / "config.json", **changes)
    begin = time.process_time()
    with pytest.raises(NsaConvertError) as caught:
        convert_checkpoint(source, tmp_path / "out", NSA)
    assert time.process_time() - begin < 1
    error = caught.value
    assert code in {error.code, *(problem.code for problem in error.problems)}, str(error)
    assert error.exit_status == 3
    assert not (tmp_path / "out").exists()


CONFIG_TEXTS = {
    "CF17-empty": (b"", "CF17"),
    "CF17-list": (b"[]", "CF17"),
    "CF17-not JSON": (b'{"a": 1,\n "b": }', "CF17"),
    "CF17-UTF-16": ('{"a": 1}'.encode("utf-16"), "CF17"),
    "CF18-deep": (b'{"a":' + b"[" * 100_000, "CF18"),
    "CF18-big": (b'{"a": "' + b"x" * 11_000_000 + b'"}', "CF18"),
    "CF19-twice": (b'{"model_type": "llama", "model_type": "qwen2"}', "CF19"),
    "CF19-NaN": (b'{"rms_norm_eps": NaN}', "CF19"),
}


@pytest.mark.parametrize(("content", "code"), CONFIG_TEXTS.values(), ids=CONFIG_TEXTS)
def test_text_of_config(source, tmp_path, content, code):
    (source / "config.json").write_bytes(content)
    with pytest.raises(NsaConvertError) as caught:
        convert_checkpoint(source, tmp_path / "out", NSA)
    assert (caught.value.code, caught.value.exit_status) == (code, 3)


def test_cf17_says_where(source, tmp_path):
    (source / "config.json").write_text('{"a": 1,\n "b": }')
    with pytest.raises(NsaConvertError, match="line 2, column 7"):
        convert_checkpoint(source, tmp_path / "out", NSA)


def test_cf17_byte_order_mark_is_accepted(source, tmp_path):
    text = (source / "config.json").read_text()
    (source / "config.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    convert_checkpoint(source, tmp_path / "out", NSA)


def test_cf11_tie_contradicts_the_weights(tmp_path):
    source = write_dense(tmp_path / "dense", tie_word_embeddings=True)
    edit_json(source / "config.json", tie_word_embeddings=False)
    with pytest.raises(NsaConvertError) as caught:
        convert_checkpoint(source, tmp_path / "out", NSA)
    assert caught.value.code == "CF11"


def test_cf12_names_what_is_supported(source, tmp_path):
    edit_json(source / "config.json", model_type="gpt2")
    with pytest.raises(NsaConvertError) as caught:
        convert_checkpoint(source, tmp_path / "out", NSA)
    assert caught.value.expected == "llama, qwen2, qwen3, mistral"


def test_cf24_no_such_place(tmp_path):
    (tmp_path / "empty").mkdir()
    for place in ("empty", "missing"):
        with pytest.raises(NsaConvertError) as caught:
            convert_checkpoint(tmp_path / place, tmp_path / "out", NSA)
        assert (caught.value.code, caught.value.exit_status) == ("CF24", 3)


def test_several_problems_are_reported_at_once(source, tmp_path):
    edit_json(source / "config.json", rms_norm_eps=-1, hidden_act="bogus", dtype="float12")
    with pytest.raises(NsaConvertError) as caught:
        convert_checkpoint(source, tmp_path / "out", NSA)
    assert {problem.code for problem in caught.value.problems} == {"CF10", "CF20", "CF21"}


SETTINGS = {
    "CF13": ({"blok_size": 8}, "did you mean 'block_size'"),
    "CF20-text": ({"block_size": "64"}, "must be an integer"),
    "CF20-truth": ({"num_blocks": True}, "must be an integer"),
    "CF20-fraction": ({"window_size": 1.5}, "must be an integer"),
    "CF20-choice": ({"gate": "x"}, "signed, sigmoid"),
    "CF22-stride": ({"compression_block": 8, "compression_stride": 3}, "compression_stride"),
    "CF22-block": ({"block_size": 9, "compression_stride": 4, "compression_block": 8}, "block_size"),
    "CF22-window": ({"window_size": 0}, "window_size"),
    "CF22-budget": ({"num_blocks": 1, "num_sink_blocks": 1, "num_local_blocks": 2}, "num_blocks"),
}


@pytest.mark.parametrize(("settings", "text"), SETTINGS.values(), ids=SETTINGS)
def test_settings(source, tmp_path, settings, text):
    plan = SparseAttentionConfig(default=LayerRule(method="nsa", settings=settings))
    with pytest.raises(NsaConvertError, match=text) as caught:
        convert_checkpoint(source, tmp_path / "out", plan)
    assert caught.value.exit_status == 3
    assert not (tmp_path / "out").exists()


def test_layer_that_does_not_exist(source, tmp_path):
    plan = SparseAttentionConfig(
        default=LayerRule(method="full"), rules=(LayerRule(method="nsa", layers=(7,)),)
    )
    with pytest.raises(NsaConvertError, match="layers 0-1"):
        convert_checkpoint(source, tmp_path / "out", plan)


def test_tk01_without_tokenizer(source, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    assert any("TK01" in line for line in convert_checkpoint(source, tmp_path / "out", NSA).warnings)


def test_tk02_tokenizer_beyond_the_embeddings(source, tmp_path):
    content = json.loads((source / "tokenizer.json").read_text())
    content["added_tokens"] = [{"id": 64, "content": "<new>"}]
    (source / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(NsaConvertError, match="token 64") as caught:
        convert_checkpoint(source, tmp_path / "out", NSA)
    assert caught.value.code == "TK02"


@pytest.mark.parametrize("value", ["../../.env", "/etc/passwd"])
def test_tk03_tokenizer_names_a_file_outside(source, tmp_path, value):
    edit_json(source / "tokenizer_config.json", vocab_file=value)
    with pytest.raises(NsaConvertError) as caught:
        convert_checkpoint(source, tmp_path / "out", NSA)
    assert caught.value.code == "TK03"


def test_tk03_side_file_links_outside(source, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (source / "generation_config.json").unlink()
    (source / "generation_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(NsaConvertError) as caught:
        convert_checkpoint(source, tmp_path / "out", NSA)
    assert caught.value.code == "CK14"


def test_tk06_bad_generation_config(source, tmp_path):
    (source / "generation_config.json").write_text("{")
    assert any("TK06" in line for line in convert_checkpoint(source, tmp_path / "out", NSA).warnings)
