"""Publish a converted folder: checked, scanned, uploaded in one commit; safe to repeat after any fault."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nsa_convert.card import (
    CARD,
    EVAL_RESULTS,
    EVALUATION_FOLDER,
    PLACEHOLDER_OWNER,
    check_card,
    is_current,
    read_evaluations,
)
from nsa_convert.checkpoint.manifest import MANIFEST, read_manifest
from nsa_convert.checkpoint.scan import hash_file
from nsa_convert.checkpoint.source import SIDE_FILES
from nsa_convert.errors import CheckFailedError, CheckpointError, ConfigError, HubError, UsageError
from nsa_convert.hub import HUB_ID, with_retries
from nsa_convert.notices import Say, silent
from nsa_convert.redaction import holds_secret

EVALUATION_FILES = re.compile(r"(report\.(json|html)|\w+\.(csv|parquet|png))")
TEXT_FILES = {".json", ".yaml", ".yml", ".md", ".txt", ".csv", ".html", ".py", ".jinja"}
STALE = re.compile(r"[^/]+\.(safetensors|bin|pt|pth|py|gguf)|[^/]+\.index\.json")
"""Files of an earlier push that would be loaded beside, or instead of, the new ones."""

LOCAL_PATH = re.compile(r"/(?:home|Users)/[A-Za-z0-9._-]+/|/roo[t]/|[A-Z]:\\\\?Users\\")
SILENCE = 120.0
"""Seconds without a byte from the Hub after which a request has failed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushFile:
    """A file that goes to the Hub.

    Attributes:
        name: Path in the repository.
        path: Where it lies.
        size: In bytes.
        content: What is sent instead of the file, where push changes it.
    """

    name: str
    path: Path
    size: int
    content: bytes | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushPlan:
    """What a push sends, checked.

    Attributes:
        repo: ``OWNER/NAME``.
        private: Visibility of a repository that is created.
        files: In order.
        left_out: Files of the folder that stay at home.
        warnings: What was overridden.
    """

    repo: str
    private: bool
    files: list[PushFile]
    left_out: list[str]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "repo": self.repo,
            "private": self.private,
            "files": [{"name": file.name, "bytes": file.size} for file in self.files],
            "left_out": self.left_out,
            "warnings": self.warnings,
        }

    def to_text(self) -> str:
        """Return the plan for people."""
        lines = [f"{file.size:>14,}  {file.name}" for file in self.files]

        total = sum(file.size for file in self.files)
        kind = "private" if self.private else "PUBLIC"

        lines.append(
            f"{total:>14,}  bytes in {len(self.files)} files to {self.repo} ({kind} if it is created)"
        )

        if self.left_out:
            lines.append(f"left out: {', '.join(self.left_out)}")

        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushReport:
    """A finished push.

    Attributes:
        repo: ``OWNER/NAME``.
        commit: Its hash.
        url: Of the commit.
        private: Visibility of the repository, None where the Hub does not say.
        files: Number of files.
        bytes: Their size.
        removed: Files of an earlier push that were removed in the same commit.
    """

    repo: str
    commit: str
    url: str
    private: bool | None
    files: int
    bytes: int
    removed: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """Return the report for people."""
        kind = {True: "private", False: "public", None: "visibility unknown"}[self.private]
        gone = f", {len(self.removed)} old files removed" if self.removed else ""
        return f"{self.repo} ({kind}): {self.files} files, {self.bytes:,} bytes{gone}\n{self.url}"


def plan_push(
    folder: str | Path, repo: str, *, private: bool = True, allow_unevaluated: bool = False
) -> PushPlan:
    """Choose what of a converted folder is published, and look for what must not be.

    Only files named in the manifest, the card, ``.eval_results/`` and the reports in ``evaluation/`` go.

    Args:
        folder: The converted folder.
        repo: ``OWNER/NAME``.
        private: Of a repository that is created.
        allow_unevaluated: Publish without an evaluation of these files.

    Raises:
        UsageError: ``repo`` is not a repository name.
        CheckpointError: The folder is not a converted one, or a file of the manifest is missing.
        CheckFailedError: There is no evaluation of these files (HB21).
        ConfigError: There is no valid card (HB15), or a file holds a token or a local path (HB13).
    """
    folder = Path(folder)

    if not HUB_ID.fullmatch(repo):
        raise UsageError(f"'{repo}' is no repository name", code="CL03", expected="OWNER/NAME", found=repo)

    warnings = _check_evaluation(folder, allow_unevaluated)
    names = list(_publishable(folder))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"files are missing: {', '.join(missing[:5])}", code="SV17", where=str(folder))

    # The card is sent with the name of the repository in it.
    files = [_card_file(folder, repo)]
    for name in names:
        path = folder / name
        files.append(PushFile(name=name, path=path, size=path.stat().st_size))

    _scan(folder, files)

    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    left_out = sorted(present - {file.name for file in files})

    return PushPlan(repo=repo, private=private, files=files, left_out=left_out, warnings=warnings)


def push_plan(
    plan: PushPlan,
    *,
    say: Say = silent,
    wait: Callable[[float], None] = time.sleep,
) -> PushReport:
    """Upload a plan in one commit.

    Large files are uploaded before the commit; what the Hub has already is not sent again, so a push that was
    interrupted is resumed by running it again, and the repository stays as it was until the one commit.
    Afterwards the hashes the Hub reports are compared with the files.

    Args:
        plan: From :func:`plan_push`.
        say: Called with a line before each step.
        wait: Sleeps between tries.

    Raises:
        HubError: No token, no right, a conflict, or a fault that did not go away; the message says which.
    """
    from huggingface_hub import HfApi, get_token  # why: publishes the folder that the user named
    from huggingface_hub.utils import get_session

    if get_token() is None:
        raise HubError("there is no token for the Hub", code="HB01", hint="`hf auth login`, or set HF_TOKEN")
    api = HfApi()
    get_session().timeout = SILENCE

    def attempt(what: str, work: Callable[[], Any]) -> Any:
        return with_retries(what, work, plan.repo, say, wait)

    say(f"hashing {len(plan.files)} files")
    hashes = {file.name: _hashes(file) for file in plan.files}

    # The repository as it is now: files of an earlier push that would be loaded wrongly are removed.
    attempt(
        "creating the repository",
        lambda: api.create_repo(plan.repo, private=plan.private, exist_ok=True),
    )
    info = attempt("looking at the repository", lambda: api.model_info(plan.repo))
    sent = {file.name for file in plan.files}
    removed = [
        s.rfilename for s in info.siblings or [] if STALE.fullmatch(s.rfilename) and s.rfilename not in sent
    ]

    say(f"uploading to {plan.repo}")
    commit = attempt("uploading", lambda: _commit(api, plan, removed, info.sha))

    say("comparing hashes")
    _check_remote(api, plan, hashes, commit.oid, attempt)

    return PushReport(
        repo=plan.repo,
        commit=commit.oid,
        url=commit.commit_url,
        private=info.private,
        files=len(plan.files),
        bytes=sum(file.size for file in plan.files),
        removed=removed,
    )


def _check_evaluation(folder: Path, allow: bool) -> list[str]:
    reports = read_evaluations(folder)
    if any(is_current(report, folder) for report in reports):
        return []

    why = "the evaluation is of other files" if reports else "there is no evaluation"
    if allow:
        return [f"{why}; it is published all the same"]

    raise CheckFailedError(
        f"{why}: {folder.resolve().name} is not published",
        code="HB21",
        where=str(folder / EVALUATION_FOLDER),
        hint=f"nsa-convert eval {folder} --out {folder / EVALUATION_FOLDER}, or --allow-unevaluated",
    )


def _publishable(folder: Path) -> Iterator[str]:
    """Yield the names of the files that are published, except the card.

    Other programs save the tokenizer after the model, so its files may be missing in the manifest.
    """
    listed = read_manifest(folder)
    later = {path.name for path in folder.iterdir() if SIDE_FILES.fullmatch(path.name) and path.is_file()}
    yield from (name for name in sorted({*listed, *later}) if name != CARD)

    yield MANIFEST
    if (folder / EVAL_RESULTS).is_file():
        yield EVAL_RESULTS

    for path in sorted((folder / EVALUATION_FOLDER).rglob("*")):
        if path.is_file() and not path.is_symlink() and EVALUATION_FILES.fullmatch(path.name):
            yield path.relative_to(folder).as_posix()


def _card_file(folder: Path, repo: str) -> PushFile:
    """Return the card with the name of the repository in its example."""
    path = folder / CARD
    if not path.is_file():
        raise ConfigError(
            "there is no model card", code="HB15", where=CARD, hint=f"nsa-convert card {folder}"
        )

    text = path.read_text(encoding="utf-8")
    if problems := check_card(text):
        raise ConfigError(f"the card: {'; '.join(problems)}", code="HB15", where=CARD)

    content = re.sub(rf'"{PLACEHOLDER_OWNER}/[^"]+"', f'"{repo}"', text).encode()
    return PushFile(name=CARD, path=path, size=len(content), content=content)


def _scan(folder: Path, files: list[PushFile]) -> None:
    """Raise ConfigError when a text file holds a token, or a path or name of this machine."""
    places = {str(folder.resolve().parent), str(Path.cwd()), str(Path.home())} - {"/"}

    # Paths are looked for only in files that this package wrote: others may mention them in general.
    found = []
    for file in files:
        text = _readable(file)
        if holds_secret(text):
            found.append(f"{file.name} holds what looks like an access token")
        if _is_ours(file.name) and (LOCAL_PATH.search(text) or any(f"{p}/" in text for p in places)):
            found.append(f"{file.name} holds a path of this machine")

    if found:
        raise ConfigError(
            f"not published: {'; '.join(found)}",
            code="HB13",
            where=str(folder),
            hint="edit the files, then again",
        )


def _readable(file: PushFile) -> str:
    """Return the text of a text file, the header of a weight file, and nothing of other files."""
    kind = Path(file.name).suffix
    if kind == ".safetensors":
        with file.path.open("rb") as weights:
            size = int.from_bytes(weights.read(8), "little")
            return weights.read(min(size, file.size)).decode("utf-8", errors="replace")

    if kind not in TEXT_FILES:
        return ""

    return (file.content or file.path.read_bytes()).decode("utf-8", errors="replace")


def _is_ours(name: str) -> bool:
    """Return whether this package wrote a file; tokenizers and code may mention ``/home/`` in general."""
    return not name.startswith(("tokenizer", "vocab", "merges", "source/")) and Path(name).suffix != ".py"


def _commit(api: Any, plan: PushPlan, removed: list[str], parent: str | None) -> Any:
    # why: publishes the folder that the user named, in one commit
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in removed]
    operations += [
        CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.content or str(file.path))
        for file in plan.files
    ]

    return api.create_commit(
        plan.repo, operations, commit_message="Upload a model converted by nsa-convert", parent_commit=parent
    )


def _hashes(file: PushFile) -> tuple[str, str]:
    """Return the sha256 (of an LFS file) and the git blob id (of a regular file)."""
    if file.content is not None:
        return hashlib.sha256(file.content).hexdigest(), _blob_id(file.content)

    # A file this large is stored by LFS, which is compared by sha256 alone; it is hashed in pieces.
    if file.size > 64_000_000:
        return hash_file(file.path), ""

    data = file.path.read_bytes()
    return hashlib.sha256(data).hexdigest(), _blob_id(data)


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _check_remote(
    api: Any, plan: PushPlan, hashes: dict[str, tuple[str, str]], commit: str, attempt: Callable[..., Any]
) -> None:
    """Compare what the Hub says it has with what was sent; withdraw the config of a damaged upload."""
    rows = attempt(
        "comparing hashes", lambda: list(api.list_repo_tree(plan.repo, recursive=True, revision=commit))
    )

    # The listing holds folders too, which have no blob id.
    remote = {row.path: row for row in rows if hasattr(row, "blob_id")}

    # LFS files are compared by sha256, regular files by the id of their git blob.
    bad = []
    for name, (sha256, blob) in hashes.items():
        row = remote.get(name)
        lfs = row.lfs.sha256 if row is not None and row.lfs is not None else None
        if row is None or (lfs != sha256 if lfs is not None else row.blob_id != blob):
            bad.append(name)

    if not bad:
        return

    # why: withdraws the config of a commit that arrived damaged
    from huggingface_hub import CommitOperationDelete

    withdrawn = [CommitOperationDelete(path_in_repo="config.json")]
    attempt(
        "withdrawing config.json",
        lambda: api.create_commit(plan.repo, withdrawn, commit_message="Withdraw a damaged upload"),
    )

    raise HubError(
        f"{len(bad)} files arrived damaged ({', '.join(bad[:5])}); config.json was removed from {plan.repo}, "
        "so that it does not load",
        code="HB17",
        where=plan.repo,
        hint="push again",
    )
