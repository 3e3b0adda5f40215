"""Unix sockets of the daemon: who may bind them, and their folder, mode and group."""

from __future__ import annotations

import fcntl
import grp
import os
import stat
from pathlib import Path

import structlog

from cached.errors import AlreadyRunningError, ConfigError
from cached.own_files import opener

_PRIVATE = 0o700
_NO_ID = 2**32 - 1
_ID_DIGITS = 10
_OTHERS = 0o077
_WRITE_BY_OTHERS = 0o022
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
        try:
            self._descriptor = opener(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            msg = f"cannot open the lock {path}: {error.strerror}"
            hint = f"the user of the {who} must be able to write there; a file that this user did not make is to go"
            raise ConfigError(msg, hint=hint, file=path, key="", value="") from error
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


def prepare_private_directory(path: str, what: str, key: str) -> None:
    """Like ``prepare_directory``, for what is the daemon's alone: mode 0700, also where it was there before.

    One of ours that others could look into is closed. Raises ConfigError where others could have written to it: what
    lies in it may be theirs.
    """
    prepare_directory(path, _PRIVATE, what, key)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        mode = stat.S_IMODE(found.st_mode)
        _check_private(path, found, what, key)
        if mode & _OTHERS:
            os.fchmod(fd, _PRIVATE)
            _log.warning("folder.closed", path=path, what=what, mode_before=f"{mode:04o}", mode=f"{_PRIVATE:04o}")
    finally:
        os.close(fd)


def _check_private(path: str, found: os.stat_result, what: str, key: str) -> None:
    uid, mode = os.geteuid(), stat.S_IMODE(found.st_mode)
    if found.st_uid != uid:
        wrong = f"belongs to uid {found.st_uid}, and this is uid {uid}"
        hint = f"chown -R {uid} {path}; or set {key} to a folder below it, which the daemon makes for itself"
    elif mode & _WRITE_BY_OTHERS:
        wrong = f"has mode {mode:04o}: others may write to it"
        hint = f"see whether all in it belongs to uid {uid}, then: chmod 0700 {path}"
    else:
        return
    raise ConfigError(f"the {what} {path} {wrong}", hint=hint, key=key, value=path)


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
    if name.isdecimal() and len(name) <= _ID_DIGITS and int(name) < _NO_ID:
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError) as error:
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
