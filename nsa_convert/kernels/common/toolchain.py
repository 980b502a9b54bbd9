"""The table of triton kernels: how each is declared, configured, chosen and launched.

Every file ``triton_*.py`` of this package declares its kernels here, so that one table holds them all and a
test can compile each of its rows ahead of time. Only these files import this one; nothing else needs triton.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor


def interpreted() -> bool:
    """Return whether kernels run in triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return bool(triton.knobs.runtime.interpret)


def upcast(dtype: torch.dtype) -> bool:
    """Return the constexpr ``UPCAST`` of all products: the interpreter multiplies bfloat16 wrongly."""
    return interpreted() and dtype == torch.bfloat16


def rows_contiguous(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors with a last dim of stride 1, copied where they have another."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def strides(**tensors: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the strides of ``[B, T, H, ...]`` tensors over batch rows, tokens and heads as ``s_<name>``."""
    return {f"s_{n}": x.stride()[:3] for n, x in tensors.items()}


def padded_dim(dim: int) -> int:
    """Return the head dim kernels work with: the next power of two, at least 16."""
    return max(16, triton.next_power_of_2(dim))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Config:
    """One way to launch a kernel.

    Attributes:
        sizes: Constexprs of the kernel, such as ``{"BN": 64}``.
        num_warps: Warps of 32 threads in a program.
        num_stages: Loads in flight in a loop.
        max_row: Used only when a key row (padded head dim times bytes of an element) is at most this long:
            longer rows would not fit shared memory.
        min_row: Used only when a key row is longer than this.
        only: Used only when the constexprs named here have one of the values listed.
    """

    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    max_row: int = 1024
    min_row: int = -1
    only: Mapping[str, tuple] = dataclasses.field(default_factory=dict)

    def serves(self, row: int, arguments: Mapping[str, Any]) -> bool:
        """Return whether this configuration may run with these arguments."""
        fits = self.min_row < row <= self.max_row
        return fits and all(arguments[n] in values for n, values in self.only.items())

    def arguments(self) -> dict[str, int]:
        """Return the keyword arguments of a launch."""
        return {**self.sizes, "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclasses.dataclass(kw_only=True, eq=False)
class Kernel:
    """A triton kernel, its configurations, and how to compile it without a GPU.

    Attributes:
        fn: The ``triton.jit`` function.
        configs: Ways to launch it; one of them should allow any row.
        key: Constexpr arguments that make a new shape class: the choice is made once for each.
        types: Triton types of the arguments that are no constexprs: ``"*T"`` is a pointer to the dtype of q,
            ``"*fp32"`` or ``"*i32"`` another, ``"i32"`` or ``"fp32"`` a number, a tuple of them a tuple.
            Strides (``s_...``) that are not named here are a tuple of three, as :func:`strides` makes it.
        cases: Values of the remaining constexprs that the ahead-of-time test compiles; ``"dtype"`` in a case
            (``"bf16"`` by default) replaces the T of ``"*T"``, ``"row"`` is the row length in bytes (256).
    """

    fn: Any
    configs: tuple[Config, ...]
    key: tuple[str, ...]
    types: Mapping[str, str | tuple[str, ...]]
    cases: tuple[Mapping[str, Any], ...]

    def __post_init__(self) -> None:
        self._tuners: dict[tuple[Config, ...], Any] = {}

    @property
    def name(self) -> str:
        """Module and function name, for tables."""
        return f"{self.fn.fn.__module__.removeprefix('nsa_convert.kernels.')}.{self.fn.fn.__name__}"

    def type_of(self, name: str) -> str | tuple[str, ...]:
        """Return the triton type of an argument that is no constexpr."""
        return self.types.get(name, ("i32",) * 3)

    def fitting(self, row: int, arguments: Mapping[str, Any]) -> tuple[Config, ...]:
        """Return the configurations that may run, only the first one under the interpreter.

        Raises:
            ValueError: There is none.
        """
        fit = tuple(c for c in self.configs if c.serves(row, arguments))
        if not fit:
            raise ValueError(f"{self.name} has no configuration for rows of {row} bytes and {arguments}")
        return fit if _tuning and not interpreted() else fit[:1]

    def launch(self, grid: Any, like: Tensor, row: int, **arguments: Any) -> None:
        """Run the kernel on the device of ``like``.

        The first launch of a shape class times every configuration that fits and keeps the fastest, in
        memory and in triton's cache folder; with one configuration nothing is timed.

        Args:
            grid: Programs, or a function of the constexprs that returns their number.
            like: Any tensor on the device.
            row: Bytes of a key row: padded head dim times the size of an element.
            arguments: All arguments but those the configuration gives.
        """
        configs = self.fitting(row, arguments)

        with _device_of(like):
            if len(configs) == 1:
                chosen = configs[0].arguments()
                size = grid({**arguments, **chosen}) if callable(grid) else grid
                if all(size):
                    self.fn[size](**arguments, **chosen)
            elif callable(grid) or all(grid):
                self._tuner(configs)[grid](**arguments)

    def _tuner(self, configs: tuple[Config, ...]) -> Any:
        if configs not in self._tuners:
            listed = [
                triton.Config(dict(c.sizes), num_warps=c.num_warps, num_stages=c.num_stages) for c in configs
            ]
            self._tuners[configs] = triton.autotune(listed, key=list(self.key), cache_results=True)(self.fn)
        return self._tuners[configs]


_tuning = True


@contextlib.contextmanager
def without_tuning() -> Iterator[None]:
    """Launch the first configuration that fits inside the block, and compile no other."""
    global _tuning
    before = _tuning
    _tuning = False
    try:
        yield
    finally:
        _tuning = before


KERNELS: list[Kernel] = []
"""Every kernel that was declared; :func:`all_kernels` imports the files first."""


def declare(
    *,
    types: Mapping[str, str | tuple[str, ...]],
    configs: Sequence[Config] = (Config(),),
    key: Sequence[str] = (),
    cases: Sequence[Mapping[str, Any]],
) -> Callable[[Callable], Kernel]:
    """Compile a function with ``triton.jit`` and enter it in :data:`KERNELS`; see :class:`Kernel`.

    Raises:
        ValueError: An argument of the kernel has no type, or no configuration takes the longest rows.
    """

    def make(function: Callable) -> Kernel:
        names = list(inspect.signature(function).parameters)
        known = {*types, *(n for c in configs for n in c.sizes), *(n for c in cases for n in c)}
        unknown = [n for n in names if n not in known and not n.startswith("s_")]
        if unknown or max(c.max_row for c in configs) < 1024:
            raise ValueError(f"{function.__name__}: no type for {unknown}, or no configuration for long rows")

        kernel = Kernel(
            fn=triton.jit(function), configs=tuple(configs), key=tuple(key), types=types, cases=tuple(cases)
        )
        KERNELS.append(kernel)
        return kernel

    return make


def all_kernels() -> list[Kernel]:
    """Import every ``triton*.py`` of the package and return the kernels they declare."""
    package = importlib.import_module("nsa_convert.kernels")
    for found in pkgutil.walk_packages(package.__path__, "nsa_convert.kernels."):
        if found.name.rpartition(".")[2].startswith("triton"):
            importlib.import_module(found.name)
    return list(KERNELS)


def _device_of(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()
