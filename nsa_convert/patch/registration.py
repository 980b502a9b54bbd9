"""Converted model types in transformers' Auto classes, without importing a model before one is loaded."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from nsa_convert.families import FAMILIES, ModelFamily

MODELS = "nsa_convert.patch.models"
"""Importing it makes the classes of all families, which takes the families' own modules."""


def register_stand_ins(config_mapping: Any) -> None:
    """Put a stand-in for the config class of every converted family into transformers' config mapping.

    The Auto classes are often imported while another transformers module is only half loaded; importing the
    model classes then would fail. A stand-in imports nothing until a config is made from it.
    """
    for family in FAMILIES.values():
        config_mapping.register(family.sparse_model_type, _stand_in(family), exist_ok=True)


def register_adapter_targets(constants: Mapping[str, Any]) -> None:
    """Give converted types the layers that peft adapts by default in their dense family (LoRA, IA3, ...).

    Args:
        constants: What ``peft.utils.constants`` holds; its tables are filled in place.
    """
    for name, table in constants.items():
        if not (name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict)):
            continue
        for family in FAMILIES.values():
            if family.model_type in table:
                table.setdefault(family.sparse_model_type, table[family.model_type])


def register() -> None:
    """Make the converted classes of every family known to the Auto classes."""
    importlib.import_module(MODELS)


def _stand_in(family: ModelFamily) -> type:
    """Return a class that becomes the real config class at its first use."""

    def real() -> Any:
        return importlib.import_module(MODELS).config_class(family)

    body = {
        "model_type": family.sparse_model_type,
        "__new__": lambda cls, *args, **kwargs: real()(*args, **kwargs),
        "from_dict": classmethod(lambda cls, *args, **kwargs: real().from_dict(*args, **kwargs)),
        "from_pretrained": classmethod(lambda cls, *args, **kwargs: real().from_pretrained(*args, **kwargs)),
    }
    return type(f"NSA{family.class_prefix}ConfigStandIn", (), body)
