"""A Hub on this machine, for tests: as much of its HTTP API as huggingface_hub needs to publish and to load.

Large files go by Git LFS's basic transfer (``HF_HUB_DISABLE_XET=1``). Faults are injected by path.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LFS_FROM = 10_000
"""Bytes from which a file is stored by its sha256."""


@dataclasses.dataclass
class Fault:
    """What happens to requests whose ``METHOD path`` matches, so many times.

    Attributes:
        where: Regular expression.
        status: Answer with it; 0 breaks the connection after half of the body was read, -1 never answers.
        times: How often; later requests succeed.
        headers: Of the answer.
        after: Do the work first, then fail.
    """

    where: str
    status: int
    times: int = 1
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    after: bool = False


class FakeHub:
    """Repositories in memory; ``repos[id]`` is the list of commits, each a dict path -> bytes."""

    def __init__(self) -> None:
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[str] = []
        self.tokens: set[str] = set()
        self.faults: list[Fault] = []
        self.corrupt: str | None = None
        self.damaged_download: str | None = None
        self.on_blob: Any = None
        hub = self

        class Handler(_Handler):
            owner = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def commits(self, repo: str) -> int:
        """Return the number of commits after the one that created the repository."""
        return len(self.repos.get(repo, [{}])) - 1

    def files(self, repo: str) -> dict[str, bytes]:
        return self.repos[repo][-1]

    def sha(self, repo: str, number: int | None = None) -> str:
        """Return the hash of commit ``number`` (from 1), of the last one when left out."""
        return hashlib.sha1(f"{repo}{number or len(self.repos[repo])}".encode()).hexdigest()

    def files_at(self, repo: str, revision: str) -> dict[str, bytes]:
        """Return the files of a commit, of the last one for a branch."""
        commits = self.repos[repo]
        known = {self.sha(repo, i + 1): files for i, files in enumerate(commits)}
        return known.get(revision, commits[-1])

    def fault_for(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.where, request):
                fault.times -= 1
                return fault
        return None

    def count(self, pattern: str) -> int:
        return sum(1 for line in self.log if re.search(pattern, line))


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    threading.Thread(target=hub.server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FakeHub

    def log_message(self, *args: Any) -> None:
        pass

    def do_any(self) -> None:
        hub, path = self.owner, urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        request = f"{self.command} {path}"
        hub.log.append(request)
        if token := self.headers.get("Authorization"):
            hub.tokens.add(token)
        fault = hub.fault_for(request)
        if fault is not None and fault.status == -1:
            time.sleep(3)
        if fault is not None and not fault.after:
            self.fail(fault)
            return
        body = self.body()
        if fault is not None:
            self.answer(path, body, silent=True)  # the work is done, the answer is lost
            self.fail(fault)
            return
        self.answer(path, body)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = do_any

    def fail(self, fault: Fault) -> None:
        if fault.status <= 0:
            if not fault.after:
                self.rfile.read1(1024)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if not fault.after:
            self.body()
        self.send({"error": "injected"}, fault.status, fault.headers)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            out = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                out += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    silent = False

    def send(
        self,
        value: Any = None,
        status: int = 200,
        headers: dict[str, str] | None = None,
        raw: bytes | None = None,
    ) -> None:
        if self.silent:
            return
        data = raw if raw is not None else json.dumps({} if value is None else value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def answer(self, path: str, body: bytes, silent: bool = False) -> None:
        self.silent = silent
        try:
            for pattern, method in _ROUTES:
                if match := re.fullmatch(pattern, path):
                    getattr(self, method)(body, *match.groups())
                    return
            self.missing("EntryNotFound")
        finally:
            self.silent = False

    def missing(self, code: str) -> None:
        self.send({"error": "not found"}, 404, {"X-Error-Code": code})

    def whoami(self, body: bytes) -> None:
        self.send({"name": "tester", "type": "user", "orgs": [], "auth": {"type": "access_token"}})

    def create(self, body: bytes) -> None:
        values, hub = json.loads(body), self.owner
        repo = f"{values.get('organization') or 'tester'}/{values['name']}"
        status = 409 if repo in hub.repos else 200
        hub.repos.setdefault(repo, [{".gitattributes": b""}])
        private = values.get("visibility") == "private" or bool(values.get("private"))
        hub.private.setdefault(repo, private)
        self.send({"url": f"{hub.url}/{repo}", "name": repo, "id": repo}, status)

    def validate(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        if "license: made-up" in text:
            self.send({"errors": [{"message": '"license" must be one of [...]'}], "warnings": []}, 400)
            return
        self.send({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = json.loads(body)["files"]
        known = self.owner.files(repo)
        self.send(
            {
                "files": [
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if f["size"] >= LFS_FROM else "regular",
                        "shouldIgnore": False,
                        "oid": _content_id(known.get(f["path"])),
                    }
                    for f in files
                ]
            }
        )

    def lfs_batch(self, body: bytes, repo: str) -> None:
        hub, objects = self.owner, []
        for item in json.loads(body)["objects"]:
            row = {"oid": item["oid"], "size": item["size"], "authenticated": True}
            if item["oid"] not in hub.blobs:
                row["actions"] = {"upload": {"href": f"{hub.url}/_lfs/{item['oid']}", "header": {}}}
            objects.append(row)
        kind = {"Content-Type": "application/vnd.git-lfs+json"}
        self.send({"transfer": "basic", "objects": objects}, headers=kind)

    def blob(self, body: bytes, oid: str) -> None:
        hub = self.owner
        if hashlib.sha256(body).hexdigest() != oid:
            self.send({"error": "sha256 differs"}, 400)
            return
        hub.blobs[oid] = body
        if hub.on_blob is not None:
            hub.on_blob(len(hub.blobs))
        self.send()

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        hub = self.owner
        files = dict(hub.files(repo))
        for line in body.decode().splitlines():
            row = json.loads(line)
            key, value = row["key"], row["value"]
            if key == "header" and value.get("parentCommit") not in (None, hub.sha(repo)):
                self.send({"error": "the branch moved"}, 412)
                return
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = hub.blobs[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"], None)
        if hub.corrupt in files:
            files[hub.corrupt] = files[hub.corrupt][::-1]
            hub.corrupt = None
        hub.repos[repo].append(files)
        sha = hub.sha(repo)
        self.send({"commitUrl": f"{hub.url}/{repo}/commit/{sha}", "commitOid": sha, "hookOutput": ""})

    def tree(self, body: bytes, repo: str, revision: str, folder: str | None) -> None:
        if repo not in self.owner.repos:
            self.missing("RepoNotFound")
            return
        files = self.owner.files_at(repo, revision)
        self.send([_entry(name, data) for name, data in files.items() if name.startswith(folder or "")])

    def info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        hub = self.owner
        if repo not in hub.repos:
            self.missing("RepoNotFound")
            return
        siblings = [{"rfilename": name} for name in hub.files_at(repo, revision or "main")]
        known = {hub.sha(repo, i + 1) for i in range(len(hub.repos[repo]))}
        sha = revision if revision in known else hub.sha(repo)
        values = {"_id": "0", "id": repo, "modelId": repo, "sha": sha, "private": hub.private.get(repo, True)}
        self.send({**values, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        hub = self.owner
        if repo not in hub.repos or name not in hub.files_at(repo, revision):
            self.missing("EntryNotFound" if repo in hub.repos else "RepoNotFound")
            return
        data = hub.files_at(repo, revision)[name]
        known = {hub.sha(repo, i + 1) for i in range(len(hub.repos[repo]))}
        commit = revision if revision in known else hub.sha(repo)
        tag = f'"{_content_id(data)}"'
        if name == hub.damaged_download:
            data = data[::-1]
        self.send(raw=data, headers={"X-Repo-Commit": commit, "ETag": tag, "Accept-Ranges": "bytes"})


_REPO = r"([^/]+/[^/]+)"
_ROUTES = [
    (r"/api/whoami-v2", "whoami"),
    (r"/api/repos/create", "create"),
    (r"/api/validate-yaml", "validate"),
    (rf"/api/models/{_REPO}/preupload/(.+)", "preupload"),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"/_lfs/(\w+)", "blob"),
    (rf"/api/models/{_REPO}/commit/(.+)", "commit"),
    (rf"/api/models/{_REPO}/tree/([^/]+)(?:/(.*))?", "tree"),
    (rf"/api/models/{_REPO}", "info"),
    (rf"/api/models/{_REPO}/revision/(.+)", "info"),
    (rf"/{_REPO}/resolve/([^/]+)/(.+)", "resolve"),
]


def _content_id(data: bytes | None) -> str | None:
    """Return what the Hub compares: the sha256 of a large file, the git blob id of another."""
    if data is None:
        return None
    entry = _entry("", data)
    return entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]


def _entry(name: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob}
    if len(data) >= LFS_FROM:
        sha256 = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
    return entry
