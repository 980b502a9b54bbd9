"""Heads in two classes, those that keep everything and those that follow a rule; published files of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nsa_convert.config import FULL, LayerRule, SparseAttentionConfig
from nsa_convert.errors import ConfigError
from nsa_convert.heads.profile import HeadProfile
from nsa_convert.strict_files import read_json_mapping

DUO_FILE = "full_attention_heads.tsv"
DUO_RULE = {"method": "streaming", "num_sinks": 64, "window_size": 256}
"""What DuoAttention deploys its streaming heads with."""
RAZOR_RULE = {"method": "razor"}
TSV_LIMIT = 1 << 20
"""Bytes that are read of a table; a head takes about 20."""


def plan_of_classes(
    profile: HeadProfile, share: float | None = None, rule: Mapping[str, Any] | None = None
) -> SparseAttentionConfig:
    """Return a plan in which the heads with the largest scores stay dense.

    Args:
        profile: With scores; larger for heads that need more of the context.
        share: Share of all key/value heads that stay dense; by default those whose score reaches the
            profile's threshold.
        rule: ``{"method": ..., **settings}`` of the other heads; by default the profile's.

    Raises:
        ConfigError: The share is not in [0, 1], or there is neither a share nor a threshold, or no rule.
    """
    scores = profile.scores
    threshold = profile.meta.get("threshold")
    rule = dict(rule or profile.meta.get("rule") or {})

    # Check what was given.
    if "method" not in rule:
        raise ConfigError("this head profile names no method for the other heads: give one", code="CF22")
    if share is None and threshold is None:
        raise ConfigError(
            "this head profile has no threshold: say which share of heads stays dense", code="CF22"
        )
    if share is not None and not 0 <= share <= 1:
        raise ConfigError(f"the share of dense heads must be between 0 and 1, got {share:g}", code="CF22")

    # The heads that stay dense: those over the threshold, or the best share of all.
    if share is None:
        assert threshold is not None
        dense = scores >= threshold
    else:
        order = scores.flatten().argsort(descending=True, stable=True)
        dense = torch.zeros(scores.numel(), dtype=torch.bool)
        dense[order[: round(share * scores.numel())]] = True
        dense = dense.view_as(scores)

    # One rule for all layers that keep the same heads dense.
    groups: dict[tuple[int, ...], list[int]] = {}
    for layer, row in enumerate(dense.tolist()):
        groups.setdefault(tuple(head for head, is_dense in enumerate(row) if is_dense), []).append(layer)
    rules = [
        LayerRule(method=FULL, layers=tuple(layers), heads=None if len(heads) == scores.shape[1] else heads)
        for heads, layers in groups.items()
        if heads
    ]

    return SparseAttentionConfig(default=LayerRule.from_dict(rule, "head profile"), rules=tuple(rules))


def import_profile(path: str | Path, num_layers: int, num_kv_heads: int) -> HeadProfile:
    """Read a published file of head classes.

    Args:
        path: DuoAttention's folder or its ``full_attention_heads.tsv`` (with ``config.json`` beside it), or
            RazorAttention's JSON ``{layer: [retrieval key/value head, ...]}``.
        num_layers: Layers of the model it is for.
        num_kv_heads: Key/value heads of a layer.

    Raises:
        ConfigError: The file cannot be read, or belongs to a model of another size.
    """
    path = Path(path)
    path = path / DUO_FILE if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"there is no file {path}", code="CF24", where=str(path))

    # The ending of the name says whose file it is.
    read = _read_razor if path.suffix == ".json" else _read_duo
    if path.suffix not in (".json", ".tsv"):
        raise ConfigError(
            f"{path} is no file of head classes that is known",
            code="CF24",
            expected="a folder or .tsv of DuoAttention, or a .json of RazorAttention",
            found=path.suffix or "none",
        )

    return read(path, num_layers, num_kv_heads)


def _read_duo(path: Path, num_layers: int, num_kv_heads: int) -> HeadProfile:
    # One row of gate values for each layer.
    rows = []
    problems = []
    text = path.read_bytes()[:TSV_LIMIT].decode("utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            rows.append([float(cell) for cell in line.split()])
        except ValueError:  # why: collected with the line number and raised together
            problems.append(f"line {number} holds no numbers")

    if not problems and (len(rows), *{len(row) for row in rows}) != (num_layers, num_kv_heads):
        sizes = " or ".join(str(size) for size in sorted({len(row) for row in rows}))
        problems.append(
            f"it has {len(rows)} layers of {sizes or 'no'} heads, the model {num_layers} of {num_kv_heads}"
        )
    if problems:
        raise ConfigError(f"{path.name}: " + "; ".join(problems), code="CF22", where=str(path))

    # Sinks and window as the authors' config has them, where it lies beside the table.
    given = path.with_name("config.json")
    config = read_json_mapping(given) if given.is_file() else {}
    rule = {
        **DUO_RULE,
        "num_sinks": config.get("sink_size", DUO_RULE["num_sinks"]),
        "window_size": config.get("recent_size", DUO_RULE["window_size"]),
    }

    meta = {"kind": "duo", "source": f"DuoAttention gates, {path.name}", "threshold": 0.5, "rule": rule}
    return HeadProfile(scores=torch.tensor(rows), meta=meta)


def _read_razor(path: Path, num_layers: int, num_kv_heads: int) -> HeadProfile:
    scores = torch.zeros(num_layers, num_kv_heads)
    problems = []

    for layer, heads in read_json_mapping(path).items():
        if not layer.isdigit() or int(layer) >= num_layers:
            problems.append(f"layer {layer!r} does not exist: the model has layers 0-{num_layers - 1}")
        elif not isinstance(heads, list) or not all(_is_head(head, num_kv_heads) for head in heads):
            problems.append(f"layer {layer}: heads must be a list of 0-{num_kv_heads - 1}, got {heads!r}")
        else:
            scores[int(layer), heads] = 1.0

    if problems:
        raise ConfigError(f"{path.name}: " + "; ".join(problems), code="CF22", where=str(path))

    meta = {
        "kind": "razor",
        "source": f"RazorAttention heads, {path.name}",
        "threshold": 1.0,
        "rule": RAZOR_RULE,
    }
    return HeadProfile(scores=scores, meta=meta)


def _is_head(value: Any, num_kv_heads: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < num_kv_heads
