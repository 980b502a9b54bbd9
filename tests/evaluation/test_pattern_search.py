"""MInference's head search and its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from nsa_convert.cli import main
from nsa_convert.errors import ConfigError
from nsa_convert.evaluation.heads.pattern_search import candidate_shares, search_patterns
from nsa_convert.heads.patterns import read_head_file, write_head_file
from nsa_convert.methods.parts.base import AttentionRecord
from nsa_convert.patch.patching import patch_model, sparse_methods
from nsa_convert.patterns import SequenceLayout
from tests.checkpoints import write_dense
from tests.models import dense_model, tokens

CANDIDATES = (("stream_llm", 8, 120), ("vertical_and_slash", 60, 110), ("block_sparse", 2, 1))


def test_each_head_gets_the_pattern_that_holds_its_attention() -> None:
    """One head looks near, one at fixed tokens in the middle; both see more by the pattern made for it."""
    total = 400
    q, k = torch.zeros(1, total, 2, 8), torch.full((1, total, 2, 8), 0.01)
    q[..., 1, 0] = 30.0
    k[:, 170:200, 1, 0] = 1.0  # tokens that all later queries of head 1 look at
    angle = torch.arange(total) * 0.02
    q[0, :, 0, :2] = 40 * torch.stack([angle.cos(), angle.sin()], -1)
    k[0, :, 0, :2] = torch.stack([angle.cos(), angle.sin()], -1)
    record = AttentionRecord(
        layer_index=0, q=q, k=k, patterns={}, layout=SequenceLayout(), scale=1.0, gates=None
    )
    shares = candidate_shares(record, (("stream_llm", 1, 60), ("vertical_and_slash", 60, 100)), 64)
    assert shares[:, 0].min() > 0.95  # a window and near diagonals are the same to the first head
    assert shares[1, 1] > 0.95
    assert shares[0, 1] < 0.75


def test_the_search_is_written_read_and_runs(tmp_path: Path) -> None:
    model, ids = dense_model("llama"), tokens(1, 300)
    before = model(ids).logits
    patterns, shares = search_patterns(model, ids[0].tolist(), CANDIDATES)
    assert torch.equal(model(ids).logits, before), "the model is dense again"
    assert [len(layer) for layer in patterns] == [4, 4, 4]
    assert all(head in CANDIDATES for layer in patterns for head in layer)
    assert all(0 < share <= 1.0001 for layer in shares for share in layer)
    write_head_file(tmp_path / "heads.json", patterns, shares)
    stored = json.loads((tmp_path / "heads.json").read_text())
    assert stored[1]["3"] == [*patterns[1][3], shares[1][3]]
    patch_model(model, read_head_file(tmp_path / "heads.json"))
    found = [list(method.patterns_by_head) for method in sparse_methods(model)]
    assert found == patterns
    assert torch.isfinite(model(ids).logits).all()


def test_a_prompt_too_short_to_tell_is_refused() -> None:
    with pytest.raises(ValueError, match="64 tokens are too few"):
        search_patterns(dense_model("llama"), list(range(64)), (("stream_llm", 8, 120),))


def test_convert_imports_a_head_file(tmp_path: Path) -> None:
    """The form of the published files: every query head, vertical_and_slash, with a score."""
    source = write_dense(tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    layer = {str(i): ["vertical_and_slash", 1000, 6096, 336796.0 + i] for i in range(heads)}
    (tmp_path / "heads.json").write_text(json.dumps([layer] * layers))
    words = ["convert", str(source), str(tmp_path / "out"), "--config", str(tmp_path / "heads.json")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.stderr
    plan = json.loads((tmp_path / "out" / "config.json").read_text())["sparse_attention"]
    assert plan["rules"][0]["head_patterns"] == [["vertical_and_slash", 1000, 6096]] * heads
    assert plan["rules"][0]["layers"] == list(range(layers))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a list with one object per layer"),
        ('[{"1": ["stream_llm", 1, 2, 0.5]}]', "layer 0: expected an object with the query heads 0, 1"),
        ('[{"0": ["slash", 1, 2, 0.5]}, {"0": 3}]', "(?s)layer 0, head 0.*layer 1, head 0"),
        ("[3]", "layer 0: expected an object"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "heads.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_head_file(tmp_path / "heads.json")
