"""A hub on this machine: real HTTP, the parts of the Hugging Face hub's protocol that a download uses, and faults on demand.

| request                                            | answer                                                                |
|----------------------------------------------------|-----------------------------------------------------------------------|
| GET /api/{models,datasets}/REPO/revision/REV       | commit and file names                                                 |
| HEAD, GET /[datasets/]REPO/resolve/REV/FILE, large | 302 to the file server, X-Linked-Size, X-Linked-Etag (SHA-256)        |
| the same, small                                    | the file, ETag (git's SHA-1)                                          |
| GET /cdn/… on the file server (another port)       | the file, 206 for a range                                             |
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = 1000
"""Bytes from which a file is kept on the file server, as the hub does with Git LFS."""


@dataclass
class Fault:
    """What happens to the next `times` requests whose path holds `path`."""

    path: str
    times: int = 1
    method: str = "GET"
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    """Bytes of the body, then the connection is closed."""
    stall_after: int | None = None
    """Bytes of the body, then nothing for `stall_s`."""
    stall_s: float = 1.0
    change: Callable[[bytes], bytes] | None = None
    """Of the whole file."""


@dataclass
class Repository:
    files: dict[str, bytes]
    commit: str = "c" * 40
    token: str | None = None
    """Needed to read it."""


@dataclass
class Seen:
    method: str
    path: str
    range: str | None
    authorization: str | None


class HubServer:
    """`repositories["datasets/owner/name"]`; `faults` are used up in their order; `seen` is every request."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.linked_size: dict[str, int] = {}
        """What is told as the size of a file instead of the truth."""
        self.tells_digests, self.ranges = True, True
        self._lock = threading.Lock()
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), self._handler()) for _ in range(2)]
        # Two hosts for a client that compares names: what the hub is told must not reach the file server.
        hosts = zip(("127.0.0.1", "localhost"), self._servers, strict=True)
        self.url, self.files_url = (f"http://{host}:{server.server_port}" for host, server in hosts)

    def __enter__(self) -> HubServer:
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, repository: str, files: dict[str, bytes], **options: str) -> Repository:
        self.repositories[repository] = Repository(files, **options)
        return self.repositories[repository]

    def requests(self, part: str, method: str = "GET") -> list[Seen]:
        return [seen for seen in self.seen if part in seen.path and seen.method == method]

    def bytes_asked(self, part: str) -> int:
        """Sum of the ranges asked of the file server."""
        spans = [
            seen.range.removeprefix("bytes=").split("-") for seen in self.requests(part) if seen.range and "/cdn/" in seen.path
        ]
        return sum(int(last) - int(first) + 1 for first, last in spans)

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times and fault.method == method and fault.path in path:
                    fault.times -= 1
                    return fault
        return None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:  # noqa: N802 - the base class's name
                with contextlib.suppress(ConnectionError):
                    hub.answer(self)

            do_HEAD = do_GET  # noqa: N815

        return Handler

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        headers = request.headers
        self.seen.append(Seen(request.command, path, headers.get("Range"), headers.get("Authorization")))
        fault = self.take_fault(request.command, path)
        if fault and fault.status:
            return _send(request, fault.status, b"told to fail", fault.headers)
        if path.startswith("/api/"):
            return self._information(request, path)
        repository, _, place = path.removeprefix("/cdn").strip("/").partition("/resolve/")
        revision, _, name = place.partition("/")
        return self._file(request, repository, revision, name, "/cdn/" in path, fault)

    def _information(self, request: BaseHTTPRequestHandler, path: str) -> None:
        place, _, revision = path.removeprefix("/api/").removeprefix("models/").partition("/revision/")
        if (repository := self._readable(request, place)) is None:
            return None
        if revision not in ("main", repository.commit):
            return _send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": name} for name in repository.files]
        body = {"id": place, "sha": repository.commit, "siblings": siblings, "private": False, "downloads": 0, "tags": []}
        return _send(request, 200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _readable(self, request: BaseHTTPRequestHandler, place: str) -> Repository | None:
        repository = self.repositories.get(place)
        if repository is None:
            _send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        if repository.token and request.headers.get("Authorization") != f"Bearer {repository.token}":
            _send(request, 401, b"", {"X-Error-Code": "GatedRepo"})
            return None
        return repository

    def _file(
        self, request: BaseHTTPRequestHandler, place: str, revision: str, name: str, on_file_server: bool, fault: Fault | None
    ) -> None:
        repository = self.repositories[place] if on_file_server else self._readable(request, place)
        if repository is None:
            return None
        if (content := repository.files.get(name)) is None:
            return _send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        told = {"X-Repo-Commit": repository.commit, "ETag": f'"{git_sha1(content)}"'}
        if len(content) >= LARGE and not on_file_server:
            told["X-Linked-Size"] = str(self.linked_size.get(name, len(content)))
            told["ETag"] = '"opaque"'
            if self.tells_digests:
                told["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            return _send(request, 302, b"", told | {"Location": f"{self.files_url}/cdn/{place}/resolve/{revision}/{name}"})
        content = fault.change(content) if fault and fault.change else content
        return _send_content(request, content, told, self.ranges, fault)


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def _send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
    request.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | headers).items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


def _send_content(request: BaseHTTPRequestHandler, content: bytes, told: dict[str, str], ranges: bool, fault: Fault | None) -> None:
    span, status = request.headers.get("Range") if ranges else None, 200
    body = content
    if span:
        first, last = (int(number) for number in span.removeprefix("bytes=").split("-"))
        body, status = content[first : last + 1], 206
        told = told | {"Content-Range": f"bytes {first}-{first + len(body) - 1}/{len(content)}"}
    if fault is None or (fault.cut_after is None and fault.stall_after is None):
        return _send(request, status, body, told)
    shown = fault.cut_after if fault.cut_after is not None else fault.stall_after
    _send(request, status, body[:shown], told | {"Content-Length": str(len(body))})
    request.wfile.flush()
    if fault.stall_after is not None:
        time.sleep(fault.stall_s)
    request.close_connection = True
    return None


@contextlib.contextmanager
def running_hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server
