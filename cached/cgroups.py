"""What cgroups allow a process and have counted for it: memory, processors, tasks. Versions 1 and 2.

Within a container the path in /proc/self/cgroup may be that of the host, of which nothing is mounted: then the mount's
own root is the container's cgroup. See cgroups(7), and the kernel's admin-guide/cgroup-v1 and cgroup-v2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED_BYTES = 1 << 60
"""Version 1 says "no limit" with the largest multiple of a page."""


@dataclass(frozen=True, slots=True)
class MemoryCgroup:
    """One cgroup's memory. ``cache_bytes``: page cache that the kernel takes back. None: no limit.

    ``shmem_bytes``: shared memory that was first touched from here, also by processes that are gone. ``high_bytes``:
    from there on its processes are slowed down (version 2). ``swap_bytes``: how much swap it may use.
    """

    folder: Path
    limit_bytes: int | None
    high_bytes: int | None
    used_bytes: int
    cache_bytes: int
    shmem_bytes: int
    swap_bytes: int | None

    @property
    def left_bytes(self) -> int | None:
        """What may still be allocated; None: no limit."""
        if self.limit_bytes is None:
            return None
        return max(0, self.limit_bytes - self.used_bytes + self.cache_bytes)


@dataclass(frozen=True, slots=True)
class Cgroups:
    """The cgroups of a process. Where nothing can be read, there is nothing that limits."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    pid: str = "self"

    def memory(self) -> list[MemoryCgroup]:
        """From its own outwards; those without a memory controller are left out."""
        found = []
        for folder, legacy in self._folders("memory"):
            try:
                found.append(_memory_1(folder) if legacy else _memory_2(folder))
            except (OSError, ValueError):
                continue
        return found

    def memory_left_bytes(self) -> int | None:
        """What the tightest one leaves, page cache that can be taken back counted as free; None: no limit."""
        return min((left for cgroup in self.memory() if (left := cgroup.left_bytes) is not None), default=None)

    def processors(self) -> float | None:
        """How many it may keep busy; None: no quota."""
        quotas = [
            _quota_1(folder) if legacy else _ratio(_words(folder / "cpu.max"))
            for folder, legacy in self._folders("cpu")
        ]
        return min((quota for quota in quotas if quota is not None), default=None)

    def tasks_left(self) -> int | None:
        """How many more processes and threads it may start; None: no limit."""
        lefts = []
        for folder, _ in self._folders("pids"):
            limit, current = _number(folder / "pids.max"), _number(folder / "pids.current")
            if limit is not None and current is not None:
                lefts.append(max(0, limit - current))
        return min(lefts, default=None)

    def _folders(self, controller: str) -> Iterator[tuple[Path, bool]]:
        """From its own outwards, each with whether it is of version 1."""
        top = self.sys / "fs/cgroup"
        unified = "/"
        for line in _read(self.proc / self.pid / "cgroup").splitlines():
            _, controllers, own = [*line.split(":", 2), "", ""][:3]
            if controller in controllers.split(","):
                places = (top / controllers, top / controller)
                for place in places:
                    if place.is_dir():
                        yield from ((folder, True) for folder in _upwards(place, own))
                        return
            elif not controllers:
                unified = own
        yield from ((folder, False) for folder in _upwards(top, unified))


def _upwards(top: Path, own: str) -> Iterator[Path]:
    parts = [part for part in own.split("/") if part not in {"", ".."}]
    for count in range(len(parts), -1, -1):
        folder = top.joinpath(*parts[:count])
        if folder.is_dir():
            yield folder


def _memory_2(folder: Path) -> MemoryCgroup:
    stat = _counters(folder / "memory.stat")
    return MemoryCgroup(
        folder=folder,
        limit_bytes=_number(folder / "memory.max"),
        high_bytes=_number(folder / "memory.high"),
        used_bytes=int((folder / "memory.current").read_text()),
        cache_bytes=stat.get("inactive_file", 0) + stat.get("active_file", 0),
        shmem_bytes=stat.get("shmem", 0),
        swap_bytes=_number(folder / "memory.swap.max"),
    )


def _memory_1(folder: Path) -> MemoryCgroup:
    stat = _counters(folder / "memory.stat")
    limit = int((folder / "memory.limit_in_bytes").read_text())
    both = _number(folder / "memory.memsw.limit_in_bytes")
    limited = limit < _UNLIMITED_BYTES
    return MemoryCgroup(
        folder=folder,
        limit_bytes=limit if limited else None,
        high_bytes=None,
        used_bytes=int((folder / "memory.usage_in_bytes").read_text()),
        cache_bytes=stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0),
        shmem_bytes=stat.get("total_shmem", 0),
        swap_bytes=max(0, both - limit) if limited and both is not None and both < _UNLIMITED_BYTES else None,
    )


def _quota_1(folder: Path) -> float | None:
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota is not None and period and quota > 0 else None


def _ratio(words: list[str]) -> float | None:
    try:
        quota, period = words
        return None if quota == "max" else int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None


def _counters(path: Path) -> dict[str, int]:
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2}


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    try:
        return int(text)
    except ValueError:
        return None  # "max", or not there


def _words(path: Path) -> list[str]:
    return _read(path).split()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
