"""What Linux lets a process give up for good: the network, writing elsewhere, new privileges. No dependencies.

Each measure is asked for, and what the kernel or a container refuses is told: see ``Measure``. To be entered by a
process of one thread, before it reads what it does not trust.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
from collections.abc import Callable
from dataclasses import dataclass

_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
# The same on every architecture: include/uapi/asm-generic/unistd.h.
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_VERSION = 1
_LANDLOCK_RULE_PATH_BENEATH = 1
# include/uapi/linux/landlock.h: everything that changes a file system, and since which version of the interface.
_WRITE_FILE, _REMOVE_DIR, _REMOVE_FILE = 1 << 1, 1 << 4, 1 << 5
_MAKE = sum(1 << bit for bit in range(6, 13))
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_NET = 0b11  # bind and connect TCP
_OPEN_FILES = 256


@dataclass(frozen=True, slots=True)
class Measure:
    """One restriction; ``why`` it is not active, or empty."""

    name: str
    active: bool
    why: str = ""


def enter(folder: str, *, largest_file_bytes: int) -> list[Measure]:
    """Gives up all that can be given up, but writing below ``folder``; what is active then. Raises nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    return [
        _attempt("limits of files and cores", lambda: _limits(largest_file_bytes)),
        _attempt("no new privileges", lambda: _call(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))),
        _attempt("no network", lambda: _leave_network(libc)),
        _attempt("no writing elsewhere", lambda: _restrict_writing(libc, folder)),
        # After the maps of the user namespace, which a process that is not dumpable may not write.
        _attempt("not to be traced", lambda: _call(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))),
    ]


def _attempt(name: str, action: Callable[[], object]) -> Measure:
    try:
        action()
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None)
        return Measure(name, active=False, why=os.strerror(number) if number else str(error))
    return Measure(name, active=True)


def _call(answer: int) -> int:
    if answer < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return answer


def _limits(largest_file_bytes: int) -> None:
    for which, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_FSIZE, largest_file_bytes),
    ):
        _, hard = resource.getrlimit(which)
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (allowed, allowed))


def _leave_network(libc: ctypes.CDLL) -> None:
    """Into a network without interfaces; as an ordinary user, within a user namespace of its own."""
    uid, gid = os.geteuid(), os.getegid()
    try:
        _call(libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET))
    except OSError:
        _call(libc.unshare(_CLONE_NEWNET))
        return
    for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{file}", "w", encoding="ascii") as opened:
            opened.write(text)


def _restrict_writing(libc: ctypes.CDLL, folder: str) -> None:
    """Landlock (since Linux 5.13): nothing but what is below ``folder`` may be written, made, moved or removed."""
    syscall = libc.syscall
    syscall.restype = ctypes.c_long
    try:
        version = _call(syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(_LANDLOCK_VERSION)))
    except OSError as error:
        if error.errno in {errno.ENOSYS, errno.EOPNOTSUPP}:
            raise ValueError("this kernel has no Landlock") from error
        raise
    rights = _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE
    rights |= (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    attributes = struct.pack("<QQ", rights, _NET) if version >= 4 else struct.pack("<Q", rights)
    ruleset = _call(syscall(_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0)))
    try:
        place = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            rule = struct.pack("<Qi", rights, place)
            _call(syscall(_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH_BENEATH, rule, ctypes.c_uint(0)))
        finally:
            os.close(place)
        _call(syscall(_LANDLOCK_RESTRICT_SELF, ruleset, ctypes.c_uint(0)))
    finally:
        os.close(ruleset)
