"""Where a converted model's code is: in this package, or in files beside a checkpoint."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any


def write_own_code(folder: str | os.PathLike, model_type: str) -> None:
    """Write the code files that load a converted model into a folder.

    From the package they are made anew; from a flat copy (remote code) the files beside this one are copied.
    """
    if __name__.startswith("nsa_convert."):
        # By name: the flat copy must not follow this import, it has no package to make files from.
        importlib.import_module("nsa_convert.patch.remote_code").write_code_files(folder, model_type)
        return
    for path in Path(__file__).parent.glob("[!_]*.py"):
        # why: code files beside the weights, where the user saves a model
        (Path(folder) / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")


def write_own_reports(folder: str | os.PathLike, model: Any) -> None:
    """Write what ``verify``, ``card`` and ``push`` read of a folder; a flat copy has no means to."""
    if __name__.startswith("nsa_convert."):
        importlib.import_module("nsa_convert.checkpoint.trained").seal_saved(model, Path(folder))
