"""Bounds of HTTP's connections: how many there are, and how long each may be open without a request under way."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import cast

from aiohttp import web

IDLE_S = 15.0
"""Until a request has come, its headers included, and after each answer."""
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Connections:
    """Those that are open. Loop only."""

    def __init__(self, most: int, idle_s: float = IDLE_S) -> None:
        self._most = most
        self._idle_s = idle_s
        self._open: set[_Guard] = set()

    async def serve(self, connection: socket.socket, make: Callable[[], asyncio.Protocol]) -> None:
        """One more, by ``make``'s protocol, to its end. Who is beyond the bound is told so."""
        loop = asyncio.get_running_loop()
        if len(self._open) >= self._most:
            with suppress(OSError):  # gone
                await loop.sock_sendall(connection, _FULL)
            return
        guard = _Guard(make(), self._idle_s)
        self._open.add(guard)
        try:
            await loop.connect_accepted_socket(lambda: guard, connection)
            await guard.lost.wait()
        finally:
            self._open.discard(guard)

    @web.middleware
    async def middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Of an application that is served so: while it answers nothing is idle."""
        guard = next((guard for guard in self._open if guard.transport is request.transport), None)
        if guard is None:  # gone
            return await handler(request)
        with guard.answering():
            return await handler(request)


class _Guard(asyncio.Protocol):
    """Around aiohttp's own protocol, which would wait for a first request for ever, and for the next one an hour."""

    def __init__(self, inner: asyncio.Protocol, idle_s: float) -> None:
        self.transport: asyncio.Transport | None = None
        self.lost = asyncio.Event()
        self._inner = inner
        self._idle_s = idle_s
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Around the answer to a request."""
        self._stop_timer()
        try:
            yield
        finally:
            self._start_timer()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._start_timer()
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self.transport = None
        self.lost.set()
        self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def _start_timer(self) -> None:
        if self.transport is not None:
            self._timer = asyncio.get_running_loop().call_later(self._idle_s, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
