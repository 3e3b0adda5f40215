"""Around every method of CacheService: is the daemon serving, who calls, what became of it, how errors travel."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from enum import StrEnum
from typing import Any, NoReturn, Self, cast

import grpc
import grpc.aio

from cached.access import Caller
from cached.errors import CachedError, PermissionDeniedError, UnavailableError
from cached.metrics import Metrics
from cached.rpc import errors
from cached.rpc.callers import calling
from cached.rpc.engine import Failures
from cached.rpc.limits import CallLimits
from cached.rpc.requests import GONE_S, only_request
from cached.tracing import Tracer, current_trace_id

_SERVICE = "cached.v1.CacheService"
_PREFIX = f"/{_SERVICE}/"
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
_HEALTH_S = 2.0
"""For the request of a health check. The only call that nobody is counted for must not be held."""
_SILENT_S = 0.02
_WHILE_DRAINING = frozenset(
    {"Detach", "List", "Describe", "ListLeases", "Stats", "Watch", "ListArtifacts", "ListColdStarts", "Overview"}
)

_Context = grpc.aio.ServicerContext[Any, Any]


class Phase(StrEnum):
    """Where the daemon's life stands."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPING = "stopping"


class Gate:
    """Which methods are answered now: none while starting, while draining only those that begin no work."""

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self._streams: set[asyncio.Task[Any]] = set()

    def stop(self) -> None:
        """Refuses everything, and ends open streams with UnavailableError, so that clients take them up again."""
        self.phase = Phase.STOPPING
        for task in self._streams:
            task.cancel()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Around a stream: what ``stop`` cancels becomes an UnavailableError; the peer's own cancellation stays one."""
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._streams.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if self.phase is not Phase.STOPPING:
                raise
            task.uncancel()
            self.refuse()
        finally:
            self._streams.discard(task)

    def check(self, method: str) -> None:
        """Raises UnavailableError unless ``method`` may pass."""
        if self.phase is Phase.SERVING or (self.phase is Phase.DRAINING and method in _WHILE_DRAINING):
            return
        self.refuse()

    def refuse(self) -> NoReturn:
        """Raises UnavailableError saying where the daemon's life stands."""
        msg = f"the daemon is {self.phase}"
        raise UnavailableError(msg, hint="try again in a moment", phase=self.phase)


class _TakenUp:
    """Tells the caller of a stream that it was taken up, unless its first message soon does: it may be silent for long.

    Not at once: on a busy host each message of its own costs a stream, and so a warm attach, milliseconds.
    """

    def __init__(self, context: _Context) -> None:
        self._context = context
        self._sending: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._timer = asyncio.get_running_loop().call_later(_SILENT_S, self._send)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._timer.cancel()
        if self._sending is not None:
            # To its end: gRPC refuses to tell an error while this is on its way, and the caller would wait for ever.
            await asyncio.gather(self._sending, return_exceptions=True)

    async def settle(self) -> None:
        """Before each message: it carries the news itself, if it is still to be told."""
        self._timer.cancel()
        if self._sending is not None:
            sending, self._sending = self._sending, None
            await sending

    def _send(self) -> None:
        self._sending = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        await self._context.send_initial_metadata(())


async def _request(_requests: Any, context: _Context) -> Any:
    return await only_request(context)


async def _as_it_is(requests: Any, _context: _Context) -> Any:
    return requests


class Interceptor(grpc.aio.ServerInterceptor):
    """Wraps CacheService; counts reflection as a stream, and lets a health check through within a time.

    ``identify`` says whose call it is, or raises what is to be told to who may not make it.

    To gRPC each call is one whose requests are streamed: it would read the request of any other first, and a call that
    never sends one would be held without being counted.
    """

    def __init__(
        self,
        gate: Gate,
        failures: Failures,
        metrics: Metrics,
        tracer: Tracer,
        limits: CallLimits,
        identify: Callable[[str, _Context], Caller],
    ) -> None:
        self._identify = identify
        self._gate = gate
        self._failures = failures
        self._limits = limits
        self._metrics = metrics
        self._tracer = tracer
        self._guarded: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler, guarded: the same one for each call of a method."""
        path = str(handler_call_details.method)
        if path in self._guarded:
            return self._guarded[path]
        handler = await continuation(handler_call_details)
        guarded = self._guard_of(path, handler) if handler is not None else None
        if guarded is not None:  # names that clients make up have no end
            self._guarded[path] = guarded
        return guarded

    def _guard_of(self, path: str, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any] | None:
        coders = handler.request_deserializer, handler.response_serializer
        if path == HEALTH_CHECK:
            return grpc.stream_unary_rpc_method_handler(self._health(handler.unary_unary), *coders)
        if not path.startswith(_PREFIX):
            # Of reflection. Health has nothing else that is answered: a watch that is not read would hold the status.
            counted = self._counted(path.rpartition("/")[2], handler.stream_stream)
            return grpc.stream_stream_rpc_method_handler(counted, *coders) if handler.stream_stream else None
        method = path.removeprefix(_PREFIX)
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(self._stream(method, handler.unary_stream), *coders)
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(self._unary(method, handler.stream_unary, _as_it_is), *coders)
        return grpc.stream_unary_rpc_method_handler(self._unary(method, handler.unary_unary), *coders)

    def _health(self, answer: Any) -> Any:
        """Not counted: it answers whatever else there is."""

        async def guarded(_requests: Any, context: _Context) -> Any:
            try:
                return await answer(await only_request(context, _HEALTH_S), context)
            except CachedError as error:
                await self._refuse("Check", context, error)

        return guarded

    def _counted(self, method: str, answer: Any) -> Any:
        async def guarded(requests: Any, context: _Context) -> None:
            try:
                caller = await self._caller(method, context)
                with self._limits.held(caller, method, streams=True):
                    async with aclosing(answer(requests, context)) as messages:
                        async for message in messages:
                            await context.write(message)
            except CachedError as error:
                await self._refuse(method, context, error)

        return guarded

    def _unary(self, method: str, answer: Any, asked: Callable[[Any, _Context], Any] = _request) -> Any:
        async def guarded(requests: Any, context: _Context) -> Any:
            async def work() -> Any:
                return await answer(await asked(requests, context), context)

            return await self._traced(method, context, work, streams=False)

        return guarded

    def _stream(self, method: str, answer: Any) -> Any:
        async def guarded(_requests: Any, context: _Context) -> None:
            async def work() -> None:
                # Writing here, not yielding: a cancelled call then closes the method's generator at once, and with it
                # the lease, and not when the generator happens to be collected.
                with self._gate.stream():
                    request = await only_request(context)
                    async with _TakenUp(context) as taken_up, aclosing(answer(request, context)) as messages:
                        async for message in messages:
                            await taken_up.settle()
                            await context.write(message)

            await self._traced(method, context, work, streams=True)

        return guarded

    async def _traced(
        self, method: str, context: _Context, work: Callable[[], Awaitable[Any]], *, streams: bool
    ) -> Any:
        headers = {str(key): value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        attributes = {"rpc.system": "grpc", "rpc.service": _SERVICE, "rpc.method": method}
        with self._tracer.request(headers, attributes):
            return await self._guard(method, context, work, streams=streams)

    async def _guard(self, method: str, context: _Context, work: Callable[[], Awaitable[Any]], *, streams: bool) -> Any:
        code, started_s = grpc.StatusCode.OK, time.monotonic()
        try:
            self._gate.check(method)
            caller = await self._caller(method, context)
            with calling(caller), self._limits.held(caller, method, streams=streams):
                return await work()
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except CachedError as error:
            code = errors.status_code(error)
            await self._refuse(method, context, error)
        except Exception as error:  # noqa: BLE001 the boundary: told, to the caller, too
            code = _code_of(error, context)
            if code is grpc.StatusCode.CANCELLED:
                await context.abort(code, "the peer is gone")
            await errors.abort(context, self._failures.bug("rpc", error, method=method))
        finally:
            seconds = None if streams else time.monotonic() - started_s
            self._metrics.answered(method, code.name, seconds, trace_id=current_trace_id())

    async def _caller(self, method: str, context: _Context) -> Caller:
        """Raises what ``identify`` does; but calls of a connection that ended before them are cancelled in a moment."""
        try:
            return self._identify(method, context)
        except PermissionDeniedError:
            await asyncio.sleep(GONE_S)
            raise

    async def _refuse(self, method: str, context: _Context, error: CachedError) -> NoReturn:
        self._failures.refused("rpc.refused", error, method=method)
        await errors.abort(context, error)


def _code_of(error: Exception, context: _Context) -> grpc.StatusCode:
    """A write to a peer that went away fails in several ways; none of them is a fault of ours."""
    if isinstance(error, grpc.aio.UsageError) and context.cancelled():
        return grpc.StatusCode.CANCELLED
    return grpc.StatusCode.INTERNAL
