"""The notebooks in examples/ run from top to bottom and print what is stored in them, numbers apart."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.marks import these_quick
from tests.published.pages import ROOT, not_printed

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "examples").glob("*.ipynb"))}
QUICK = {"head_profiles"}
MOST_BYTES = 100_000


def cells(name: str, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOKS[name].read_text())["cells"] if cell["cell_type"] == kind]


def text_of(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)


def printed(cell: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that a cell printed or returned; progress and pictures are left out."""
    for output in cell["outputs"]:
        if output["output_type"] == "stream" and output["name"] == "stdout":
            yield from text_of(output["text"]).splitlines()
        elif output["output_type"] == "execute_result":
            yield from text_of(output["data"].get("text/plain", "")).splitlines()


@pytest.mark.parametrize("name", these_quick(NOTEBOOKS, QUICK))
def test_a_notebook_runs_as_stored(name, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(
        notebook, timeout=600, startup_timeout=600, kernel_name="python3", resources=place
    )
    client.execute()
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for stored, cell in zip(cells(name, "code"), ran, strict=True):
        lost = not_printed(printed(stored), "\n".join(printed(cell)))
        assert not lost, f"{text_of(stored['source'])}\ndoes not print\n" + "\n".join(lost)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_stored_and_small(name):
    code = cells(name, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run it as a whole"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert [output for output in outputs if output["output_type"] == "error"] == []
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    assert any(list(printed(cell)) for cell in code)
    assert NOTEBOOKS[name].stat().st_size < MOST_BYTES


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_lead_somewhere(name):
    text = "\n".join(text_of(cell["source"]) for cell in cells(name, "markdown"))
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    assert [target for target in targets if not (ROOT / "examples" / target).exists()] == []


def test_the_readme_names_their_folder():
    """Everything else in the folder is a job file, each of which test_clusters.py runs."""
    assert len(NOTEBOOKS) >= 3
    assert "](examples)" in (ROOT / "README.md").read_text()


def test_printed_lines_are_read():
    stream = {"output_type": "stream", "name": "stdout", "text": ["a 1\n", "b"]}
    noise = {"output_type": "stream", "name": "stderr", "text": "bar"}
    value = {"output_type": "execute_result", "data": {"text/plain": "c"}}
    assert list(printed({"outputs": [stream, noise, value]})) == ["a 1", "b", "c"]
