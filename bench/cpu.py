"""Processor time of a process, what it reaped and what descends from it, from /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class _Process:
    parent: int
    cpu_s: float


def tree_cpu_s(*pids: int) -> float:
    """User and system time so far of these processes, of their descendants, and of all that any of them has reaped.

    Grows only, as long as no descendant is orphaned. In steps of the kernel's tick (10 ms) for each process.
    """
    processes = dict(_processes())
    children: dict[int, list[int]] = {}
    for pid, process in processes.items():
        children.setdefault(process.parent, []).append(pid)
    total_s, waiting, seen = 0.0, list(pids), set[int]()
    while waiting:
        pid = waiting.pop()
        if pid in processes and pid not in seen:
            seen.add(pid)
            total_s += processes[pid].cpu_s
            waiting += children.get(pid, ())
    return total_s


def wait_idle(*pids: int, busy_share: float = 0.06, window_s: float = 0.25, timeout_s: float = 60.0) -> bool:
    """Waits until these process trees use less than ``busy_share`` of one core; False if they never do."""
    deadline_s = time.monotonic() + timeout_s
    before_s = tree_cpu_s(*pids)
    while time.monotonic() < deadline_s:
        time.sleep(window_s)
        now_s = tree_cpu_s(*pids)
        if now_s - before_s <= busy_share * window_s + _TICK_S:
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


def _processes() -> Iterator[tuple[int, _Process]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            ticks = sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
            yield int(entry.name), _Process(int(fields[1]), ticks * _TICK_S)
