"""Bounds of HTTP's connections: how many there are, and how long each may be open without a request under way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
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

    def guarded(self, make: Callable[[], asyncio.Protocol]) -> asyncio.Protocol:
        """What serves one more: ``make``'s protocol, or one that says that there are too many."""
        if len(self._open) >= self._most:
            return _Full()
        guard = _Guard(make(), self._open, self._idle_s)
        self._open.add(guard)
        return guard

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

    def __init__(self, inner: asyncio.Protocol, others: set[_Guard], idle_s: float) -> None:
        self.transport: asyncio.Transport | None = None
        self._inner = inner
        self._others = others
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
        self._others.discard(self)
        self._stop_timer()
        self.transport = None
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


class _Full(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast("asyncio.Transport", transport)
        transport.write(_FULL)
        transport.close()
