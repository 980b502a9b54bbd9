"""Compile every declared kernel for GPUs that are not here, and read what the result needs.

    python -m tests.kernels.triton.ahead            prints one JSON line for each compiled kernel
    python -m tests.kernels.triton.ahead --write    and records them in ahead.json

Must run without TRITON_INTERPRET: kernels are then compiled for real.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("ahead.json")

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32)}
AMD = {"gfx942": ("hip", "gfx942", 64)}
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}

MATRIX = re.compile(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


Row = tuple[Any, Mapping, Any, str]


def rows() -> Iterator[Row]:
    """Yield ``(kernel, case, configuration, target)``: all that is compiled ahead of time.

    Each configuration for each target with the first case it serves, the other cases with their first
    configuration for one target, and one configuration of each kernel for an AMD target.
    """
    from nsa_convert.kernels.common.toolchain import all_kernels

    for kernel in sorted(all_kernels(), key=lambda kernel: kernel.name):
        seen = set()
        for case in kernel.cases:
            fit = [c for c in kernel.configs if c.serves(case.get("row", 256), case)]
            assert fit, f"{kernel.name}: no configuration serves {case}"
            for config in fit:
                if id(config) not in seen:
                    yield from ((kernel, case, config, target) for target in TARGETS)
                elif config is fit[0]:
                    yield kernel, case, config, "sm_90"
                seen.add(id(config))
        unused = [c for c in kernel.configs if id(c) not in seen]
        assert not unused, f"{kernel.name}: no case compiles {unused}"
        yield kernel, kernel.cases[0], kernel.configs[0], "gfx942"


def few_rows() -> Iterator[Row]:
    """Yield each configuration once, for the targets in turn; those of float32 take too long."""
    turn: dict[int, str] = {}
    for kernel, case, config, target in rows():
        half = case.get("dtype", "bf16") != "fp32"
        if half and target in TARGETS and id(config) not in turn:
            turn[id(config)] = list(TARGETS)[len(turn) % len(TARGETS)]
        if turn.get(id(config)) == target:
            turn[id(config)] = ""
            yield kernel, case, config, target


def signature(kernel: Any, case: Mapping, config: Any) -> tuple[dict, dict, dict]:
    """Return triton's signature, constexprs and attributes; pointers and strides are multiples of 16."""
    names = kernel.fn.arg_names
    constants = {n: v for n, v in {**case, **config.sizes}.items() if n in names}
    types, values, attributes = {}, {}, {}

    for i, name in enumerate(names):
        if name in constants:
            types[name], values[(i,)] = "constexpr", constants[name]
            continue
        made = kernel.type_of(name)
        if isinstance(made, tuple):
            types[name] = made
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(len(made))}
            continue
        types[name] = made.replace("*T", "*" + case.get("dtype", "bf16"))
        if types[name].startswith("*") or name.startswith("s_"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return types, values, attributes


def compiled(kernel: Any, case: Mapping, config: Any, target: str) -> dict[str, Any]:
    """Compile one row and return its registers, stack and shared bytes, and matrix instructions."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    made = triton.compile(
        ASTSource(kernel.fn, *signature(kernel, case, config)),
        target=GPUTarget(*(TARGETS | AMD)[target]),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    code = made.asm["ptx"] if "ptx" in made.asm else made.asm["amdgcn"]
    row = {"shared": made.metadata.shared, "matrix": len(MATRIX.findall(code))}
    if "cubin" in made.asm:
        row |= usage(made.asm["cubin"])
    return row


def usage(cubin: bytes) -> dict[str, int]:
    """Return registers of a thread and bytes of its stack, where spilled registers go."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = USAGE.search(told.stdout).groups()
    return {"registers": int(registers), "stack": int(stack)}


def label(case: Mapping, config: Any) -> str:
    """Name a case and a configuration in one line."""
    sizes = {**case, **config.sizes, "warps": config.num_warps, "stages": config.num_stages}
    return " ".join(f"{k}={v}" for k, v in sizes.items() if k not in ("UPCAST", "DP", "slow"))


def name_of(row: Row) -> str:
    """Return the name of a row in the record."""
    kernel, case, config, target = row
    return f"{kernel.name} {label(case, config)} {target}"


def compile_launch(name: str, arguments: Mapping[str, Any]) -> None:
    """Compile one launch as the runtime would: integers specialised, every argument bound by name.

    Args:
        name: Kernel.
        arguments: What the launch was given; ``{"tensor": dtype}`` stands for a tensor.

    Raises:
        Exception: Whatever triton raises.
    """
    import torch

    from nsa_convert.kernels.common.toolchain import all_kernels

    kernel = next(kernel for kernel in all_kernels() if kernel.name == name)

    def made_of(x: Any) -> Any:
        if isinstance(x, dict):
            return torch.empty(16, dtype=getattr(torch, x["tensor"]))
        return tuple(x) if isinstance(x, list) else x  # JSON knows no tuples

    made = {n: made_of(x) for n, x in arguments.items()}
    kernel.fn.warmup(grid=(1,), **made)


class NoDriver:
    """Answers what triton asks of a GPU before it compiles."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGETS["sm_90"])

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="record the result")
    parser.add_argument("--few", action="store_true", help="each configuration for one target")
    parser.add_argument("--names", action="store_true", help="list the names and compile nothing")
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--launches", type=Path, help="compile the launches in this file, and nothing else")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import triton
    from triton.runtime.driver import driver

    from nsa_convert.kernels.common.toolchain import all_kernels

    if options.launches:
        driver.set_active(NoDriver())
        for launch in json.loads(options.launches.read_text()):
            compile_launch(*launch)
        return
    if options.names:
        driver.set_active(NoDriver())
        for kernel in all_kernels():
            kernel._tuner(kernel.configs)  # refuses keys that are no arguments
    record: dict[str, Any] = {"triton": triton.__version__}
    for row in few_rows() if options.few else rows():
        if options.only in (name := name_of(row)):
            record[name] = {} if options.names else compiled(*row)
            print(json.dumps({name: record[name]}), flush=True)
    if options.write:
        lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in record.items())
        RECORD.write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
