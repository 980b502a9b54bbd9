"""README.md and docs/ run as they are printed: commands, Python and YAML, in order, a folder for each page.

Names in capitals are files and folders of these names: ``MODEL`` is a tiny dense model, ``RECIPE`` a small
recipe, ``OUT`` what the page's commands write, or where none does, MODEL converted. Eight processes are two.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.marks import these_quick
from tests.published.pages import (
    NOT_RUN,
    PAGES,
    ROOT,
    SMALLER,
    STAND_INS,
    Piece,
    command_lines,
    not_printed,
    pieces,
    unmarked,
)
from tests.published.places import run_command, two_processes, write_model, write_recipe
from tests.published.scaling import set_words
from tests.pushing import hub  # noqa: F401

MODELS: dict[str, dict[str, Any]] = {
    "docs/reference/conversion.md": {"num_hidden_layers": 30},
    "docs/reference/methods.md": {"num_hidden_layers": 8, "num_key_value_heads": 4},
    "docs/reference/evaluation.md": {"num_hidden_layers": 5},
}
"""Page -> sizes its examples need of MODEL: layers and heads they name, lengths they read."""
QUICK = {"README.md", "docs/reference/methods.md"}


def write_places(page: str, folder: Path) -> None:
    """Write what the names in capitals stand for, and link what a page expects of the checkout."""
    write_model(folder, **MODELS.get(page, {}))
    write_recipe(folder)
    for name in ("recipes", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    found = pieces(page)
    written = {piece.words[3] for piece in found if piece.text.startswith("nsa-convert convert")}
    for name in ("OUT", "my-sparse-model"):
        if name not in written and any(re.search(rf"\b{name}\b", piece.text) for piece in found):
            run_command(["nsa-convert", "convert", "MODEL", name, "--method", "nsa"])


def small(piece: Piece, number: int) -> list[str]:
    """Return the words of a command line with less work: two processes for eight, and what SMALLER adds."""
    words = [STAND_INS.get(word, word) for word in piece.words]
    words += SMALLER.get((piece.page, piece.text), "").split()
    if words[0] in ("torchrun", "accelerate"):
        # The page shows ways to start one run; here each is a run of its own.
        return [*two_processes(words), "--set", f"out=runs/{number}"]
    return words


def run_python(texts: list[str]) -> None:
    """Run a page's Python blocks in a process of their own: what they forget to import is not there."""
    place = Path("blocks.py")
    place.write_text("\n".join(texts))
    run_command(["python", str(place)])


def run_plan(piece: Piece, number: int) -> None:
    """Use a block of YAML or JSON for what it is: a config, a plan, or stages of a recipe."""
    values, out = yaml.safe_load(piece.text), f"from-block-{number}"
    place = Path(f"{out}.yaml")
    if "model_type" in values:
        from transformers import AutoConfig

        config = AutoConfig.for_model(**values, num_hidden_layers=4)
        assert config.sparse_attention == values["sparse_attention"]
    elif "base" in values:
        place.write_text(piece.text)
        sizes = {f"stages.{one['name']}.tokens": 1024 for one in values["stages"]}
        run_command(["nsa-convert", "train", str(place), *set_words(sizes)])
    elif "sparse_attention" in values:
        place.write_text(piece.text)
        run_command(["nsa-convert", "convert", "MODEL", out, "--config", str(place)])
    else:
        (one,) = values["stages"]
        recipe = {**yaml.safe_load(Path("RECIPE").read_text()), **values, "out": out}
        place.write_text(yaml.safe_dump(recipe))
        Path("chats.jsonl").write_text((ROOT / "recipes" / "tiny" / "chats.jsonl").read_text())
        sizes = {"seq_len": 256, "tokens": 1024, "batch_tokens": 512}
        sizes = {f"stages.{one['name']}.{key}": size for key, size in sizes.items()}
        run_command(["nsa-convert", "train", str(place), *set_words(sizes)])


@pytest.mark.parametrize("page", these_quick(PAGES, {*QUICK, *(page for page in PAGES if not pieces(page))}))
def test_a_page_runs_as_printed(page, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    found = pieces(page)
    if any(" push " in piece.text for piece in found):
        request.getfixturevalue("hub")
    if found:
        write_places(page, tmp_path)
    texts = []
    for number, piece in enumerate(found):
        if piece.language == "python":
            # A later block of a page may use the names of an earlier one.
            texts.append(piece.text)
            run_python(texts)
        elif piece.language != "bash":
            run_plan(piece, number)
        elif (page, piece.text) not in NOT_RUN:
            output = run_command(small(piece, number))
            lost = [] if piece.words[1] == "generate" else not_printed(piece.printed, output)
            assert not lost, f"{piece.text} does not print\n" + "\n".join(lost) + f"\nbut\n{output}"


def test_what_is_not_run_is_still_printed():
    printed = {(piece.page, piece.text) for page in PAGES for piece in pieces(page)}
    assert set(NOT_RUN) | set(SMALLER) <= printed
    assert all(NOT_RUN.values())


def test_printed_lines_can_be_wrong():
    block = "$ nsa-convert verify OUT\nfiles: 12 of 12, 0.5 s\n$ make x  # y\nlayers 0-29: nsa ...\n"
    (_, files), (line, layers) = command_lines(block)
    assert (line, layers) == ("make x", ("layers 0-29: nsa ...",))
    assert not_printed(files, "  files: 3 of 3, 14 s\nmore") == []
    assert not_printed(files, "files: 3 of 3") == list(files)
    assert not_printed(layers, "layers 0-1: nsa num_blocks=3") == []
    assert not_printed(layers, "layers 0-1: ssa") == list(layers)
    assert list(command_lines("make x\nmake y")) == [("make x", ()), ("make y", ())]


@pytest.mark.parametrize("page", PAGES)
def test_commands_stand_in_blocks_that_are_run(page):
    assert unmarked(page) == []
