"""LoRA on the dense weights of a converted model; weights that conversion added are trained in full."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from nsa_convert.checkpoint.staging import staged
from nsa_convert.errors import MachineError
from nsa_convert.extras import pip_line
from nsa_convert.loading import quiet
from nsa_convert.training.recipe.sections import Lora


def new_modules(model: nn.Module) -> list[str]:
    """Return the full names of the modules that hold weights added by conversion.

    Full names, because peft matches a short name with every module whose name ends in it.
    """
    names = []
    for name, module in model.named_modules():
        inside = ".self_attn.sparse." in f"{name}."
        if inside and any(True for _ in module.parameters(recurse=False)):
            names.append(name)
    return names


def add_adapters(model: nn.Module, lora: Lora) -> nn.Module:
    """Return the model wrapped by peft: adapters on ``lora.targets``, new modules in ``modules_to_save``.

    Raises:
        MachineError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MachineError(
            "train: lora needs the package peft", code="CL11", hint=pip_line("train")
        ) from error

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(model, lora),
        modules_to_save=new_modules(model) or None,
        task_type="CAUSAL_LM",
    )

    # peft copies the modules to save: they must be unsharded at that moment.
    with _whole(model, config.modules_to_save or []):
        return get_peft_model(model, config)


@contextlib.contextmanager
def _whole(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Replace sharded weights (FSDP2) of some modules by whole ones inside the block, for peft to copy.

    The copies are what is trained. Copies and adapters are small: each process holds all of them, and the
    Trainer averages their gradients. The modules themselves get their sharded weights back, frozen.

    Args:
        model: The model.
        names: Full names of the modules.
    """
    # Module name -> parameter name -> parameter as it was.
    cut = {}
    for name in names:
        module = model.get_submodule(name)
        cut[name] = dict(module.named_parameters(recurse=False))
        for own, parameter in cut[name].items():
            if hasattr(parameter, "full_tensor"):
                mine: Any = parameter.detach()  # a DTensor
                setattr(module, own, nn.Parameter(mine.full_tensor()))

    modules = {name: model.get_submodule(name) for name in names}

    yield

    for name, parameters in cut.items():
        for own, parameter in parameters.items():
            setattr(modules[name], own, parameter.requires_grad_(False))


def _targets(model: nn.Module, lora: Lora) -> list[str]:
    """Return the full names of the dense linear layers that get an adapter."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-1] in lora.targets and ".sparse." not in name
    ]


def save_adapters(model: Any, folder: Path, *, is_main: bool) -> None:
    """Write the adapter to ``folder``; every process of a sharded model calls this, the main one writes."""
    with staged(folder) if is_main else contextlib.nullcontext(folder) as place, quiet():
        model.save_pretrained(place, is_main_process=is_main)  # why: the adapter, inside a staging folder


def merged(model: Any, folder: Path, base: nn.Module | None) -> nn.Module:
    """Return the model with its adapter merged into its weights.

    Args:
        model: The model with its adapter.
        folder: Folder the adapter was saved to.
        base: The unsharded model the adapter belongs to, where ``model`` is sharded; else None.
    """
    from peft import PeftModel

    return (model if base is None else PeftModel.from_pretrained(base, folder)).merge_and_unload()


def load_adapters(model: Any, folder: Path) -> None:
    """Load the weights of a saved adapter, and the new weights saved with it, into a model with adapters."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
