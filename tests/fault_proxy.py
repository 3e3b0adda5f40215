"""A reverse proxy between a client and an S3 server that counts what passes and breaks what it is told to break.

The Host header passes unchanged, so the server checks the signature that the client made for the proxy's address.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self
from urllib.parse import unquote, urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

ACCESS_KEY = "AKIATESTACCESSKEY"
SECRET_KEY = "test/secret+key0123456789"

_BLOCK_BYTES = 1 << 18
_HOP_HEADERS = {"connection", "transfer-encoding", "keep-alive", "expect"}

FaultKind = Literal[
    "reset", "status", "truncate", "short_length", "wrong_range", "whole", "etag", "corrupt", "hold", "garbage", "slow"
]


@dataclass(slots=True)
class SeenRequest:
    """A request, counted before its first byte is answered, so that whoever has an answer finds it counted.

    ``body_bytes`` are those of the answer that were handed to the client's connection; ``status`` 0: none yet.
    """

    method: str
    path: str
    range: str
    status: int = 0
    body_bytes: int = 0
    fault: str = ""


@dataclass(eq=False)
class Fault:
    """What to break, in which requests, and how often (``times`` < 0: always).

    ``after_bytes`` counts bytes of the body: ``reset``, ``truncate`` and ``hold`` act behind them, ``corrupt`` flips
    the byte there. ``truncate`` closes early; ``short_length`` announces and sends less. ``hold`` waits for
    ``release()``; so does ``garbage``, which goes on with other bytes then.
    """

    kind: FaultKind
    times: int = 1
    method: str = "GET"
    path: str = ""  # part of the decoded path
    query: str = ""  # part of the query
    ranged: bool | None = None  # only requests with (True) or without (False) a Range header
    range: str = ""  # only requests with this very Range header
    after_bytes: int = 0
    status: int = 503
    code: str = ""  # S3's, instead of the usual one of the status
    message: str = "as told by the test"
    wait: bool = False  # a status is answered once it is released
    rate_bytes_per_s: float = 1e6
    hits: int = 0
    reached: threading.Event = field(default_factory=threading.Event)
    gate: threading.Event = field(default_factory=threading.Event)

    def release(self) -> None:
        """Lets held requests go on."""
        self.gate.set()

    def matches(self, method: str, target: str, range_header: str) -> bool:
        parts = urlsplit(target)
        return (
            self.times != 0
            and self.method == method
            and self.path in unquote(parts.path)
            and self.query in parts.query
            and (self.ranged is None or self.ranged == bool(range_header))
            and self.range in {"", range_header}
        )


class CountingProxy:
    """``with CountingProxy(server.endpoint_url) as proxy:`` then give clients ``proxy.endpoint_url``."""

    def __init__(self, upstream_url: str) -> None:
        parts = urlsplit(upstream_url)
        assert parts.scheme == "http", "the proxy speaks plain HTTP to its server"
        self.upstream = (parts.hostname or "", parts.port or 80)
        self._lock = threading.Lock()
        self._requests: list[SeenRequest] = []
        self._faults: list[Fault] = []
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def connections(self) -> int:
        """How many connections clients have made so far."""
        return self._server.accepted

    def inject(self, kind: FaultKind, **settings: Any) -> Fault:
        """Breaks matching requests from now on. The first fault that matches a request acts on it, alone."""
        fault = Fault(kind, **settings)
        with self._lock:
            self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """Withdraws all faults and lets held requests go on."""
        with self._lock:
            faults, self._faults = self._faults, []
        for fault in faults:
            fault.release()

    def requests(self, method: str = "", path: str = "") -> list[SeenRequest]:
        """What was asked so far, in order; ``path`` is a part of the decoded path."""
        with self._lock:
            seen = [replace(item) for item in self._requests]
        return [item for item in seen if method in {"", item.method} and path in unquote(urlsplit(item.path).path)]

    def gets(self, path: str = "") -> list[SeenRequest]:
        """GETs of objects (not listings)."""
        return [item for item in self.requests("GET", path) if "list-type=" not in item.path]

    def get_bytes(self, path: str = "") -> int:
        """Bytes of objects that were sent."""
        return sum(item.body_bytes for item in self.gets(path))

    def clear(self) -> None:
        """Forgets what was counted."""
        with self._lock:
            self._requests.clear()

    def close(self) -> None:
        """Refuses connections from now on; idempotent."""
        self.heal()
        self._server.shutdown()
        self._thread.join()
        self._server.drop_connections()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def take_fault(self, method: str, target: str, range_header: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.matches(method, target, range_header):
                    fault.times -= 1
                    fault.hits += 1
                    return fault
        return None

    def record(self, request: SeenRequest) -> None:
        with self._lock:
            self._requests.append(request)


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = False
    proxy: CountingProxy

    def __init__(self, *args: Any) -> None:
        self._open: set[socket.socket] = set()
        self.accepted = 0
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        self.accepted += 1
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def drop_connections(self) -> None:
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client or a server that went away is nothing to report here."""


class _Cut(Exception):  # noqa: N818 not an error: the connection is to end here
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *args: Any) -> None:
        pass

    def _forward(self) -> None:
        fault = self.server.proxy.take_fault(self.command, self.path, self.headers.get("Range", ""))
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        upstream = http.client.HTTPConnection(*self.server.proxy.upstream, timeout=60)
        self._seen = SeenRequest(
            self.command, self.path, self.headers.get("Range", ""), fault=fault.kind if fault else ""
        )
        self.server.proxy.record(self._seen)
        try:
            if fault is not None and fault.kind == "status":
                self._answer_status(fault)
            elif fault is not None and fault.kind == "reset" and not fault.after_bytes:
                self._reset()
            else:
                self._relay(upstream, body, fault)
        except _Cut:
            self.close_connection = True
        finally:
            upstream.close()

    def do_GET(self) -> None:
        self._forward()

    def do_HEAD(self) -> None:
        self._forward()

    def do_PUT(self) -> None:
        self._forward()

    def do_POST(self) -> None:
        self._forward()

    def do_DELETE(self) -> None:
        self._forward()

    def _relay(self, upstream: http.client.HTTPConnection, body: bytes, fault: Fault | None) -> None:
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        headers = dict(self.headers.items()) if fault is None or fault.kind != "whole" else self._sign_whole()
        for name, value in headers.items():
            if name.lower() not in _HOP_HEADERS:
                upstream.putheader(name, value)
        upstream.endheaders(body or None)
        answer = upstream.getresponse()
        self._seen.status = answer.status
        answered = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP_HEADERS}
        lowered = {name.lower() for name in answered}
        rest: Any = answer
        if "content-length" not in lowered:
            data = answer.read()
            rest = None
            answered["Content-Length"] = str(len(data))
        length = int(next(value for name, value in answered.items() if name.lower() == "content-length"))
        length = self._spoil_headers(fault, answered, length)
        self.send_response_only(answer.status, answer.reason)
        for name, value in answered.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD" and answer.status not in {204, 304}:
            blocks = _blocks(rest, length) if rest is not None else iter([data[:length]])
            self._send_body(blocks, fault)

    def _sign_whole(self) -> dict[str, str]:
        """Headers of a request for the whole object: the client signed its Range, so that cannot just be left out."""
        request = AWSRequest("GET", f"http://{self.headers['Host']}{self.path}", headers={"Host": self.headers["Host"]})
        S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", "us-east-1").add_auth(request)
        return dict(request.headers.items())

    def _spoil_headers(self, fault: Fault | None, headers: dict[str, str], length: int) -> int:
        if fault is None:
            return length
        for name, value in list(headers.items()):
            if fault.kind == "etag" and name.lower() == "etag":
                headers[name] = '"0123456789abcdef0123456789abcdef"'
            if fault.kind == "wrong_range" and name.lower() == "content-range":
                headers[name] = re.sub(r"(\d+)-(\d+)", lambda m: f"{int(m[1]) + 1}-{int(m[2]) + 1}", value)
            if fault.kind == "short_length" and name.lower() == "content-length":
                length = min(length, fault.after_bytes)
                headers[name] = str(length)
        return length

    def _send_body(self, blocks: Iterator[bytes], fault: Fault | None) -> None:
        kind = fault.kind if fault else ""
        for block in blocks:
            if fault is None or kind not in {"reset", "truncate", "corrupt", "hold", "garbage", "slow"}:
                self._send(block)
                continue
            cut = fault.after_bytes - self._seen.body_bytes
            if kind == "slow":
                threading.Event().wait(len(block) / fault.rate_bytes_per_s)
                self._send(block)
            elif kind == "garbage" and cut < len(block):
                self._send(block[: max(cut, 0)])
                if cut >= 0:
                    self._act(fault)
                self._send(bytes(len(block) - max(cut, 0)))
            elif not 0 <= cut < len(block):
                self._send(block)
            elif kind == "corrupt":
                self._send(block[:cut] + bytes([block[cut] ^ 0x40]) + block[cut + 1 :])
            else:
                self._send(block[:cut])
                self._act(fault)
                self._send(block[cut:])

    def _act(self, fault: Fault) -> None:
        fault.reached.set()
        if fault.kind in {"hold", "garbage"}:
            fault.gate.wait()
            return
        if fault.kind == "reset":
            self._reset()
        raise _Cut

    def _send(self, block: bytes) -> None:
        self._seen.body_bytes += len(block)
        self.wfile.write(block)

    def _answer_status(self, fault: Fault) -> None:
        self._seen.status = fault.status
        fault.reached.set()
        if fault.wait:
            fault.gate.wait()
        usual = {503: "SlowDown", 500: "InternalError", 403: "AccessDenied"}.get(fault.status, "Broken")
        code = fault.code or usual
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{fault.message}</Message></Error>".encode()
        self.send_response_only(fault.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self._send(text)

    def _reset(self) -> None:
        """Ends the connection with RST, at once."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.server._open.discard(self.connection)
        os.close(self.connection.detach())
        raise _Cut


def _blocks(answer: http.client.HTTPResponse, length: int) -> Iterator[bytes]:
    while length:
        block = answer.read(min(_BLOCK_BYTES, length))
        if not block:
            return
        length -= len(block)
        yield block
