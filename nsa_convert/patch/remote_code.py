"""The code files that travel with a checkpoint, so that it loads where this package is not installed.

transformers copies remote code as flat files of one directory and follows ``from .x import y`` only. So the
package's own modules are written flat (``nsa_convert/methods/nsa.py`` -> ``nsa_methods_nsa.py``) with
their imports renamed, and two small files beside them hold the classes that ``auto_map`` names.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from nsa_convert.families import family_of_sparse

ENTRY = "nsa_convert.patch.model_classes"
_IMPORT = re.compile(r"^(\s*)from (nsa_convert(?:\.\w+)*) import ", re.MULTILINE)

_CONFIGURATION = '''"""Configuration of a {title} model converted to sparse attention by nsa_convert."""

from .nsa_families import FAMILIES
from .nsa_patch_model_classes import sparse_config_class

{prefix}Config = sparse_config_class(FAMILIES["{dense}"], __name__)
'''

_MODELING = '''"""A {title} model converted to sparse attention by nsa_convert."""

from .configuration_{sparse} import {prefix}Config
from .nsa_families import FAMILIES
from .nsa_patch_model_classes import sparse_model_classes

_classes = sparse_model_classes(FAMILIES["{dense}"], {prefix}Config, __name__)
globals().update({{cls.__name__: cls for cls in _classes.values()}})
'''


def write_code_files(folder: str | os.PathLike, model_type: str) -> list[Path]:
    """Write the code files of a converted model type into a folder.

    Args:
        folder: Where to write; must exist.
        model_type: ``model_type`` of the converted model.

    Returns:
        The files written.
    """
    files = code_files(model_type)
    for name, text in files.items():
        # why: code files beside the weights, inside the staging folder of the caller
        (Path(folder) / name).write_text(text, encoding="utf-8")
    return [Path(folder) / name for name in files]


def code_files(model_type: str) -> dict[str, str]:
    """Return file name -> text of the code files of a converted model type."""
    family = family_of_sparse(model_type)
    names = {
        "title": family.title,
        "dense": family.model_type,
        "sparse": model_type,
        "prefix": f"NSA{family.class_prefix}",
    }
    files = {
        f"configuration_{model_type}.py": _CONFIGURATION.format(**names),
        f"modeling_{model_type}.py": _MODELING.format(**names),
    }
    root = Path(__file__).parent.parent
    pending = [ENTRY]
    while pending:
        module = pending.pop()
        if _flat_name(module) + ".py" in files:
            continue
        source = _source(root, module)
        files[_flat_name(module) + ".py"] = _IMPORT.sub(
            lambda m: f"{m[1]}from .{_flat_name(m[2])} import ", source
        )
        pending += [match[2] for match in _IMPORT.finditer(source)]
    return dict(sorted(files.items()))


def _flat_name(module: str) -> str:
    return "nsa_" + "_".join(module.split(".")[1:])


def _source(root: Path, module: str) -> str:
    base = root.joinpath(*module.split(".")[1:])
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    return path.read_text(encoding="utf-8")
