"""The descriptor socket: shows a lease's token, receives read-only descriptors of the model's files.

A Unix socket of packets (SOCK_SEQPACKET). A request is one packet, ``{"token": …, "files": [index, …]}``; its answer
is one packet too, ``{"files": [index, …]}`` with a descriptor for each by SCM_RIGHTS in the same order, or
``{"error": {"reason", "message", "hint", "fields"}}``. ``{"save": "artifact"}`` is answered with ``{"ticket": …}``.

The daemon serves a bounded number of connections of each user: when hundreds of workers start at once, those that find
no place ask again a little later, and nobody hears of it.
"""

from __future__ import annotations

import array
import json
import os
import random
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cached_client.connection import ANSWER_S
from cached_client.errors import CacheError, PermissionDeniedError, daemon_unavailable, error_of_reason

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from types import TracebackType
    from typing import Self

FILES_PER_REQUEST = 64
"""The most that the daemon answers at once; the kernel would take 253."""

_ANSWER_BYTES = 64 * 1024
_TIMEOUT_S = 30.0
"""For an answer, by one who has a place among the connections; that is waited for as long as for any call's answer."""
_FIRST_WAIT_S, _LAST_WAIT_S = 0.01, 0.5


def locate(announced: str, grpc_socket: Path) -> Path:
    """The descriptor socket as this process sees it.

    The daemon announces its own path. In a container the sockets' folder may be mounted elsewhere: then it is the file
    of that name beside the gRPC socket. So it is where this process may not look into the announced folder.
    """
    path = Path(announced)
    # Not Path.exists, which raises PermissionError.
    return path if os.path.exists(path) else grpc_socket.with_name(path.name)


class DescriptorClient:
    """One connection to the descriptor socket, for one thread at a time. Use it in a ``with`` block."""

    def __init__(self, path: Path, stopping: threading.Event | None = None) -> None:
        """Connects. Raises CacheError: nobody is there, or has a place, or the mode of the socket forbids it.

        ``stopping``: once it is set, a place is not waited for any more; see `interrupt`, too.
        """
        self._path = path
        self._served = False
        self._stopping = stopping or threading.Event()
        self._waits = _Waits(self._stopping)
        self._connect()

    def interrupt(self) -> None:
        """Ends the wait for an answer, another thread's too: it gets an error. ``stopping`` must be set before."""
        with suppress(OSError):  # it is about to connect, and will see ``stopping``
            self._socket.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def fetch(self, token: str, indices: Sequence[int]) -> Generator[tuple[int, int], None, None]:
        """Yields ``(index, descriptor)`` for each file, in order; each descriptor is the caller's to close.

        They arrive in batches, so that a model of any number of files needs few of them open at once. Those that were
        received but not taken are closed when the iteration is left. Raises CacheError as the daemon does,
        DaemonUnavailableError if it goes away, and NotReadyError if it never had a place for this connection.
        """
        for at in range(0, len(indices), FILES_PER_REQUEST):
            batch = indices[at : at + FILES_PER_REQUEST]
            descriptors = self._exchange(token, batch)
            try:
                for index in batch:
                    yield index, descriptors.pop(0)
            finally:
                _close_all(descriptors)

    def ticket(self) -> str:
        """What lets this process save one compile artifact. Raises PermissionDeniedError where that is not allowed."""
        packet, descriptors, _ = self._asked({"save": "artifact"})
        _close_all(descriptors)
        answer = _parse(packet)
        _raise_refusal(answer)
        ticket = answer.get("ticket")
        if not isinstance(ticket, str):
            raise CacheError(
                "the descriptor socket does not give tickets to save compile artifacts",
                hint="the daemon and this client may be of different versions: compare `cached version` with pip's",
            )
        return ticket

    def _connect(self) -> None:
        while True:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._socket.settimeout(_TIMEOUT_S)
            try:
                self._socket.connect(os.fspath(self._path))
            except BlockingIOError as error:  # too many wait to be accepted
                self._socket.close()
                self._wait(error)
            except OSError as error:
                self._socket.close()
                raise self._translated(error) from error
            else:
                if self._stopping.is_set():
                    self.interrupt()
                return

    def _asked(self, request: dict[str, object]) -> tuple[bytes, list[int], int]:
        while True:
            try:
                self._socket.send(json.dumps(request).encode(), socket.MSG_NOSIGNAL)
                answer = _receive(self._socket)
            except OSError as error:
                # A connection that is refused may be gone before what was sent by it is read.
                if self._served or not isinstance(error, (ConnectionResetError, BrokenPipeError)):
                    raise self._translated(error) from error
                self._wait(error)
            else:
                self._served = self._served or not _is_refused_for_now(answer[0])
                if self._served or not self._waits.another():
                    return answer
            self._socket.close()
            self._connect()

    def _exchange(self, token: str, batch: Sequence[int]) -> list[int]:
        packet, descriptors, flags = self._asked({"token": token, "files": list(batch)})
        try:
            _check_answer(packet, descriptors, flags, batch)
        except BaseException:
            _close_all(descriptors)
            raise
        return descriptors

    def _translated(self, error: OSError) -> CacheError:
        if isinstance(error, PermissionError):
            return PermissionDeniedError(
                f"this process (uid {os.geteuid()}) may not use the descriptor socket {self._path}",
                hint="run the worker as a member of the group that owns the socket",
                path=self._path,
            )
        return daemon_unavailable(str(self._path), error.strerror or str(error))

    def _wait(self, error: OSError) -> None:
        """For a place. Raises NotReadyError when it was long enough."""
        if not self._waits.another():
            raise error_of_reason(
                "UNAVAILABLE",
                f"the descriptor socket {self._path} had no place for one more connection for {ANSWER_S:g} s",
                hint="try again when fewer workers start at once on this host",
            ) from error


class _Waits:
    """The waits for a place: longer and longer, none like another's, and an end to them."""

    def __init__(self, stopping: threading.Event) -> None:
        self._stopping = stopping
        self._end_s = time.monotonic() + ANSWER_S
        self._wait_s = _FIRST_WAIT_S

    def another(self) -> bool:
        """Waits; False at once when it was long enough, or is to stop."""
        if time.monotonic() >= self._end_s:
            return False
        stops = self._stopping.wait(self._wait_s * random.uniform(0.5, 1.5))  # noqa: S311 not a secret
        self._wait_s = min(2 * self._wait_s, _LAST_WAIT_S)
        return not stops


def _is_refused_for_now(packet: bytes) -> bool:
    refusal = _parse(packet).get("error")
    return isinstance(refusal, dict) and refusal.get("reason") == "UNAVAILABLE"


def _receive(connection: socket.socket) -> tuple[bytes, list[int], int]:
    """A packet, its descriptors (not inherited by a child's exec), and the flags that came with it."""
    # socket.recv_fds would do, but does not pass its flags on to the kernel (seen in Python 3.11).
    descriptors = array.array("i")
    space = socket.CMSG_LEN(FILES_PER_REQUEST * descriptors.itemsize)
    packet, ancillary, flags, _ = connection.recvmsg(_ANSWER_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    return packet, list(descriptors), flags


def _check_answer(packet: bytes, descriptors: list[int], flags: int, batch: Sequence[int]) -> None:
    if not packet:
        raise error_of_reason("UNAVAILABLE", "the daemon closed the descriptor socket", hint="attach again")
    if flags & socket.MSG_CTRUNC:
        raise CacheError(
            "this process cannot hold more open files",
            hint="raise its limit, for instance with `ulimit -n 65536`",
            reason="TOO_MANY_FILES",
        )
    answer = _parse(packet) if not flags & socket.MSG_TRUNC else {}
    _raise_refusal(answer)
    if answer.get("files") != list(batch) or len(descriptors) != len(batch):
        raise CacheError(
            f"the descriptor socket answered {len(descriptors)} descriptors for {len(batch)} files",
            hint="the daemon and this client may be of different versions: compare `cached version` with pip's",
        )


def _raise_refusal(answer: dict[str, Any]) -> None:
    refusal = answer.get("error")
    if isinstance(refusal, dict):
        raise error_of_reason(
            str(refusal.get("reason")),
            str(refusal.get("message")),
            hint=str(refusal.get("hint", "")),
            fields={str(key): str(value) for key, value in dict(refusal.get("fields") or {}).items()},
        )


def _parse(packet: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(packet)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
