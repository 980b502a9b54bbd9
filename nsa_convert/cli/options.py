"""Turn the text of options into values."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from nsa_convert.config import FULL, LayerRule, SparseAttentionConfig
from nsa_convert.errors import ConfigError, UsageError
from nsa_convert.strict_files import parse_yaml
from nsa_convert.training.recipe.bases import read_recipe_values


def parse_lengths(text: str, option: str) -> tuple[int, ...]:
    """Read ``8192,32768``."""
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:  # why: what is no number is refused below
        lengths = ()

    if not lengths or min(lengths) < 1:
        raise UsageError(
            f"{option} takes whole numbers such as 8192,32768, got '{text}'", code="CL03", found=text
        )
    return lengths


def parse_layers(text: str) -> tuple[int, ...]:
    """Read ``0-3,7``."""
    layers: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or (last and int(last) < int(first)):
            raise UsageError(
                f"--layers takes numbers and ranges such as 0-3,7, got '{text}'", code="CL03", found=text
            )

        layers += range(int(first), int(last or first) + 1)
    return tuple(layers)


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Read ``key=value`` pairs; values are YAML scalars or lists."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set takes key=value, got '{pair}'", code="CL03", found=pair)
        settings[key.strip()] = parse_yaml(value, f"--set {key}")
    return settings


def read_method(
    method: str | None, pairs: Sequence[str], known: Collection[str]
) -> tuple[dict[str, Any], SparseAttentionConfig | None]:
    """Split the pairs of --set between a command and the --method it runs an unmodified checkpoint with.

    Args:
        method: Name of the method, or None.
        pairs: ``key=value``.
        known: Settings of the command; with a method, all others belong to the method.

    Returns:
        The settings of the command and the plan, None without a method.
    """
    settings = parse_settings(pairs)

    if method is None:
        return settings, None

    from nsa_convert.methods.parts.registry import read_rule

    own = {key: value for key, value in settings.items() if key not in known}
    plan = SparseAttentionConfig(default=LayerRule(method=method, settings=own))
    for rule in (plan.default, *plan.rules):
        read_rule(rule, "--method")

    return {key: value for key, value in settings.items() if key in known}, plan


def read_plan(
    method: str | None,
    config: str | None,
    pairs: Sequence[str],
    layers: str | None,
    profile: str | None = None,
    density: float | None = None,
) -> SparseAttentionConfig:
    """Return the plan that the options of ``convert`` describe."""
    settings = parse_settings(pairs)

    if profile is not None or density is not None:
        if layers is not None or config is not None:
            raise UsageError("a --profile decides the layers; leave out --layers and --config", code="CL02")
        return _with_settings(_profile_plan(profile, density, method), settings)

    if config is not None:
        if method is not None or layers is not None:
            raise UsageError("--config holds the whole plan; leave out --method and --layers", code="CL02")
        return _with_settings(read_plan_file(Path(config)), settings)

    if method is None:
        raise UsageError(
            "name a --method, or a --config file", code="CL02", hint="`nsa-convert methods` lists them"
        )

    # Without --layers all layers use the method, else all others stay dense.
    rule = LayerRule(
        method=method, settings=settings, layers=None if layers is None else parse_layers(layers)
    )
    if rule.layers is None:
        return SparseAttentionConfig(default=rule)
    return SparseAttentionConfig(default=LayerRule(method=FULL), rules=(rule,))


def read_plan_file(path: Path) -> SparseAttentionConfig:
    """Return the plan of a file with ``sparse_attention``, such as a recipe, or of MInference's head file.

    Raises:
        ConfigError: There is no such file, or it holds no plan.
    """
    from nsa_convert.heads.patterns import is_head_file, read_head_file

    if is_head_file(path):
        return read_head_file(path)
    values = read_recipe_values(path)
    if "sparse_attention" not in values:
        raise ConfigError(f"{path} has no key 'sparse_attention'", code="RC08", where=str(path))
    return SparseAttentionConfig.from_dict(values["sparse_attention"])


def read_named_plan(text: str) -> Any:
    """Read ``NAME=FILE``, or ``NAME=PROFILE.safetensors@SHARE`` for a head profile.

    Returns:
        A :class:`~nsa_convert.evaluation.suites.compare_plans.NamedPlan`.

    Raises:
        UsageError: The text has another form.
        ConfigError: There is no such file, or it holds no plan.
    """
    from nsa_convert.evaluation.suites.compare_plans import NamedPlan

    name, equals, given = text.partition("=")
    if not equals or not name.strip() or not given:
        raise UsageError(f"--plan takes NAME=FILE, got '{text}'", code="CL03", found=text)

    # The share of NAME=PROFILE.safetensors@SHARE; in other file names an @ has no meaning.
    file, at, share = given.partition("@")
    path = Path(file)
    if path.suffix == ".safetensors":
        plan = _profile_plan(file, _share(share) if at else None, None)
    else:
        path = Path(given)
        plan = read_plan_file(path)

    return NamedPlan(
        name=name.strip(), source=path.name + (f"@{share}" if path == Path(file) and at else ""), plan=plan
    )


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(
            f"a head profile takes FILE@SHARE with a number, got '@{text}'", code="CL03"
        ) from None


def _profile_plan(profile: str | None, density: float | None, method: str | None) -> SparseAttentionConfig:
    if profile is None:
        raise UsageError("--density belongs to a --profile", code="CL02")
    from nsa_convert.heads.classes import plan_of_classes
    from nsa_convert.heads.profile import HeadProfile, plan_from_profile

    read = HeadProfile.load(profile)

    # Classes of heads: those that retrieve, and the others.
    if read.error is None:
        return plan_of_classes(read, density, None if method is None else {"method": method})

    # Budgets, which were measured with one method.
    if method is not None:
        raise UsageError("this --profile was measured with its method; leave out --method", code="CL02")
    if density is None:
        raise UsageError("a --profile of budgets needs a --density", code="CL02")
    return plan_from_profile(read, density)


def _with_settings(plan: SparseAttentionConfig, settings: dict[str, Any]) -> SparseAttentionConfig:
    """Return the plan with settings changed in every rule that is not dense."""

    def changed(rule: LayerRule) -> LayerRule:
        if rule.method == FULL:
            return rule
        return dataclasses.replace(rule, settings={**rule.settings, **settings})

    return SparseAttentionConfig(
        default=changed(plan.default), rules=tuple(changed(rule) for rule in plan.rules)
    )
