"""The descriptor socket: a worker shows its lease's token and receives read-only descriptors of its files.

One packet asks, one answers, as JSON: ``{"token": …, "files": [indices]}`` → ``{"files": [indices]}`` with a descriptor
for each by SCM_RIGHTS, in order, or ``{"error": {reason, message, hint, fields}}``. ``{"save": "artifact"}`` →
``{"ticket": …}``, for who wants to save a compile artifact by RPC. A connection may ask any number of times. Who is
asking is what the kernel says (SO_PEERCRED), never what the peer says.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections import Counter
from dataclasses import dataclass

import structlog

from cached.access import AccessPolicy, Caller
from cached.errors import CachedError, InvalidRequestError, PermissionDeniedError, UnavailableError
from cached.failures import kind_of
from cached.rpc import sockets
from cached.rpc.callers import caller_of, exceeded
from cached.rpc.engine import WholeEngine
from cached.rpc.peers import groups_of, peer_of
from cached.rpc.seen import Views
from cached.tracing import Tracer, current_trace_id
from cached.types import Peer

REQUEST_LIMIT_BYTES = 16 * 1024
FILES_LIMIT = 64
"""Well below the kernel's 253 descriptors in one message."""

_REFUSAL_S = 0.2
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the descriptor socket."""

    connections: int = 4096
    connections_per_uid: int = 1024
    idle_timeout_s: float = 30.0


class DescriptorServer:
    """Accepts from ``start`` to ``stop``. A peer that misbehaves loses its own connection and nothing else."""

    def __init__(
        self,
        engine: WholeEngine,
        path: str,
        *,
        mode: int,
        gid: int = -1,
        access: AccessPolicy | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.path = path
        self._engine = engine
        self._mode = mode
        self._gid = gid
        self._access = access or AccessPolicy()
        self._seen = Views(engine, self._access)
        self._limits = limits or Limits()
        self._tracer = Tracer()
        self._per_uid: Counter[int] = Counter()
        self._connections: set[asyncio.Task[None]] = set()
        self._acceptor: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Binds. The caller holds the socket's lock. Raises ConfigError."""
        sockets.remove_stale(self.path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            listener.bind(self.path)
            sockets.open_to(self.path, self._mode, self._gid)
            listener.listen(128)
        except BaseException:
            listener.close()
            raise
        self._acceptor = asyncio.create_task(
            sockets.accept_each(
                listener, self._serve, self._connections, self._ended, failed_event="descriptors.accept_failed"
            ),
            name="descriptor-socket",
        )
        self._acceptor.add_done_callback(self._ended)
        sockets.close_after(self._acceptor, listener)

    async def stop(self) -> None:
        """Ends all connections and removes the socket; idempotent."""
        if self._acceptor is None:
            return
        tasks = [self._acceptor, *self._connections]
        self._acceptor = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Nobody awaits these tasks: what they end by would be told when they are collected, or never."""
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._engine.failures.bug("descriptors", failure)

    async def _serve(self, connection: socket.socket) -> None:
        peer = peer_of(connection)
        self._per_uid[peer.uid] += 1
        try:
            with self._tracer.request({}, {}):
                await self._converse(connection, peer)
        except OSError as error:  # gone, or silent for too long
            _log.debug("descriptors.ended", error=str(error), pid=peer.pid, uid=peer.uid)
        finally:
            self._per_uid[peer.uid] -= 1
            if not self._per_uid[peer.uid]:
                del self._per_uid[peer.uid]

    async def _converse(self, connection: socket.socket, peer: Peer) -> None:
        try:
            caller = await self._admitted(connection, peer)
            while await self._exchange(connection, peer, caller):
                pass
        except CachedError as error:
            await self._send(connection, self._refusal(error, peer), [])
        except OSError:
            raise
        except Exception as bug:  # noqa: BLE001 the boundary: told, to the peer, too
            shown = self._engine.failures.bug("descriptors", bug, pid=peer.pid, uid=peer.uid)
            await self._send(connection, _error_packet(shown), [])

    async def _admitted(self, connection: socket.socket, peer: Peer) -> Caller:
        """Of who is refused the request is taken: the kernel would tell of one left unread, and not of the answer."""
        try:
            return self._admit(connection, peer)
        except CachedError:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REFUSAL_S):
                    await asyncio.get_running_loop().sock_recv(connection, REQUEST_LIMIT_BYTES + 1)
            raise

    def _admit(self, connection: socket.socket, peer: Peer) -> Caller:
        caller = caller_of(peer, groups_of(connection))
        if not self._access.lets_in(caller):
            msg = f"uid {peer.uid}, gid {peer.gid} may not fetch descriptors"
            hint = "add the uid to access.uids or a group of it to access.gids"
            raise PermissionDeniedError(msg, hint=hint, uid=peer.uid, gid=peer.gid)
        limits = self._limits
        if self._per_uid[peer.uid] > limits.connections_per_uid:
            raise exceeded("descriptor connections", caller, limits.connections_per_uid)
        if len(self._connections) > limits.connections:
            msg = f"the descriptor socket has all the {limits.connections} connections that it takes"
            raise UnavailableError(msg, hint="try again in a moment", uid=peer.uid)
        return caller

    async def _exchange(self, connection: socket.socket, peer: Peer, caller: Caller) -> bool:
        """One request and its answer; False when the peer is done. A refusal leaves the connection open."""
        async with asyncio.timeout(self._limits.idle_timeout_s):
            packet = await asyncio.get_running_loop().sock_recv(connection, REQUEST_LIMIT_BYTES + 1)
        if not packet:
            return False
        if _asks_for_ticket(packet):
            await self._send(connection, self._ticket(peer), [])
            return True
        token, indices = _parse(packet)
        try:
            descriptors = self._seen.by(caller).open_descriptors(token, indices, peer)
        except CachedError as error:
            await self._send(connection, self._refusal(error, peer), [])
            return True
        try:
            await self._send(connection, json.dumps({"files": indices}).encode(), descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _ticket(self, peer: Peer) -> bytes:
        try:
            return json.dumps({"ticket": self._engine.artifact_ticket(peer)}).encode()
        except CachedError as error:
            return self._refusal(error, peer)

    def _refusal(self, error: CachedError, peer: Peer) -> bytes:
        self._engine.failures.refused("descriptors.refused", error, pid=peer.pid, uid=peer.uid)
        return _error_packet(error)

    async def _send(self, connection: socket.socket, packet: bytes, descriptors: list[int]) -> None:
        """Raises OSError for a peer that is gone, TimeoutError for one that does not read."""
        async with asyncio.timeout(self._limits.idle_timeout_s):
            while True:
                try:
                    if descriptors:
                        socket.send_fds(connection, [packet], descriptors, socket.MSG_NOSIGNAL)
                    else:
                        connection.send(packet, socket.MSG_NOSIGNAL)
                except BlockingIOError:
                    await _writable(connection)
                else:
                    return


def _asks_for_ticket(packet: bytes) -> bool:
    try:
        return len(packet) <= REQUEST_LIMIT_BYTES and json.loads(packet) == {"save": "artifact"}
    except (ValueError, RecursionError):
        return False


def _parse(packet: bytes) -> tuple[str, list[int]]:
    hint = f'send {{"token": TEXT, "files": [at most {FILES_LIMIT} indices]}}'
    if len(packet) > REQUEST_LIMIT_BYTES:
        msg = f"the request is larger than {REQUEST_LIMIT_BYTES} bytes"
        raise InvalidRequestError(msg, hint=hint)
    try:
        request = json.loads(packet)
    except (ValueError, RecursionError) as error:
        msg = "the request is not JSON"
        raise InvalidRequestError(msg, hint=hint) from error
    token = request.get("token") if isinstance(request, dict) else None
    files = request.get("files") if isinstance(request, dict) else None
    if not isinstance(token, str) or not isinstance(files, list) or not 1 <= len(files) <= FILES_LIMIT:
        msg = "the request has no token, or not 1 to 64 files"
        raise InvalidRequestError(msg, hint=hint)
    if not all(type(index) is int and 0 <= index < 1 << 32 for index in files):
        msg = "a file is given by its index"
        raise InvalidRequestError(msg, hint=hint)
    return token, files


def _error_packet(error: CachedError) -> bytes:
    """What it came of stays here; its trace id leads to that in the log."""
    told = {"reason": error.reason, "message": error.message, "hint": error.hint or kind_of(error.reason).hint}
    return json.dumps({"error": told | {"fields": {"trace_id": current_trace_id()} | error.fields}}).encode()


async def _writable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(connection, _settle, ready)
    try:
        await ready
    finally:
        loop.remove_writer(connection)


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
