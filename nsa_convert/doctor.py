"""What this machine can run, as a block to paste into a report."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nsa_convert import __version__
from nsa_convert.extras import EXTRAS

PACKAGES = ("torch", "transformers", "safetensors", "huggingface_hub", "numpy", "accelerate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorReport:
    """State of the machine.

    Attributes:
        versions: Package -> version, Python and the system included.
        device: What computation runs on.
        kernel: Outcome of a tiny kernel run.
        kernel_ok: Whether it agreed with the reference.
        cores: Processor cores.
        memory_gb: Main memory in all and free, or None where the system does not say.
        disk_free_gb: Free space here and in the cache's place.
        missing: Optional packages that are not installed: what for, and the pip line.
        hub: Whether a Hub token and offline mode are set; never the token.
    """

    versions: dict[str, str]
    device: str
    kernel: str
    kernel_ok: bool
    cores: int
    memory_gb: tuple[float, float] | None
    disk_free_gb: dict[str, float]
    missing: dict[str, dict[str, str]]
    hub: dict[str, bool]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """Return the report for people."""
        memory = "unknown" if self.memory_gb is None else "{} GB, {} GB free".format(*self.memory_gb)
        disk = ", ".join(f"{name} {free} GB free" for name, free in self.disk_free_gb.items())
        hub = f"token {'set' if self.hub['token'] else 'not set'}{', offline' if self.hub['offline'] else ''}"

        rows = [
            *self.versions.items(),
            ("device", self.device),
            ("kernel", self.kernel),
            ("cores", self.cores),
            ("memory", memory),
            ("disk", disk),
            ("hub", hub),
        ]

        lines = [f"{name:16} {value}" for name, value in rows]
        lines += [
            f"missing          {name}, for {m['for']}: {m['install']}" for name, m in self.missing.items()
        ]
        return "\n".join(lines)


def examine_machine() -> DoctorReport:
    """Look at versions, device, a tiny kernel run, memory, disk and optional packages."""
    outcome, ok = _kernel_run()
    return DoctorReport(
        versions=_versions(),
        device=_device(),
        kernel=outcome,
        kernel_ok=ok,
        cores=os.cpu_count() or 1,
        memory_gb=host_memory(),
        disk_free_gb=_disk(),
        missing=_missing(),
        hub=_hub(),
    )


def _versions() -> dict[str, str]:
    found = {"nsa_convert": __version__, "python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # why: a missing package is what this report is there to show
            found[name] = "missing"
    return found


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"cpu, {torch.get_num_threads()} threads"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"


def _kernel_run() -> tuple[str, bool]:
    """Run window attention on tiny tensors with the reference and the default backend, and compare."""
    import torch

    from nsa_convert.kernels import sparse_attention, use_backend
    from nsa_convert.patterns import SinkWindow

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 96, 4, 16, generator=generator)
    k, v = (torch.randn(1, 96, 2, 16, generator=generator) for _ in range(2))
    pattern = SinkWindow(num_sinks=4, window_size=16)

    try:
        with use_backend("reference"):
            expected, _ = sparse_attention(q, k, v, pattern)
        begin = time.perf_counter()
        got, _ = sparse_attention(q, k, v, pattern)
        milliseconds = (time.perf_counter() - begin) * 1e3
    except Exception as error:  # why: a failing kernel is what this report is there to show
        return f"failed: {type(error).__name__}: {error}", False

    difference = float((got - expected).abs().max())
    return f"torch backend within {difference:.0e} of the reference, {milliseconds:.1f} ms", difference < 1e-5


def host_memory() -> tuple[float, float] | None:
    """Return the memory of this machine and how much of it is free, in GB; None where it is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # why: without /proc the memory is not known, and the report says so
        return None

    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return round(sizes["MemTotal"] / 1e6, 1), round(sizes.get("MemAvailable", 0) / 1e6, 1)


def _disk() -> dict[str, float]:
    places = {"here": Path.cwd(), "home": Path.home()}
    return {
        name: round(shutil.disk_usage(place).free / 1e9, 1)
        for name, place in places.items()
        if place.is_dir()
    }


def _missing() -> dict[str, dict[str, str]]:
    return {
        name: {"for": purpose, "install": f"pip install {name}"}
        for packages in EXTRAS.values()
        for name, purpose in packages.items()
        if importlib.util.find_spec(name.replace("-", "_")) is None
    }


def _hub() -> dict[str, bool]:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    token = bool(os.environ.get("HF_TOKEN")) or (home / "token").is_file()
    return {"token": token, "offline": os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")}
