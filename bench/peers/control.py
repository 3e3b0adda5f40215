"""Processes around a daemon whose control plane is measured: one asks, one pulls, one holds leases.

A fourth serves calls that need no work, for what the gRPC library and the scheduler take of each.

Order: ``socket`` and ``role``; for ``pull`` the ``model``, for ``ask`` and ``hold`` the small ``models``; for ``ask``
the socket of the ``bare`` server, too.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import grpc
import grpc.aio

import cached_client
from bench.peers.lines import Order, answer_lines
from cached_client._proto import cached_pb2 as pb

_PAUSE_S = 0.01
_BARE = "/bench.Bare/Answer"
_ANSWER = bytes(3000)
"""As long as a list of twenty models."""


class Asker:
    """Asks for each thing in turn, with a short pause between them; the ends of leases are not measured."""

    def __init__(self, order: Order) -> None:
        self._cache = cached_client.connect(order["socket"])
        self._cache.wait_ready(30)
        self._models = cycle(order["models"])
        channel = grpc.insecure_channel(f"unix:{order['bare']}")
        self._bare: Any = channel.unary_unary(_BARE)

    def __call__(self, asked: Order) -> Order:
        ways = {
            "bare_s": self._bare_call, "list_s": self._list,
            "attach_rpc_s": self._attach_rpc, "attach_s": self._attach,
        }  # fmt: skip
        found: dict[str, list[float]] = {name: [] for name in ways}
        until_s = time.monotonic() + asked["for_s"]
        while time.monotonic() < until_s:
            for name, way in ways.items():
                time.sleep(_PAUSE_S)
                found[name].append(way())
        return found

    def _bare_call(self) -> float:
        began_s = time.perf_counter()
        self._bare(b"")
        return time.perf_counter() - began_s

    def _list(self) -> float:
        began_s = time.perf_counter()
        self._cache.list()
        return time.perf_counter() - began_s

    def _attach_rpc(self) -> float:
        request = pb.AttachRequest(ref=next(self._models), client_name="asker", only_if_resident=True)
        stub = self._cache.connection.stub
        began_s = time.perf_counter()
        call: Any = stub.Attach(request)
        assert next(call).opened.HasField("complete")
        seconds = time.perf_counter() - began_s
        call.cancel()
        return seconds

    def _attach(self) -> float:
        began_s = time.perf_counter()
        model = self._cache.attach(next(self._models), only_if_resident=True)
        seconds = time.perf_counter() - began_s
        model.close()
        return seconds


class Puller:
    """Between ``start`` and ``stop`` it pulls the model again and again, each time from the origin."""

    def __init__(self, order: Order) -> None:
        self._connection = cached_client.connect(order["socket"]).connection
        self._model = order["model"]
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._began_s = 0.0
        self._pulled_bytes = 0
        self._failure = ""

    def __call__(self, asked: Order) -> Order:
        if asked["do"] == "start":
            self._pulled_bytes, self._began_s = self._pull(), time.monotonic()  # from here on it is at full speed
            self._pulled_bytes = 0
            self._stop.clear()
            self._thread = threading.Thread(target=self._go_on)
            self._thread.start()
            return {}
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        if self._failure:
            raise RuntimeError(self._failure)
        return {"pulled_bytes": self._pulled_bytes, "seconds": time.monotonic() - self._began_s}

    def _go_on(self) -> None:
        try:
            while not self._stop.is_set():
                self._pulled_bytes += self._pull()
        except cached_client.CacheError as error:
            self._failure = f"the pull failed: {error}"

    def _pull(self) -> int:
        stub = self._connection.stub
        self._connection.call(stub.Evict, pb.EvictRequest(ref=self._model))
        total_bytes = 0
        for response in self._connection.stream(stub.Pull, pb.PullRequest(ref=self._model)):
            total_bytes = response.progress.total_bytes
        return total_bytes


class Holder:
    """Asked to hold ``leases``, it opens that many and keeps them until it ends."""

    def __init__(self, order: Order) -> None:
        self._connection = cached_client.connect(order["socket"]).connection
        self._models = order["models"]
        self._calls: list[Any] = []

    def __call__(self, asked: Order) -> Order:
        for name in islice(cycle(self._models), asked["leases"]):
            call = self._connection.stub.Attach(pb.AttachRequest(ref=name, client_name="holder"))
            next(call)
            self._calls.append(call)
        return {"leases": len(self._calls)}


class Bare:
    """Serves a unary call with asyncio, as the daemon does, and nothing else. Asked anything, it is serving."""

    def __init__(self, order: Order) -> None:
        self._serving = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve(order["socket"])), daemon=True).start()

    def __call__(self, asked: Order) -> Order:
        if not self._serving.wait(asked["within_s"]):
            raise TimeoutError("the bare server does not serve")
        return {}

    async def _serve(self, socket: str) -> None:
        async def answer(_request: bytes, _context: Any) -> bytes:
            return _ANSWER

        server = grpc.aio.server()
        service, method = _BARE.strip("/").split("/")
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {method: grpc.unary_unary_rpc_method_handler(answer)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        server.add_insecure_port(f"unix:{socket}")
        await server.start()
        self._serving.set()
        await server.wait_for_termination()


ROLES: dict[str, Callable[[Order], Callable[[Order], Order]]] = {
    "ask": Asker, "pull": Puller, "hold": Holder, "bare": Bare,
}  # fmt: skip

if __name__ == "__main__":
    answer_lines(lambda order: ROLES[order["role"]](order))
