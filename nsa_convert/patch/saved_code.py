"""What a model asks of the installed package, and does without where its code came with a checkpoint."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nsa_convert.errors import BackendError

IS_INSTALLED = __name__.startswith("nsa_convert.")
"""Whether this is the package, and not a copy of some of its code beside a checkpoint."""


def package_function(module: str, name: str) -> Callable[..., Any]:
    """Return a function of the package by name: a copy beside a checkpoint does not have it.

    Raises:
        BackendError: This is such a copy.
    """
    if not IS_INSTALLED:
        raise BackendError(
            f"the code that came with this checkpoint cannot do this (nsa_convert.{module}.{name}): install "
            "nsa_convert, import it, and load the model without trust_remote_code"
        )
    return getattr(importlib.import_module(f"nsa_convert.{module}"), name)


def write_own_code(folder: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Write the code files that load a converted model into a folder.

    From the package they are made anew; a copy copies itself.

    Args:
        folder: Where to write.
        config: Config of the model.
    """
    if IS_INSTALLED:
        package_function("patch.remote_code", "write_code_files")(folder, config)
        return
    for path in Path(__file__).parent.glob(f"*_{config['model_type']}.py"):
        # why: code files beside the weights, where the user saves a model
        (Path(folder) / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")


def write_own_reports(folder: str | os.PathLike, model: Any) -> None:
    """Write what ``verify``, ``card`` and ``push`` read of a folder; a copy has no means to."""
    if IS_INSTALLED:
        package_function("checkpoint.trained", "seal_saved")(model, Path(folder))
