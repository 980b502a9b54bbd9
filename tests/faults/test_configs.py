"""Impossible and misleading config.json and settings: refused before anything is allocated."""

from __future__ import annotations

import json

import pytest

from tests.checkpoints import edit_json, write_dense
from tests.faults.checks import METHOD, converted, edit_tensors, error_of, refused, run, warned

ROPE = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = {**ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def bad(source, code: str, *told: str, **changes) -> dict:
    """Edit config.json; refused in less than a second, nothing allocated."""
    edit_json(source / "config.json", **changes)
    return refused(source, code, *told, seconds=1)


@pytest.mark.parametrize("value", [0, -4, 2**40])
def test_cf01_number_of_heads(source, value):
    bad(source, "CF01", "num_attention_heads", repr(value), "1 to 100", num_attention_heads=value)


@pytest.mark.parametrize(("value", "told"), [(0, "from 1"), (3, "not a multiple"), (8, "not a multiple")])
def test_cf02_number_of_key_value_heads(source, value, told):
    bad(source, "CF02", "num_key_value_heads", str(value), told, num_key_value_heads=value)


def test_cf03_hidden_size_is_no_multiple(source):
    bad(source, "CF03", "hidden_size 33", "num_attention_heads 4", hidden_size=33, head_dim=None)


@pytest.mark.parametrize("value", [-1, 0, 1, 3])
def test_cf04_number_of_layers(source, value):
    told = ("from 1",) if value < 1 else ("the headers contain layers 0-1",)
    bad(
        source,
        "CF04",
        f"num_hidden_layers {'must be' if value < 1 else value}",
        *told,
        num_hidden_layers=value,
    )


def test_cf05_ten_thousand_layers(source):
    bad(source, "CF04", "10000", "layers 0-1", num_hidden_layers=10000)


CF06 = {
    "vocabulary -1": ({"vocab_size": -1}, "CF06"),
    "vocabulary + 1": ({"vocab_size": 65}, "CK25"),
    "vocabulary 2^33": ({"vocab_size": 2**33}, "CF06"),
    "inner 2^40": ({"intermediate_size": 2**40}, "CF06"),
    "hidden 2^20": ({"hidden_size": 2**20}, "CF06"),
    "pad token": ({"pad_token_id": 9999}, "CF06"),
}


@pytest.mark.parametrize(("changes", "code"), CF06.values(), ids=CF06)
def test_cf06_sizes(source, changes, code):
    ((key, value),) = changes.items()
    bad(source, code, *((key, str(value)) if code == "CF06" else ("[64, 32]", "[65, 32]")), **changes)


@pytest.mark.parametrize(("value", "code", "told"), [(7, "CF09", "even"), (16, "CK25", "[64, 32]")])
def test_cf07_head_dim(source, value, code, told):
    bad(source, code, told, head_dim=value)


@pytest.mark.parametrize("value", [0, -1.0, "x", None, True])
def test_cf08_rope_base(source, value):
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": value}}
    bad(source, "CF09", "rope_theta must be a positive finite number", repr(value), **changes)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999"])
def test_cf08_rope_base_that_is_no_number(source, text):
    edit_json(source / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 12345})
    path = source / "config.json"
    path.write_text(path.read_text().replace("12345", text))
    refused(source, "CF19", text, "config.json")


CF09 = {
    "unknown": ({**ROPE, "rope_type": "bogus"}, "'bogus'"),
    "no text": ({**ROPE, "rope_type": ["yarn"]}, "supported: default, linear, llama3, yarn"),
    "factor -2": ({**ROPE, "rope_type": "linear", "factor": -2.0}, "-2.0"),
    "no factor": ({**ROPE, "rope_type": "yarn"}, "needs a positive factor, got None"),
    "llama3 without its length": (LLAMA3, "original_max_position_embeddings"),
    "llama3 with equal factors": (
        {**LLAMA3, "high_freq_factor": 1.0, "original_max_position_embeddings": 64},
        "high_freq_factor must be above",
    ),
    "no mapping": ("default", "must be a mapping"),
    "part of the head": ({**ROPE, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
}


@pytest.mark.parametrize(("rope", "told"), CF09.values(), ids=CF09)
def test_cf09_rope(source, rope, told):
    bad(source, "CF09", told, rope_parameters=rope)


def test_cf09_complete_rope_is_fine(source):
    edit_json(source / "config.json", rope_parameters={**LLAMA3, "original_max_position_embeddings": 64})
    converted(source)


CF10 = {"rms_norm_eps": -1, "attention_dropout": 5.0, "max_position_embeddings": 0}


@pytest.mark.parametrize(("key", "value"), CF10.items(), ids=CF10)
def test_cf10_numbers(source, key, value):
    bad(source, "CF10", key, repr(value), **{key: value})


def test_cf11_untied_without_a_head(tmp_path):
    source = write_dense(tmp_path / "model", tie_word_embeddings=True)
    bad(source, "CF11", "lm_head.weight", tie_word_embeddings=False)


def test_cf11_tied_with_a_head_of_its_own(source):
    """transformers would drop the stored head; only reading the two tensors can tell."""
    edit_json(source / "config.json", tie_word_embeddings=True)
    refused(source, "CF11", "lm_head.weight", "other values", "tie_word_embeddings", inspect=False)


def test_cf11_tied_with_a_head_of_another_dtype(tmp_path):
    source = write_dense(tmp_path / "model", tie_word_embeddings=True, shards=False)
    edit_tensors(
        source / "model.safetensors",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].bfloat16()}),
    )
    refused(source, "CF11", "F32", "BF16")


CF12 = {
    "none": (None, "llama, qwen2, qwen3, mistral"),
    "a number": (3, "llama, qwen2, qwen3, mistral"),
    "MoE": ("mixtral", "mixture of experts"),
    "MLA": ("deepseek_v3", "latent attention"),
    "encoder": ("bert", "encoder"),
    "no RoPE": ("gpt2", "not rotary"),
    "no attention": ("mamba", "no attention"),
}


@pytest.mark.parametrize(("model_type", "told"), CF12.values(), ids=CF12)
def test_cf12_architecture(source, model_type, told):
    bad(source, "CF12", told, repr(model_type), model_type=model_type)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("rope_thta", "did you mean 'rope_theta'"),
        ("num_hiden_layers", "unknown key 'num_hiden_layers'"),
        ("nsa_blokc_size", "sparse_attention"),
    ],
)
def test_cf13_misspelt_key_of_config(source, key, told):
    changes = {"rope_parameters": ...} if key == "rope_thta" else {"num_hidden_layers": ...}
    bad(source, "CF13", told, **{key: 2}, **({} if key.startswith("nsa") else changes))


def test_cf13_keys_of_other_tools_are_left_alone(source):
    edit_json(source / "config.json", pretraining_tp=1, _flash_attn_2_enabled=False, num_experts_per_tok=2)
    converted(source)


def test_cf13_misspelt_setting(source):
    options = ("--method", "nsa", "--set", "blokc_size=8")
    refused(source, "CF22", "did you mean 'block_size'", options=options, inspect=False)


def test_cf13_misspelt_setting_of_a_converted_folder(source):
    out, _ = converted(source)
    config = json.loads((out / "config.json").read_text())
    config["sparse_attention"]["default"]["blokc_size"] = 8
    (out / "config.json").write_text(json.dumps(config))
    for words in (["generate", out, "--prompt", "a"], ["inspect", out]):
        assert "did you mean 'block_size'" in error_of(run(*words, "--json"), 3)["message"]


def write_code(source, **config) -> None:
    """Put code into the folder that leaves a file behind where it is run."""
    (source / "evil.py").write_text(
        f"open({str(source.parent / 'sentinel')!r}, 'w').close()\nclass Model: pass\n"
    )
    edit_json(
        source / "config.json", auto_map={"AutoConfig": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    )
    edit_json(source / "config.json", **config)


def test_cf14_custom_code_of_an_unknown_architecture(source):
    write_code(source, model_type="evil")
    refused(source, "CF12", "'evil'")
    error_of(run("generate", source, "--prompt", "a", "--json"), 3)
    assert not (source.parent / "sentinel").exists()


def test_cf14_custom_code_of_a_known_architecture(source):
    write_code(source)
    edit_json(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Model", None]})
    out = warned(source, "CF14", "neither run nor copied")
    assert not (out / "evil.py").exists()
    assert "evil" not in (out / "config.json").read_text()
    for folder in (source, out):
        run("generate", folder, "--prompt", "<1>", "--max-new-tokens", "1")
    assert not (source.parent / "sentinel").exists()


KERNELS = [{"attn_implementation": "kernels-community/evil"}, {"_attn_implementation": "org/kernel"}]


@pytest.mark.parametrize("changes", KERNELS)
def test_cf15_attention_kernels_are_not_fetched(source, changes):
    """The folder itself may be used by `generate` and `eval`, which load it with transformers."""
    edit_json(source / "config.json", **changes)
    out = warned(source, "CF15", "dropped")
    assert "attn_implementation" not in (out / "config.json").read_text()
    import torch

    from nsa_convert.loading import load_causal_model

    config = load_causal_model(source, torch.float32).config
    assert config._attn_implementation == "sdpa"


@pytest.mark.parametrize("note", [{"bogus": 1}, "bogus", {}, []])
def test_cf16_bogus_quantisation_note(source, note):
    bad(source, "CK36", "quantised", "quantization_config", quantization_config=note)


CF17 = {
    "empty": (b"", "line 1, column 1"),
    "list": (b"[]", "JSON object"),
    "not JSON": (b'{"a": 1,\n "b": }', "line 2, column 7"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
}


@pytest.mark.parametrize(("content", "told"), CF17.values(), ids=CF17)
def test_cf17_text_of_config(source, content, told):
    (source / "config.json").write_bytes(content)
    refused(source, "CF17", "config.json", told)


def test_cf17_byte_order_mark_is_accepted(source):
    content = (source / "config.json").read_bytes()
    (source / "config.json").write_bytes(b"\xef\xbb\xbf" + content)
    converted(source)


CF18 = {
    "100,000 levels": (b'{"a":' + b"[" * 100_000, "nested too deeply"),
    "200 MB": (None, "200,000,000 bytes"),
    "a million keys": (b"{" + b",".join(b'"%x":0' % i for i in range(700_000)) + b"}", "values"),
}


@pytest.mark.parametrize(("content", "told"), CF18.values(), ids=CF18)
def test_cf18_config_too_large(source, content, told):
    with (source / "config.json").open("wb") as file:
        file.write(content or b"")
        file.truncate(None if content else 200_000_000)
    refused(source, "CF18", "config.json", told, seconds=1)


CF19 = {
    "twice": (b'{"model_type": "llama", "model_type": "qwen2"}', "'model_type'"),
    "twice inside": (b'{"a": {"b": 1, "b": 1}}', "'b'"),
    "NaN": (b'{"rms_norm_eps": NaN}', "NaN"),
    "Infinity": (b'{"rms_norm_eps": -Infinity}', "Infinity"),
    "1e999": (b'{"rms_norm_eps": 1e999}', "1e999"),
    "a hundred digits": (b'{"rms_norm_eps": ' + b"9" * 105 + b"}", "too large a number"),
    "thousands of digits": (b'{"hidden_size": ' + b"9" * 5000 + b"}", "too large a number"),
    "half a character": (b'{"model_type": "\\ud800"}', "half a character"),
}


@pytest.mark.parametrize(("content", "told"), CF19.values(), ids=CF19)
def test_cf19_what_json_does_not_know(source, content, told):
    (source / "config.json").write_bytes(content)
    refused(source, "CF19", "config.json", told)


CF20 = {
    "text": {"hidden_size": "32"},
    "2.0": {"num_hidden_layers": 2.0},
    "1e3": {"vocab_size": 1e3},
    "true": {"num_attention_heads": True},
    "activation": {"hidden_act": "bogus"},
    "list": {"hidden_act": ["silu"]},
    "tie": {"tie_word_embeddings": "yes"},
}


@pytest.mark.parametrize("changes", CF20.values(), ids=CF20)
def test_cf20_wrong_types(source, changes):
    ((key, value),) = changes.items()
    bad(source, "CF20", f"config.json: {key}", repr(value), **changes)


@pytest.mark.parametrize("value", ["float12", 32, ["float32"]])
def test_cf21_dtype(source, value):
    bad(source, "CF21", repr(value), "float32, float16, bfloat16", dtype=value)


CF22 = {
    "stride": ({"compression_block": 8, "compression_stride": 3}, "compression_stride"),
    "block": ({"block_size": 9, "compression_stride": 4, "compression_block": 8}, "block_size"),
    "window": ({"window_size": 0}, "window_size"),
    "budget": ({"num_blocks": 1, "num_sink_blocks": 1, "num_local_blocks": 2}, "num_blocks"),
    "text": ({"block_size": "'64'"}, "must be a whole number, got '64'"),
    "truth": ({"num_blocks": "true"}, "must be a whole number, got True"),
    "fraction": ({"window_size": 1.5}, "must be a whole number, got 1.5"),
    "choice": ({"gate": "x"}, "signed, sigmoid"),
}


@pytest.mark.parametrize(("values", "told"), CF22.values(), ids=CF22)
def test_cf22_settings_of_a_method(source, values, told):
    pairs = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    refused(source, "CF22", told, options=("--method", "nsa", *pairs), inspect=False)


def test_cf22_budget_beyond_the_positions(source):
    edit_json(source / "config.json", max_position_embeddings=32)
    warned(source, "no sparsity at any length", "32")
    edit_json(source / "config.json", max_position_embeddings=33)
    _, report = converted(source, out=source.parent / "other")
    assert not any("no sparsity" in line for line in report["warnings"])


CF23 = {
    "sliding": (["full_attention", "sliding_attention"], "sliding_attention"),
    "unknown": (["full_attention", "bogus"], "bogus"),
    "too few": (["full_attention"], "lists 1 layers, num_hidden_layers is 2"),
    "too many": (["full_attention"] * 3, "lists 3 layers"),
    "none": ([], "full_attention"),
    "text": ("full_attention", "full_attention"),
}


@pytest.mark.parametrize(("kinds", "told"), CF23.values(), ids=CF23)
def test_cf23_layer_types(source, kinds, told):
    bad(source, "CF09", "layer_types", told, layer_types=kinds)


def test_cf23_layer_that_does_not_exist(source):
    refused(source, "CF22", "layers 0-1", options=(*METHOD, "--layers", "7"), inspect=False)


@pytest.mark.parametrize("name", ["missing", "empty", "org/missing"])
def test_cf24_no_such_place(tmp_path, monkeypatch, name):
    """A path never falls through to the Hub."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nsa_convert.hub._snapshot", lambda *_: pytest.fail("the Hub was asked"))
    error = error_of(run("convert", name if "/" in name else tmp_path / name, "out", *METHOD, "--json"), 3)
    assert error["code"] == "CF24"
    assert name in error["message"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "org"]


def test_several_problems_are_reported_at_once(source):
    error = bad(source, "CF10", rms_norm_eps=-1, hidden_act="bogus", dtype="float12")
    assert {problem["code"] for problem in error["problems"]} == {"CF10", "CF20", "CF21"}
