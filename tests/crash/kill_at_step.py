"""The daemon, killed by SIGKILL just before or after its Nth step that changes what outlives it.

``python -m tests.crash.kill_at_step N TRACE serve --config FILE``: steps are counted from 1; an odd N dies before its
step, an even one after it, and 0 never. Each step is written to the file TRACE. The code of the daemon knows nothing of
this: the functions that it calls to change the disk, shared memory and the index are wrapped from outside.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import posix_ipc

from cached.cli.main import main as run
from cached.index.store import Store
from cached.levels import shm

_OS_STEPS = (
    "chmod", "fchmod", "fsync", "ftruncate", "link", "mkdir", "rename", "replace", "rmdir", "symlink", "truncate",
    "unlink", "write",
)  # fmt: skip
_OTHER_STEPS: tuple[tuple[Any, str], ...] = (
    (posix_ipc, "SharedMemory"),
    (posix_ipc, "unlink_shared_memory"),
    (shm, "rename_new"),
    (Store, "write"),
)


class Steps:
    """Counts steps, from any thread, and dies at one of them."""

    def __init__(self, last: int, trace_path: str) -> None:
        self._last = last
        self._write = os.write
        self._trace = os.open(trace_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC)
        self._lock = threading.Lock()
        self._count = 0

    def wrap(self, where: Any, name: str) -> None:
        """Calls of ``where.name`` are steps from now on."""
        function: Callable[..., Any] = getattr(where, name)

        @functools.wraps(function)
        def step(*args: Any, **kwargs: Any) -> Any:
            self._before(name)
            result = function(*args, **kwargs)
            self._after()
            return result

        setattr(where, name, step)

    def _before(self, name: str) -> None:
        with self._lock:
            self._count += 1
            self._write(self._trace, f"{self._count} {name}\n".encode())
            self._die_if(odd=True)

    def _after(self) -> None:
        with self._lock:
            self._die_if(odd=False)

    def _die_if(self, *, odd: bool) -> None:
        if self._count == self._last and self._last % 2 == odd:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    steps = Steps(int(sys.argv[1]), sys.argv[2])
    for os_name in _OS_STEPS:
        steps.wrap(os, os_name)
    for place, other_name in _OTHER_STEPS:
        steps.wrap(place, other_name)
    del sys.argv[1:3]
    sys.exit(run())
