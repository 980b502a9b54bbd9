"""One word for one thing: a name that modules share means one thing, wherever it is defined."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2] / "nsa_convert"
BACKENDS = {"reference", "torch_backend", "triton_backend", "dense_torch", "sparse_torch", "__init__"}
"""Files of a kernel's folder that implement the same operation, under the same name."""


def public_names(path: Path) -> list[str]:
    """Return the functions and classes that a module defines for others."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    body = ast.parse(path.read_text()).body
    return [node.name for node in body if isinstance(node, kinds) and not node.name.startswith("_")]


def homonyms(root: Path) -> dict[str, list[str]]:
    """Return the public names that two modules define, and where."""
    places = defaultdict(list)
    for path in sorted(root.rglob("*.py")):
        for name in public_names(path):
            places[name].append(path)

    def is_one_operation(paths: list[Path]) -> bool:
        folders = {path.parent for path in paths}
        return len(folders) == 1 and all(path.stem in BACKENDS for path in paths)

    return {
        name: [path.relative_to(root).as_posix() for path in paths]
        for name, paths in places.items()
        if len(paths) > 1 and not is_one_operation(paths)
    }


def test_no_two_modules_define_the_same_name():
    assert homonyms(ROOT) == {}


def test_two_modules_with_the_same_name_are_found(tmp_path: Path):
    for folder, name in (("gates", "reference"), ("gates", "torch_backend"), ("training", "losses")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.py").write_text("def attend(): ...\n\n\ndef _own(): ...\n")
    assert homonyms(tmp_path) == {
        "attend": ["gates/reference.py", "gates/torch_backend.py", "training/losses.py"]
    }
    (tmp_path / "training" / "losses.py").unlink()
    assert homonyms(tmp_path) == {}
