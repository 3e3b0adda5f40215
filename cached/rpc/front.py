"""The daemon's socket: accepts, asks the kernel who it is, and passes the bytes on to gRPC's own listener.

gRPC does not tell who is behind a Unix socket, and takes no connection that somebody else accepted. So the daemon
accepts, and connects for each to a socket that only its own user can reach, from an end that has a name of its own:
gRPC tells that name with every call, and `Callers` whose it is. Nothing a client sends takes part in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from typing import cast

import structlog

from cached.errors import CachedError, ConfigError, UnavailableError
from cached.listening import accept_each
from cached.open_files import not_accepted
from cached.rpc import sockets
from cached.rpc.callers import Callers, caller_of
from cached.rpc.engine import Failures
from cached.rpc.peers import groups_of, peer_of

_BACKLOG = 1024
_RETRY_S = 0.01
_CONNECT_S = 10.0
_FLUSH_S = 0.5
_BUFFER_BYTES = 256 * 1024
_log = structlog.get_logger(__name__)


def inner_path(path: str) -> str:
    """GRPC's own socket that belongs to a daemon's: ``/run/cached/cached.sock`` → ``/run/cached/.cached/rpc``."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name.removesuffix('.sock')}", "rpc")


class Front:
    """Accepts from ``start`` to ``stop``. The caller holds the socket's lock."""

    def __init__(self, path: str, callers: Callers, failures: Failures, *, mode: int, gid: int = -1) -> None:
        self.path = path
        self.inner = inner_path(path)
        self._callers = callers
        self._failures = failures
        self._mode = mode
        self._gid = gid
        self._acceptor: asyncio.Task[None] | None = None
        self._listener: socket.socket | None = None
        self._links: set[asyncio.Task[None]] = set()
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))

    def prepare(self) -> None:
        """Makes the folder of gRPC's own socket: nobody else can enter it. Raises ConfigError."""
        folder = os.path.dirname(self.inner)
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            found = os.lstat(folder)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                raise ConfigError(
                    f"{folder} is not a folder of the daemon's user", hint="remove it, or set daemon.socket",
                    key="daemon.socket", value=self.path,
                )  # fmt: skip
            os.chmod(folder, 0o700)
            sockets.remove_stale(self.inner)
        except OSError as error:
            msg = f"cannot make {folder}: {error.strerror}"
            raise ConfigError(msg, hint="set daemon.socket", key="daemon.socket", value=self.path) from error

    async def start(self) -> None:
        """Binds, once gRPC listens. Raises ConfigError."""
        sockets.remove_stale(self.path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            listener.bind(self.path)
            sockets.open_to(self.path, self._mode, self._gid)
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            msg = f"cannot listen on {self.path}: {error.strerror}"
            hint = "check the folder's owner and mode, or set daemon.socket"
            raise ConfigError(msg, hint=hint, key="daemon.socket", value=self.path) from error
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        self._acceptor = asyncio.create_task(
            accept_each(listener, self._link, self._links, self._ended, self._not_accepted), name="front"
        )
        self._acceptor.add_done_callback(self._ended)

    async def stop(self) -> None:
        """Ends all connections and removes the socket; idempotent. gRPC has said what it had to say."""
        if self._acceptor is None or self._listener is None:
            return
        tasks = [self._acceptor, *self._links]
        self._acceptor = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()
        for path in (self.path, self.inner):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(self.inner))

    def _not_accepted(self, error: OSError) -> None:
        self._failures.report("front.accept_failed", not_accepted("the socket of calls", error))

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Nobody awaits these tasks: what they end by is told here, or never."""
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._failures.bug("front", failure)

    async def _link(self, connection: socket.socket) -> None:
        """One connection, to its end."""
        try:
            caller = caller_of(peer_of(connection), groups_of(connection))
            name = self._callers.come(caller)
            try:
                await self._splice(connection, name)
            finally:
                self._callers.gone(name)
        except CachedError as error:
            self._failures.refused("rpc.refused", error, method="connect")
        except OSError as error:  # gone
            _log.debug("front.ended", error=str(error))

    async def _splice(self, connection: socket.socket, name: str) -> None:
        loop = asyncio.get_running_loop()
        outer, inner = _End(self._buffer), _End(self._buffer)
        outer.other, inner.other = inner, outer
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as link:
            link.bind(f"\0{name}")
            await _connect(link, self.inner)
            try:
                await loop.create_unix_connection(lambda: inner, sock=link)
                await loop.connect_accepted_socket(lambda: outer, connection)
                await asyncio.wait({outer.lost, inner.lost}, return_when=asyncio.FIRST_COMPLETED)
                # What the one had sent before it ended still goes to the other.
                for end in (outer, inner):
                    end.close()
                await asyncio.wait({outer.lost, inner.lost}, timeout=_FLUSH_S)
            finally:
                for end in (outer, inner):
                    end.abort()


class _End(asyncio.BufferedProtocol):
    """One end of a connection. What comes goes to the other one, no faster than that takes it.

    All ends read into the same ``buffer``, which holds nothing between two steps of the loop. Without one, asyncio
    takes 256 KiB for each read and gives most of it back, which leaves the heap in holes.
    """

    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer
        self.other: _End = self
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None
        self._early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        for data in self._early:
            self.transport.write(data)
        self._early.clear()

    @property
    def usable(self) -> asyncio.Transport | None:
        """The transport, if it can be used: uvloop raises while it is closing, where asyncio ignores that."""
        return None if self.transport is None or self.transport.is_closing() else self.transport

    def get_buffer(self, sizehint: int) -> memoryview:
        del sizehint
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.other.send(bytes(self._buffer[:nbytes]))

    def send(self, data: bytes) -> None:
        """To whoever is at this end, unless it is gone."""
        if self.transport is None:
            self._early.append(data)
        elif (transport := self.usable) is not None:
            transport.write(data)

    def pause_writing(self) -> None:
        if (transport := self.other.usable) is not None:
            transport.pause_reading()

    def resume_writing(self) -> None:
        if (transport := self.other.usable) is not None:
            transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)

    def close(self) -> None:
        """Once what is under way was sent."""
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """At once."""
        if self.transport is not None:
            self.transport.abort()


async def _connect(link: socket.socket, path: str) -> None:
    """To a listener of our own; while its queue is full a Unix socket answers EAGAIN, and cannot be waited for.

    Raises UnavailableError when it stays full.
    """
    loop = asyncio.get_running_loop()
    end_s = loop.time() + _CONNECT_S
    while True:
        try:
            link.connect(path)
        except BlockingIOError as error:
            if loop.time() >= end_s:
                msg = f"gRPC took no connection for {_CONNECT_S:g} s"
                raise UnavailableError(msg, hint="try again in a moment") from error
            await asyncio.sleep(_RETRY_S)
        else:
            return
