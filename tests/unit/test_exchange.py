"""A GET on an open connection: what servers and proxies may answer, byte by byte."""

from __future__ import annotations

import http.client
import socket
import threading
from contextlib import suppress
from typing import Any, Self

import pytest

from cached.origins.net.addresses import Addresses
from cached.origins.net.body import Body
from cached.origins.net.connections import pool_classes
from cached.origins.net.exchange import Reply, ask

HEADERS = {"Host": "here", "Range": "bytes=0-4"}
END = b""
PLAIN = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 5\r\nETag: x\r\n\r\nhello"


class Script:
    """A server that answers each request with the next of ``answers``: pieces, sent one by one; END closes."""

    def __init__(self, answers: list[list[bytes]]) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self._answers = iter(answers)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        pool_class: Any = pool_classes(Addresses())["http"]
        self.pool = pool_class(*self._listening.getsockname()[:2], maxsize=2, timeout=10)
        return self

    def __exit__(self, *exc: object) -> None:
        self.pool.close()
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()

    def open(self) -> None:
        """Has urllib3 make a connection, by a first request."""
        assert self.pool.urlopen("GET", "/", headers=HEADERS).data == b"hello"

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection, suppress(ConnectionError):
                self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        while data := connection.recv(65536):
            self.requests.append(data)
            for piece in next(self._answers):
                if piece == END:
                    return
                connection.sendall(piece)


def asked(script: Script) -> Reply:
    reply = ask(script.pool, "GET", "/m?v=1", HEADERS)
    assert reply is not None
    return reply


def read(reply: Reply, length_bytes: int) -> bytes:
    """As an origin does; in pieces that do not fit what arrives."""
    body, content = Body(), bytearray(length_bytes)
    body.begin(reply)
    done_bytes = sum(body.read_into(memoryview(content)[at : at + 2]) for at in range(0, length_bytes, 2))
    if done_bytes == length_bytes:
        body.finish()
    body.end()
    return bytes(content[:done_bytes])


ANSWERS = {
    "plain": [PLAIN],
    "byte by byte": [bytes([byte]) for byte in PLAIN],
    "repeated header": [PLAIN.replace(b"ETag: x", b"Vary: a\r\nETag: x\r\nVary: b")],
    "folded header": [PLAIN.replace(b"ETag: x", b"Other: a\r\n b\r\nETag: x")],
    "in chunks": [
        b"HTTP/1.1 206 Partial Content\r\nETag: x\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n",
    ],
    "continue first": [b"HTTP/1.1 100 Continue\r\n\r\n", PLAIN],
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_the_body_is_read_and_the_connection_kept(answer: list[bytes]) -> None:
    with Script([[PLAIN], answer, [PLAIN]]) as script:
        script.open()
        reply = asked(script)
        assert (reply.status, reply.headers["etag"]) == (206, "x")
        assert read(reply, 5) == b"hello"
        assert read(asked(script), 5) == b"hello"
        assert script.connections == 1
        assert script.requests[1].startswith(b"GET /m?v=1 HTTP/1.1\r\n")
        assert b"Range: bytes=0-4\r\n" in script.requests[1]


HEADS = {
    "plain": [b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\nETag: x\r\n\r\n"],
    "in chunks": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nETag: x\r\n\r\n"],
    "refused": [b"HTTP/1.1 404 Not Found\r\nContent-Length: 500\r\nETag: x\r\n\r\n"],
    "folded header": [b"HTTP/1.1 200 OK\r\nOther: a\r\n b\r\nETag: x\r\nContent-Length: 500\r\n\r\n"],
}


@pytest.mark.parametrize("answer", HEADS.values(), ids=HEADS)
def test_a_head_has_no_body_and_the_connection_is_kept(answer: list[bytes]) -> None:
    with Script([[PLAIN], answer, [PLAIN]]) as script:
        script.open()
        reply = ask(script.pool, "HEAD", "/m", HEADERS)
        assert reply is not None
        assert (reply.headers["etag"], reply.content()) == ("x", b"")
        assert read(asked(script), 5) == b"hello"
        assert script.connections == 1
        assert script.requests[1].startswith(b"HEAD /m HTTP/1.1\r\n")


def test_a_head_with_a_body_all_the_same_ends_its_connection() -> None:
    with Script([[PLAIN], [PLAIN.replace(b"206 Partial Content", b"200 OK")], [PLAIN]]) as script:
        script.open()
        reply = ask(script.pool, "HEAD", "/m", HEADERS)
        assert reply is not None
        assert reply.content() == b""
        script.open()
        assert script.connections == 2


def test_without_an_open_connection_it_is_left_to_urllib3() -> None:
    with Script([[PLAIN]]) as script:
        assert ask(script.pool, "GET", "/", HEADERS) is None
        script.open()


@pytest.mark.parametrize("value", ["x\r\nEvil: 1", "x\nEvil: 1", "\u20ac", "\ud800"])
def test_what_is_no_header_is_never_sent(value: str) -> None:
    with Script([[PLAIN]]) as script:
        script.open()
        assert ask(script.pool, "GET", "/", {**HEADERS, "If-Match": value}) is None
        assert len(script.requests) == 1


def test_a_connection_that_is_to_end_is_not_used_again() -> None:
    closing = PLAIN.replace(b"ETag: x", b"ETag: x\r\nConnection: close")
    with Script([[PLAIN], [closing], [PLAIN]]) as script:
        script.open()
        assert read(asked(script), 5) == b"hello"
        assert ask(script.pool, "GET", "/", HEADERS) is None, "none is open"
        script.open()
        assert script.connections == 2


@pytest.mark.parametrize("chunked", [False, True])
def test_a_refusal_is_read_whole(chunked: bool) -> None:
    body = b"3\r\nwhy\r\n0\r\n\r\n" if chunked else b"why"
    length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 3"
    with Script([[PLAIN], [b"HTTP/1.1 503 Slow Down\r\n" + length + b"\r\n\r\n", body], [PLAIN]]) as script:
        script.open()
        reply = asked(script)
        assert (reply.status, reply.content()) == (503, b"why")
        assert read(asked(script), 5) == b"hello"
        assert script.connections == 1


@pytest.mark.parametrize("answer", [[END], [b"nonsense\r\n\r\n"], [b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000]])
def test_no_answer_is_an_error_and_ends_the_connection(answer: list[bytes]) -> None:
    with Script([[PLAIN], answer, [PLAIN]]) as script:
        script.open()
        with pytest.raises((http.client.HTTPException, OSError)):
            asked(script)
        script.open()
        assert script.connections == 2


def test_a_body_that_ends_early_is_not_taken_for_whole() -> None:
    with Script([[PLAIN], [PLAIN[:-2], END]]) as script:
        script.open()
        assert read(asked(script), 5) == b"hel"
        assert ask(script.pool, "GET", "/", HEADERS) is None, "none is open"
