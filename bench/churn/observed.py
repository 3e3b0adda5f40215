"""``cached serve`` that can be asked how many objects it has: ``python -m bench.churn.observed FILE serve …``.

With SIGUSR2 it appends a line of JSON to FILE: what Python has allocated, and the tasks of its event loop. Nothing else
is different from the command, and without the signal nothing at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import signal
import sys
from types import FrameType

from cached.cli.main import main


def observe(file: str) -> None:
    """From now on the signal is answered; by the main thread, between two steps of its own."""

    def tell(_number: int, _frame: FrameType | None) -> None:
        tasks = -1
        with contextlib.suppress(RuntimeError):  # no loop runs
            tasks = len(asyncio.all_tasks())
        line = {"blocks": sys.getallocatedblocks(), "tasks": tasks, "young": gc.get_count()[0], **malloc_mb()}
        with open(file, "a", encoding="utf-8") as answers:
            answers.write(json.dumps(line) + "\n")

    signal.signal(signal.SIGUSR2, tell)


_MALLINFO = (
    "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
)  # fmt: skip


class _MallInfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLINFO)


def malloc_mb() -> dict[str, float]:
    """What the C library's allocator has given out, and what it keeps free; nothing where it does not tell."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return {}
    mallinfo2.restype = _MallInfo
    found = mallinfo2()
    return {"malloc_used_mb": (found.uordblks + found.hblkhd) / 1e6, "malloc_free_mb": found.fordblks / 1e6}


if __name__ == "__main__":
    observe(sys.argv.pop(1))
    sys.exit(main())
