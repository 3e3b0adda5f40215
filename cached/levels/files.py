"""What the local levels and the movers share: names that may become paths, careful opening, typed errors."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from cached.errors import CachedError, InvalidRequestError, LevelError, NoRoomError, NotFoundError
from cached.level import Level
from cached.levels.base import FileRef
from cached.own_files import foreign

_DIGEST = re.compile(r"[0-9a-f]{64}")
_INGEST_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


def is_digest(text: str) -> bool:
    """64 lower-case hex digits."""
    return _DIGEST.fullmatch(text) is not None


def is_ingest_id(text: str) -> bool:
    """What may name an ingest: it becomes part of a path."""
    return _INGEST_ID.fullmatch(text) is not None


def checked_digest(text: str) -> str:
    """The digest itself; raises InvalidRequestError for anything else, before it gets near a path."""
    if not is_digest(text):
        raise InvalidRequestError(f"{text!r} is not a SHA-256 (64 lower-case hex digits)", value=text)
    return text


def checked_ingest_id(text: str) -> str:
    """The id itself; raises InvalidRequestError for anything else, before it gets near a path."""
    if not is_ingest_id(text):
        raise InvalidRequestError(f"{text!r} is not an ingest id (letters, digits, '-' and '_')", value=text)
    return text


def level_of(ref: FileRef) -> Level:
    """The level that a file of ours belongs to."""
    return Level.L1 if ref.memory else Level.L2


@contextmanager
def level_errors(
    level: Level, path: str, doing: str, needed_bytes: int = 0, *, missing_is_failure: bool = False
) -> Iterator[None]:
    """Turns OSError into NotFoundError, NoRoomError or LevelError.

    ``missing_is_failure``: it is no name that is missing but the level itself, which is a LevelError.
    """
    try:
        yield
    except OSError as error:
        if missing_is_failure and error.errno == errno.ENOENT:
            raise LevelError(
                f"{level}: cannot {doing} {path}: its folder is gone",
                hint="is the file system mounted?",
                level=level,
                path=path,
                cause=os.strerror(errno.ENOENT),
            ) from error
        raise level_error(level, path, doing, error, needed_bytes) from error


def level_error(level: Level, path: str, doing: str, error: OSError, needed_bytes: int = 0) -> CachedError:
    """The typed error for ``error``, met while ``doing`` (an infinitive without "to")."""
    cause = os.strerror(error.errno) if error.errno else str(error)
    code = errno.errorcode.get(error.errno or 0, "")
    if error.errno == errno.ENOENT:
        return NotFoundError(f"{level}: {path} does not exist", level=level, path=path, ref=path)
    if error.errno in _NO_ROOM:
        return no_room(level, path, needed_bytes, cause)
    hint = "see the kernel's log (dmesg) for the device" if error.errno in {errno.EIO, errno.EROFS} else ""
    return LevelError(
        f"{level}: cannot {doing} {path}: {cause}", hint=hint, level=level, path=path, cause=cause, errno=code
    )


def no_room(level: Level, path: str, needed_bytes: int, cause: str) -> NoRoomError:
    """The file system, not our bookkeeping, says that it is full."""
    available_bytes = _free_bytes_or_zero(os.path.dirname(path))
    what = "the shared memory's file system" if level is Level.L1 else "the disk"
    return NoRoomError(
        f"{level}: {what} has no room for {path}: {cause}",
        hint=f"something else fills {what}, or the level's capacity is set above what the file system has",
        level=level,
        path=path,
        needed_bytes=needed_bytes,
        available_bytes=available_bytes,
        capacity_bytes="",
        cause=cause,
    )


def open_checked(level: Level, path: str, flags: int = os.O_RDONLY, ref: FileRef | None = None) -> int:
    """A descriptor of a regular file that is ours alone (our uid, one name), never of what a planted link leads to.

    With ``ref`` its inode and size must be those, else LevelError: the name was reused. The caller closes it.
    """
    with level_errors(level, path, "open"):
        # O_NONBLOCK: a planted FIFO must not make us wait for its other end.
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        refuse_foreign(level, path, found)
        if ref is not None:
            _refuse_replaced(level, ref, found)
    except BaseException:
        os.close(fd)
        raise
    return fd


def refuse_foreign(level: Level, path: str, found: os.stat_result) -> None:
    """Raises LevelError unless it is a regular file, ours, with one name."""
    problem = foreign(found)
    if problem:
        raise LevelError(
            f"{level}: {path} is not a file of ours: {problem}",
            hint="somebody put it there; remove it",
            level=level,
            path=path,
            cause=problem,
        )


def _refuse_replaced(level: Level, ref: FileRef, found: os.stat_result) -> None:
    if (found.st_ino, found.st_size) != (ref.inode, ref.size_bytes):
        raise LevelError(
            f"{level}: {ref.path} is not the file it was: inode {found.st_ino} of {found.st_size} bytes "
            f"instead of {ref.inode} of {ref.size_bytes}",
            level=level,
            path=ref.path,
            cause="replaced",
        )


def stat_ref(level: Level, path: str) -> FileRef:
    """A reference to a file of ours as it is now. Raises NotFoundError, or LevelError for what is not ours."""
    with level_errors(level, path, "stat"):
        found = os.lstat(path)
    refuse_foreign(level, path, found)
    return FileRef(path=path, inode=found.st_ino, size_bytes=found.st_size, memory=level is Level.L1)


def rename_new(source: str, target: str) -> None:
    """Renames, but never over an existing name: that raises FileExistsError."""
    result = _renameat2()(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE)
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), source, None, target)


def free_bytes(level: Level, path: str) -> int:
    """What an unprivileged process could still write to the file system of ``path``."""
    with level_errors(level, path, "statvfs"):
        found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def _free_bytes_or_zero(path: str) -> int:
    try:
        found = os.statvfs(path)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


@cache
def libc() -> ctypes.CDLL:
    """The C library, its calls releasing the interpreter lock and keeping errno."""
    return ctypes.CDLL(None, use_errno=True)


@cache
def _renameat2() -> ctypes._NamedFuncPointer:
    function = libc().renameat2
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    function.restype = ctypes.c_int
    return function
