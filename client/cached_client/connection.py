"""The way to the daemon: which socket, and one gRPC channel over it. The `cached` command uses it too."""

from __future__ import annotations

import math
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote

import grpc

from cached_client._proto import cached_pb2 as pb
from cached_client._proto import cached_pb2_grpc
from cached_client._trace import trace_metadata
from cached_client.errors import (
    CacheError,
    DaemonUnavailableError,
    InvalidRequestError,
    NotReadyError,
    TimeoutExpiredError,
    daemon_unavailable,
    from_rpc_error,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Self

T = TypeVar("T")

SYSTEM_SOCKET = "/run/cached/cached.sock"

_MAX_PATH_BYTES = 107  # sockaddr_un.sun_path less its NUL
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_POLL_S = 0.1
ANSWER_S = 150.0
"""Longer than the daemon itself waits for its disks before it gives up; one that does not answer by then hangs."""
_ENDLESS_S = 1e9
"""From here on, infinity too, a time limit is none: neither gRPC nor a lock can count much further."""
CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    # In fact the least time that one attempt to connect has: a daemon on a busy host may need it to say hello. One that
    # is not there refuses at once.
    ("grpc.min_reconnect_backoff_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Otherwise a second channel of this process would share, and wait for, the back-off of the first.
    ("grpc.use_local_subchannel_pool", 1),
]
_NO_KEEPALIVE = ("grpc.keepalive_time_ms", 2**31 - 1)
"""A local socket says by itself when the other side is gone."""


def default_target() -> str:
    """The daemon's socket: ``CACHED_SOCKET``, else the system's daemon, else that of this user.

    Without any of them it is the system's path, so that the error which follows names it.
    """
    chosen = os.environ.get("CACHED_SOCKET")
    if chosen:
        return chosen
    if os.path.exists(SYSTEM_SOCKET):
        return SYSTEM_SOCKET
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR")
    own_dir = os.path.join(runtime_dir, "cached") if runtime_dir else f"/tmp/cached-{os.getuid()}"  # noqa: S108
    own = os.path.join(own_dir, "cached.sock")
    return own if _is_ours(own) else SYSTEM_SOCKET


def _is_ours(path: str) -> bool:
    """Whether it is there and this user made it: in /tmp anybody could put a socket."""
    try:
        return os.lstat(path).st_uid == os.getuid()
    except OSError:
        return False


def limited(timeout_s: float | None) -> float | None:
    """A time limit as a call or a wait can have it: None for one without end."""
    return None if timeout_s is None or timeout_s >= _ENDLESS_S else timeout_s


def socket_path(target: str | os.PathLike[str]) -> Path:
    """The path in ``unix:///path``, ``unix:path`` or a plain path, made absolute. Raises InvalidRequestError."""
    given = text = os.fspath(target)
    is_uri = "://" in given
    if given.startswith("unix:"):
        is_uri, text = False, unquote(given.removeprefix("unix:"))
        text = text.removeprefix("//") if text.startswith("///") else text
    if is_uri or not text.strip("/"):
        raise InvalidRequestError(
            f"{given!r} is not the path of a Unix socket",
            hint="write a path, or unix:///path",
            value=given,
        )
    path = os.path.abspath(text)
    if "," in path:
        raise InvalidRequestError(
            f"the socket path {path!r} has a comma, which gRPC takes for the end of an address",
            hint="use a path without one, for instance a symbolic link to the socket's folder",
            value=given,
        )
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise InvalidRequestError(
            f"the socket path {path!r} is longer than the {_MAX_PATH_BYTES} bytes that Linux allows",
            hint="use a shorter path, for instance a symbolic link in /tmp",
            value=given,
        )
    return Path(path)


class Connection:
    """A channel to one daemon, opened when it is first used. Safe to use from any thread.

    A connection belongs to the process that made it: after a fork, make a new one. It survives a restart of the daemon.
    """

    def __init__(self, target: str | os.PathLike[str] | None = None) -> None:
        """``target``: a path or ``unix:///path``; by default `default_target`. Raises InvalidRequestError."""
        self.path: Path = socket_path(target or default_target())
        self._prepare()

    def _prepare(self) -> None:
        self._lock = threading.RLock()
        self._channel: grpc.Channel | None = None
        self._stub: cached_pb2_grpc.CacheServiceStub[grpc.Channel] | None = None

    @property
    def target(self) -> str:
        """The socket's path, as errors name it."""
        return str(self.path)

    @property
    def channel(self) -> grpc.Channel:
        """The channel, for services other than `stub`, such as grpc.health.v1."""
        with self._lock:
            if self._channel is None:
                self._channel = self._open()
            return self._channel

    def _open(self) -> grpc.Channel:
        return grpc.insecure_channel(f"unix://{quote(self.target)}", options=[*CHANNEL_OPTIONS, _NO_KEEPALIVE])

    @property
    def stub(self) -> cached_pb2_grpc.CacheServiceStub[grpc.Channel]:
        """The methods of cached.v1. They raise grpc.RpcError: `call` and `stream` raise CacheError instead."""
        with self._lock:
            if self._stub is None:
                self._stub = cached_pb2_grpc.CacheServiceStub(self.channel)
            return self._stub

    def call(self, method: Callable[..., T], request: object, *, timeout_s: float | None = ANSWER_S) -> T:
        """One answer: ``connection.call(connection.stub.List, ListRequest())``. Raises CacheError.

        ``timeout_s``: None, or infinity, for what may take as long as the daemon needs, such as Evict while bytes are
        being written.
        """
        try:
            return self._begun(method, request, timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.target) from error

    def stream(
        self, method: Callable[..., Iterator[T]], request: object, *, timeout_s: float | None = None
    ) -> Iterator[T]:
        """The answers of a streaming method. Raises CacheError; leaving the iteration cancels the call."""
        call: Any = self._begun(method, request, timeout_s)
        try:
            yield from call
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.target) from error
        finally:
            call.cancel()

    def _begun(self, method: Callable[..., T], request: object, timeout_s: float | None) -> T:
        try:
            return method(request, timeout=limited(timeout_s), metadata=trace_metadata())
        except ValueError as error:  # what gRPC says of a channel that another thread has closed meanwhile
            raise daemon_unavailable(self.target, "the connection was closed") from error

    def wait_ready(self, timeout_s: float) -> None:
        """Waits until the daemon answers; for workers that start beside it.

        Raises DaemonUnavailableError (nobody answered) or NotReadyError (it was still starting) after ``timeout_s``.
        """
        starting: CacheError | None = None
        limit_s = limited(timeout_s)
        deadline = math.inf if limit_s is None else time.monotonic() + limit_s
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            try:
                self.call(self.stub.Stats, pb.StatsRequest(), timeout_s=max(left_s, _POLL_S))
            except TimeoutExpiredError as error:
                # What it said before tells more than that the last try, a short one, had no answer.
                raise starting or daemon_unavailable(self.target, f"no answer within {timeout_s:g} s") from error
            except (DaemonUnavailableError, NotReadyError) as error:
                if left_s <= _POLL_S:
                    raise
                starting = error if isinstance(error, NotReadyError) else None
                time.sleep(_POLL_S)
            else:
                return

    def close(self) -> None:
        """Ends every call of this connection. Idempotent; the next use opens it again."""
        with self._lock:
            channel, self._channel, self._stub = self._channel, None, None
        if channel is not None:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
