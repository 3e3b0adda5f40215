"""Unix sockets of the daemon: who may bind them, and their folder, mode and group."""

from __future__ import annotations

import asyncio
import fcntl
import grp
import os
import socket
import stat
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import structlog

from cached.errors import AlreadyRunningError, ConfigError

_ACCEPT_AGAIN_S = 0.5
_log = structlog.get_logger(__name__)


def descriptor_socket_path(path: str) -> str:
    """The descriptor socket that belongs to a daemon's socket: ``cached.sock`` → ``cached-fd.sock``."""
    return path.removesuffix(".sock") + "-fd.sock"


class FileLock:
    """An exclusive lock on a file, held by an open descriptor, so that it ends with the process however that ends.

    The file stays behind: removing it would let two processes hold "the" lock. It holds the owner's pid for people.
    """

    def __init__(
        self,
        path: str,
        what: str,
        *,
        who: str = "daemon",
        hint: str = "stop it, or give this one a socket and a state folder of its own",
    ) -> None:
        """Takes the lock or raises AlreadyRunningError at once. ``what`` is locked, and by ``who``, in words."""
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            msg = f"cannot open the lock {path}: {error.strerror}"
            raise ConfigError(msg, hint=f"the user of the {who} must be able to write there", file=path) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._descriptor)
            msg = f"another {who} (pid {holder}) uses {what}"
            raise AlreadyRunningError(msg, hint=hint, path=path, holder_pid=holder) from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Gives the lock back; idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def prepare_directory(path: str, mode: int, what: str, key: str, gid: int = -1) -> None:
    """Creates a folder with ``mode`` and group, or checks that the one that is there can be used. Raises ConfigError.

    In a folder that anyone may write to (/tmp) it must be ours: else another user could have laid it there.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        os.mkdir(path, mode)
        os.chown(path, -1, gid)
        os.chmod(path, mode)
    except FileExistsError:
        _check_directory(path, what, key)
    except OSError as error:
        msg = f"cannot create the {what} {path}: {error.strerror}"
        raise ConfigError(msg, hint=f"create it for uid {os.geteuid()}, or set {key}", key=key, value=path) from error


def _check_directory(path: str, what: str, key: str) -> None:
    about = {"hint": f"mend it, or set {key} to another folder", "key": key, "value": path}
    if not os.path.isdir(path):
        msg = f"the {what} {path} is not a folder"
        raise ConfigError(msg, **about)
    if os.stat(os.path.dirname(path)).st_mode & stat.S_IWOTH and os.lstat(path).st_uid != os.geteuid():
        msg = f"the {what} {path} belongs to another user, in a folder that anyone may write to"
        raise ConfigError(msg, **about)
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        msg = f"the {what} {path} cannot be written by uid {os.geteuid()}"
        raise ConfigError(msg, **about)


def remove_stale(path: str) -> None:
    """Removes a socket that an earlier daemon left. Only for the holder of the socket's lock. Raises ConfigError."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        msg = f"{path} exists and is not a socket"
        raise ConfigError(msg, hint="move it away, or set daemon.socket", key="daemon.socket", value=path)
    os.unlink(path)


def group_id(name: str, key: str) -> int:
    """The number of a group given by name or number; -1, which leaves things as they are, for an empty name."""
    if not name:
        return -1
    if name.isdigit():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as error:
        msg = f"{key} = {name!r}: there is no such group on this host"
        raise ConfigError(msg, hint="create the group, or give its number", key=key, value=name) from error


def open_to(path: str, mode: int, gid: int) -> None:
    """Gives a bound socket its group and mode; until then only the daemon's user may connect. Raises ConfigError."""
    try:
        if gid >= 0:
            os.chown(path, -1, gid)
        os.chmod(path, mode)
    except OSError as error:
        msg = f"cannot give {path} group {gid} and mode {mode:04o}: {error.strerror}"
        hint = "make the daemon's user a member of access.socket_group"
        raise ConfigError(msg, hint=hint, key="access.socket_group", value=gid) from error


async def accept_each(
    listener: socket.socket,
    serve: Callable[[socket.socket], Coroutine[Any, Any, None]],
    tasks: set[asyncio.Task[None]],
    ended: Callable[[asyncio.Task[None]], None],
    *,
    failed_event: str,
) -> None:
    """Serves each connection in a task of its own: in ``tasks`` until it is over, and then told to ``ended``."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            connection, _ = await loop.sock_accept(listener)
        except OSError as error:
            # Out of descriptors, usually: those who wait are served when some are back.
            _log.warning(failed_event, error=str(error))
            await asyncio.sleep(_ACCEPT_AGAIN_S)
            continue
        task = asyncio.create_task(serve(connection))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        task.add_done_callback(ended)
        close_after(task, connection)


def close_after(task: asyncio.Task[None], owned: socket.socket) -> None:
    """Also for a task that is cancelled before its first step, where a ``with`` inside it would never be reached."""
    task.add_done_callback(lambda _: owned.close())
