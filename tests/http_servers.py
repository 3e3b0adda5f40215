"""Real HTTP servers for tests: a plain web server of files, and a hub that speaks Hugging Face's API.

The hub keeps large files elsewhere, as the real one does: it redirects to a second server with a signed URL. Put a
``CountingProxy(server.url)`` before either (before the second one with ``hub.cdn_url = proxy.endpoint_url``) to count
requests and to inject faults.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import hashlib
import http.client
import json
import re
import selectors
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

LFS_BYTES = 1000
PAGE_FILES = 2
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True
    app: Any

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nothing to report here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.app.handle(self)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.do_GET()

    def do_CONNECT(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Keyword ``X_Repo_Commit`` is the header ``X-Repo-Commit``; an empty ``Content_Length``: until the end."""
        self.send_response_only(status)
        if length := headers.pop("Content_Length", str(len(body))):
            self.send_header("Content-Length", length)
        else:
            self.close_connection = True
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_content(self, data: bytes, **headers: str) -> None:
        """The content, or the range of it that was asked for."""
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        if match is None:
            self.answer(200, data, Accept_Ranges="bytes", **headers)
            return
        first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
        if first >= len(data):
            self.answer(416, b"", Content_Range=f"bytes */{len(data)}")
            return
        ranged = f"bytes {first}-{last}/{len(data)}"
        self.answer(206, data[first : last + 1], Accept_Ranges="bytes", Content_Range=ranged, **headers)


class HttpServer:
    """A server in a thread of its own; a context manager."""

    def __init__(self) -> None:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.app = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def handle(self, request: _Handler) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class FileServer(HttpServer):
    """Files by their path. ``SHA256SUMS`` of each folder is what sha256sum would say, unless one was put there.

    ``etags`` false: only dates, which the server makes up so that each change has another one. ``ranges`` false: it
    ignores them. ``token``: what has to be shown. ``seen``: the Authorization header of each request.
    """

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, int]] = {}
        self.etags = True
        self.dates = True
        self.ranges = True
        self.token = ""
        self.seen: list[str] = []
        self._changes = 0
        super().__init__()

    def put(self, path: str, data: bytes) -> None:
        self._changes += 1
        self.files[path] = data, 1_700_000_000 + self._changes

    def delete(self, path: str) -> None:
        del self.files[path]

    def handle(self, request: _Handler) -> None:
        path = unquote(urlsplit(request.path).path).removeprefix("/")
        authorization = request.headers.get("Authorization", "")
        self.seen.append(authorization)
        if self.token and authorization != f"Bearer {self.token}":
            request.answer(401, f"no entry with {authorization!r}".encode())
            return
        found = self.files.get(path) or self._sums(path)
        if found is None:
            request.answer(404, b"nothing here")
            return
        data, changed_s = found
        headers = {}
        if self.etags:
            headers["ETag"] = f'"{hashlib.md5(data).hexdigest()}-{changed_s}"'
        if self.dates:
            headers["Last_Modified"] = email.utils.formatdate(changed_s, usegmt=True)
        wanted = request.headers.get("If-Match", headers.get("ETag", ""))
        if self.etags and wanted != headers["ETag"]:
            request.answer(412, b"")
        elif self.etags and request.headers.get("If-None-Match") == headers["ETag"]:
            request.answer(304, b"", **headers)
        elif not self.ranges:
            request.answer(200, data, **headers)
        else:
            request.answer_content(data, **headers)

    def _sums(self, path: str) -> tuple[bytes, int] | None:
        folder, _, name = path.rpartition("/")
        below = {item: data for item, (data, _) in self.files.items() if item.startswith(f"{folder}/")}
        if name != "SHA256SUMS" or not below:
            return None
        lines = [f"{hashlib.sha256(data).hexdigest()}  {item[len(folder) + 1 :]}\n" for item, data in below.items()]
        return "".join(lines).encode(), 1_600_000_000 + self._changes


class ForwardProxy(HttpServer):
    """A proxy for plain HTTP (whole URLs) and for tunnels (CONNECT); all goes to ``target``. ``asked``: for what.

    ``user``: USER:PASSWORD that have to be shown to it.
    """

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._target = parts.hostname or "", parts.port or 80
        self.asked: list[str] = []
        self.user = ""
        super().__init__()

    def handle(self, request: _Handler) -> None:
        self.asked.append(f"{request.command} {request.path}")
        wanted = f"Basic {base64.b64encode(self.user.encode()).decode()}"
        if self.user and request.headers.get("Proxy-Authorization") != wanted:
            request.answer(407, b"", Proxy_Authenticate='Basic realm="proxy"')
            return
        if request.command == "CONNECT":
            with socket.create_connection(self._target, 30) as upstream:
                request.send_response_only(200)
                request.end_headers()
                _relay(request.connection, upstream)
            request.close_connection = True
            return
        with contextlib.closing(http.client.HTTPConnection(*self._target, timeout=60)) as server:
            server.request(request.command, urlsplit(request.path).path, headers=dict(request.headers.items()))
            with server.getresponse() as answer:
                request.send_response_only(answer.status)
                for name, value in answer.getheaders():
                    request.send_header(name, value)
                request.end_headers()
                while data := answer.read1(1 << 16):
                    request.wfile.write(data)


def _relay(one: socket.socket, other: socket.socket) -> None:
    """Until either ends."""
    with selectors.DefaultSelector() as selector:
        selector.register(one, selectors.EVENT_READ, other)
        selector.register(other, selectors.EVENT_READ, one)
        while True:
            for key, _ in selector.select():
                data = key.fileobj.recv(1 << 16)
                if not data:
                    return
                key.data.sendall(data)


@dataclass
class Repository:
    """``commits``: hash → path → content; ``branches``: name → hash."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False


class Hub(HttpServer):
    """Speaks the hub's API: revisions, trees (paged), content (large files by redirect to ``cdn_url``).

    ``token``: the one that may see private and gated repositories.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.token = "hf_right"
        self.seen: list[tuple[str, str]] = []
        self.cdn = Cdn()
        self.cdn_url = self.cdn.url
        super().__init__()

    def close(self) -> None:
        super().close()
        self.cdn.close()

    def commit(self, name: str, files: dict[str, bytes], *, branch: str = "main", squash: bool = False) -> str:
        """A new state of a repository; its hash. ``squash``: its history is gone then, as the hub can do it."""
        repository = self.repositories.setdefault(name, Repository())
        text = f"{name} {len(repository.commits)} {sorted(files)} {sorted(map(sha256, files.values()))}"
        commit = hashlib.sha1(f"{text} {repository.branches}".encode()).hexdigest()
        if squash:
            repository.commits.clear()
        repository.commits[commit] = dict(files)
        repository.branches[branch] = commit
        for data in files.values():
            self.cdn.blobs[sha256(data)] = data
        return commit

    def handle(self, request: _Handler) -> None:
        parts = urlsplit(request.path)
        self.seen.append((f"{request.command} {request.path}", request.headers.get("Authorization", "")))
        path = unquote(parts.path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            if found := self._found(request, match[1], match[2]):
                request.answer(200, json.dumps({"id": match[1], "sha": found[0]}).encode())
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            if found := self._found(request, match[1], match[2]):
                self._answer_tree(request, found, parse_qs(parts.query))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if found := self._found(request, match[1], match[2]):
                self._answer_content(request, found, match[3])
        else:
            request.answer(404, b"no such page")

    def _found(self, request: _Handler, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.repositories.get(name)
        shown = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository is None or (repository.private and shown != self.token):
            request.answer(
                401 if not shown else 404, b"", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found"
            )
        elif repository.gated and shown != self.token:
            message = f"Access to model {name} is restricted"
            request.answer(403 if shown else 401, b"", X_Error_Code="GatedRepo", X_Error_Message=message)
        else:
            commit = repository.branches.get(revision, revision)
            if commit in repository.commits:
                return commit, repository.commits[commit]
            request.answer(404, b"", X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        return None

    def _answer_tree(self, request: _Handler, found: tuple[str, dict[str, bytes]], query: dict[str, list[str]]) -> None:
        _, files = found
        assert query.get("recursive") == ["true"]
        start = int(query.get("cursor", ["0"])[0])
        folders = {path.rpartition("/")[0] for path in files} - {""}
        entries = [*({"type": "directory", "oid": "0" * 40, "path": item} for item in folders), *_entries(files)]
        page = entries[start : start + PAGE_FILES]
        headers = {}
        if start + PAGE_FILES < len(entries):
            following = f"{self._base(request)}{urlsplit(request.path).path}?recursive=true&cursor={start + PAGE_FILES}"
            headers["Link"] = f'<{following}>; rel="next"'
        request.answer(200, json.dumps(page).encode(), **headers)

    def _base(self, request: _Handler) -> str:
        return f"http://{request.headers['Host']}"

    def _answer_content(self, request: _Handler, found: tuple[str, dict[str, bytes]], path: str) -> None:
        commit, files = found
        if path not in files:
            request.answer(404, b"", X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
            return
        data = files[path]
        if len(data) < LFS_BYTES:
            request.answer_content(data, ETag=f'"{git_oid(data)}"', X_Repo_Commit=commit)
            return
        digest = sha256(data)
        where = f"{self.cdn_url}/lfs/{digest}?signature={self.cdn.signature}&name={quote(path)}"
        request.answer(
            302, b"", Location=where, X_Linked_Etag=f'"{digest}"', X_Linked_Size=str(len(data)), X_Repo_Commit=commit,
            ETag='"of-the-redirect"',
        )  # fmt: skip


class Cdn(HttpServer):
    """Where a hub's large files are. ``signature`` is what its URLs must have; ``leaked``: credentials sent to it."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.signature = "first-secret"
        self.leaked: list[str] = []
        super().__init__()

    def handle(self, request: _Handler) -> None:
        if "Authorization" in request.headers:
            self.leaked.append(request.headers["Authorization"])
        parts = urlsplit(request.path)
        data = self.blobs.get(parts.path.rpartition("/")[2])
        if parse_qs(parts.query).get("signature") != [self.signature]:
            request.answer(403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
        elif data is None:
            request.answer(404, b"")
        else:
            request.answer_content(data, ETag=f'"{hashlib.md5(data).hexdigest()}"')


def _entries(files: dict[str, bytes]) -> Iterator[dict[str, Any]]:
    for path, data in files.items():
        entry: dict[str, Any] = {"type": "file", "oid": git_oid(data), "size": len(data), "path": path}
        if len(data) >= LFS_BYTES:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(data)}\nsize {len(data)}\n"
            entry["oid"] = git_oid(pointer.encode())
            entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": len(pointer)}
        yield entry


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
