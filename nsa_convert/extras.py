"""Packages that only some work needs: what for, and the pip line that gets them."""

from __future__ import annotations

EXTRAS: dict[str, dict[str, str]] = {
    "gguf": {"gguf": "reading .gguf files"},
    "eval": {"matplotlib": "plots of eval", "jinja2": "reports, model cards, chat templates"},
    "lm-eval": {"lm-eval": "eval --suite tasks"},
    "train": {
        "peft": "train: lora",
        "trl": "kind: sft",
        "datasets": "Parquet files, packed JSON lines, data sets of the Hub",
    },
    "triton": {"triton": "GPU kernels"},
}
"""Extra of pyproject.toml -> its packages, and what each is for."""

MODULES = {"yaml": "pyyaml", "lm_eval": "lm-eval"}
"""Module -> its package, where the names differ."""

NEEDED = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "tokenizers",
    "click",
    "rich",
    "pyyaml",
    "wrapt",
)
"""Packages that everybody needs."""


def pip_line(extra: str) -> str:
    """Return the command that installs the packages of an extra.

    It names the packages, not ``nsa-convert[extra]``: pip would ask the index for that name, which may be
    nobody's there, or somebody else's. So the line is right in a checkout and with a release file.
    """
    return f"pip install {' '.join(EXTRAS[extra])}"


def missing_hint(module: str) -> str:
    """Return what to do about a module that cannot be imported."""
    package = MODULES.get(module, module)
    if package in NEEDED or any(package in packages for packages in EXTRAS.values()):
        return f"pip install {package}"
    return "no part of nsa-convert needs it: run again with --debug, which shows what asked for it"
