"""Files of the daemon's own: nobody else may read them, and nothing that somebody planted is followed or opened.

What is opened is judged by its descriptor, after opening: a name can be exchanged between a look and its use.
"""

from __future__ import annotations

import errno
import os
import stat


def opener(path: str, flags: int) -> int:
    """For ``open(…, opener=)``: a regular file of ours with one name, made with mode 0600 whatever the umask.

    Raises OSError for anything else, which is neither waited for (a FIFO), followed (a link) nor truncated.
    """
    # O_NONBLOCK: a planted FIFO must not make us wait for its other end.
    fd = os.open(path, flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    try:
        _refuse_foreign(path, os.fstat(fd))
        if flags & os.O_TRUNC:
            os.ftruncate(fd, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _refuse_foreign(path: str, found: os.stat_result) -> None:
    if problem := foreign(found):
        raise OSError(errno.EPERM, f"it is not a file of ours: {problem}", path)


def foreign(found: os.stat_result) -> str:
    """Why this cannot be a file of ours; empty when it can. One that was unlinked meanwhile (no name) can."""
    if not stat.S_ISREG(found.st_mode):
        return f"it is a {_kind(found.st_mode)}"
    if found.st_uid != os.geteuid():
        return f"it belongs to uid {found.st_uid}"
    if found.st_nlink > 1:
        return f"it has {found.st_nlink} names"
    return ""


def fsync_folder(path: str) -> None:
    """Makes the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISLNK, "symbolic link"),
        (stat.S_ISDIR, "folder"),
        (stat.S_ISFIFO, "FIFO"),
        (stat.S_ISSOCK, "socket"),
    ):
        if test(mode):
            return name
    return "device"
