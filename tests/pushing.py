"""A folder to publish and a Hub on this machine to publish it to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from nsa_convert.push import plan_push, push_plan
from tests.fake_hub import fake_hub
from tests.publishable import publishable

ROOT = Path(__file__).parents[1]
REPO = "tester/tiny"
TOKEN = "hf_" + "a1B2" * 8
COMMIT = r"POST .*/commit/"
BLOB = r"PUT /_lfs/"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return publishable(tmp_path_factory.mktemp("published"))


@pytest.fixture
def model(original, tmp_path):
    return shutil.copytree(original, tmp_path / "tiny-nsa")


@pytest.fixture
def hub(monkeypatch):
    with fake_hub() as server:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield server


def push(model, **options):
    told, waits = [], []
    report = push_plan(plan_push(model, REPO, **options), say=told.append, wait=waits.append)
    return report, told, waits


def outside(hub, **more):
    """Return the environment of a process that talks to the hub and keeps its caches to itself."""
    env = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "PYTHONPATH")}
    return {**env, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, **more}
