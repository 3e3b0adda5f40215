"""HTTP for machines and a look by eye: /metrics, /healthz, /readyz and the status page. Reads only."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import cast

from aiohttp import web

from cached.cache.failures import Failures
from cached.errors import ConfigError
from cached.listening import accept_each
from cached.metrics import Metrics
from cached.open_files import file_shares, not_accepted
from cached.overview import Limits, Overview
from cached.web.connections import Connections
from cached.web.page import StatusPage

_KEY = "http.listen"
_BACKLOG = 128


@dataclass(frozen=True, slots=True)
class Views:
    """What the pages show. The functions are called at each request, in the loop, and must not block."""

    metrics: Metrics
    not_ready: Callable[[], tuple[str, ...]]
    """Why the daemon is not ready; empty when it is."""
    overview: Callable[[Limits], Overview | None]
    """None while there is nothing to look at yet."""
    host: str = ""
    """What this host is called."""


class HttpServer:
    """Serves from ``start`` to ``stop``."""

    def __init__(self, listen: str, views: Views, failures: Failures, connections: Connections | None = None) -> None:
        """``listen``: HOST:PORT; port 0 takes a free one, see ``address``."""
        self._listen = listen
        self._views = views
        self._failures = failures
        self._connections = connections or Connections(file_shares().http)
        self._runner: web.AppRunner | None = None
        self._listeners: list[socket.socket] = []
        self._acceptors: list[asyncio.Task[None]] = []
        self._served: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """HOST:PORT that it really listens on; empty before ``start``."""
        if not self._listeners:
            return ""
        host, port = self._listeners[0].getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def start(self) -> None:
        """Binds. Raises ConfigError naming http.listen when the address is wrong or taken."""
        host, port = _split(self._listen)
        application = _application(self._views)
        application.middlewares.append(self._connections.middleware)
        runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=2.0)
        await runner.setup()
        try:
            self._listeners = await _bound(host, port)
        except (OSError, OverflowError) as error:
            await runner.cleanup()
            cause = getattr(error, "strerror", None) or str(error)
            msg = f"{_KEY}: cannot listen on {self._listen}: {cause}"
            hint = f"give {_KEY} another port or an address of this host, or '' to serve no HTTP"
            raise ConfigError(msg, hint=hint, key=_KEY, value=self._listen) from error
        self._runner = runner
        make = cast("Callable[[], asyncio.Protocol]", runner.server)
        for listener in self._listeners:
            accepting = accept_each(
                listener,
                lambda connection: self._connections.serve(connection, make),
                self._served,
                self._ended,
                self._not_accepted,
            )
            self._acceptors.append(asyncio.create_task(accepting, name="http"))
            self._acceptors[-1].add_done_callback(self._ended)

    async def stop(self) -> None:
        """Ends it; idempotent."""
        await self._end(self._acceptors)
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()
        await self._end(self._served)

    async def _end(self, tasks: Collection[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _not_accepted(self, error: OSError) -> None:
        self._failures.report("http.accept_failed", not_accepted("the HTTP listener", error))

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Nobody awaits these tasks: what they end by is told here, or never."""
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._failures.bug("http", failure)


async def _bound(host: str, port: int) -> list[socket.socket]:
    """A listener for each address of ``host``, all of the first one's port. Raises OSError, OverflowError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listeners: list[socket.socket] = []
    try:
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            free = (address[0], port or listeners[0].getsockname()[1], *address[2:]) if listeners else address
            listeners.append(socket.create_server(free, family=family, backlog=_BACKLOG))
            listeners[-1].setblocking(False)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _split(listen: str) -> tuple[str, int]:
    host, colon, port = listen.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        msg = f"{_KEY}: {listen!r} is not HOST:PORT"
        raise ConfigError(msg, hint="write an address such as '127.0.0.1:9470'", key=_KEY, value=listen)
    return host.removeprefix("[").removesuffix("]"), int(port)


@dataclass(frozen=True, slots=True)
class _Pages:
    views: Views
    page: StatusPage
    headers: dict[str, str] = field(
        default_factory=lambda: {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    )

    async def metrics(self, request: web.Request) -> web.Response:
        body, content_type = self.views.metrics.expose(request.headers.get("Accept", ""))
        return web.Response(body=body, headers=self.headers | {"Content-Type": content_type})

    async def healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n", headers=self.headers)

    async def readyz(self, _request: web.Request) -> web.Response:
        reasons = self.views.not_ready()
        text = "".join(f"{reason}\n" for reason in reasons) or "ready\n"
        return web.Response(text=text, status=503 if reasons else 200, headers=self.headers)

    async def status(self, request: web.Request) -> web.Response:
        page, policy = await self.page.get(), {"Content-Security-Policy": self.page.policy}
        headers = self.headers | policy | {"Referrer-Policy": "no-referrer", "Vary": "Accept-Encoding"}
        body = page.html
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            body, headers = page.packed, headers | {"Content-Encoding": "gzip"}
        return web.Response(body=body, content_type="text/html", charset="utf-8", headers=headers)


def _application(views: Views) -> web.Application:
    page = StatusPage(views.overview, views.not_ready, host=views.host, wall_s=time.time)
    pages = _Pages(views, page)
    application = web.Application()
    application.add_routes(
        [
            web.get("/metrics", pages.metrics),
            web.get("/healthz", pages.healthz),
            web.get("/readyz", pages.readyz),
            web.get("/", pages.status),
        ]
    )
    return application
