"""Recipes by name: those that come with the project, in a checkout or where pip put them."""

from __future__ import annotations

from pathlib import Path

from nsa_convert.errors import UsageError
from nsa_convert.settings import suggest

NOT_RUN = ("accelerate", "base")
"""Folders beside the recipes: presets for ``accelerate launch``, and what recipes build on."""


def recipe_folder() -> Path:
    """Return the folder of the recipes that come with the project: of the checkout, or where pip put them.

    Raises:
        UsageError: They are not installed.
    """
    import site
    import sysconfig

    import nsa_convert

    root = Path(nsa_convert.__file__).parents[1]
    prefixes = (root, Path(sysconfig.get_path("data")), Path(site.getuserbase()))
    places = [root / "recipes", *(prefix / "share" / "nsa_convert" / "recipes" for prefix in prefixes)]
    for place in places:
        if (place / "tiny").is_dir():
            return place
    raise UsageError(
        "the recipes of the project are not installed with it",
        code="CL02",
        hint="`pip install` the checkout or the release file, or give the path of a recipe",
    )


def known_recipes() -> dict[str, Path]:
    """Return name -> file of the recipes of the project that run."""
    return {name: path for name, path in _named("*/*.yaml").items() if path.parent.name not in NOT_RUN}


def known_bases() -> dict[str, Path]:
    """Return name -> file of what the project's recipes build on; such a file names no model."""
    return _named("base/*.yaml")


def _named(pattern: str) -> dict[str, Path]:
    root = recipe_folder()
    return {str(path.relative_to(root).with_suffix("")): path for path in sorted(root.glob(pattern))}


def find_recipe(name: str, folder: Path = Path()) -> Path:
    """Return the file of a recipe given by path or by name.

    Args:
        name: A path, or a name such as ``tiny/nsa``.
        folder: Where a path starts.

    Raises:
        UsageError: There is no such file and no such recipe.
    """
    path = folder / name
    if path.exists() or path.suffix in (".yaml", ".yml"):
        return path
    known = {**known_recipes(), **known_bases()}
    if name not in known:
        raise UsageError(f"there is no recipe '{name}'{suggest(name, known)}", code="CL02", found=name)
    return known[name]
