"""The gRPC server on its Unix socket, and over TCP where that is asked for: cache service, health and reflection."""

from __future__ import annotations

import asyncio
from typing import cast
from urllib.parse import quote

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cached.access import AccessPolicy
from cached.config import LimitsConfig
from cached.errors import ConfigError
from cached.metrics import Metrics
from cached.open_files import file_shares
from cached.rpc import sockets
from cached.rpc.callers import Callers, current_caller
from cached.rpc.engine import WholeEngine
from cached.rpc.front import Front
from cached.rpc.interceptor import Gate, Interceptor, Phase
from cached.rpc.limits import CallLimits
from cached.rpc.network import MOST_CALLS, Network
from cached.rpc.seen import Views
from cached.rpc.service import CacheService
from cached.tracing import Tracer
from cached.units import parse_size
from cached_client._proto import cached_pb2, cached_pb2_grpc

SERVICE = cached_pb2.DESCRIPTOR.services_by_name["CacheService"].full_name
_NEVER_MS = 2**31 - 1
_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.max_concurrent_streams", 1024),
    ("grpc.so_reuseport", 0),
    # Over a Unix socket the kernel says at once that a peer is gone. A ping would only end the lease of a worker that
    # is stopped in a debugger or by the freezer.
    ("grpc.keepalive_time_ms", _NEVER_MS),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)
_MOST_CALLS = 8192
"""Every lease is one RPC for as long as it is held."""
_MAX_CONCURRENT_RPCS = 8 * _MOST_CALLS
"""GRPC's own bound, which is only to be met by calls that are on their way to be refused, or to health."""


class _Methods:
    """Where generated code adds methods to a server, without registering them with gRPC's core.

    For each registered method the library keeps a task that waits for its next call, and looks at all of these tasks
    for every call, which takes longer than an empty call does otherwise. Registration would save a look-up by name.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, service_name: str, method_handlers: object) -> None:
        """They are among the generic ones."""


class RpcServer:
    """Bound to its socket and answering from ``start`` to ``stop``; the gate and health say what can be asked."""

    def __init__(
        self,
        engine: WholeEngine,
        metrics: Metrics,
        socket: str,
        *,
        mode: int,
        gid: int = -1,
        reflect: bool = False,
        tracer: Tracer | None = None,
        access: AccessPolicy | None = None,
        limits: LimitsConfig | None = None,
        network: Network | None = None,
    ) -> None:
        """``gid`` -1 leaves the group; ``network``: serve there, too.

        The caller holds the socket's lock from before ``start`` to after ``stop``.
        """
        self.socket = socket
        limits = limits or LimitsConfig()
        callers = Callers(per_uid=limits.connections_per_uid, in_all=file_shares().calls)
        self._front = Front(socket, callers, engine.failures, mode=mode, gid=gid)
        self._gate = Gate()
        self._health = health.aio.HealthServicer()
        tracer, calls = tracer or Tracer(), CallLimits(limits, in_all=_MOST_CALLS)
        message_size = ("grpc.max_receive_message_length", parse_size(limits.message_size))
        self._server = grpc.aio.server(
            interceptors=[
                Interceptor(
                    self._gate, engine.failures, metrics, tracer, calls, lambda _, context: callers.of(context.peer())
                )
            ],
            options=(*_OPTIONS, message_size),
            maximum_concurrent_rpcs=_MAX_CONCURRENT_RPCS,
        )
        self._servers = [self._server]
        self._network = network
        if network is not None:
            afar = CallLimits(limits, in_all=MOST_CALLS)  # nobody is a caller of both
            metrics.bind_limits(afar.used_ratios)
            interceptor = Interceptor(self._gate, engine.failures, metrics, tracer, afar, network.admit)
            self._servers.append(network.make_server(interceptor, message_size))
        metrics.bind_limits(callers.used_ratios)
        metrics.bind_limits(calls.used_ratios)
        views = Views(engine, access or AccessPolicy())
        service = CacheService(lambda: views.by(current_caller()), sockets.descriptor_socket_path(socket))
        for server in self._servers:
            methods = cast("grpc.aio.Server", _Methods(server))
            cached_pb2_grpc.add_CacheServiceServicer_to_server(service, methods)
            health_pb2_grpc.add_HealthServicer_to_server(self._health, methods)
        if reflect:
            names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)

    async def start(self) -> None:
        """Binds and answers; the cache service refuses until ``serving``. Raises ConfigError when it cannot bind."""
        self._front.prepare()
        await self._set_health(serving=False)
        try:
            self._server.add_insecure_port(f"unix:{quote(self._front.inner)}")  # gRPC decodes %20 and its like
        except RuntimeError as error:
            msg = f"cannot listen on {self._front.inner}: {error}"
            hint = "check the folder's owner and mode, or set daemon.socket"
            raise ConfigError(msg, hint=hint, key="daemon.socket", value=self.socket) from error
        if self._network is not None:
            self._network.bind(self._servers[-1])
        for server in self._servers:
            await server.start()
        await self._front.start()

    async def serving(self) -> None:
        """Recovery is done: everything is answered."""
        self._gate.phase = Phase.SERVING
        await self._set_health(serving=True)

    async def draining(self) -> None:
        """Nothing new is begun; what runs goes on."""
        self._gate.phase = Phase.DRAINING
        await self._set_health(serving=False)

    async def stop(self, grace_s: float) -> None:
        """Ends streams, tells why, and waits ``grace_s`` for what is still running. Removes the socket."""
        self._gate.stop()
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))
        await self._front.stop()

    async def _set_health(self, *, serving: bool) -> None:
        kinds = health_pb2.HealthCheckResponse
        status = kinds.SERVING if serving else kinds.NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, status)
