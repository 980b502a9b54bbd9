"""What a bundle of code keeps, leaves out and renames, and what it refuses because a name would change."""

from __future__ import annotations

import importlib

import pytest

from nsa_convert.patch import code_bundle
from nsa_convert.patch.code_bundle import ENTRIES, BundleError, File, bundle

LOW = '''
from torch import Tensor

LIMIT = 3
"""Never more than this."""
UNUSED = 4


def _size(x: Tensor) -> int:
    """Return the rows."""
    return len(x)


def size(x: Tensor) -> int:
    return int(f"{_size(x)}") + LIMIT  # a comment, and a word: _size


def unused() -> None:
    print(UNUSED)
'''
HIGH = '''
"""What this file is for."""

from torch import Tensor

from nsa_convert.low.first import size as counted


def _size(x: Tensor, *, depth: int = 0) -> int:
    here = {"_size": depth}
    return here["_size"]


# What stands above a function goes with it.
def both(x: Tensor) -> int:
    return counted(x) + _size(x, depth=len("_size"))
'''


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that bundles two modules of a package that is not this one."""
    monkeypatch.setattr(code_bundle, "ROOT", tmp_path / "nsa_convert")

    def run(low: str = LOW, high: str = HIGH) -> dict[str, str]:
        for name, text in (("low/first", low), ("high/second", high), ("high/other", "thing = len\n")):
            path = tmp_path / "nsa_convert" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        entry = f"from {ENTRIES}.config_x import NUMBER\nfrom nsa_convert.high.second import both\n"
        files = (
            File(name="config_x", head="Config.", entry="NUMBER = 1\n"),
            File(name="low_x", head="Low.", entry="", parts=("low",)),
            File(name="high_x", head="High.", entry=f"{entry}RESULT = both([NUMBER])\n", parts=("high",)),
        )
        return bundle(files, {})

    return run


def test_what_is_used_is_kept_under_a_name_of_its_own(write, tmp_path, monkeypatch):
    files = write()
    low, high = files["low_x"], files["high_x"]
    assert "UNUSED" not in low
    assert "def unused" not in low
    assert "Never more than this." in low
    assert "def _first_size(x: Tensor)" in low
    assert 'return int(f"{_first_size(x)}") + LIMIT  # a comment, and a word: _size' in low
    assert "from .low_x import (\n    size,\n)" in high
    assert "from .config_x import (\n    NUMBER,\n)" in high
    assert "# nsa_convert/high/second.py\n#\n# What this file is for." in high
    assert 'here = {"_size": depth}' in high
    assert "# What stands above a function goes with it.\ndef both" in high
    assert 'return size(x) + _second_size(x, depth=len("_size"))' in high

    place = tmp_path / "copied"
    place.mkdir()
    (place / "__init__.py").touch()
    for name, text in files.items():
        (place / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.import_module("copied.high_x").RESULT == 1 + 3 + 5


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("def size(x: Tensor)", "def size(_first_size: Tensor, x=None)", "names to locals"),
        ("    return len(x)", "    global _size\n    _size = None", "names to locals|rebound"),
        ("LIMIT", "print", "something else in a file: print"),
        ("from torch import Tensor", "from torch.nn import Parameter as Tensor", "one name for two imports"),
        ("from torch", "from nsa_convert.high.other import thing\nfrom torch", None),
    ],
)
def test_what_would_change_the_meaning_of_a_name_is_refused(write, old, new, says):
    write()
    low = LOW.replace(old, new)
    assert low != LOW
    if says is None:
        low, says = low.replace("len(x)", "thing(x)"), "low_x would need"
    with pytest.raises(BundleError, match=says):
        write(low)
