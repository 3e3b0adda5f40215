"""One more GET or HEAD on a connection that is open already, at a tenth of what urllib3 and http.client take for it.

They build and parse headers as mail has them, which costs as much as receiving some MB does. Whatever is not the
ordinary answer (a refusal, a body in chunks) is left to http.client, and connecting to urllib3.
"""

from __future__ import annotations

import http.client
import io
import ssl
from collections.abc import Callable, Mapping
from typing import Any

from urllib3 import HTTPConnectionPool

_READ_BYTES = 4096
_MAX_HEAD_BYTES = 1 << 16
_END = b"\r\n\r\n"


class LongBodyError(http.client.HTTPException):
    """A body of no announced length goes on after what was asked for."""

    def __init__(self) -> None:
        super().__init__("it has more bytes than were asked for")


class Reply:
    """An answer, its body still to be read: what was ``received`` with the head, then with ``receive``.

    In the end ``close`` it, unless all was read and ``finish`` says that the connection can be used again, and release
    it. ``headers``: by their names in lower case.
    """

    def __init__(
        self,
        status: int,
        headers: Mapping[str, str],
        received: bytes,
        receive: Callable[[memoryview], int],
        pool: HTTPConnectionPool,
        connection: Any,
        finish: Callable[[], bool],
    ) -> None:
        self.status = status
        self.headers = headers
        self.received = received
        self.receive = receive
        self.finish = finish
        self._pool = pool
        self._connection = connection

    def take_received(self, view: memoryview) -> int:
        """Into ``view``, as much as there is room for; the count of bytes."""
        count = min(len(view), len(self.received))
        view[:count] = self.received[:count]
        self.received = self.received[count:]
        return count

    def content(self) -> bytes:
        """The body, where it is that of an error as far as it may matter; the connection is given back."""
        content = bytearray(self.received)
        piece = memoryview(bytearray(_READ_BYTES))
        finished = False
        try:
            while len(content) < _MAX_HEAD_BYTES:
                count = self.receive(piece)
                if not count:
                    finished = self.finish()
                    break
                content += piece[:count]
        finally:
            if not finished:
                self.close()
            self.release_conn()
        return bytes(content)

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()

    def release_conn(self) -> None:
        """Gives the connection back to its pool; it must have been closed unless its whole answer was read."""
        self._pool._put_conn(self._connection)  # noqa: SLF001


def ask(pool: HTTPConnectionPool, method: str, target: str, headers: Mapping[str, str]) -> Reply | None:
    """The answer to a GET or HEAD; None where no connection is open, or the request is none that may be sent.

    ``pool``: of ``pool_classes``. Raises OSError and HTTPException; the connection is closed then.
    """
    request = _request(method, target, headers)
    connection: Any = pool._get_conn() if request else None  # noqa: SLF001
    if connection is None:
        return None
    if connection.sock is None:
        pool._put_conn(connection)  # noqa: SLF001
        return None
    try:
        connection.hold_for_abort()
        connection.sock.sendall(request)
        return _reply(pool, connection, method)
    except BaseException:
        connection.close()
        pool._put_conn(connection)  # noqa: SLF001
        raise


def receiver(sock: Any) -> Callable[[memoryview], int]:
    """Receives from a socket into a view as much as there is; 0 at the end."""
    if isinstance(sock, ssl.SSLSocket):
        read: Callable[[int, memoryview], int] = sock._sslobj.read  # type: ignore[attr-defined]  # noqa: SLF001
        return lambda view: read(len(view), view)
    return sock.recv_into  # type: ignore[no-any-return]


def _request(method: str, target: str, headers: Mapping[str, str]) -> bytes:
    """Empty for a header that is not one line of ASCII."""
    lines = [
        f"{method} {target} HTTP/1.1",
        "Accept-Encoding: identity",
        *(f"{name}: {headers[name]}" for name in headers),
    ]
    if not all(line.isascii() and line.isprintable() for line in lines):
        return b""
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _reply(pool: HTTPConnectionPool, connection: Any, method: str) -> Reply:
    sock = connection.sock
    data = b""
    while _END not in data:
        more = sock.recv(_READ_BYTES)
        if not more:
            raise http.client.RemoteDisconnected("the server closed the connection without an answer")
        data += more
        if len(data) > _MAX_HEAD_BYTES:
            raise http.client.LineTooLong("the head of the answer")
    head, _, first = data.partition(_END)
    status, headers = _parsed(head)
    if status == 200 and method == "HEAD":
        keep = _keeps(head, headers) and not first
        return Reply(status, headers, b"", lambda _view: 0, pool, connection, lambda: keep)
    if status in {200, 206} and "transfer-encoding" not in headers and headers.get("content-length", "").isdecimal():
        keep = _keeps(head, headers)
        return Reply(status, headers, first, receiver(sock), pool, connection, lambda: keep)
    response = http.client.HTTPResponse(_Replayed(data, receiver(sock)), method=method)  # type: ignore[arg-type]
    response.begin()
    headers = {name.lower(): value for name, value in response.headers.items()}

    def finish() -> bool:
        """A body in chunks ends with a marker that has to be read."""
        if response.read(1):
            raise LongBodyError
        return not response.will_close

    return Reply(response.status, headers, b"", response.readinto, pool, connection, finish)


def _keeps(head: bytes, headers: Mapping[str, str]) -> bool:
    """Whether the server takes another request on the connection."""
    return head.startswith(b"HTTP/1.1 ") and headers.get("connection", "").lower() != "close"


def _parsed(head: bytes) -> tuple[int, dict[str, str]]:
    """Status and headers; 0 and none for what is to be left to http.client."""
    first, *lines = head.decode("iso-8859-1").split("\r\n")
    version, _, rest = first.partition(" ")
    if not version.startswith("HTTP/1.") or not rest[:3].isdecimal():
        return 0, {}
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or name != name.strip():
            return 0, {}  # folded, or none at all
        name, value = name.lower(), value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return int(rest[:3]), headers


class _Replayed(io.RawIOBase):
    """What was received already, then what the socket has."""

    def __init__(self, received: bytes, receive: Callable[[memoryview], int]) -> None:
        super().__init__()
        self._received = received
        self._receive = receive

    def readable(self) -> bool:
        return True

    def readinto(self, view: Any) -> int:
        if not self._received:
            return self._receive(view)
        count = min(len(view), len(self._received))
        view[:count] = self._received[:count]
        self._received = self._received[count:]
        return count

    def makefile(self, _mode: str) -> io.BufferedReader:
        """As http.client takes a socket."""
        return io.BufferedReader(self)
