"""The daemon, killed by SIGKILL just before or after its Nth step that changes what outlives it.

``python -m tests.crash.kill_at_step N TRACE serve --config FILE``: steps are counted from 1; an odd N dies before its
step, an even one after it. Each step is written to the file TRACE. The code of the daemon knows nothing of this: the
functions that it calls to change the disk, shared memory and the index are wrapped from outside.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

OS_STEPS = (
    "chmod", "fchmod", "fsync", "ftruncate", "link", "mkdir", "rename", "replace", "rmdir", "symlink", "truncate", "unlink",
    "write",
)  # fmt: skip
_lock = threading.Lock()
_count = 0


def main() -> int:
    last, trace = int(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    write = os.write

    def step(name: str, *, after: bool) -> None:
        global _count
        with _lock:
            if not after:
                _count += 1
                write(trace, f"{_count} {name}\n".encode())
            if _count == last and after == (last % 2 == 0):
                os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            step(name, after=False)
            result = function(*args, **kwargs)
            step(name, after=True)
            return result

        return call

    import posix_ipc

    from cached.cli.main import main as run
    from cached.index.store import Store
    from cached.levels import shm

    for name in OS_STEPS:
        setattr(os, name, wrapped(name, getattr(os, name)))
    posix_ipc.SharedMemory = wrapped("shm_open", posix_ipc.SharedMemory)
    posix_ipc.unlink_shared_memory = wrapped("shm_unlink", posix_ipc.unlink_shared_memory)
    shm.rename_new = wrapped("rename_new", shm.rename_new)
    Store.write = wrapped("index", Store.write)  # type: ignore[method-assign]
    del sys.argv[1:3]
    return run()


if __name__ == "__main__":
    sys.exit(main())
