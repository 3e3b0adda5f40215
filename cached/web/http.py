"""HTTP for machines and a look by eye: /metrics, /healthz, /readyz and a plain status page. Reads only."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from aiohttp import web

from cached.errors import ConfigError
from cached.metrics import Metrics
from cached.types import ModelSummary, Stats
from cached.units import format_duration, format_size

_KEY = "http.listen"


@dataclass(frozen=True, slots=True)
class Views:
    """What the pages show. The functions are called at each request, in the loop, and must not block."""

    metrics: Metrics
    not_ready: Callable[[], tuple[str, ...]]
    """Why the daemon is not ready; empty when it is."""
    stats: Callable[[], Stats]
    models: Callable[[], tuple[ModelSummary, ...]]


class HttpServer:
    """Serves from ``start`` to ``stop``."""

    def __init__(self, listen: str, views: Views) -> None:
        """``listen``: HOST:PORT; port 0 takes a free one, see ``address``."""
        self._listen = listen
        self._views = views
        self._runner: web.AppRunner | None = None

    @property
    def address(self) -> str:
        """HOST:PORT that it really listens on; empty before ``start``."""
        if self._runner is None or not self._runner.addresses:
            return ""
        host, port = self._runner.addresses[0][:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def start(self) -> None:
        """Binds. Raises ConfigError naming http.listen when the address is wrong or taken."""
        host, port = _split(self._listen)
        runner = web.AppRunner(_application(self._views), access_log=None, handle_signals=False, shutdown_timeout=2.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except (OSError, OverflowError) as error:
            await runner.cleanup()
            cause = getattr(error, "strerror", None) or str(error)
            msg = f"{_KEY}: cannot listen on {self._listen}: {cause}"
            hint = f"give {_KEY} another port or an address of this host, or '' to serve no HTTP"
            raise ConfigError(msg, hint=hint, key=_KEY, value=self._listen) from error
        self._runner = runner

    async def stop(self) -> None:
        """Ends it; idempotent."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()


def _split(listen: str) -> tuple[str, int]:
    host, colon, port = listen.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        msg = f"{_KEY}: {listen!r} is not HOST:PORT"
        raise ConfigError(msg, hint="write an address such as '127.0.0.1:9470'", key=_KEY, value=listen)
    return host.removeprefix("[").removesuffix("]"), int(port)


@dataclass(frozen=True, slots=True)
class _Pages:
    views: Views
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

    async def status(self, _request: web.Request) -> web.Response:
        reasons = self.views.not_ready()
        body = f"<p>Not ready: {html.escape('; '.join(reasons))}</p>" if reasons else _overview(self.views)
        page = f"{_HEAD}<h1>cached</h1>{body}</html>"
        policy = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return web.Response(text=page, content_type="text/html", headers=self.headers | policy)


def _application(views: Views) -> web.Application:
    pages = _Pages(views)
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


_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>cached</title>
<style>body{font:14px system-ui;margin:2em}td,th{padding:.2em 1em .2em 0;text-align:left}</style>
"""


_MODEL_HEADS = (
    "model", "revision", "state", "tier", "value", "idle", "size", "L1", "L2", "leases", "notes",
)  # fmt: skip


def _idle(model: ModelSummary, now_s: float) -> str:
    if model.lease_count:
        return "in use"
    return format_duration(max(0.0, now_s - model.last_used_time_s)) if model.last_used_time_s else "never used"


def _notes(model: ModelSummary) -> str:
    notes = [
        ("pinned", model.pinned), ("transient", model.transient), (f"adapter of {model.base}", model.base),
        (f"tenant {model.tenant}", model.tenant),
    ]  # fmt: skip
    return ", ".join(note for note, holds in notes if holds)


def _overview(views: Views) -> str:
    stats, now_s = views.stats(), time.time()
    state = "; ".join(stats.degraded) if stats.degraded else "all is well"
    facts = (
        f"<p>Version {html.escape(stats.version)}, up {format_duration(stats.uptime_s)}, {stats.lease_count} leases, "
        f"{stats.active_load_count} loads, {stats.mover_count} movers: {html.escape(state)}.</p>"
    )
    levels = [
        (
            level.level.value.upper(), format_size(level.used_bytes), format_size(level.reserved_bytes),
            format_size(level.capacity_bytes), format_size(level.transient_bytes),
            f"{format_size(level.hot_bytes)} of {format_size(level.hot_capacity_bytes)}", str(level.blob_count),
            level.limited_by,
        )
        for level in stats.levels
    ]  # fmt: skip
    models = [
        (
            model.name, model.revision[:12], model.state.value, f"{model.tier.value} (by {model.tier_from})",
            format_duration(model.worth_s), _idle(model, now_s), format_size(model.size_bytes),
            format_size(model.l1_bytes), format_size(model.l2_bytes), str(model.lease_count), _notes(model),
        )
        for model in views.models()
    ]  # fmt: skip
    return (
        facts
        + _table(("level", "used", "reserved", "capacity", "transient", "hot", "blobs", "limited by"), levels)
        + _table(_MODEL_HEADS, models)
    )


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{item}</th>" for item in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(item)}</td>" for item in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
