"""The descriptor socket: a worker shows its lease's token and receives read-only descriptors of its files.

One packet asks, one answers, as JSON: ``{"token": …, "files": [indices]}`` → ``{"files": [indices]}`` with a descriptor
for each by SCM_RIGHTS, in order, or ``{"error": {reason, message, hint, fields}}``. ``{"save": "artifact"}`` →
``{"ticket": …}``, for who wants to save a compile artifact by RPC. A connection may ask any number of times, each time
once it has read the answer before. Who is asking is what the kernel says (SO_PEERCRED), never what the peer says.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
from collections import Counter
from dataclasses import dataclass, field

import structlog

from cached.access import AccessPolicy, Caller
from cached.errors import CachedError, InvalidRequestError, PermissionDeniedError, UnavailableError
from cached.failures import kind_of
from cached.listening import accept_each, close_after
from cached.open_files import HINT, SETTING, file_shares, not_accepted
from cached.rpc import sockets
from cached.rpc.callers import caller_of, exceeded
from cached.rpc.engine import WholeEngine
from cached.rpc.peers import groups_of, peer_of
from cached.rpc.seen import Views
from cached.rpc.unread import Unread, until_read
from cached.tracing import Tracer, current_trace_id
from cached.types import Peer

REQUEST_LIMIT_BYTES = 16 * 1024
FILES_LIMIT = 64
"""Well below the kernel's 253 descriptors in one message."""

_REFUSAL_S = 0.2
_TOLD = 64
"""Connections that are refused at the same time and told why; further ones are closed."""
_SHORT = frozenset({errno.ETOOMANYREFS, errno.EMFILE, errno.ENFILE})
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the descriptor socket. One user has at most half of all connections, whatever its own limit is.

    ``unread``: descriptors that were sent and not read; ``room_timeout_s``: how long a request waits for room there.
    """

    connections: int = field(default_factory=lambda: file_shares().descriptors)
    connections_per_uid: int = 1024
    idle_timeout_s: float = 30.0
    unread: int = field(default_factory=lambda: file_shares().unread)
    room_timeout_s: float = 10.0


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
        self._unread = Unread(self._limits.unread)
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
            accept_each(listener, self._serve, self._connections, self._ended, self._not_accepted),
            name="descriptor-socket",
        )
        self._acceptor.add_done_callback(self._ended)
        close_after(self._acceptor, listener)

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

    def used_ratios(self) -> dict[str, float]:
        """How far each limit is used; that of each user by the one who has the most."""
        most = max(self._per_uid.values(), default=0)
        return self._unread.used_ratios() | {
            "descriptor_connections": most / self._most_per_uid,
            "all_descriptor_connections": self._per_uid.total() / self._limits.connections,
        }

    @property
    def _most_per_uid(self) -> int:
        return min(self._limits.connections_per_uid, max(1, self._limits.connections // 2))

    def _not_accepted(self, error: OSError) -> None:
        self._engine.failures.report("descriptors.accept_failed", not_accepted("the descriptor socket", error))

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Nobody awaits these tasks: what they end by would be told when they are collected, or never."""
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._engine.failures.bug("descriptors", failure)

    async def _serve(self, connection: socket.socket) -> None:
        peer = peer_of(connection)
        with self._tracer.request({}, {}):
            try:
                caller = self._admit(connection, peer)
            except CachedError as error:
                await self._turn_away(connection, peer, error)
                return
            self._per_uid[peer.uid] += 1
            try:
                await self._converse(connection, peer, caller)
                await self._part(connection, peer)
            finally:
                self._unread.forget(connection)
                self._per_uid[peer.uid] -= 1
                if not self._per_uid[peer.uid]:
                    del self._per_uid[peer.uid]

    async def _part(self, connection: socket.socket, peer: Peer) -> None:
        """From one who left descriptors unread only when it reads them or is gone.

        The kernel counts them until then, and so they and the connection count here.
        """
        if not (count := self._unread.count(connection)):
            return
        msg = f"{count} descriptors were not read; the connection is ended, and counts until they are"
        error = InvalidRequestError(msg, hint="read each answer of the descriptor socket, or close the connection")
        self._engine.failures.refused("descriptors.refused", error, pid=peer.pid, uid=peer.uid)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        await until_read(connection)

    async def _converse(self, connection: socket.socket, peer: Peer, caller: Caller) -> None:
        try:
            try:
                while await self._exchange(connection, peer, caller):
                    pass
            except CachedError as error:
                await self._send(connection, self._refusal(error, peer), [])
        except OSError as error:  # gone, or silent for too long
            _log.debug("descriptors.ended", error=str(error), pid=peer.pid, uid=peer.uid)
        except Exception as bug:  # noqa: BLE001 the boundary: told, to the peer, too
            shown = self._engine.failures.bug("descriptors", bug, pid=peer.pid, uid=peer.uid)
            with contextlib.suppress(OSError):
                await self._send(connection, _error_packet(shown), [])

    async def _turn_away(self, connection: socket.socket, peer: Peer, error: CachedError) -> None:
        """The request is taken: the kernel would tell of one left unread, and not of the answer."""
        refusal = self._refusal(error, peer)
        if len(self._connections) - self._per_uid.total() > _TOLD:
            return
        with contextlib.suppress(OSError):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REFUSAL_S):
                    await asyncio.get_running_loop().sock_recv(connection, REQUEST_LIMIT_BYTES + 1)
            await self._send(connection, refusal, [])

    def _admit(self, connection: socket.socket, peer: Peer) -> Caller:
        caller = caller_of(peer, groups_of(connection))
        if not self._access.lets_in(caller):
            msg = f"uid {peer.uid}, gid {peer.gid} may not fetch descriptors"
            hint = "add the uid to access.uids or a group of it to access.gids"
            raise PermissionDeniedError(msg, hint=hint, uid=peer.uid, gid=peer.gid)
        limits, has = self._limits, self._per_uid[peer.uid]
        if has >= limits.connections_per_uid:
            raise exceeded("descriptor connections", caller, limits.connections_per_uid)
        if self._per_uid.total() >= limits.connections or has >= self._most_per_uid:
            msg = f"the descriptor socket has all its connections, {has} of them of uid {peer.uid}"
            raise UnavailableError(msg, hint="try again in a moment", uid=peer.uid)
        return caller

    async def _exchange(self, connection: socket.socket, peer: Peer, caller: Caller) -> bool:
        """One request and its answer; False when the peer is done. A refusal leaves the connection open."""
        async with asyncio.timeout(self._limits.idle_timeout_s):
            packet = await asyncio.get_running_loop().sock_recv(connection, REQUEST_LIMIT_BYTES + 1)
        if not packet:
            return False
        async with asyncio.timeout(self._limits.idle_timeout_s):
            await until_read(connection)
        self._unread.forget(connection)
        if _asks_for_ticket(packet):
            await self._send(connection, self._ticket(peer), [])
            return True
        token, indices = _parse(packet)
        try:
            await self._unread.take(connection, peer, len(indices), self._limits.room_timeout_s)
            await self._give(connection, peer, caller, token, indices)
        except CachedError as error:
            self._unread.forget(connection)
            await self._send(connection, self._refusal(error, peer), [])
        return True

    async def _give(
        self, connection: socket.socket, peer: Peer, caller: Caller, token: str, indices: list[int]
    ) -> None:
        try:
            descriptors = self._seen.by(caller).open_descriptors(token, indices, peer)
            try:
                await self._send(connection, json.dumps({"files": indices}).encode(), descriptors)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
        except OSError as error:
            if error.errno not in _SHORT:
                raise
            msg = f"no descriptor can be sent: {error.strerror}"
            raise UnavailableError(msg, hint=HINT, uid=peer.uid, setting=SETTING) from error

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
    hint = f'send {{"token": TEXT, "files": [at most {FILES_LIMIT} different indices]}}'
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
    if len(set(files)) < len(files):
        msg = "a file is asked for twice"
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
