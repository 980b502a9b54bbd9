"""Reference pages that follow from the code: `make pages` writes them, test_reference.py compares them.

python -m tests.guards.reference          # write the pages
"""

from __future__ import annotations

import csv
import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from nsa_convert.cli import main
from nsa_convert.error_codes import render_markdown
from nsa_convert.evaluation.suites.compare_settings import CompareSettings
from nsa_convert.evaluation.suites.lm_eval_tasks import TaskSettings
from nsa_convert.evaluation.suites.long_settings import LongSettings
from nsa_convert.evaluation.suites.quick_settings import QuickSettings
from nsa_convert.families import FAMILIES
from nsa_convert.methods.parts.registry import METHODS
from nsa_convert.training.recipe.library import known_bases, known_recipes
from nsa_convert.training.recipe.schema import Recipe, Stage
from nsa_convert.training.recipe.sections import FreshModel, Lora, Machine, RopeScaling, Source
from tests.training.combinations import combinations_table

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs"
STEP0 = ROOT / "benchmarks" / "results" / "compare_step0.csv"
NOTICE = "<!-- Written from the code by `make pages`; do not edit. -->"

SUITE_SETTINGS: dict[str, tuple[str, ...]] = {
    "QuickSettings": ("quick",),
    "LongSettings": ("long", "full"),
    "CompareSettings": ("compare",),
    "TaskSettings": ("tasks",),
}
"""Class of settings -> suites that read it."""

RECIPE_PARTS: dict[type, str] = {
    Recipe: "Recipe",
    Stage: "Stage",
    Source: "Data source",
    RopeScaling: "RoPE scaling",
    Lora: "LoRA",
    FreshModel: "Fresh model",
    Machine: "Machine",
}
"""Part of a recipe -> its heading."""


def plain(text: str) -> str:
    """Return a piece of a docstring as one line of Markdown for a table."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(text.split()))
    return text.replace("``", "`").replace("|", "\\|")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def attributes(kind: type) -> dict[str, str]:
    """Return what a dataclass says of its fields in ``Attributes:``, those it inherits included."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        doc = inspect.cleandoc(one.__doc__ or "")
        _, _, part = doc.partition("Attributes:\n")
        lines = re.split(r"^    (?=\w+: )", part.split("\n\n")[0], flags=re.MULTILINE)
        found |= {name: plain(text) for name, _, text in (line.partition(": ") for line in lines if line)}
    return found


def values_of(hint: Any) -> str:
    """Return what a field may hold, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(values_of(one) for one in inner if one is not type(None)))
    if origin is tuple:
        many = {int: "whole numbers", float: "numbers", str: "texts"}
        return f"a list of {many.get(inner[0], values_of(inner[0]))}"
    words = {int: "a whole number", float: "a number", bool: "true, false", str: "text"}
    if hint in words:
        return words[hint]
    if hint in RECIPE_PARTS:
        title = RECIPE_PARTS[hint]
        return f"keys, see [{title}](#{anchor(title)})"
    return "keys with values"


def default_of(field: dataclasses.Field) -> str:
    """Return the default of a field as a plan would say it; nothing where it has to be given."""
    if field.default is dataclasses.MISSING:
        return "" if field.default_factory is dataclasses.MISSING else f"`{field.default_factory()}`"
    value = field.default
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return "none" if value is None else f"`{value}`"


def fields_table(kind: type, first: str, sources: dict[str, str] | None = None) -> str:
    """Return the table of a dataclass: names, defaults, values, meanings, and sources where given."""
    hints, said = get_type_hints(kind), attributes(kind)
    header = [first, "default", "values", "what it is"]
    rows = []
    for field in dataclasses.fields(kind):
        row = [f"`{field.name}`", default_of(field), values_of(hints[field.name]), said.get(field.name, "")]
        rows.append(row if sources is None else [*row, plain(sources.get(field.name, ""))])
    return table(header if sources is None else [*header, "source of the default"], rows)


def contents(text: str) -> str:
    """Return links to the headings of a page, those of the third level below theirs."""
    lines = []
    for marks, heading in re.findall(r"^(##+) (.+)$", text, re.MULTILINE):
        lines.append(f"{'  ' * (len(marks) - 2)}- [{heading}](#{anchor(heading)})")
    return "\n".join(lines)


def anchor(heading: str) -> str:
    """Return what a link to a heading has behind ``#``, as GitHub writes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def methods_table(text: str) -> str:
    """Return the table of methods and of the families they run on."""
    specs = [method.spec for method in METHODS.values()]
    families = [family.title for family in FAMILIES.values()]
    rows = [
        [f"[`{spec.name}`](settings.md#{spec.name})", spec.paper, spec.summary, *["yes"] * len(families)]
        for spec in specs
    ]
    return table(["method", "paper", "what it does", *families], rows)


def step0_table(text: str) -> str:
    """Return untrained methods at equal budgets, as they were measured."""
    rows = [row for row in csv.DictReader(STEP0.open()) if row["kind"] == "trainable"]
    budgets = sorted({int(row["budget"]) for row in rows})
    header = ["method", *(part for budget in budgets for part in (f"{budget}: x, KL", "needle"))]
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = [f"`{name}`"]
        for budget in budgets:
            (row,) = (row for row in rows if row["name"] == name and int(row["budget"]) == budget)
            found = "yes" if row["hits"] == row["cases"] else "no"
            cells += [f"x{float(row['code_ratio']):.3f}, {float(row['code_kl']):.3f}", found]
        lines.append(cells)
    return table(header, lines)


def settings_page() -> str:
    """Return the settings of every method and of every suite."""
    suites = [f"[{name}](#suite-{names[0]})" for names in SUITE_SETTINGS.values() for name in names]
    lines = [
        "# Settings", "", NOTICE, "",
        "A setting is given as `--set key=value`, in a rule of a plan, or to `patch_model`.",
        "[methods.md](methods.md) says what the settings of a method do together.", "",
        "Methods: " + ", ".join(f"[{name}](#{name})" for name in METHODS) + ".", "",
        "Suites of `nsa-convert eval`: " + ", ".join(suites) + ".",
    ]  # fmt: skip
    for name, method in METHODS.items():
        lines += ["", f"## {name}", "", f"{method.spec.title}: {method.spec.summary}.", ""]
        lines.append(fields_table(method.Settings, "setting", dict(method.spec.sources)))
    for kind in (QuickSettings, LongSettings, CompareSettings, TaskSettings):
        names = SUITE_SETTINGS[kind.__name__]
        lines += ["", f"## suite {names[0]}", ""]
        if names[1:]:
            lines += [f"And of `{'`, `'.join(names[1:])}`.", ""]
        lines.append(fields_table(kind, "setting"))
    return "\n".join(lines) + "\n"


def recipes_page() -> str:
    """Return every key of a recipe, and the recipes there are."""
    lines = [
        "# Recipes", "", NOTICE, "",
        "A recipe is a YAML file; [train.md](../howto/train.md) says how to use one and how stages work.",
        "A key without a default has to be given. `--set` takes dotted keys, and a stage goes by its name:",
        "`--set stages.align.lr=1e-4`. In a file `base` names the recipe it builds on.",
    ]  # fmt: skip
    for kind, title in RECIPE_PARTS.items():
        summary = plain(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0])
        lines += ["", f"## {title}", "", summary, "", fields_table(kind, "key")]
    lines += ["", "## What comes with the project", ""]
    lines += [f"Run by name: `nsa-convert train {next(iter(known_recipes()))} --dry-run`.", ""]
    lines.append(table(["recipe", "what it does"], titles(known_recipes())))
    lines += ["", "To build on (`base: NAME`); these name no model:", ""]
    lines.append(table(["base", "what it does"], titles(known_bases())))
    return "\n".join(lines) + "\n"


def titles(files: dict[str, Path]) -> Iterator[list[str]]:
    """Yield name and first line of each recipe."""
    for name, path in files.items():
        first = path.read_text().splitlines()[0]
        yield [f"[`{name}`](../../{path.relative_to(ROOT)})", plain(first.lstrip("# "))]


def command_page() -> str:
    """Return every command with its arguments and options."""
    lines = [
        "# Command line", "", NOTICE, "",
        "Every command takes `--json` for one JSON object on stdout, `--debug` for the traceback of an",
        "error, and `--help`. Exit codes and error codes: [errors.md](errors.md).",
        "`python -m nsa_convert.cli` is the same program.", "",
        "Commands: " + ", ".join(f"[{name}](#{name})" for name in sorted(main.commands)) + ".",
    ]  # fmt: skip
    for name in sorted(main.commands):
        command = main.commands[name]
        context = click.Context(command, info_name=name, parent=click.Context(main, info_name="nsa-convert"))
        usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
        rows = [option_row(one, context) for one in command.params if is_own(one)]
        lines += ["", f"## {name}", "", f"```\n{usage}\n```", "", plain(command.help or "")]
        if rows:
            lines += ["", table(["option", "default", "what it does"], rows)]
    return "\n".join(lines) + "\n"


def is_own(parameter: click.Parameter) -> bool:
    """Return whether it is an option, and not one that every command has."""
    return isinstance(parameter, click.Option) and not {"--json", "--debug"} & set(parameter.opts)


def option_row(option: click.Parameter, context: click.Context) -> list[str]:
    """Return names, default and help of an option."""
    assert isinstance(option, click.Option)
    names, more = option.get_help_record(context) or ("", "")
    default = option.default if option.show_default and option.default is not None else ""
    text = re.sub(r"\s*\[[^\[\]]*default:[^\[\]]*\]$", "", plain(more))
    return [f"`{plain(names)}`", f"`{default}`" if default != "" else "", text]


PAGES: dict[str, Callable[[], str]] = {
    "reference/settings.md": settings_page,
    "reference/recipes.md": recipes_page,
    "reference/cli.md": command_page,
    "reference/errors.md": render_markdown,
}
"""Page in docs/ -> what it has to say."""

PARTS: dict[str, tuple[str, Callable[[str], str]]] = {
    "contents": ("reference/methods.md", contents),
    "methods": ("reference/methods.md", methods_table),
    "step 0": ("howto/choose_a_method.md", step0_table),
    "combinations": ("howto/train.md", lambda _: combinations_table()),
}
"""Mark of a part of a page that is else written by hand -> the page, and the part from the page's text."""


def with_part(text: str, mark: str, part: str) -> str:
    """Return a page with what stands between ``<!-- mark -->`` and ``<!-- /mark -->`` replaced."""
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    assert len(pattern.findall(text)) == 1, f"the page needs one <!-- {mark} --> section"
    return pattern.sub(lambda found: f"{found[1]}{part}\n{found[2]}", text)


def written(page: str) -> str:
    """Return a page as the code has it: all of it, or with its marked parts."""
    if page in PAGES:
        return PAGES[page]()
    text = (FOLDER / page).read_text()
    for mark, (place, make) in PARTS.items():
        text = with_part(text, mark, make(text)) if place == page else text
    return text


def pages() -> list[str]:
    """Return the names of the pages that follow from the code, whole or in part."""
    return [*PAGES, *dict.fromkeys(place for place, _ in PARTS.values())]


if __name__ == "__main__":
    for page in pages():
        (FOLDER / page).write_text(written(page))
