from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.checkpoints import write_dense


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> Path:
    return write_dense(tmp_path_factory.mktemp("pristine") / "model")


@pytest.fixture
def source(pristine, tmp_path) -> Path:
    """A fresh checkpoint in ten shards to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """An uninterrupted run of the dense case."""
    # Imported here: this file is read before the interpreter of triton is asked for, see tests/conftest.py.
    from tests.training.recipes import run

    out = tmp_path_factory.mktemp("whole") / "run"
    run(out, "dense")
    return out


@pytest.fixture(scope="session")
def cut(tmp_path_factory):
    """The same run, stopped after step 4, with checkpoints of steps 2 and 4."""
    from nsa_convert.training.run.runner import Interrupted
    from tests.training.recipes import run

    out = tmp_path_factory.mktemp("cut") / "run"
    with pytest.raises(Interrupted):
        run(out, "dense", "pretrain 3/")
    return out


@pytest.fixture
def stopped(cut, tmp_path):
    """A copy of the stopped run to damage."""
    from tests.faults.runs import copied

    return copied(cut, tmp_path / "run")
