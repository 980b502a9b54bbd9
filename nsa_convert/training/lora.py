"""LoRA on the dense weights of a converted model; its new weights are trained and saved whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from nsa_convert.errors import MachineError
from nsa_convert.patch.loading import quiet
from nsa_convert.patch.staging import staged
from nsa_convert.training.parts import Lora


def new_modules(model: nn.Module) -> list[str]:
    """Return the full names of the modules that hold weights conversion added.

    Full names, because peft takes a short one for every module whose name ends in it.
    """
    names = []
    for name, module in model.named_modules():
        inside = ".self_attn.sparse." in f"{name}."
        if inside and any(True for _ in module.parameters(recurse=False)):
            names.append(name)
    return names


def add_adapters(model: nn.Module, lora: Lora) -> nn.Module:
    """Return the model wrapped by peft: adapters on ``lora.targets``, new weights in ``modules_to_save``.

    Raises:
        MachineError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MachineError(
            "train: lora needs the package peft", code="CL11", hint="pip install 'nsa-convert[train]'"
        ) from error
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(model, lora),
        modules_to_save=new_modules(model) or None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _targets(model: nn.Module, lora: Lora) -> list[str]:
    """Return the full names of the dense layers that get an adapter."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-1] in lora.targets and ".sparse." not in name
    ]


def save_adapters(model: Any, folder: Path) -> nn.Module:
    """Write the adapter to ``folder`` and return the model with it merged into its weights."""
    with staged(folder) as place, quiet():
        model.save_pretrained(place)
    return model.merge_and_unload()
