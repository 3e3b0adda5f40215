"""When this process, and the container that it runs in, were started: from /proc, as proc(5) describes it."""

from __future__ import annotations

import os
import time
from pathlib import Path

_HOST_PID_NAMESPACE = "pid:[4026531836]"
"""PROC_PID_INIT_INO in the kernel's include/linux/proc_ns.h: the namespace of the host itself."""

_START_TIME = 21 - 2
"""Field 22 of /proc/PID/stat, counted from 0 behind the process's name."""


def age_s(pid: str = "self") -> float | None:
    """Seconds since a process was started, to the 10 ms of the kernel's clock tick; None where /proc does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        ticks = int(stat.rpartition(")")[2].split()[_START_TIME])
        # Both count from boot, suspended time included, and are shifted alike in a time namespace.
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
    return max(0.0, age)


def container_age_s() -> float | None:
    """Seconds since the first process of this container was started; None outside of one.

    A container is a PID namespace other than the host's. What happened before its first process (the image, the
    sandbox) cannot be seen from within.
    """
    try:
        if os.readlink("/proc/self/ns/pid") == _HOST_PID_NAMESPACE:
            return None
    except OSError:
        return None
    return age_s("1")
