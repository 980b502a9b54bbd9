"""The names other people may use, and how they are called. Changing one of these is a breaking change."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

import nsa_convert
from nsa_convert.methods.parts.base import SparseMethod

FUNCTIONS = {
    "block_topk": "(q, ck, *, width, stride, rule, layout=…, scale=…, lse=…)",
    "compressed_attention": "(q, ck, cv, *, width, stride, rule=…, layout=…, scale=…)",
    "convert_checkpoint": (
        "(source, out, sparse, *, dry_run=…, overwrite=…, copy=…, allow_extra_tensors=…, allow_pickle=…, "
        "dtype=…, source_id=…, revision=…, contexts=…, threads=…, progress=…)"
    ),
    "merge_lse": "(outputs, lses)",
    "patch_model": "(model, sparse, **settings)",
    "revert_checkpoint": "(out, dense, *, overwrite=…, copy=…)",
    "set_mode": "(model, mode)",
    "sparse_attention": "(q, k, v, pattern, *, layout=…, scale=…)",
    "unpatch_model": "(model)",
    "use_backend": "(name)",
    "verify_checkpoint": "(out, against=…, *, lengths=…, trust_remote_code=…, say=…)",
}

CLASSES = {
    "AttentionGeometry": ["hidden_size", "num_query_heads", "num_kv_heads", "head_dim", "qkv_bias"],
    "BlockSelection": ["block_indices", "block_size", "query_block"],
    "BlockTopK": ["block_size", "num_blocks", "num_sink_blocks", "num_local_blocks", "reduce", "per_head"],
    "LayerRule": ["method", "settings", "layers", "heads", "phase"],
    "SequenceLayout": ["offset", "start", "cu_seqlens", "max_seqlen"],
    "SinkWindow": ["num_sinks", "window_size"],
    "SparseAttentionConfig": ["default", "rules"],
    "TokenSelection": ["token_indices", "query_block"],
}


def call_form(function: object) -> str:
    """Return parameter names, the keyword-only mark and which have defaults; annotations are left out."""
    parts, keyword_only = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            parts.append("*")
            keyword_only = True
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        parts.append(stars + parameter.name + ("" if parameter.default is parameter.empty else "=…"))
    return f"({', '.join(parts)})"


def test_public_names():
    assert set(nsa_convert.__all__) == {*FUNCTIONS, *CLASSES, "__version__"}
    assert dir(nsa_convert) == sorted(nsa_convert.__all__)


@pytest.mark.parametrize(("name", "form"), FUNCTIONS.items())
def test_functions_are_called_as_before(name, form):
    assert call_form(getattr(nsa_convert, name)) == form


@pytest.mark.parametrize(("name", "fields"), CLASSES.items())
def test_classes_have_the_fields_they_had(name, fields):
    cls = getattr(nsa_convert, name)
    assert [field.name for field in dataclasses.fields(cls)] == fields
    assert all(field.kw_only for field in dataclasses.fields(cls))


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        nsa_convert.nonsense  # noqa: B018 - the access is the test


def test_call_form_sees_a_change():
    def before(a, *, b=1): ...

    def after(a, b=1): ...

    assert call_form(before) == "(a, *, b=…)"
    assert call_form(after) == "(a, b=…)"


def test_the_base_of_a_method_has_at_most_twelve_members():
    """Composites have to merge each of them; what is a fact goes into one of the values they return."""
    own = {name for name in (*vars(SparseMethod), *SparseMethod.__annotations__) if not name.startswith("_")}
    assert len(own) <= 12, sorted(own)
