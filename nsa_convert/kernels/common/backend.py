"""Which implementation runs: ``reference`` (dense mask), ``torch`` (block-gathered) or ``triton`` (GPU)."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nsa_convert.errors import BackendError

BACKENDS = ("auto", "reference", "torch", "triton")
# A plain global, shared by threads: torch.compile cannot trace a ContextVar.
_current = "auto"

MAX_HEAD_DIM = 256
"""Largest head dim of the triton kernels."""

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# The kernels and the reference do not travel with a checkpoint: a copy of this code there runs without them.
_IS_INSTALLED = __name__ == "nsa_convert.kernels.common.backend"
_HAS_KERNELS = _IS_INSTALLED and importlib.util.find_spec("triton") is not None
_ENTRIES = {
    "triton": (
        "attention.triton_backend.attend_dense",
        "attention.triton_backend.attend_pattern",
        "compressed.triton_backend.attend_cells",
        "gates.triton_backend.gated_sum",
    ),
    "reference": (
        "attention.reference.attend_dense",
        "attention.reference.attend_pattern",
        "compressed.reference.attend_cells",
    ),
}
"""Functions of the backends that are not imported before one runs."""
_loaded: dict[str, Callable] = {}
_told: set[str] = set()


def current_backend() -> str:
    """Return the name given to :func:`use_backend`, ``"auto"`` outside of it."""
    return _current


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside the ``with`` block on one backend, in every thread.

    Args:
        name: ``"auto"``, the default, takes ``"triton"`` for GPU tensors it can serve and ``"torch"`` for all
            others; ``"reference"`` builds a TQ x TK mask and serves as the truth for tests; ``"torch"``
            gathers blocks and never builds one; ``"triton"`` runs compiled kernels on a GPU (float64 goes to
            ``"torch"``).

    Raises:
        BackendError: The name is not a backend, or one that only the installed package has.
    """
    if name not in BACKENDS:
        raise BackendError(
            f"unknown backend {name!r}", expected=", ".join(BACKENDS), found=name, hint="choose one of these"
        )
    if name == "reference" and not _IS_INSTALLED:
        raise BackendError("the code beside a checkpoint has no reference backend: install nsa_convert")

    global _current
    before = _current
    _current = name
    try:
        yield
    finally:
        _current = before


def choose_backend(q: Tensor, value_dim: int | None = None) -> str:
    """Return the backend for these queries: ``"reference"``, ``"torch"`` or ``"triton"``.

    Args:
        q: ``[B, TQ, HQ, D]``.
        value_dim: Head dim of the values where it may differ from D.

    Raises:
        BackendError: ``"triton"`` was asked for and cannot run on these tensors.
    """
    if _current in ("reference", "torch"):
        return _current

    # On a CPU the kernels run in triton's interpreter alone, and only when asked for by name.
    if q.device.type != "cuda":
        if _current == "auto":
            return "torch"
        if q.device.type != "cpu" or os.environ.get("TRITON_INTERPRET", "0") != "1":
            raise BackendError(
                f"the triton backend cannot run on {q.device.type} tensors",
                expected="tensors on a GPU",
                found=q.device.type,
                hint="move the tensors to the GPU, or use the backend 'torch'; on a CPU the kernels run only "
                "in triton's interpreter, for tests: set TRITON_INTERPRET=1 before anything imports triton",
            )

    reason = _unserved(q, q.shape[-1] if value_dim is None else value_dim)
    if reason is None:
        return "triton"

    if _current == "triton" and not _HAS_KERNELS:
        raise BackendError(f"the triton backend cannot run: {reason}", hint="pip install triton")

    # Warn once for each reason; a graph that is being traced cannot warn.
    if not torch.compiler.is_compiling() and reason not in _told:
        _told.add(reason)
        warnings.warn(f"sparse attention runs on the torch backend: {reason}", stacklevel=3)
    return "torch"


def implementation(
    op: str, q: Tensor, gathered: Callable, value_dim: int | None = None
) -> Callable[..., Any]:
    """Return the function that computes an op for these queries.

    Args:
        op: The function of the other backends, as ``folder.function``: it is in ``triton_backend.py`` and in
            ``reference.py`` of that folder of ``kernels``.
        q: ``[B, TQ, HQ, D]``.
        gathered: ``attend`` of the torch backend.
        value_dim: Head dim of the values where it may differ from D.

    Raises:
        BackendError: ``"triton"`` was asked for and cannot run on these tensors.
    """
    name = choose_backend(q, value_dim)
    if name == "torch":
        return gathered
    folder, _, function = op.partition(".")
    return kernel_function(f"{folder}.{'triton_backend' if name == 'triton' else name}", function)


def is_kernel_failure(error: BaseException) -> bool:
    """Return whether an error comes from compiling or launching a kernel."""
    seen: BaseException | None = error
    while seen is not None:
        if type(seen).__module__.partition(".")[0] == "triton":
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def kernel_function(module: str, name: str) -> Callable:
    """Return a function of ``nsa_convert.kernels.<module>``, imported when it is first asked for."""
    _load(module, name)
    return _loaded[f"{module}.{name}"]


def _load(module: str, name: str) -> bool:
    """Import a function, and those of all ops of its backend, into ``_loaded``.

    torch.compile runs this while it traces and then reads the dict, but does not see what a second call adds.
    """
    backend = "reference" if module.endswith(".reference") else "triton"
    for key in (*_ENTRIES[backend], f"{module}.{name}"):
        if key not in _loaded:
            path, _, function = key.rpartition(".")
            _loaded[key] = getattr(importlib.import_module(f"nsa_convert.kernels.{path}"), function)
    return True


# What torch.compiler.assume_constant_result does; calling it here would import the compiler, which takes
# longer than everything that `inspect` does.
_load._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _unserved(q: Tensor, value_dim: int) -> str | None:
    """Return why the kernels cannot take these tensors, or None."""
    if not _HAS_KERNELS:
        return "triton or the installed nsa_convert package is missing"
    if q.dtype not in KERNEL_DTYPES:
        return f"there are no kernels for {q.dtype}"
    if not 0 < q.shape[-1] <= MAX_HEAD_DIM or value_dim != q.shape[-1]:
        return f"there are no kernels for head dims {q.shape[-1]} and {value_dim}"
    return None
