"""Making head profiles: what `inspect --measure` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nsa_convert.cli.frame import hint, print_json, say
from nsa_convert.errors import UsageError
from nsa_convert.settings import read_settings, read_values, suggest

KINDS = ("budgets", "razor", "duo", "distance", "import")
"""What a profile is made of, chosen by ``--set kind=``."""


def write_profile(model: str, method: str | None, out: Path, pairs: tuple[str, ...], as_json: bool) -> None:
    """Make the head profile of a dense model and write it."""
    from nsa_convert.cli.options import parse_settings
    from nsa_convert.hub import dense_folder, resolve_model

    settings = parse_settings(pairs)
    kind = settings.pop("kind", KINDS[0])

    if kind not in KINDS:
        raise UsageError(f"there is no kind '{kind}'{suggest(kind, KINDS)}", code="CL03", found=str(kind))
    if method is not None and kind != KINDS[0]:
        raise UsageError(f"--method belongs to kind=budgets, not to kind={kind}", code="CL02")
    if out.exists():
        raise UsageError(f"{out} exists; choose another file or remove it", code="CL03", where=str(out))

    folder = dense_folder(resolve_model(model, say=say), say)
    profile = _make(folder, kind, method or "ssa", settings)
    profile.save(out)

    if profile.budgets is not None:
        _show_budgets(profile, out, as_json)
        hint(f"next: nsa-convert convert {model} OUT --profile {out} --density 0.5")
        return

    _show_scores(profile, out, as_json)
    share = "" if "threshold" in profile.meta else " --density 0.5"
    hint(f"next: nsa-convert convert {model} OUT --profile {out}{share}")


def _make(folder: Path, kind: str, method: str, settings: dict[str, Any]) -> Any:
    if kind == "budgets":
        from nsa_convert.evaluation.heads.profile import profile_checkpoint

        options = {name: settings.pop(name) for name in ("length", "dtype") if name in settings}
        return profile_checkpoint(folder, method, settings, say=say, **options)

    if kind == "import":
        return _imported(folder, settings)

    from nsa_convert.evaluation.models import load_model

    dtype = settings.pop("dtype", "float32")

    if kind == "razor":
        from nsa_convert.evaluation.heads.retrieval import razor_probe

        chosen = read_values({"period": int, "seed": int}, settings, "--set")
        return razor_probe(load_model(folder, dtype), **chosen)

    if kind == "distance":
        from nsa_convert.evaluation.heads.retrieval import distance_probe

        chosen = {
            "length": 500,
            "tokens": 4096,
            **read_values({"length": int, "tokens": int}, settings, "--set"),
        }
        return distance_probe(
            load_model(folder, dtype), _prose(folder, chosen["tokens"]), length=chosen["length"]
        )

    from nsa_convert.loading import load_tokenizer
    from nsa_convert.training.duo_gates import GateSettings, passkey_cases, train_gates

    gates = read_settings(GateSettings, settings, "--set")
    tokenizer = load_tokenizer(folder)

    cases = passkey_cases(
        _prose(folder, gates.max_length), lambda text: tokenizer.encode(text, add_special_tokens=False), gates
    )

    return train_gates(load_model(folder, dtype), cases, gates, say)


def _imported(folder: Path, settings: dict[str, Any]) -> Any:
    from nsa_convert.checkpoint.source import open_checkpoint
    from nsa_convert.heads.classes import import_profile

    chosen = read_values({"file": str}, settings, "--set")

    if "file" not in chosen:
        raise UsageError("kind=import needs --set file=FILE", code="CL02")

    checkpoint = open_checkpoint(folder, allow_extra_tensors=True)
    return import_profile(chosen["file"], checkpoint.num_layers, checkpoint.geometry.num_kv_heads)


def _prose(folder: Path, tokens: int) -> list[int]:
    """Return the first tokens of the prose text, all of them where it is shorter."""
    from nsa_convert.evaluation.tasks.text import prose_text
    from nsa_convert.loading import load_tokenizer

    return load_tokenizer(folder).encode(prose_text().text, add_special_tokens=False)[:tokens]


def _show_budgets(profile: Any, out: Path, as_json: bool) -> None:
    mass = profile.captured.mean((0, 1)).tolist()  # for each budget
    budgets = profile.budgets.tolist()

    if as_json:
        rows = {"budgets": budgets, "captured": mass, "scores": profile.scores.tolist()}
        print_json({"ok": True, "out": str(out), **rows})
        return

    for budget, kept in zip(budgets, mass, strict=True):
        click.echo(f"{budget:>7,} keys: {kept:.1%} of the attention mass, mean over heads")


def _show_scores(profile: Any, out: Path, as_json: bool) -> None:
    threshold = profile.meta.get("threshold")

    if as_json:
        print_json({"ok": True, "out": str(out), "scores": profile.scores.tolist(), "threshold": threshold})
        return

    scores = profile.scores
    if threshold is not None:
        kept = int((scores >= threshold).sum())
        click.echo(
            f"{kept} of {scores.numel()} key/value heads keep everything (score of {threshold:g} or more)"
        )

    # The heads with the highest scores.
    best = scores.flatten().topk(min(5, scores.numel())).indices.tolist()
    for index in best:
        layer, head = divmod(index, scores.shape[1])
        click.echo(f"layer {layer:>3}, head {head:>3}: {scores[layer, head]:.3f}")
