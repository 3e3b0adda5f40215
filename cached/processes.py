"""What the kernel tells of processes of ours, from /proc."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """Of several processes together. ``resident_bytes`` is what is theirs alone: mapped files and segments are not."""

    cpu_s: float = 0.0
    resident_bytes: int = 0
    open_fds: int = 0


def children_usage(pids: Iterable[int]) -> Usage:
    """Of children that live, by their ``pids``; ``cpu_s`` counts those that ended, too, and so never falls."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s, resident_bytes, open_fds = ended.ru_utime + ended.ru_stime, 0, 0
    for pid in pids:
        with suppress(OSError):  # it ends just now
            folder = Path(f"/proc/{pid}")
            # The name before it is in parentheses, and may hold anything.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            cpu_s += (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
            found = re.search(r"^RssAnon:\s+(\d+) kB$", (folder / "status").read_text(), re.MULTILINE)
            resident_bytes += 1024 * int(found[1]) if found else 0
            open_fds += len(os.listdir(folder / "fd"))
    return Usage(cpu_s, resident_bytes, open_fds)
