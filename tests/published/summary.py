"""The line at the end of a test run that says which published recipes ran, and how long they took."""

from __future__ import annotations

import json
from typing import Any

PROPERTY = "published recipe"
"""Property of a test report: name and seconds of a recipe that ran."""
WITHOUT = "without a recipe"
"""Property of a test report: trainable methods and families that no recipe is an example of."""


def report_line(stats: dict[str, list[Any]]) -> str | None:
    """Return the line, or None where no recipe ran."""
    ran: dict[str, float] = {}
    without: list[str] = []
    for report in stats.get("passed", []):
        for key, value in getattr(report, "user_properties", ()):
            if key == PROPERTY:
                name, seconds = json.loads(value)
                ran[name] = seconds
            elif key == WITHOUT:
                without = json.loads(value)
    if not ran:
        return None
    missing = f"; without a recipe: {', '.join(without)}" if without else ""
    return f"published recipes: {len(ran)} ran in {sum(ran.values()):.0f} s{missing}"
