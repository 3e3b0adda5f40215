"""The composition root: takes the locks, builds the parts, recovers, serves, drains."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import resource
import signal
import socket
import stat
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import structlog
import uvloop

from cached import __version__, heap, logs, priority
from cached.cache import ModelCache
from cached.cache.background import Background
from cached.catalog_watch import CatalogWatch
from cached.clock import SystemClock
from cached.config import Config, LoadedConfig, wants_telemetry
from cached.errors import CachedError, ConfigError
from cached.layout import claim_layout
from cached.metrics import Metrics
from cached.overview import Limits, Overview
from cached.rpc import sockets
from cached.rpc.descriptors import DescriptorServer
from cached.rpc.descriptors import Limits as DescriptorLimits
from cached.rpc.network import Network
from cached.rpc.server import RpcServer
from cached.sdnotify import Notifier
from cached.service_status import StatusReporter
from cached.signatures import CatalogGuard
from cached.tracing import Tracer
from cached.units import format_size

if TYPE_CHECKING:
    from cached.web.http import HttpServer

_WATCHDOG_S = 5.0
_OPEN_FILES = 65536
_MORE_TIME_S = 30.0
"""What a daemon that starts or stops asks for with each sign of life; it takes that long to notice that one hangs."""

_LAG_INTERVAL_S = 1.0
_TRIM_S = 60.0
_STOP_GRACE_S = 1.0
_CLOSE_TIMEOUT_S = 10.0
_log = structlog.get_logger(__name__)


def serve(loaded: LoadedConfig, environment: Mapping[str, str], read: Callable[[], LoadedConfig]) -> int:
    """Runs the daemon in this process until SIGTERM or SIGINT; a second signal cuts the drain short. Returns 0.

    From the main thread only. ``environment`` is asked for the service manager's socket, and ``read`` for the settings
    as they are now, with SIGHUP: of these the budgets of the levels are taken. Raises ConfigError for what
    cannot be used, AlreadyRunningError within a second when another daemon holds the state folder or the socket.
    """
    heap.share_one_arena()
    priority.answer_soon()
    config, notifier = loaded.config, Notifier.from_environment(environment)
    logs.configure(config.daemon.log_level, config.daemon.log_format)
    faulthandler.enable()  # a watchdog ends a daemon that hangs by SIGABRT: then the log has where it hung
    os.umask(0o077)
    _raise_open_files()
    try:
        with _locked(config):
            _log.info("daemon.starting", version=__version__, pid=os.getpid(), config=loaded.file or "defaults")
            notifier.status("starting: reading what an earlier daemon left")
            uvloop.run(_run(config, environment, notifier, read))
    except CachedError as error:
        notifier.status(f"failed: {error.message}")
        raise
    return 0


def _raise_open_files() -> None:
    """To what the host allows: each connection takes three, each segment and file one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft < wanted:
        with suppress(OSError, ValueError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _run(
    config: Config, environment: Mapping[str, str], notifier: Notifier, read: Callable[[], LoadedConfig]
) -> None:
    """Built within the loop: the gRPC server belongs to the loop that it is made in."""
    metrics = Metrics(__version__)
    tracer = _tracer(config, environment, metrics)
    try:
        await _Daemon(config, notifier, read, metrics, tracer).run()
    finally:
        await asyncio.to_thread(tracer.close)


def _tracer(config: Config, environment: Mapping[str, str], metrics: Metrics) -> Tracer:
    """One that exports, where that is asked for. Raises ConfigError if the settings ask for what is not installed.

    Variables of OpenTelemetry may be meant for every program of a host: then that is a warning.
    """
    if not wants_telemetry(config.telemetry, environment):
        return Tracer()
    try:
        from cached.telemetry import OtelTracer
    except ImportError as error:
        endpoint, hint = config.telemetry.otlp_endpoint, "pip install 'cached[otel]'"
        if endpoint:
            msg = f"telemetry.otlp_endpoint is set, but OpenTelemetry is not installed: {error}"
            raise ConfigError(msg, hint=hint, key="telemetry.otlp_endpoint", value=endpoint) from error
        _log.warning("telemetry.missing", cause=str(error), hint=hint)
        return Tracer()
    return OtelTracer(
        config.telemetry.otlp_endpoint,
        version=__version__,
        on_exported=lambda outcome, count: metrics.telemetry_spans.labels(outcome=outcome).inc(count),
    )


@contextmanager
def _locked(config: Config) -> Iterator[None]:
    """The folders exist and can be used by this version, and both locks are held."""
    daemon, access = config.daemon, config.access
    sockets.prepare_private_directory(daemon.state_dir, "state folder", "daemon.state_dir")
    group = sockets.group_id(access.socket_group, "access.socket_group")
    folder = os.path.dirname(daemon.socket)
    sockets.prepare_directory(
        folder, _folder_mode(folder, access.socket_mode, group), "socket's folder", "daemon.socket", group
    )
    state = sockets.FileLock(f"{daemon.state_dir}/lock", f"the state folder {daemon.state_dir}")
    try:
        claim_layout(daemon.state_dir, __version__)
        bound = sockets.FileLock(f"{daemon.socket}.lock", f"the socket {daemon.socket}")
        try:
            yield
        finally:
            bound.release()
    finally:
        state.release()


def _folder_mode(folder: str, socket_mode: str, group: int) -> int:
    """Whoever may use the socket must be able to enter its folder. Below /tmp only a group that was named may."""
    mode = int(socket_mode, 8)
    if mode & 0o007:
        return 0o755
    parent = os.path.dirname(folder)
    in_public = os.path.isdir(parent) and os.stat(parent).st_mode & stat.S_IWOTH
    return 0o700 if not mode & 0o070 or (in_public and group < 0) else 0o750


class _Daemon:
    def __init__(
        self,
        config: Config,
        notifier: Notifier,
        read: Callable[[], LoadedConfig],
        metrics: Metrics,
        tracer: Tracer,
    ) -> None:
        self._config = config
        self._read = read
        self._notifier = notifier
        self._metrics = metrics
        self._metrics.config.done(successful=True)
        self._engine = ModelCache.build(config, self._metrics, SystemClock(), tracer)
        keys = config.catalog.public_keys
        guard = CatalogGuard(keys, f"{config.daemon.state_dir}/catalog-signed-at") if keys else None
        self._catalog = CatalogWatch(config.daemon.catalog, self._engine, self._metrics.catalog, guard)
        self._refused = ""
        self._status = StatusReporter(notifier, self._engine, self._problems)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._phase = "starting"
        access, policy = config.access, self._engine.visibility.policy
        mode, group = int(access.socket_mode, 8), sockets.group_id(access.socket_group, "access.socket_group")
        self._network = Network(config.tcp, config.daemon.socket) if config.tcp.listen else None
        self._rpc = RpcServer(
            self._engine,
            self._metrics,
            config.daemon.socket,
            mode=mode,
            gid=group,
            reflect=config.daemon.reflection,
            tracer=tracer,
            access=policy,
            limits=config.limits,
            network=self._network,
        )
        self._descriptors = DescriptorServer(
            self._engine,
            sockets.descriptor_socket_path(config.daemon.socket),
            mode=mode,
            gid=group,
            access=policy,
            limits=DescriptorLimits(connections_per_uid=config.limits.descriptor_connections_per_uid),
        )
        metrics.bind_limits(self._descriptors.used_ratios)
        self._http = self._http_server() if config.http.listen else None

    def _http_server(self) -> HttpServer:
        """Imported here, since a daemon without pages does without its library."""
        from cached.web.http import HttpServer, Views

        host = self._config.fleet.node_name or socket.gethostname()
        views = Views(self._metrics, self._not_ready, self._overview, host=host)
        return HttpServer(self._config.http.listen, views, self._engine.failures)

    async def run(self) -> None:
        """Until it is told to stop. Whatever was begun is ended, in reverse order."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_stray)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop)
        loop.add_signal_handler(signal.SIGHUP, self._catalog.reload_soon)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._beside("watchdog", self._watchdog()))
            await stack.enter_async_context(self._beside("loop lag", self._measure_lag()))
            await stack.enter_async_context(self._beside("heap", self._trim_heap()))
            stack.push_async_callback(self._close_engine)
            await self._bind(stack)
            if not await self._recover():
                self._notifier.stopping("stopped before it was ready")
                return
            await stack.enter_async_context(self._beside("catalog", self._catalog.run(self._reload)))
            await stack.enter_async_context(self._beside("status", self._status.run()))
            if self._network is not None:
                await stack.enter_async_context(self._beside("certificates", self._network.run(self._engine)))
            await self._stop.wait()
            await self._drain()

    async def _reload(self) -> None:
        """Reads settings and catalog. READY=1 comes in any case: if nothing else, the daemon serves as before."""
        self._notifier.reloading()
        try:
            await self._reload_settings()
            await self._catalog.load(force=True)
            if self._network is not None:
                with self._engine.failures.survived("certificates"):
                    await self._network.reload(self._engine)
        finally:
            self._notifier.ready(self._status.line())

    async def _reload_settings(self) -> None:
        """What cannot be used changes nothing, and is told like a catalog that cannot: log, event and status."""
        self._refused = ""
        try:
            loaded = await asyncio.to_thread(self._read)
            self._engine.set_budgets(loaded.config)
            if self._network is not None:
                self._network.set_names(loaded.config.tcp)
            self._metrics.config.done(successful=True)
        except CachedError as error:
            self._refuse_settings(error)
            self._engine.failures.report(
                "config.refused", error, f"the settings cannot be used: {error.message}", error=error.message,
                hint=error.hint,
            )  # fmt: skip
        except Exception as bug:  # noqa: BLE001 - told; the daemon serves as before
            self._refuse_settings(self._engine.failures.bug("settings", bug))

    def _refuse_settings(self, error: CachedError) -> None:
        self._metrics.config.done(successful=False)
        self._refused = f"the new settings are refused, the old ones stay: {error.message}"

    def _problems(self) -> tuple[str, ...]:
        return tuple(filter(None, (self._refused, self._catalog.problem)))

    async def _bind(self, stack: AsyncExitStack) -> None:
        """Answers before it is ready: who asks early is told so, and health probes see a live process."""
        if self._http is not None:
            stack.push_async_callback(self._http.stop)
            await self._http.start()
        stack.push_async_callback(self._rpc.stop, _STOP_GRACE_S)
        await self._rpc.start()
        stack.push_async_callback(self._descriptors.stop)
        await self._descriptors.start()

    async def _recover(self) -> bool:
        """False when it was told to stop meanwhile."""
        await self._catalog.load()
        start = asyncio.create_task(self._engine.start())
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not start.done():
                return False
            start.result()
        finally:
            for task in (start, stop):
                task.cancel()
            await asyncio.gather(start, stop, return_exceptions=True)
        heap.spare_the_collector()
        await self._rpc.serving()
        self._phase = "serving"
        self._metrics.bind(self._engine.gauges, lambda: not self._not_ready())
        self._announce()
        return True

    def _announce(self) -> None:
        stats = self._engine.stats()
        levels = {
            level.level.value: (
                f"{format_size(level.used_bytes)} of {format_size(level.capacity_bytes)} ({level.limited_by})"
            )
            for level in stats.levels
        }
        http = self._http.address if self._http is not None else "off"
        path = self._config.daemon.socket
        tcp = self._network.address if self._network is not None else "off"
        _log.info(
            "daemon.ready", socket=path, http=http, tcp=tcp, models=stats.model_count, version=__version__, **levels
        )
        for problem in stats.degraded:
            _log.warning("daemon.degraded", problem=problem)
        self._notifier.ready(self._status.line())

    async def _drain(self) -> None:
        """Nothing new begins; loads under way have ``daemon.drain_timeout_s`` to end."""
        timeout_s = self._config.daemon.drain_timeout_s
        self._phase = "draining"
        _log.info("daemon.draining", timeout_s=timeout_s)
        self._notifier.stopping(self._status.drain(timeout_s))
        self._notifier.extend_timeout(_MORE_TIME_S)
        await self._rpc.draining()
        drain = asyncio.create_task(self._engine.drain(timeout_s))
        hurry = asyncio.create_task(self._hurry.wait())
        try:
            await asyncio.wait({drain, hurry}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (drain, hurry):
                task.cancel()
            for result in await asyncio.gather(drain, hurry, return_exceptions=True):
                if isinstance(result, Exception):
                    self._engine.failures.bug("drain", result)

    async def _close_engine(self) -> None:
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._engine.close()
        except TimeoutError:
            _log.error("daemon.close_timed_out", timeout_s=_CLOSE_TIMEOUT_S)
        _log.info("daemon.stopped")

    @asynccontextmanager
    async def _beside(self, name: str, work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
        """``work`` beside the body; one that fails is told at once and not started again."""
        background = Background(self._engine.failures)
        background.start(name, work)
        try:
            yield
        finally:
            await background.stop()

    def _on_stray(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What nobody awaited and nobody caught."""
        message, error = str(context.get("message", "")), context.get("exception")
        self._engine.failures.bug("event loop", error or RuntimeError(message), said=message)

    def _on_stop(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def _not_ready(self) -> tuple[str, ...]:
        reasons = [] if self._phase == "serving" and self._engine.ready else [f"the daemon is {self._phase}"]
        missing = self._catalog.missing
        if missing and self._engine.visibility.policy.has_lists:
            missing = "the catalog is not loaded: see the log"
        return (*reasons, *filter(None, [missing]))

    def _overview(self, limits: Limits) -> Overview | None:
        """For whoever reads the page, which nobody knows."""
        visibility = self._engine.visibility
        sees = visibility.is_public if visibility.policy.has_lists else None
        return self._engine.overview(limits, sees) if self._engine.ready else None

    async def _watchdog(self) -> None:
        """From the loop, so that a loop that hangs is noticed; and a long recovery or drain is not taken for a hang."""
        interval_s = min(_WATCHDOG_S, (self._notifier.watchdog_s or 2 * _WATCHDOG_S) / 2)
        while True:
            self._notifier.watchdog()
            if self._phase != "serving":
                self._notifier.extend_timeout(_MORE_TIME_S)
            await asyncio.sleep(interval_s)

    async def _measure_lag(self) -> None:
        """A loop that is held up answers nobody meanwhile, and it is this that shows it first."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + _LAG_INTERVAL_S
            await asyncio.sleep(_LAG_INTERVAL_S)
            self._metrics.event_loop_lag_seconds.observe(max(0.0, loop.time() - due_s))

    async def _trim_heap(self) -> None:
        while True:
            await asyncio.sleep(_TRIM_S)
            await asyncio.to_thread(heap.trim)
