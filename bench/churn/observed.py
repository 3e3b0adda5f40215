"""``cached serve`` that can be asked how many objects it has: ``python -m bench.churn.observed FILE serve …``.

With SIGUSR2 it appends a line of JSON to FILE: what Python has allocated, and the tasks of its event loop. Nothing else
is different from the command, and without the signal nothing at all.
"""

from __future__ import annotations

import asyncio
import contextlib
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
        line = {"blocks": sys.getallocatedblocks(), "tasks": tasks, "young": gc.get_count()[0]}
        with open(file, "a", encoding="utf-8") as answers:
            answers.write(json.dumps(line) + "\n")

    signal.signal(signal.SIGUSR2, tell)


if __name__ == "__main__":
    observe(sys.argv.pop(1))
    sys.exit(main())
