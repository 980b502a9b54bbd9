"""Access tokens: found in values that are read, and taken out of texts that are shown or written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b|\bapi_org_[A-Za-z0-9]{20,}\b")
"""What tokens of the Hub look like."""
HIDDEN = "[a token]"

_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
_SECRET_KEY = re.compile(r"(?i)(?:^|[_-])(?:token|secret|password|passwd|credentials?|api[_-]?key)$")


def known_secrets() -> list[str]:
    """Return the tokens of the environment, whatever they look like."""
    return [value for key in _VARIABLES if len(value := os.environ.get(key, "")) > 8]


def holds_secret(text: str) -> bool:
    """Return whether a text holds a token."""
    return bool(TOKEN.search(text)) or any(secret in text for secret in known_secrets())


def redact(text: str) -> str:
    """Return a text without the tokens in it."""
    for secret in known_secrets():
        text = text.replace(secret, HIDDEN)

    return TOKEN.sub(HIDDEN, text)


def secret_places(values: Any, where: str = "") -> Iterator[str]:
    """Yield the dotted key of each value that is a token, or is called one; never the value itself."""
    # Mappings and sequences are searched to any depth.
    if isinstance(values, Mapping):
        for key, value in values.items():
            place = f"{where}.{key}" if where else str(key)
            if _SECRET_KEY.search(str(key)):
                yield redact(place)
            else:
                yield from secret_places(value, redact(place))
    elif isinstance(values, (list, tuple)):
        for index, value in enumerate(values):
            yield from secret_places(value, f"{where}[{index}]")
    elif isinstance(values, str) and holds_secret(values):
        yield where
