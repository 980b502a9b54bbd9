"""Code files as earlier versions wrote them: every module a flat file of its own."""

from __future__ import annotations

import re
from pathlib import Path

from nsa_convert.checkpoint.manifest import write_manifest
from nsa_convert.families import family_of_sparse
from nsa_convert.patch.code_bundle import ROOT
from nsa_convert.patch.remote_code import CODE_FILES

_IMPORT = re.compile(r"^(\s*)from (nsa_convert(?:\.\w+)*) import ", re.MULTILINE)
_CONFIGURATION = """from .nsa_families import FAMILIES
from .nsa_patch_model_classes import sparse_config_class

{prefix}Config = sparse_config_class(FAMILIES["{dense}"], __name__)
"""
_MODELING = """from .configuration_{sparse} import {prefix}Config
from .nsa_families import FAMILIES
from .nsa_patch_model_classes import sparse_model_classes

_classes = sparse_model_classes(FAMILIES["{dense}"], {prefix}Config, __name__)
globals().update({{cls.__name__: cls for cls in _classes.values()}})
"""


def make_flat(folder: Path, model_type: str) -> list[str]:
    """Replace the code files of a converted folder, and note it in its manifest; return the new names."""
    for kind in CODE_FILES:
        (folder / f"{kind}_{model_type}.py").unlink()
    family = family_of_sparse(model_type)
    names = {"prefix": f"NSA{family.class_prefix}", "dense": family.model_type, "sparse": model_type}
    files = {
        f"configuration_{model_type}": _CONFIGURATION.format(**names),
        f"modeling_{model_type}": _MODELING.format(**names),
    }
    pending = ["nsa_convert.patch.model_classes"]
    while pending:
        module = pending.pop()
        if _flat(module) in files:
            continue
        base = ROOT.joinpath(*module.split(".")[1:])
        source = (base / "__init__.py" if base.is_dir() else base.with_suffix(".py")).read_text()
        files[_flat(module)] = _IMPORT.sub(lambda m: f"{m[1]}from .{_flat(m[2])} import ", source)
        pending += [match[2] for match in _IMPORT.finditer(source)]
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    write_manifest(folder, {})
    return [f"{name}.py" for name in files]


def _flat(module: str) -> str:
    return "nsa_" + "_".join(module.split(".")[1:])
