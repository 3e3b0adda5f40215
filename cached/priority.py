"""Who runs first where all cores are busy: the daemon, which answers, before movers, which move bytes."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import threading
import time

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}.get(platform.machine())
"""The number of the system call, which C libraries give no function yet."""
_SLICE_NS = 1_000_000
_SESSION = "/proc/self/autogroup"
_AGAIN_S = 0.15
_ATTEMPTS = 100


def answer_soon() -> None:
    """This thread, and those that it starts, get a core as soon as they have something to do, for a short time.

    For that, Linux 6.12 and later take a time slice shorter than others'. A call is a relay of some ten wake-ups with
    little to do, and each would wait for the slice of whatever runs. Older kernels ignore it, and a process whose
    policy is not the default stays as it is: somebody chose that.
    """
    _slice(_SLICE_NS)


def make_way(nice: int) -> None:
    """This process has the niceness, in a session of its own, and the slices that are usual.

    Where the kernel shares the cores between sessions first (sched(7), "The autogroup feature"), niceness counts within
    a session alone: the session gets it, too. It is absolute: the daemon's own, which is inherited, may be below zero.
    """
    nice = max(nice, os.getpriority(os.PRIO_PROCESS, 0))
    os.setpriority(os.PRIO_PROCESS, 0, nice)
    _slice(0)
    try:
        os.setsid()
    except PermissionError:  # started by hand, it leads a group of a session that is others', too
        return
    if nice > 0:
        threading.Thread(target=_nice_session, args=(nice,), name="nice", daemon=True).start()


def _slice(length_ns: int) -> None:
    """0: what is usual. Only asked for: a sandbox may forbid it."""
    if _SCHED_SETATTR is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    # struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period.
    attributes = struct.pack("=IIQiIQQQ", 48, os.SCHED_OTHER, 0, nice, 0, length_ns, 0, 0)
    ctypes.CDLL(None).syscall(_SCHED_SETATTR, 0, attributes, 0)


def _nice_session(nice: int) -> None:
    """The kernel takes one such change in a tenth of a second, of all users together (root's always)."""
    for _ in range(_ATTEMPTS):
        try:
            with open(_SESSION, "w", encoding="ascii") as file:
                file.write(str(nice))
        except BlockingIOError:
            time.sleep(_AGAIN_S)
        except OSError:  # the kernel has no such groups
            return
        else:
            return
    sys.stderr.write(f"this session was not given niceness {nice}: the kernel took too many others' meanwhile\n")
