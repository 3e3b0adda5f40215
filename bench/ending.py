"""How a benchmark ends: whatever it started ends with it, also after Ctrl-C or SIGTERM at any moment."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE_S = 10.0
"""How long the end may take in order: daemons, servers and folders, one after the other."""
_REAPING_S = 1.0
_PR_SET_CHILD_SUBREAPER = 36


def prepare() -> None:
    """From now on signals end this process in order, and orphans below it stay its own. Main thread only."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in _SIGNALS:
        signal.signal(number, _end)


def kill_descendants() -> None:
    """What is left below this process, whatever its session."""
    deadline_s = time.monotonic() + _REAPING_S
    while (left := _descendants()) and time.monotonic() < deadline_s:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)


def _end(number: int, _frame: FrameType | None) -> None:
    for each in _SIGNALS:
        signal.signal(each, _not_again)
    late = threading.Timer(_PATIENCE_S, _give_up, (number,))
    late.daemon = True
    late.start()
    sys.exit(128 + number)


def _not_again(_number: int, _frame: FrameType | None) -> None:
    """It is ending."""


def _give_up(number: int) -> None:
    sys.stderr.write(f"not ended in order within {_PATIENCE_S:g} s\n")
    kill_descendants()
    os._exit(128 + number)


def _descendants() -> list[int]:
    """Parents before their children; zombies too, for they are to be waited for."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found = list(children.get(os.getpid(), []))
    for pid in found:
        found += children.get(pid, [])
    return found
