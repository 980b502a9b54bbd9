"""Whether a model was trained on the texts that it is evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nsa_convert.checkpoint.manifest import RECIPE
from nsa_convert.errors import NsaConvertError
from nsa_convert.evaluation.tasks.text import EvalText
from nsa_convert.strict_files import read_mapping

KINDS = {"code": "python", "prose": "reference"}
"""Kind of a default text -> kind of training data that contains it."""


def seen_in_training(folder: Path, texts: Sequence[EvalText]) -> list[str]:
    """Return a warning if evaluation texts are in the training data of the model.

    The recipe in the folder names kinds and files of the data: only those are compared, not the contents.

    Args:
        folder: Folder of the evaluated model.
        texts: The evaluation texts.
    """
    sources = _sources(folder)
    kinds = {source.get("kind") for source in sources}
    # What stands between question and answer of long recall documents is prose.
    kinds |= {"reference" for source in sources if source.get("filler")}
    names = {Path(str(source["path"])).name for source in sources if source.get("path")}

    seen = [
        text.name
        for text in texts
        if KINDS.get(text.kind) in kinds
        or (text.kind == "file" and text.source.removeprefix("file ") in names)
    ]
    if not seen:
        return []

    count = f"{len(seen)} of {len(texts)} evaluation texts"
    return [
        f"{count} ({', '.join(seen)}) are in this model's training data: its figures on them say little "
        "about other texts"
    ]


def _sources(folder: Path) -> list[dict]:
    """Return the data sources of the recipe in a folder; none if there is no readable recipe."""
    if not (folder / RECIPE).is_file():
        return []
    try:
        stages = read_mapping(folder / RECIPE).get("stages")
    except NsaConvertError:  # why: without a readable recipe nothing can be compared
        return []

    rows = [row for row in stages if isinstance(row, dict)] if isinstance(stages, list) else []
    found = [source for row in rows for source in row.get("data") or []]
    return [source for source in found if isinstance(source, dict)]
