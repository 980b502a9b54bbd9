"""The converted classes of every family, known to transformers' Auto classes once this module is imported."""

from __future__ import annotations

from typing import Any

import transformers

from nsa_convert.families import FAMILIES, ModelFamily
from nsa_convert.patch.model_classes import sparse_config_class, sparse_model_classes
from nsa_convert.plan import AUTO_CLASSES

_CONFIGS: dict[str, Any] = {}
_MODELS: dict[str, dict[str, type]] = {}
for _family in FAMILIES.values():
    _config = _CONFIGS[_family.model_type] = sparse_config_class(_family, __name__)
    _MODELS[_family.model_type] = sparse_model_classes(_family, _config, __name__)
    _made = (_config, *_MODELS[_family.model_type].values())
    globals().update({cls.__name__: cls for cls in _made})
    transformers.AutoConfig.register(_config.model_type, _config, exist_ok=True)
    for _auto, _ending in AUTO_CLASSES.items():
        if _ending in _MODELS[_family.model_type]:
            getattr(transformers, _auto).register(
                _config, _MODELS[_family.model_type][_ending], exist_ok=True
            )


def config_class(family: ModelFamily) -> type:
    """Return the config class of a converted family."""
    return _CONFIGS[family.model_type]


def model_classes(family: ModelFamily) -> dict[str, type]:
    """Return ending of the name (``"Model"``, ``"ForCausalLM"``, ...) -> class of a converted family."""
    return _MODELS[family.model_type]
