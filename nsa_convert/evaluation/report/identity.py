"""Model, machine and command of an evaluation, without local paths: reports are made to be published."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from nsa_convert import __version__
from nsa_convert.checkpoint.manifest import MANIFEST
from nsa_convert.config import PAIR, SparseAttentionConfig
from nsa_convert.errors import ConfigError
from nsa_convert.evaluation.models import ModelFacts


def describe_model(facts: ModelFacts, *, same_weights: bool = False) -> dict[str, Any]:
    """Return what a report says about a model.

    Args:
        facts: What its config says.
        same_weights: It is the evaluated model itself with dense attention.

    Returns:
        ``name`` (of the folder), ``model_type``, ``layers_by_method``, and for a converted folder
        ``manifest_sha256``, which ties the report to exactly these files.
    """
    counts = {name: facts.methods.count(name) for name in dict.fromkeys(facts.methods)}
    out: dict[str, Any] = {
        "name": facts.path.resolve().name,
        "model_type": facts.model_type,
        "layers_by_method": counts,
        "manifest_sha256": manifest_hash(facts.path),
    }

    if facts.plan is not None:
        out["patched_in_memory"] = facts.plan.to_dict()
    return {**out, "attention": "dense, over the weights of the evaluated model"} if same_weights else out


def model_fingerprint(model: ModelFacts) -> dict[str, Any]:
    """Return what identifies a checkpoint, without reading its weights."""
    facts = describe_model(model)
    # Without a manifest the files are identified by size and time of their last change.
    if facts["manifest_sha256"] is None:
        rows = sorted(path for path in model.path.iterdir() if path.suffix in {".safetensors", ".json"})
        facts["files"] = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in rows]
    return facts


def manifest_hash(folder: Path) -> str | None:
    """Return the hash of a converted folder's manifest, which holds the hashes of all its files."""
    path = folder / MANIFEST
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def describe_machine(device: str) -> dict[str, Any]:
    """Return versions, device, number of threads and date."""
    return {
        "nsa_convert": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
    }


def processor_name() -> str:
    """Return the name of the processor as Linux reports it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # why: without /proc the architecture stands for the processor's name
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def command_line(
    model: ModelFacts,
    against: ModelFacts | None,
    suite: str,
    settings: Mapping[str, Any],
    plans: Sequence[str] = (),
) -> str:
    """Return the command that repeats an evaluation; models and files are named without their folders.

    Args:
        model: The evaluated model.
        against: The dense checkpoint, or None.
        suite: Name of the suite.
        settings: Settings that were given.
        plans: ``NAME=FILE`` of the plans that a comparison also runs.
    """
    words = ["nsa-convert", "eval", model.path.resolve().name]
    words += [] if against is None else ["--against", against.path.resolve().name]

    # A plan given as a method: its settings are those of the command too.
    if model.plan is not None:
        method, own = _words_of_plan(model.plan)
        words += ["--method", method]
        settings = {**own, **settings}

    words += ["--suite", suite, *(word for plan in plans for word in ("--plan", plan))]
    for key, value in settings.items():
        if isinstance(value, (list, tuple)):
            value = ",".join(str(part) for part in value)
        text = str(value).lower() if isinstance(value, bool) else value
        words += ["--set", f"{key}={text}"]

    return shlex.join(words)


def _words_of_plan(plan: SparseAttentionConfig) -> tuple[str, dict[str, Any]]:
    """Return the method and the settings by which a command names the plan that it was given by --method."""
    if not plan.rules:
        return plan.default.method, dict(plan.default.settings)
    parts = {"prefill": plan.default, **{str(rule.phase): rule for rule in plan.rules}}
    pair = {name: json.dumps({"method": rule.method, **rule.settings}) for name, rule in parts.items()}
    return PAIR, pair


def choose_device(name: str) -> str:
    """Return ``cpu`` or ``cuda`` for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: CUDA was asked for and there is none (RC10).
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, but torch sees no CUDA device", code="RC10")
    return name
