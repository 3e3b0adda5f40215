"""Processor time of a process, what it reaped and what descends from it: spans of a benchmark, and quiet ones."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cached.cli.measure.cpu import TICK_S, tree_cpu_s


def wait_idle(*pids: int, busy_share: float = 0.06, window_s: float = 0.25, timeout_s: float = 60.0) -> bool:
    """Waits until these process trees use less than ``busy_share`` of one core; False if they never do."""
    deadline_s = time.monotonic() + timeout_s
    before_s = tree_cpu_s(*pids)
    while time.monotonic() < deadline_s:
        time.sleep(window_s)
        now_s = tree_cpu_s(*pids)
        if now_s - before_s <= busy_share * window_s + TICK_S:
            return True
        before_s = now_s
    return False


@dataclass(slots=True)
class Span:
    """Filled in when the measured block ends."""

    seconds: float = 0.0
    cpu_s: float = 0.0


@contextmanager
def measured(pids: Iterable[int] = ()) -> Iterator[Span]:
    """Wall time of the block, and the processor time that this process and the trees of ``pids`` spend in it."""
    pids = tuple(pids)
    span = Span()
    cpu_s = tree_cpu_s(*pids) + time.process_time()
    began_s = time.perf_counter()
    yield span
    span.seconds = time.perf_counter() - began_s
    span.cpu_s = tree_cpu_s(*pids) + time.process_time() - cpu_s
