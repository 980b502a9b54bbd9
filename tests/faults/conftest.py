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
