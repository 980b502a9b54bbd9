"""Turn a dense Llama, Qwen or Mistral checkpoint into a natively sparse one.

Importing this package loads neither torch nor transformers. As soon as transformers' Auto classes are
imported (before or after), the converted model types are known to them.
"""

from __future__ import annotations

import importlib
from typing import Any

import wrapt

__version__ = "0.2.0"

_EXPORTS = {
    "AttentionGeometry": "nsa_convert.config",
    "LayerRule": "nsa_convert.config",
    "SparseAttentionConfig": "nsa_convert.config",
    "BlockSelection": "nsa_convert.patterns",
    "BlockTopK": "nsa_convert.patterns",
    "SequenceLayout": "nsa_convert.patterns",
    "SinkWindow": "nsa_convert.patterns",
    "TokenSelection": "nsa_convert.patterns",
    "block_topk": "nsa_convert.kernels",
    "compressed_attention": "nsa_convert.kernels",
    "merge_lse": "nsa_convert.kernels",
    "sparse_attention": "nsa_convert.kernels",
    "use_backend": "nsa_convert.kernels",
    "patch_model": "nsa_convert.patch.patching",
    "set_mode": "nsa_convert.patch.patching",
    "unpatch_model": "nsa_convert.patch.patching",
    "convert_checkpoint": "nsa_convert.convert",
    "revert_checkpoint": "nsa_convert.verification",
    "verify_checkpoint": "nsa_convert.verification",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'nsa_convert' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


@wrapt.when_imported("transformers.models.auto.configuration_auto")
def _register(auto: Any) -> None:
    importlib.import_module("nsa_convert.patch.registration").register_stand_ins(auto.CONFIG_MAPPING)


@wrapt.when_imported("peft.utils.constants")
def _register_adapters(constants: Any) -> None:
    importlib.import_module("nsa_convert.patch.registration").register_adapter_targets(vars(constants))
