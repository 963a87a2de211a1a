"""A hub on loopback: listing, small files, redirects to a storage of its own with ranges, tokens, and faults on demand.

It speaks what huggingface_hub asks of the real one, through the ordinary `HF_ENDPOINT`; the storage listens on another port, so that
tokens which leave the hub are seen.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

TOKEN = "hf_" + "loopbackSecretOfTheTests"
PIECE = 64 << 10


@dataclass
class Request:
    """What a fault is decided on: `where` is api, file or storage; `start` and `stop` the range, or the whole file."""

    where: str
    method: str
    repository: str
    file: str
    start: int
    stop: int
    number: int


# What goes wrong with a request: "drop N" closes the connection after N bytes; "html", "whole"; or a status, with headers.
Fault = str | tuple[int, dict[str, str]]


@dataclass
class Repo:
    """A served folder.

    Attributes:
        folder: its files.
        needs_token: private; with `gated`, visible and not to be read.
        past: what earlier commits held, which can still be had.
        stated: a commit that files are said to be of, in place of the one that was asked for.
    """

    folder: Path
    needs_token: bool = False
    gated: bool = False
    branch: str = "main"
    hashes: dict[str, str] = field(default_factory=dict)
    past: list[Repo] = field(default_factory=list)
    stated: str | None = None

    @property
    def commit(self) -> str:
        digest = hashlib.sha1()
        for name, path in self.files.items():
            stat = path.stat()
            digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    @property
    def files(self) -> dict[str, Path]:
        found = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in found}

    def sha256(self, name: str) -> str:
        """Of what lies there; a sparse giant gets a made-up one, which nothing reads whole."""
        if name not in self.hashes:
            path = self.folder / name
            content = path.read_bytes() if path.stat().st_size < 200 << 20 else name.encode()
            self.hashes[name] = hashlib.sha256(content).hexdigest()
        return self.hashes[name]


class LoopbackHub:
    """The hub and its storage; a context manager.

    Attributes:
        repos: by name; may change while it runs.
        moved: body bytes sent, by where.
        requests: how many, by where and method.
        spans: the ranges that the storage sent, as (file, start, bytes sent).
        leaked: Authorization headers that came to the storage.
        fault: asked about every request.
    """

    def __init__(self, repos: dict[str, Repo], *, uploads: Path | None = None) -> None:
        self.uploads = uploads
        self.repos = repos
        self.moved: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.spans: list[tuple[str, int, int]] = []
        self.leaked: list[str] = []
        self.posted: list[tuple[str, Any]] = []
        self.fault: Callable[[Request], Fault | None] = lambda request: None
        self.valid_signatures: set[str] = set()
        self.lock = threading.Lock()
        self._servers: list[ThreadingHTTPServer] = []

    def __enter__(self) -> LoopbackHub:
        for handler in (_Hub, _Storage):
            server = _Server(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": self}))
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
            self._servers.append(server)
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def storage(self) -> str:
        return f"http://127.0.0.1:{self._servers[1].server_port}"

    def forget(self) -> None:
        """Count from zero; what is still sent to requests from before counts no more."""
        self.moved, self.requests, self.spans = Counter(), Counter(), []

    def environment(self, home: Path, *, token: str | None = None) -> dict[str, str]:
        """For a process that is to use this hub, with a cache of its own."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        proxies = {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")}
        return {
            **proxies,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **({"HF_TOKEN": token} if token else {}),
        }

    def reapkit(
        self, *arguments: object, home: Path, token: str | None = None, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command against this hub, in a process of its own."""
        command = [sys.executable, "-m", "reapkit", *map(str, arguments)]
        environment = self.environment(home, token=token)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, **more)
        assert TOKEN not in done.stdout + done.stderr
        return done


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed leave in the middle of an answer."""


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    where = "file"

    def log_message(self, *_: Any) -> None:
        pass

    def parse_request(self) -> bool:
        self.moved, self.spans = self.hub.moved, self.hub.spans  # those of the time of asking
        return super().parse_request()

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, *, where: str = "") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            with self.hub.lock:
                self.moved[where or self.where] += len(body)

    def answer_json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, where="api")

    def send_file(self, repo: Repo, name: str, headers: dict[str, str], fault: Fault | None) -> None:
        path = repo.folder / name
        size = path.stat().st_size
        start, stop, partial = self.wanted(size)
        if fault == "whole":
            start, stop, partial = 0, size, False
        if start >= size and size:
            self.answer(416, headers={"Content-Range": f"bytes */{size}"})
            return
        self.send_response(206 if partial else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = int(fault.split()[1]) if isinstance(fault, str) and fault.startswith("drop") else stop - start
        sent = 0
        try:
            with path.open("rb") as stream:
                stream.seek(start)
                while sent < min(limit, stop - start):
                    piece = stream.read(min(PIECE, limit - sent, stop - start - sent))
                    self.wfile.write(piece)
                    sent += len(piece)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with self.hub.lock:
                self.moved[self.where] += sent
                if self.where == "storage":
                    self.spans.append((name, start, sent))
        if sent < stop - start:
            self.close_connection = True

    def wanted(self, size: int) -> tuple[int, int, bool]:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return 0, size, False
        return int(match[1]), min(size, int(match[2]) + 1 if match[2] else size), True

    def faulty(self, where: str, repository: str, file: str = "") -> Fault | None:
        """What is to go wrong; a status is answered here and then."""
        size = 0
        if file and (path := self.hub.repos[repository].folder / file).is_file():
            size = path.stat().st_size
        start, stop, _ = self.wanted(size)
        with self.hub.lock:
            self.hub.requests[f"{where} {self.command}"] += 1
            number = self.hub.requests.total()
            fault = self.hub.fault(Request(where, self.command, repository, file, start, stop, number))
        if fault == "html":
            self.answer(200, b"<html><body>Please log in</body></html>", {"Content-Type": "text/html; charset=utf-8"})
        elif isinstance(fault, tuple):
            self.answer(fault[0], b"", fault[1])
        return fault

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        raise NotImplementedError


class _Hub(_Handler):
    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.info(match[1], match[2])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", path):
            self.tree(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(match[1], match[2], match[3])
        else:
            self.answer(404)

    def do_POST(self) -> None:
        """What uploading asks: make a repository, say how each file is to come, and take a commit; all come inline."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.posted.append(("create", asked))
            if name not in self.hub.repos:
                self.hub.repos[name] = Repo(Path(tempfile.mkdtemp(dir=self.hub.uploads)))
            self.answer_json({"url": f"{self.hub.endpoint}/{name}", "name": name})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer_json({"files": files})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            repo = self.hub.repos[match[1]]
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    target = repo.folder / line["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(line["value"]["content"]))
            url = f"{self.hub.endpoint}/{match[1]}/commit/{repo.commit}"
            self.answer_json({"success": True, "commitOid": repo.commit, "commitUrl": url})
        else:
            self.answer(404)

    def allowed(self, name: str, revision: str | None, *, reading: bool = False) -> Repo | None:
        """The repository, unless an error was answered."""
        repo = self.hub.repos.get(name)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.needs_token and not known and not repo.gated):
            self.answer(404 if known else 401, headers={"X-Error-Code": "RepoNotFound"})
        elif repo.gated and reading and (repo.needs_token and not known):
            self.answer(401, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif repo.gated and reading and not repo.needs_token:
            self.answer(403, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif (earlier := next((past for past in repo.past if past.commit == revision), None)) is not None:
            return earlier
        elif revision not in (None, repo.branch, repo.commit):
            self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        else:
            return repo
        return None

    def info(self, name: str, revision: str | None) -> None:
        if self.faulty("api", name) or (repo := self.allowed(name, revision)) is None:
            return
        siblings = [
            {"rfilename": file, "size": path.stat().st_size, "blobId": "0" * 40}
            | ({"lfs": {"sha256": repo.sha256(file), "size": path.stat().st_size, "pointerSize": 1}} if _is_large(file) else {})
            for file, path in repo.files.items()
        ]  # fmt: skip
        self.answer_json({"id": name, "sha": repo.commit, "siblings": siblings, "private": False, "tags": [],
                          "downloads": 0, "likes": 0, "gated": repo.gated})  # fmt: skip

    def tree(self, name: str, revision: str) -> None:
        if self.faulty("api", name) or (repo := self.allowed(name, revision)) is None:
            return
        self.answer_json(
            [
                {"type": "file", "path": file, "size": path.stat().st_size, "oid": "0" * 40}
                | ({"lfs": {"oid": repo.sha256(file), "size": path.stat().st_size, "pointerSize": 1}} if _is_large(file) else {})
                for file, path in repo.files.items()
            ]
        )  # fmt: skip

    def resolve(self, name: str, revision: str, file: str) -> None:
        if self.faulty("file", name, file) or (repo := self.allowed(name, revision, reading=True)) is None:
            return
        headers = {"X-Repo-Commit": repo.stated or repo.commit, "Accept-Ranges": "bytes"}
        if file not in repo.files:
            self.answer(404, headers={**headers, "X-Error-Code": "EntryNotFound"})
        elif _is_large(file):
            signature = f"s{len(self.hub.valid_signatures)}"
            self.hub.valid_signatures.add(signature)
            size = str((repo.folder / file).stat().st_size)
            linked = {"X-Linked-Etag": f'"{repo.sha256(file)}"', "X-Linked-Size": size}
            location = f"{self.hub.storage}/{name}/{quote(file)}?Commit={repo.commit}&Signature={signature}&Policy=signedSecret"
            self.answer(302, headers={**headers, **linked, "Location": location})
        else:
            etag = hashlib.sha1((repo.folder / file).read_bytes()).hexdigest()
            self.send_file(repo, file, {**headers, "ETag": f'"{etag}"'}, None)


class _Storage(_Handler):
    where = "storage"

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        owner, name, file = unquote(parts.path).lstrip("/").split("/", 2)
        if "Authorization" in self.headers:
            self.hub.leaked.append(self.headers["Authorization"])
        fault = self.faulty("storage", f"{owner}/{name}", file)
        if fault == "html" or isinstance(fault, tuple):
            return
        asked = parse_qs(parts.query)
        if asked["Signature"][0] not in self.hub.valid_signatures:
            self.answer(403)
            return
        repo = self.hub.repos[f"{owner}/{name}"]
        repo = next((past for past in repo.past if past.commit == asked["Commit"][0]), repo)
        self.send_file(repo, file, {"ETag": '"of-the-storage"', "Content-Type": "application/octet-stream"}, fault)


def _is_large(file: str) -> bool:
    return file.endswith((".safetensors", ".safetensors.index.json"))


def assert_without_token(folder: Path) -> None:
    """No file below holds the token, nor a signed address."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size < 64 << 20:
            content = path.read_bytes()
            assert TOKEN.encode() not in content, path
            assert b"signedSecret" not in content, path


def connect(monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub, home: Path, *, token: str | None = None) -> None:
    """Let this process use the hub: huggingface_hub reads its settings when it is imported."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    close_session()
    settings = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A cache of the hub that no other test has."""
    return tmp_path / "home"
