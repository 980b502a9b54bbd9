"""Converted model types in transformers' Auto classes, without importing a model before one is loaded."""

from __future__ import annotations

from typing import Any

from nsa_convert.patch.families import FAMILIES, ModelFamily


def register_stand_ins(config_mapping: Any) -> None:
    """Put a stand-in for the config class of every converted family into transformers' config mapping.

    The Auto classes are often imported while another transformers module is only half loaded; importing the
    model classes then would fail. A stand-in imports nothing until a config is made from it.
    """
    for family in FAMILIES.values():
        config_mapping.register(family.sparse_model_type, _stand_in(family), exist_ok=True)


def register() -> None:
    """Register the converted classes of every family with AutoConfig, AutoModel and AutoModelForCausalLM."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from nsa_convert.patch.models import classes_of

    for family in FAMILIES.values():
        config, model, lm = classes_of(family)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, lm, exist_ok=True)


def _stand_in(family: ModelFamily) -> type:
    """Return a class that becomes the real config class at its first use."""

    def real() -> Any:
        from nsa_convert.patch.models import classes_of

        register()
        return classes_of(family)[0]

    body = {
        "model_type": family.sparse_model_type,
        "__new__": lambda cls, *args, **kwargs: real()(*args, **kwargs),
        "from_dict": classmethod(lambda cls, *args, **kwargs: real().from_dict(*args, **kwargs)),
        "from_pretrained": classmethod(lambda cls, *args, **kwargs: real().from_pretrained(*args, **kwargs)),
    }
    return type(f"NSA{family.class_prefix}ConfigStandIn", (), body)
