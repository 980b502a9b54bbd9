"""The methods there are: one line each."""

from __future__ import annotations

from typing import Any

from nsa_convert.config import FULL, AttentionGeometry, LayerRule, suggest
from nsa_convert.errors import ConfigError
from nsa_convert.methods.base import MethodSpec, SparseMethod
from nsa_convert.methods.dsa import DSA
from nsa_convert.methods.full import FullAttention
from nsa_convert.methods.infllm_v2 import InfLLMv2
from nsa_convert.methods.moba import MoBA
from nsa_convert.methods.msa import MSA
from nsa_convert.methods.nsa import NSA
from nsa_convert.methods.ssa import SSA
from nsa_convert.methods.streaming import Streaming

METHODS: dict[str, type[SparseMethod]] = {
    "nsa": NSA,
    "ssa": SSA,
    "moba": MoBA,
    "infllm_v2": InfLLMv2,
    "dsa": DSA,
    "msa": MSA,
    "streaming": Streaming,
}


def method_class(name: str) -> type[SparseMethod]:
    """Return the class of a method by name.

    Raises:
        ConfigError: No method has this name.
    """
    if name == FULL:
        return FullAttention
    if name not in METHODS:
        raise ConfigError(f"unknown method '{name}'{suggest(name, {*METHODS, FULL})}", code="RC02")
    return METHODS[name]


def method_specs() -> list[MethodSpec]:
    """Return the metadata of every method, in the order of the table."""
    return [method.spec for method in METHODS.values()]


def read_rule(rule: LayerRule, where: str) -> tuple[type[SparseMethod], Any]:
    """Return the method class of a rule and its checked settings.

    Raises:
        ConfigError: Unknown method, unknown setting or bad value.
    """
    method = method_class(rule.method)
    return method, method.read_settings(rule.settings, f"{where} ({rule.method})")


def build_method(rule: LayerRule, geometry: AttentionGeometry, layer_index: int) -> SparseMethod:
    """Build the method module of one layer.

    Raises:
        ConfigError: Unknown method, unknown setting or bad value.
    """
    method, settings = read_rule(rule, f"layer {layer_index}")
    return method(settings, geometry, layer_index)
