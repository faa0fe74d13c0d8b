"""A hub on this machine: folders of tests/fixtures under the ids of real repositories, over HTTP on 127.0.0.1.

It speaks what huggingface_hub asks of a hub: the info of a model, its list of files, and files by HEAD, GET and range,
with weights on a second server as the hub has them on a CDN. Every request is written down, and a test may have one go
wrong. The fixture `hub` points this process to it; a program run by a test gets there with `env=hub.environment`.

    def test_reads_only_a_header(hub: Loopback) -> None:
        remote = Remote.open("google/gemma-4-31B-it")
        remote.header("model.safetensors")
        assert hub.sent("google/gemma-4-31B-it", "model.safetensors") < 100_000
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

FIXTURES = Path(__file__).parent / "fixtures"
STOCK = {
    "google/gemma-4-31B-it": "gemma4_keqv",
    "google/gemma-4-31B-it-assistant": "gemma4_keqv/assistant",
    "google/gemma-4-26B-A4B-it": "gemma4_moe",
    "google/gemma-4-26B-A4B-it-assistant": "gemma4_moe/assistant",
    "google/gemma-4-E4B-it": "gemma4_ple",
    "google/gemma-4-E4B-it-assistant": "gemma4_ple/assistant",
    "mlx-community/gemma-4-31b-it-bf16": "gemma4_keqv",
    "Qwen/Qwen3.6-27B": "qwen3_5_dense",
    "Qwen/Qwen3.6-35B-A3B": "qwen3_5_moe_sharded",
}


@dataclass(frozen=True)
class Request:
    """What was asked for and what was given; a file on the second server counts under its own name."""

    method: str
    repo: str
    file: str  # "" for the info of a model and for the list of its files
    status: int
    range: str  # the header as it came, "" without
    sent: int  # bytes of the body
    authorized: bool  # a token came with it


@dataclass
class Repository:
    """One repository; its commit is another one whenever a file is."""

    id: str
    files: dict[str, bytes]
    gated: bool = False

    @property
    def commit(self) -> str:
        digests = [(name, hashlib.sha1(content).hexdigest()) for name, content in sorted(self.files.items())]
        return hashlib.sha1(json.dumps([self.id, digests]).encode()).hexdigest()

    def listing(self, path: str, oid: str, size: str = "size") -> list[dict[str, Any]]:
        """Every file, with the fields called as the endpoint calls them."""
        return [
            {path: name, size: len(content), oid: hashlib.sha1(content).hexdigest(), "type": "file"}
            | ({"lfs": _lfs(content)} if _is_large(name) else {})
            for name, content in sorted(self.files.items())
        ]


def _is_large(name: str) -> bool:
    """Whether the hub would keep the file apart from the repository (LFS)."""
    return not name.endswith((".json", ".md", ".jinja", ".txt", ".py")) and not name.startswith(".")


def _lfs(content: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    return {"oid": digest, "sha256": digest, "size": len(content), "pointerSize": 134}


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a request for bytes."""

    after: int | None = None  # the connection is dropped after so many bytes
    wait: float = 0.0  # seconds of silence before the answer
    status: int = 0  # the answer is this status
    whole: bool = False  # a range is answered with the whole file, as by some proxies
    short: int = 0  # a range is answered with so many bytes less


@dataclass
class Loopback:
    """The hub: repositories by id, what was asked of it, and what shall go wrong."""

    home: Path  # HF_HOME of those who ask
    repositories: dict[str, Repository] = field(default_factory=dict)
    log: list[Request] = field(default_factory=list)
    waiting: list[tuple[str, str]] = field(default_factory=list)  # requests that were let wait, as they came
    faults: dict[tuple[str, str], list[Fault]] = field(default_factory=dict)  # by repository and file

    def __post_init__(self) -> None:
        self._servers = [_Server(self), _Server(self)]
        for server in self._servers:
            Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return self._servers[0].url

    @property
    def storage(self) -> str:
        """Where the large files are, on a host of their own."""
        return self._servers[1].url

    @property
    def environment(self) -> dict[str, str]:
        """For a program that shall ask this hub: no compiler, no telemetry, and nothing of the user's own."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return clean | ours | {"MLX_DISABLE_COMPILE": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def add(self, repo: str, folder: Path | None = None, files: Mapping[str, bytes] = {}, gated: bool = False) -> None:
        """Serve the files that lie directly in a folder, and others by name. An id given again is a new commit."""
        held = {} if folder is None else {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        held.pop("golden.npz", None)
        self.repositories[repo] = Repository(repo, held | dict(files), gated)

    def fail(self, repo: str, file: str = "", times: int = 1, **fault: Any) -> None:
        """Have the next requests of a file's bytes go wrong, or of the model's info. `fault` as in Fault."""
        self.faults[repo, file] = [Fault(**fault)] * times

    def sent(self, repo: str = "", file: str = "") -> int:
        """Bytes of files handed out so far."""
        asked = [r for r in self.log if r.file and repo in ("", r.repo) and file in ("", r.file)]
        return sum(request.sent for request in asked)

    def ranges(self, repo: str, file: str) -> list[str]:
        """The ranges that were asked for of a file."""
        return [r.range for r in self.log if (r.repo, r.file) == (repo, file) and r.method == "GET" and r.range]

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    """A hub with the repositories of STOCK, to which this process's huggingface_hub speaks; its cache is empty."""
    served = Loopback(tmp_path / "hf")
    for repo, folder in STOCK.items():
        served.add(repo, FIXTURES / folder)
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(served.home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(served.home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    close_session()  # opened before, it may know of a proxy
    yield served
    close_session()
    served.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Loopback):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.repo, self.file = "", ""
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/[^/]+)?", path)
        file = re.fullmatch(r"/(storage/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if info:
            self.repo = info[1]
            self._send_info(as_tree=info[2] == "tree")
        elif file:
            self.repo, self.file = file[2], file[4]
            self._send_file(stored=bool(file[1]), revision=file[3])
        else:
            self._refuse(404, f"nothing is at {path}")

    def _send_info(self, as_tree: bool) -> None:
        """That of a gated repository too is open to all."""
        found = self.server.hub.repositories.get(self.repo)
        if found is None and not self.headers["Authorization"]:
            self._refuse(401, "Invalid username or password.")  # what the hub tells a stranger of any such id
        elif found is None:
            self._refuse(404, "Repository not found", "RepoNotFound")
        elif as_tree:
            self._send(json.dumps(found.listing("path", "oid")).encode(), {})
        else:
            content = {"id": self.repo, "sha": found.commit, "siblings": found.listing("rfilename", "blobId")}
            self._send(json.dumps(content).encode(), {})

    def _send_file(self, stored: bool, revision: str) -> None:
        found = self.server.hub.repositories.get(self.repo)
        if found is None:
            self._refuse(404, "Repository not found", "RepoNotFound")
        elif stored:
            self._send(found.files[self.file], {})
        elif found.gated:
            code = 403 if self.headers["Authorization"] else 401
            self._refuse(code, f"Access to model {self.repo} is restricted.", "GatedRepo")
        elif revision not in ("main", found.commit):
            self._refuse(404, "Invalid rev id", "RevisionNotFound")
        elif self.file not in found.files:
            self._refuse(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": found.commit})
        elif _is_large(self.file):
            self._redirect(found)
        else:
            etag = hashlib.sha1(found.files[self.file]).hexdigest()
            self._send(found.files[self.file], {"X-Repo-Commit": found.commit, "ETag": f'"{etag}"'})

    def _redirect(self, found: Repository) -> None:
        lfs = _lfs(found.files[self.file])
        headers = {
            "Location": f"{self.server.hub.storage}/storage/{found.id}/resolve/{found.commit}/{quote(self.file)}",
            "X-Repo-Commit": found.commit,
            "X-Linked-Etag": f'"{lfs["oid"]}"',
            "X-Linked-Size": str(lfs["size"]),
        }
        self._finish(302, headers, b"")

    def _refuse(self, status: int, message: str, code: str = "", headers: Mapping[str, str] = {}) -> None:
        said = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._finish(status, said | dict(headers), json.dumps({"error": message}).encode())

    def _send(self, content: bytes, headers: dict[str, str]) -> None:
        """Bytes, or the range of them that was asked for; or what shall go wrong."""
        planned = self.server.hub.faults.get((self.repo, self.file))
        fault = planned.pop() if planned and self.command == "GET" else Fault()
        if fault.wait:
            self.server.hub.waiting.append((self.repo, self.file))
            time.sleep(fault.wait)
        if fault.status:
            self._refuse(fault.status, "as the test wants it")
            return
        asked = None if fault.whole else re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if asked is None:
            self._finish(200, headers, content, fault.after)
            return
        first, last = int(asked[1]), min(len(content) - 1, int(asked[2] or len(content)))
        if first > last:
            self._finish(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
            return
        last -= fault.short
        headers = headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        self._finish(206, headers, content[first : last + 1], fault.after)

    def _finish(self, status: int, headers: Mapping[str, str], body: bytes, after: int | None = None) -> None:
        """Send an answer, or its first bytes, and write it down."""
        part = b"" if self.command == "HEAD" else body if after is None else body[:after]
        wanted, authorized = self.headers["Range"] or "", bool(self.headers["Authorization"])
        # Before the answer: a test that has read it looks here.
        self.server.hub.log.append(Request(self.command, self.repo, self.file, status, wanted, len(part), authorized))
        self.send_response_only(status)
        for name, value in {"Accept-Ranges": "bytes", **headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(part)
        self.close_connection = self.close_connection or (after is not None and len(part) < len(body))
