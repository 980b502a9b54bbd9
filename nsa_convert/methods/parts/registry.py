"""The methods there are: one line each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from nsa_convert.config import FULL, PHASES, AttentionGeometry, LayerRule, SparseAttentionConfig
from nsa_convert.errors import ConfigError
from nsa_convert.methods.dsa import DSA
from nsa_convert.methods.flexprefill import FlexPrefill
from nsa_convert.methods.h2o import H2O
from nsa_convert.methods.infllm import InfLLM
from nsa_convert.methods.infllm_v2 import InfLLMv2
from nsa_convert.methods.minference import MInference
from nsa_convert.methods.moba import MoBA
from nsa_convert.methods.msa import MSA
from nsa_convert.methods.nsa import NSA
from nsa_convert.methods.parts.base import SparseMethod
from nsa_convert.methods.parts.dense import FullAttention
from nsa_convert.methods.parts.mix import HeadMix
from nsa_convert.methods.parts.phases import PhaseMix, PhasePart, PhaseParts
from nsa_convert.methods.quest import Quest
from nsa_convert.methods.razor import Razor
from nsa_convert.methods.spargeattn import SpargeAttn
from nsa_convert.methods.ssa import SSA
from nsa_convert.methods.streaming import Streaming
from nsa_convert.methods.tri_shape import TriShape
from nsa_convert.methods.xattention import XAttention
from nsa_convert.settings import read_settings, suggest

METHODS: dict[str, type[SparseMethod]] = {
    "nsa": NSA,
    "ssa": SSA,
    "moba": MoBA,
    "infllm_v2": InfLLMv2,
    "dsa": DSA,
    "msa": MSA,
    "streaming": Streaming,
    "quest": Quest,
    "h2o": H2O,
    "razor": Razor,
    "infllm": InfLLM,
    "xattention": XAttention,
    "flexprefill": FlexPrefill,
    "spargeattn": SpargeAttn,
    "minference": MInference,
    "tri_shape": TriShape,
}


STRUCTURES: dict[str, type[SparseMethod]] = {
    "full": FullAttention,
    "hybrid": HeadMix,
    "phases": PhaseMix,
}
"""What a layer may be beside one of the methods: dense, or a mix of methods by heads or by phases."""

LEFT_OUT: tuple[str, ...] = ()
"""Names of both tables that a copy of this code beside a checkpoint lacks: its plan does not use them."""


def method_class(name: str) -> type[SparseMethod]:
    """Return the class of a method by name.

    Raises:
        ConfigError: No method has this name, or only the installed package has it.
    """
    if name == FULL:
        return _structure(FULL)
    if name not in METHODS:
        _refuse_left_out(name)
        raise ConfigError(f"unknown method '{name}'{suggest(name, {*METHODS, FULL})}", code="RC02")
    return METHODS[name]


def _structure(name: str) -> type[SparseMethod]:
    _refuse_left_out(name)
    return STRUCTURES[name]


def _refuse_left_out(name: str) -> None:
    if name in LEFT_OUT:
        has = ", ".join(sorted({*METHODS, *STRUCTURES}))
        raise ConfigError(
            f"the code that came with this checkpoint has what its plan asked for ({has}), not '{name}': "
            "install nsa_convert, import it, and load the model without trust_remote_code",
            code="RC02",
        )


def parallel_problems(kind: str, methods: Iterable[SparseMethod], title: str) -> list[str]:
    """Return which of some methods processes cannot share this way (:attr:`MethodSpec.parallel`)."""
    table = {**METHODS, **STRUCTURES}
    known = [name for name, method in table.items() if kind in method.spec.parallel]
    unable = sorted({method.spec.name for method in methods} - set(known))
    return [f"{title} knows {', '.join(known)}, not {name}" for name in unable]


def read_rule(rule: LayerRule, where: str) -> tuple[type[SparseMethod], Any]:
    """Return the method class of a rule and its checked settings.

    Raises:
        ConfigError: Unknown method, unknown setting or bad value.
    """
    method = method_class(rule.method)
    return method, read_settings(method.Settings, rule.settings, f"{where} ({rule.method})")


def build_method(rule: LayerRule, geometry: AttentionGeometry, layer_index: int) -> SparseMethod:
    """Build the method module of one layer.

    Raises:
        ConfigError: Unknown method, unknown setting or bad value.
    """
    method, settings = read_rule(rule, f"layer {layer_index}")
    return method(settings, geometry, layer_index)


def build_layer(sparse: SparseAttentionConfig, geometry: AttentionGeometry, layer_index: int) -> SparseMethod:
    """Build the method module of one layer of a plan whose layers count from the front.

    Raises:
        ConfigError: Unknown method, unknown setting or bad value, or methods that cannot share the layer.
    """
    where = f"layer {layer_index}"
    shares = sparse.shares(layer_index, geometry.num_kv_heads)
    rules = (sparse.default, *sparse.rules)
    parts = {
        heads: _read_phases([rules[number] for number in dict.fromkeys(numbers.values())], where)
        for heads, numbers in shares.items()
    }
    if len(parts) == 1:
        ((method, settings),) = parts.values()
        return method(settings, geometry, layer_index)

    # Heads differ. A method whose heads choose together cannot be split because the other phase differs.
    for phase in PHASES:
        numbers = [share[phase] for share in shares.values()]
        for number in sorted({number for number in numbers if numbers.count(number) > 1}):
            name = rules[number].method
            if method_class(name).spec.couples_heads:
                raise ConfigError(
                    f"{where}: {name} chooses for all its heads together, so that the other phase of these "
                    "heads must have one method too",
                    code="CF22",
                )
    mix: Any = _structure("hybrid")
    runs = [run for heads, (method, own) in parts.items() for run in mix.split(method, own, heads)]
    return mix(tuple(sorted(runs, key=lambda run: run.heads)), geometry, layer_index)


def _read_phases(rules: Sequence[LayerRule], where: str) -> tuple[type[SparseMethod], Any]:
    """Return the method class and settings of one rule for both phases, or of one for each."""
    read = [read_rule(rule, where) for rule in rules]
    if len(read) == 1:
        return read[0]
    prefill, decode = (PhasePart(method, settings) for method, settings in read)
    return _structure("phases"), PhaseParts(prefill=prefill, decode=decode)
