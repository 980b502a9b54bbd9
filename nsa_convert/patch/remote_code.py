"""The code files that travel with a checkpoint, so that it loads where this package is not installed.

transformers copies remote code as flat files of one directory and follows ``from .x import y`` only. Three
files hold what the plan of the checkpoint needs of this package, written by
:mod:`nsa_convert.patch.code_bundle`: the config class, the attention of its methods on plain torch, and the
model classes.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nsa_convert import __version__
from nsa_convert.config import SparseAttentionConfig
from nsa_convert.families import FAMILIES, family_of_sparse
from nsa_convert.methods.parts.mix import HeadMix
from nsa_convert.methods.parts.phases import PhaseMix
from nsa_convert.methods.parts.registry import METHODS, STRUCTURES, read_rule
from nsa_convert.patch.code_bundle import ENTRIES, File, bundle

CODE_FILES = ("configuration", "sparse_attention", "modeling")
"""Beginnings of the names of the code files; ``_<model_type>.py`` follows."""

_REGISTRY = "nsa_convert.methods.parts.registry"
_PARTS = {
    "sparse_attention": ("errors", "settings", "config", "families", "patterns", "kernels", "methods"),
    "modeling": ("plan", "patch"),
}

_WHAT = {
    "configuration": "Configuration of a {title} model with sparse attention ({methods}).",
    "sparse_attention": "Sparse attention ({methods}) on plain torch: key patterns, kernels and methods.",
    "modeling": "A {title} model with sparse attention ({methods}): layers, caches, masks and model classes.",
}
_HEAD = """{what}

Written by nsa_convert {version} out of its own sources, with what the plan of this checkpoint
(sparse_attention in config.json) needs of them. The lines between the parts name the files of nsa_convert
that the parts come from. A name that two of those files have stands here with that of its file in front.
Licence: Apache 2.0, as nsa_convert's.
"""

_ENTRIES = {
    "configuration": '''"""The config class that config.json names (auto_map)."""

from nsa_convert.families import FAMILIES
from nsa_convert.patch.model_classes import sparse_config_class

{prefix}Config = sparse_config_class(FAMILIES["{dense}"], __name__)
''',
    "sparse_attention": "",
    "modeling": '''"""The model classes that config.json names (auto_map): {prefix}ForCausalLM and others."""

from {entries}.configuration_{sparse} import {prefix}Config
from nsa_convert.families import FAMILIES
from nsa_convert.patch.model_classes import sparse_model_classes

_classes = sparse_model_classes(FAMILIES["{dense}"], {prefix}Config, __name__)
globals().update({{cls.__name__: cls for cls in _classes.values()}})
''',
}


def write_code_files(folder: str | os.PathLike, config: Mapping[str, Any]) -> list[Path]:
    """Write the code files of a converted model into a folder.

    Args:
        folder: Where to write; must exist.
        config: config.json of the converted model.

    Returns:
        The files written.

    Raises:
        UnsupportedModelError: It is not the config of a converted model.
        ConfigError: Its plan is not valid.
    """
    files = code_files(config)
    for name, text in files.items():
        # why: code files beside the weights, inside the staging folder of the caller
        (Path(folder) / name).write_text(text, encoding="utf-8")
    return [Path(folder) / name for name in files]


def code_files(config: Mapping[str, Any]) -> dict[str, str]:
    """Return file name -> text of the code files that a converted model needs.

    Args:
        config: config.json of the converted model.

    Raises:
        UnsupportedModelError: It is not the config of a converted model.
        ConfigError: Its plan is not valid.
    """
    family = family_of_sparse(config["model_type"])
    used = plan_classes(SparseAttentionConfig.from_dict(config["sparse_attention"]))
    return dict(_code_files(family.model_type, tuple(used)))


def plan_classes(sparse: SparseAttentionConfig) -> list[str]:
    """Return the names, of both tables of the registry, of what the layers of a plan are made of.

    Raises:
        ConfigError: A rule of the plan is not valid.
    """
    names = set()
    for rule in (sparse.default, *sparse.rules):
        method, _ = read_rule(rule, "sparse_attention")
        names.add(method.spec.name)

        if rule.heads is not None:
            names.add(HeadMix.spec.name)
        if rule.phase is not None:
            names.add(PhaseMix.spec.name)

    return [name for name in (*METHODS, *STRUCTURES) if name in names]


@functools.lru_cache(maxsize=8)
def _code_files(dense: str, used: tuple[str, ...]) -> dict[str, str]:
    # What the templates name.
    family = FAMILIES[dense]
    names = {
        "title": family.title,
        "methods": ", ".join(used),
        "dense": dense,
        "sparse": family.sparse_model_type,
        "prefix": f"NSA{family.class_prefix}",
        "entries": ENTRIES,
    }

    # One file of each kind, with the parts of the package that go into it.
    files = [
        File(
            name=f"{kind}_{family.sparse_model_type}",
            head=_HEAD.format(what=_WHAT[kind].format(**names), version=__version__),
            entry=_ENTRIES[kind].format(**names),
            parts=_PARTS.get(kind, ()),
        )
        for kind in CODE_FILES
    ]

    return {f"{name}.py": text for name, text in bundle(files, _tables(used)).items()}


def _tables(used: Collection[str]) -> dict[tuple[str, str], str]:
    """Return the tables of the registry, written with the entries of a plan alone."""
    tables = {"METHODS": METHODS, "STRUCTURES": STRUCTURES}
    texts = {}

    # The two tables with the classes of the plan.
    for title, table in tables.items():
        entries = "".join(f'    "{name}": {table[name].__name__},\n' for name in table if name in used)
        body = f"{{\n{entries}}}" if entries else "{}"
        texts[_REGISTRY, title] = f"{title}: dict[str, type[SparseMethod]] = {body}"

    # The names of all other methods, for the error of a plan that asks for one.
    left_out = [name for table in tables.values() for name in table if name not in used]
    entries = "".join(f'    "{name}",\n' for name in left_out)
    texts[_REGISTRY, "LEFT_OUT"] = (
        f"LEFT_OUT: tuple[str, ...] = (\n{entries})" if left_out else "LEFT_OUT = ()"
    )

    return texts
