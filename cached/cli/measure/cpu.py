"""Processor time of processes and of what descends from them, from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


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


def _processes() -> Iterator[tuple[int, _Process]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            ticks = sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
            yield int(entry.name), _Process(int(fields[1]), ticks * TICK_S)
