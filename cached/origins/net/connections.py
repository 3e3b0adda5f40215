"""urllib3 connections that use every address of their host, and that can be ended while a thread waits on them."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import urllib3.exceptions
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection

from cached.origins.base import Abort
from cached.origins.net.addresses import Address, Addresses

_MAX_TRIES = 3


class _Reading(threading.local):
    """The interruptible read of this thread."""

    interrupt: _Interrupt | None = None


_reading = _Reading()


@contextmanager
def interruptible(abort: Abort | None) -> Iterator[None]:
    """In the block, an abort ends what this thread waits for on a connection of ``pool_classes``: it reads the end.

    Leave it before the connection is given back, or an abort that comes late hits its next user.
    """
    if abort is None:
        yield
        return
    interrupt = _reading.interrupt = _Interrupt()
    try:
        with abort.calling(interrupt.shut):
            yield
    finally:
        _reading.interrupt = None
        interrupt.let_go()


class _Interrupt:
    """Shuts the socket that it holds.

    It holds a descriptor of its own: shutting that ends the connection for all of them, in a TLS handshake too, where
    the Python object changes, and never hits another connection that got the number of a closed one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: socket.socket | None = None
        self._connection: SpreadConnection | None = None
        self._shut = False

    def hold(self, sock: socket.socket, connection: SpreadConnection) -> None:
        """From now on it is this one."""
        mine = socket.socket(sock.family, sock.type, sock.proto, fileno=os.dup(sock.fileno()))
        with self._lock:
            held, self._held, self._connection = self._held, mine, connection
            if self._shut:
                self._shut_held()
        if held is not None:
            held.close()

    def shut(self) -> None:
        """Ends it, and every later one."""
        with self._lock:
            self._shut = True
            self._shut_held()

    def let_go(self) -> None:
        """Nothing is held any more."""
        with self._lock:
            held, self._held, self._connection = self._held, None, None
        if held is not None:
            held.close()

    def _shut_held(self) -> None:
        if self._held is not None and self._connection is not None:
            self._connection.blame()
            with suppress(OSError):
                self._held.shutdown(socket.SHUT_RDWR)


class SpreadConnection:
    """To be mixed into a connection class of urllib3; ``addresses`` is set by ``pool_classes``."""

    addresses: Addresses
    sock: Any
    _address: Address | None = None

    def blame(self) -> None:
        """New connections avoid its address for a while."""
        if self._address is not None:
            self.addresses.failed(self._address)

    def request(self, *args: Any, **kwargs: Any) -> Any:
        """See urllib3."""
        self.hold_for_abort()
        return super().request(*args, **kwargs)  # type: ignore[misc]

    def hold_for_abort(self) -> None:
        """This thread's interruptible read is on this connection from now on, if it is open."""
        if _reading.interrupt is not None and self.sock is not None:
            _reading.interrupt.hold(self.sock, self)

    def _new_conn(self) -> socket.socket:
        """As urllib3's own, which always begins with the first address."""
        connection: Any = self
        try:
            addresses = self.addresses.next(connection._dns_host, connection.port)  # noqa: SLF001
        except (socket.gaierror, UnicodeError) as error:
            reason = error if isinstance(error, socket.gaierror) else socket.gaierror(str(error))
            raise urllib3.exceptions.NameResolutionError(connection.host, connection, reason) from error
        problem: OSError = OSError("the name has no address")
        for address in addresses[:_MAX_TRIES]:
            try:
                return self._connect_to(address)
            except OSError as error:
                self.addresses.failed(address)
                problem = error
        if isinstance(problem, TimeoutError):
            message = f"Connection to {connection.host} timed out. (connect timeout={connection.timeout})"
            raise urllib3.exceptions.ConnectTimeoutError(connection, message) from problem
        message = f"Failed to establish a new connection: {problem}"
        raise urllib3.exceptions.NewConnectionError(connection, message) from problem

    def _connect_to(self, address: Address) -> socket.socket:
        connection: Any = self
        sock = socket.socket(address.family, socket.SOCK_STREAM)
        try:
            for option in connection.socket_options or ():
                sock.setsockopt(*option)
            sock.settimeout(connection.timeout)
            if connection.source_address:
                sock.bind(connection.source_address)
            self._address = address
            if _reading.interrupt is not None:
                _reading.interrupt.hold(sock, self)
            sock.connect(address.sockaddr)
        except BaseException:
            sock.close()
            raise
        return sock


def pool_classes(
    addresses: Addresses,
    http: type[HTTPConnection] = HTTPConnection,
    https: type[HTTPSConnection] = HTTPSConnection,
) -> dict[str, type[HTTPConnectionPool]]:
    """For ``pool_classes_by_scheme`` of a urllib3 PoolManager; of one for a proxy, the addresses are the proxy's.

    ``http`` and ``https``: the classes of connections that these are to be.
    """
    spread_http = type("SpreadHTTPConnection", (SpreadConnection, http), {"addresses": addresses})
    spread_https = type("SpreadHTTPSConnection", (SpreadConnection, https), {"addresses": addresses})
    return {
        "http": type("SpreadHTTPConnectionPool", (HTTPConnectionPool,), {"ConnectionCls": spread_http}),
        "https": type("SpreadHTTPSConnectionPool", (HTTPSConnectionPool,), {"ConnectionCls": spread_https}),
    }
