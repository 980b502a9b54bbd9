"""Which implementation runs: ``reference`` (dense mask, any dtype) or ``torch`` (block-gathered)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from nsa_convert.errors import BackendError

BACKENDS = ("reference", "torch")
# A plain global, shared by threads: torch.compile cannot trace a ContextVar.
_current = "torch"


def current_backend() -> str:
    """Return the name of the backend that ops use now."""
    return _current


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside the ``with`` block on one backend, in every thread.

    Args:
        name: ``"reference"`` builds a TQ x TK mask and serves as the truth for tests; ``"torch"`` gathers
            blocks and never builds one.

    Raises:
        BackendError: The name is not a backend.
    """
    if name not in BACKENDS:
        raise BackendError(
            f"unknown backend {name!r}", expected=", ".join(BACKENDS), found=name, hint="choose one of these"
        )
    global _current
    before, _current = _current, name
    try:
        yield
    finally:
        _current = before
