"""gRPC over TCP, for operators on other machines: mutual TLS or nothing, and only what needs no descriptors."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import grpc
import grpc.aio

from cached.access import Caller
from cached.config import TcpConfig
from cached.errors import CachedError, ConfigError, LocalOnlyError, PermissionDeniedError
from cached.rpc import errors
from cached.rpc.certificates import Certificates
from cached.rpc.engine import Failures
from cached.rpc.interceptor import HEALTH_CHECK

LOOKING: Final = frozenset(
    {"List", "Describe", "ListLeases", "Stats", "Overview", "Trace", "Watch", "ListColdStarts", "ListArtifacts"}
)
"""For every client that is let in."""
OPERATING: Final = frozenset({"Pull", "SetTier", "Pin", "Unpin", "Evict", "Remove", "Verify"})
"""For operators. Whatever is in neither of the two is for this host alone."""

_POLL_S = 5.0
MOST_CALLS: Final = 512
"""Of all clients together."""
_MAX_CONCURRENT_RPCS = 8 * MOST_CALLS
"""GRPC's own bound, which is only to be met by calls that are on their way to be refused, or to health."""
_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.max_concurrent_streams", 64),
    ("grpc.so_reuseport", 0),
    # Nobody says that a machine at the other end was switched off.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.max_connection_age_ms", 3_600_000),  # so that certificates are looked at again
    ("grpc.max_connection_age_grace_ms", 60_000),
)
_Context = grpc.aio.ServicerContext[Any, Any]


class Told(Protocol):
    """Where what happens to the certificates is told."""

    @property
    def failures(self) -> Failures:
        """What cannot be used."""
        ...

    def tell(self, kind: str, message: str, **fields: object) -> None:
        """An event."""
        ...


class Network:
    """The TCP listener's settings, certificates and rule of who may what. Loop only."""

    def __init__(self, config: TcpConfig, socket: str) -> None:
        """``socket`` is named to whoever asks for what only this host gets. Blocks. Raises ConfigError."""
        _check_complete(config)
        self.config = config
        self._socket = socket
        self._certificates = Certificates(config)
        self.address = ""

    def make_server(self, interceptor: grpc.aio.ServerInterceptor, *options: tuple[str, int]) -> grpc.aio.Server:
        """Not bound yet. ``interceptor`` is around the cache service, and asks ``admit``."""
        return grpc.aio.server(
            interceptors=[_HealthGuard(self), interceptor],
            options=(*_OPTIONS, *options),
            maximum_concurrent_rpcs=_MAX_CONCURRENT_RPCS,
        )

    def bind(self, server: grpc.aio.Server) -> None:
        """Raises ConfigError when it cannot listen."""
        listen = self.config.listen
        try:
            port = server.add_secure_port(listen, self._certificates.credentials())
        except RuntimeError as error:
            msg = f"cannot listen on tcp.listen = {listen!r}: {error}"
            hint = "choose an address of this host and a port that is free"
            raise ConfigError(msg, hint=hint, key="tcp.listen", value=listen) from error
        self.address = f"{listen.rpartition(':')[0]}:{port}"

    def admit(self, method: str, context: _Context) -> Caller:
        """Who calls. Raises PermissionDeniedError or LocalOnlyError unless they may call ``method`` from afar."""
        names = names_of(context)
        is_operator = not names.isdisjoint(self.config.operators)
        if not is_operator and names.isdisjoint(self.config.clients):
            shown = ", ".join(sorted(names)) or "none"
            raise PermissionDeniedError(
                f"the certificate's names ({shown}) are not on the daemon's list",
                hint="add one of them to tcp.clients or tcp.operators",
                names=shown,
            )
        if method not in LOOKING | OPERATING and method != HEALTH_CHECK:
            raise LocalOnlyError(
                f"{method} is for processes on the daemon's host: descriptors of memory do not cross a network",
                hint=f"on that host, use its socket {self._socket}",
                method=method,
                socket=self._socket,
            )
        if method in OPERATING and not is_operator:
            raise PermissionDeniedError(
                f"{method} is for operators, and {', '.join(sorted(names))} is not one of them",
                hint="add the name to tcp.operators",
                names=", ".join(sorted(names)),
            )
        listed = names.intersection(self.config.operators if is_operator else self.config.clients)
        return Caller(f"certificate {min(listed)}", operator=is_operator)

    def set_names(self, config: TcpConfig) -> None:
        """Takes who may come in, and nothing else, from new settings. A call that is under way goes on."""
        self.config = dataclasses.replace(self.config, clients=config.clients, operators=config.operators)

    async def run(self, engine: Told) -> None:
        """Until cancelled: reads the certificates again when their files change, and tells how that went."""
        while True:
            await asyncio.sleep(_POLL_S)
            await self.reload(engine)

    async def reload(self, engine: Told) -> None:
        """Reads the certificates again if their files changed. Those that cannot be used are told of once."""
        try:
            changed = await asyncio.to_thread(self._certificates.reload)
        except ConfigError as error:
            problem = f"the certificates of the TCP listener stay as they were: {error.message}"
            if engine.failures.degraded.get("tcp") != problem:
                engine.failures.report("tls.refused", error, problem, error=error.message, hint=error.hint)
                engine.failures.degraded.began("tcp", problem, error)
            return
        engine.failures.degraded.ended("tcp")
        if changed:
            engine.tell("tls.loaded", "the TCP listener shows and trusts new certificates", file=self.config.cert)


def names_of(context: _Context) -> frozenset[str]:
    """The names that the peer's certificate proves: those of its subjectAltName, else its common name."""
    found: dict[str, Any] = dict(context.auth_context() or {})
    for key in ("x509_subject_alternative_name", "x509_common_name"):
        names = [bytes(name).decode("utf-8", "replace") for name in found.get(key, ())]
        if names:
            return frozenset(names)
    return frozenset()


def _check_complete(config: TcpConfig) -> None:
    for name in ("cert", "key", "client_ca"):
        if not getattr(config, name):
            raise ConfigError(
                f"tcp.listen is set, but tcp.{name} is not: TCP is served with mutual TLS or not at all",
                hint="set tcp.cert, tcp.key and tcp.client_ca, or clear tcp.listen",
                key=f"tcp.{name}", value="",
            )  # fmt: skip
    if not config.clients and not config.operators:
        raise ConfigError(
            "tcp.listen is set, but nobody is named who may come in",
            hint="name certificates in tcp.clients or tcp.operators, or clear tcp.listen",
            key="tcp.clients", value="",
        )  # fmt: skip


class _HealthGuard(grpc.aio.ServerInterceptor):
    """Lets the health check through to whom the listener lets in; the cache service has an interceptor of its own."""

    def __init__(self, network: Network) -> None:
        self._network = network

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler, guarded."""
        handler = await continuation(handler_call_details)
        path = str(handler_call_details.method)
        if handler is None or path != HEALTH_CHECK:
            return handler

        async def guarded(requests: Any, context: _Context) -> Any:
            try:
                self._network.admit(HEALTH_CHECK, context)
            except CachedError as error:
                await errors.abort(context, error)
            return await handler.stream_unary(requests, context)  # type: ignore[misc, arg-type]

        return grpc.stream_unary_rpc_method_handler(guarded, handler.request_deserializer, handler.response_serializer)
