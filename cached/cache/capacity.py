"""How much a level may hold now: the least of what was configured and what the host can really give."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cached.cgroups import Cgroups
from cached.config import resolve_capacity
from cached.levels.shm import SHM_FOLDER
from cached.units import format_size

_PROC = Path("/proc")
_PSI = _PROC / "pressure/memory"
_SHORT_PERCENT, _EASY_PERCENT = 5.0, 1.0
_SHRINK, _GROW, _LEAST_SHARE = 0.9, 1.05, 0.1


@dataclass(frozen=True, slots=True)
class Limit:
    """A bound in bytes, and whose it is."""

    size_bytes: int
    because: str
    is_gone: bool = False
    """There is nothing to be bounded: no file system of the level answers."""


class Allocated:
    """What a daemon's segments really take up; one that is still arriving has only some of its pages."""

    def __init__(self, instance: str, folder: str = SHM_FOLDER) -> None:
        self._prefix = f"cached.{instance}."
        self._folder = folder
        self._blobs: dict[str, int] = {}

    def size_bytes(self) -> int:
        """Now. Of blobs, which stay as they are, only new ones are looked at."""
        blobs, self._blobs = self._blobs, {}
        others_bytes = 0
        with os.scandir(self._folder) as entries:
            for entry in entries:
                name = entry.name
                if not name.startswith(self._prefix):
                    continue
                if name in blobs:
                    self._blobs[name] = blobs[name]
                    continue
                with suppress(FileNotFoundError):  # its memory is being given back in a thread
                    size_bytes = entry.stat(follow_symlinks=False).st_blocks * 512
                    if name.startswith("blob.", len(self._prefix)):
                        self._blobs[name] = size_bytes
                    else:
                        others_bytes += size_bytes
        return others_bytes + sum(self._blobs.values())


class Pressure:
    """What share of its budget L1 may use while the host is short of memory, by the kernel's pressure stall figures.

    While all tasks together stall for memory 5 % of the time it shrinks by a tenth with each look; once they hardly do,
    it grows back.
    """

    def __init__(self, path: Path = _PSI) -> None:
        self._path = path
        self.share = 1.0
        self.stalled_percent = 0.0
        self.is_known = False

    def look(self) -> None:
        """Reads the figures. A kernel without them never is under pressure."""
        try:
            found = re.search(r"^full avg10=([0-9.]+)", self._path.read_text(), re.MULTILINE)
        except OSError:
            found = None
        self.is_known = found is not None
        self.stalled_percent = float(found[1]) if found else 0.0
        if self.stalled_percent >= _SHORT_PERCENT:
            self.share = max(_LEAST_SHARE, self.share * _SHRINK)
        elif self.stalled_percent <= _EASY_PERCENT:
            self.share = min(1.0, self.share * _GROW)

    def limited(self, limit: Limit) -> Limit:
        """The limit as it is under the present pressure."""
        if self.share == 1.0:
            return limit
        why = f"the host is short of memory (stalled {self.stalled_percent:.0f} % of the time)"
        return Limit(int(limit.size_bytes * self.share), why)


def memory_total_bytes(proc: Path = _PROC) -> int:
    """The host's memory, from /proc/meminfo."""
    return meminfo(proc)["MemTotal"]


def l1_budget(configured: str, proc: Path = _PROC) -> Limit:
    """What was configured for L1: a size, or a share of the host's memory."""
    return Limit(resolve_capacity(configured, memory_total_bytes(proc)), f"configured {configured}")


def l1_host_limit(*, reserve_bytes: int, ours_bytes: int, free_bytes: int) -> Limit:
    """What the host can give to L1, whatever was configured.

    ``ours_bytes``: what our segments take up; ``free_bytes``: what the mount has left.
    """
    available = meminfo()["MemAvailable"]
    spare = max(0, available - reserve_bytes)
    limits = [
        Limit(ours_bytes + free_bytes, f"the shared-memory mount has {format_size(free_bytes)} free"),
        Limit(ours_bytes + spare, f"the host has {format_size(available)} of memory available"),
    ]
    left = Cgroups().memory_left_bytes()
    if left is not None:
        limits.append(Limit(ours_bytes + left, f"the memory cgroup leaves {format_size(left)}"))
    return min(limits, key=lambda limit: limit.size_bytes)


def l2_limit(configured: str, folders: Sequence[str], *, ours_bytes: int) -> Limit:
    """The capacity of L2 in these folders together; one whose file system cannot even be asked gives nothing."""
    drives: dict[int, tuple[int, int]] = {}
    problem = ""
    for folder in folders:
        try:
            # Its own folder of blobs: where a drive is not mounted, the folder above would answer for another one.
            blobs = os.path.join(folder, "blobs")
            found = os.statvfs(blobs)
            drives[os.stat(blobs).st_dev] = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
        except OSError as error:
            problem = f"{folder} cannot be used: {error.strerror}"
    if not drives:
        return Limit(0, problem, is_gone=True)
    total_bytes, free_bytes = (sum(sizes) for sizes in zip(*drives.values(), strict=True))
    return min(
        Limit(resolve_capacity(configured, total_bytes), f"configured {configured}"),
        Limit(
            ours_bytes + free_bytes,
            f"the file {'system has' if len(drives) == 1 else 'systems have'} {format_size(free_bytes)} free",
        ),
        key=lambda limit: limit.size_bytes,
    )


def meminfo(proc: Path = _PROC) -> dict[str, int]:
    """The host's memory in bytes, by the names of /proc/meminfo."""
    found = re.findall(r"^(\w+):\s+(\d+) kB$", (proc / "meminfo").read_text(), re.MULTILINE)
    return {name: int(kib) * 1024 for name, kib in found}
