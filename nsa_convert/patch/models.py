"""The converted classes of every family."""

from __future__ import annotations

from nsa_convert.patch.families import FAMILIES, ModelFamily
from nsa_convert.patch.modeling import sparse_config_class, sparse_model_classes

_CLASSES: dict[str, tuple[type, type, type]] = {}
for _family in FAMILIES.values():
    _config = sparse_config_class(_family, __name__)
    _CLASSES[_family.model_type] = (_config, *sparse_model_classes(_family, _config, __name__))
    globals().update({cls.__name__: cls for cls in _CLASSES[_family.model_type]})


def classes_of(family: ModelFamily) -> tuple[type, type, type]:
    """Return the config, decoder and causal language model class of a converted family."""
    return _CLASSES[family.model_type]
