"""Text of a comparison of methods, made from its JSON: figures of each row, tables, a verdict."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]
MACHINE = ("device_name", "threads", "torch", "transformers", "nsa_convert", "date")
"""Keys of ``environment`` that every row of the CSV file repeats."""
DISTANCES = ("kl", "kl_after")
"""KL beyond the budget, where reading in one pass is a measure for all rows; KL of what follows a prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text.

    Attributes:
        title: Title above the table.
        note: How to read it.
        header: Names of the columns.
        rows: The text of each cell, row by row.
    """

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def summary(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a row over its texts and needles; None for figures that it does not have."""
    texts = list(row["texts"].values())
    needles = row["needles"]

    # Densities are those of the texts, or of the needles where there are no texts.
    measured = texts or needles
    return {
        "hits": sum(case["hit"] for case in needles) if needles else None,
        "cases": len(needles),
        "found": known_mean([float(case["hit"]) for case in needles]),
        "nll": known_mean([case["nll"] for case in needles]),
        "cache_bytes": known_mean([case["cache_bytes"] for case in needles]),
        "kl": known_mean([text["kl"] for text in texts]),
        "kl_after": known_mean([text["kl_after"] for text in texts]),
        "captured": known_mean([text["captured"] for text in texts]),
        "oracle": known_mean([text["oracle"] for text in texts]),
        "density_prompt": known_mean([value["density"]["prompt"] for value in measured]),
        "density_steps": known_mean([value["density"]["steps"] for value in measured]),
        "seconds": sum(value["seconds"] for value in [*texts, *needles]),
    }


def distance_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the key in :data:`DISTANCES` that every row with a text has."""
    return (
        "kl" if all(text["kl"] is not None for row in rows for text in row["texts"].values()) else "kl_after"
    )


def csv_rows(report: Report) -> list[dict[str, Any]]:
    """Return one flat row for each row of a comparison, with its plan and the machine's versions."""
    machine = {key: report["environment"][key] for key in MACHINE} if report.get("rows") else {}

    rows = []
    for row in report.get("rows", []):
        keys = ("name", "kind", "budget", "length", "tokens", "visible", "causal", "one_pass")
        flat = {key: row[key] for key in keys} | summary(row)
        # Every row has the columns of all texts, so that the rows share their keys.
        for name in _text_names(report):
            text = row["texts"].get(name, {})
            for key in ("ppl", "ratio", "kl", "ppl_after", "ratio_after", "kl_after"):
                flat[f"{name}_{key}"] = text.get(key)
        rows.append({**flat, **machine, "plan": json.dumps(row["plan"])})
    return rows


def tables(report: Report) -> list[Table]:
    """Return for each length a table per text, and one of needles, mass, density and memory."""
    rows = report.get("rows", [])
    out = []
    for length in sorted({row["length"] for row in rows}):
        mine = [row for row in rows if row["length"] == length]
        for name in _text_names(report):
            out += _text_table(name, length, [row for row in mine if name in row["texts"]])
        out.append(_reading_table(length, mine))
    return out


def _text_table(name: str, length: int, rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return the table of one text at one length; none if no row has read it."""
    if not rows:
        return []

    forms = {"ppl": ".4g", "ratio": ".3f", "kl": ".2g", "ratio_after": ".3f", "kl_after": ".2g"}
    cells = [
        (
            row["name"], row["budget"], "yes" if row["causal"] else "no",
            *(number(row["texts"][name][key], form) for key, form in forms.items()),
        )
        for row in rows
    ]  # fmt: skip

    # The note tells how many tokens follow the prompt.
    last = length - rows[0]["texts"][name]["prompt"]
    note = (
        "ppl is the perplexity of the whole text; x and KL are over the dense model beyond the budget. They "
        "stand where one pass is a measure: no later token chooses keys, and prompts are read like the rest. "
        f"The columns 'last' are over the last {last} tokens, read in decoding steps, for every method."
    )
    header = ("method", "budget", "causal", "ppl", "x", "KL", "x last", "KL last")
    return [Table(title=f"{name}, {length} tokens", note=note, header=header, rows=tuple(cells))]


def _reading_table(length: int, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of needles, mass, density and memory at one length."""
    cells = []
    for row in rows:
        found = summary(row)
        cache = None if found["cache_bytes"] is None else found["cache_bytes"] / 2**20
        cells.append((
            row["name"], row["budget"], number(row["visible"]),
            f"{found['hits']}/{found['cases']}" if found["cases"] else "-", number(found["nll"], ".3f"),
            _mass(found), number(found["density_prompt"], ".2f"), number(found["density_steps"], ".2f"),
            number(cache, ".1f"),
        ))  # fmt: skip

    note = (
        "visible: context that every layer sees whole. needles: read back, teacher-forced, and the mean NLL "
        "of the answers. mass: dense attention captured / best possible, mean over layers and texts. prompt "
        "and steps: pairs read over those of dense attention, counted on the texts, or on the needles where "
        "there are none. MiB: cache of one sequence after the needle's prompt."
    )
    header = ("method", "budget", "visible", "needles", "NLL", "mass", "prompt", "steps", "MiB")
    title = f"what was found and read, {length} tokens"
    return Table(title=title, note=note, header=header, rows=tuple(cells))


def comparison_verdict(report: Report) -> str:
    """Return which method is closest to dense and which lose needles, for each length and budget."""
    groups: dict[tuple[int, str], dict[str, Mapping[str, Any]]] = {}
    dense: dict[int, set[float]] = {}  # depths at which dense attention finds the needle
    for row in report["rows"]:
        if row["kind"] == "dense":
            dense[row["length"]] = {case["depth"] for case in row["needles"] if case["hit"]}
        else:
            groups.setdefault((row["length"], row["budget"]), {})[row["name"]] = row

    parts = []
    distance = distance_of(report["rows"])
    for (length, budget), rows in groups.items():
        distances = {name: summary(row)[distance] for name, row in rows.items()}
        near = {name: value for name, value in distances.items() if value is not None}
        said = []

        # By distance, where a row has read a text.
        if near:
            best = min(near, key=near.__getitem__)
            worst = max(near, key=near.__getitem__)
            said.append(
                f"{best} is closest to dense (KL {near[best]:.3g}), {worst} farthest ({near[worst]:.3g})"
            )

        # By needles, against those that dense attention finds; a run in work has not asked all of them.
        if found := dense.get(length):
            missed = {
                name: {c["depth"] for c in row["needles"] if not c["hit"]} for name, row in rows.items()
            }
            lost = [name for name, depths in missed.items() if depths & found]
            said.append(f"needles are lost by {', '.join(lost)}" if lost else "no needle of dense is lost")

        if said:
            parts.append(f"At {length} tokens, budget {budget}: {'; '.join(said)}.")

    return " ".join(parts) or "Nothing was measured that the dense model can do."


def number(value: float | None, form: str = "") -> str:
    """Return a number as text, a dash for None."""
    return "-" if value is None else format(value, form)


def _mass(found: Mapping[str, Any]) -> str:
    """Return captured mass over the oracle as text, a dash where nothing was hidden."""
    shares = [found[key] for key in ("captured", "oracle")]
    return "-" if shares[0] is None else "/".join(number(share, ".2f") for share in shares)


def _text_names(report: Report) -> list[str]:
    """Return the names of all texts in the order of their first row."""
    return list(dict.fromkeys(name for row in report.get("rows", []) for name in row["texts"]))


def known_mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
