"""What the daemon tells the service manager of its state: the Status line of ``systemctl status``, while it lives.

``L1 42.0/128 GiB, L2 1.2/3.0 TiB, 3 leases, pulling llama 37 %``
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from cached.cache import ModelCache
from cached.sdnotify import Notifier
from cached.types import LevelStats, PullProgress, Stats
from cached.units import format_size

_SHORTEST_S = 1.0
"""Between two lines: whoever reads them is a person."""

_LONGEST_S = 15.0
"""Without an event; levels also change without one (the pool, capacities that the host takes away)."""

_SHOWN_LOADS = 2


class StatusReporter:
    """One background task, which costs nothing where no service manager listens, and next to nothing at rest."""

    def __init__(self, notifier: Notifier, engine: ModelCache, problems: Callable[[], Sequence[str]]) -> None:
        """``problems``: what the operator has to know first, such as a reload that was refused."""
        self._notifier = notifier
        self._engine = engine
        self._problems = problems
        self._told = ""
        self._drain_end_s: float | None = None
        self._happened = asyncio.Event()

    def line(self) -> str:
        """The line as it is now, for a message that the caller sends; ``run`` will not send it again."""
        stats, loads = self._engine.stats(), self._engine.loads()
        if self._drain_end_s is None:
            self._told = status_line(stats, loads, tuple(self._problems()))
        else:
            left_s = self._drain_end_s - asyncio.get_running_loop().time()
            self._told = drain_line(loads, stats.lease_count, left_s)
        return self._told

    def drain(self, timeout_s: float) -> str:
        """From now on the line is that of a drain that ends in ``timeout_s`` at the latest; returns its first one."""
        self._drain_end_s = asyncio.get_running_loop().time() + timeout_s
        self._happened.set()
        return self.line()

    async def run(self) -> None:
        """Until cancelled: tells each new line, at most one a second."""
        if not self._notifier.is_heard:
            return
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen())
            while True:
                self._happened.clear()
                self._tell()
                await asyncio.sleep(_SHORTEST_S)
                busy = self._drain_end_s is not None or bool(self._engine.loads())
                if not busy:
                    await self._next_event()

    def _tell(self) -> None:
        before = self._told
        line = self.line()
        if line != before:
            self._notifier.status(line)

    async def _next_event(self) -> None:
        try:
            async with asyncio.timeout(_LONGEST_S):
                await self._happened.wait()
        except TimeoutError:
            return

    async def _listen(self) -> None:
        async for _event in self._engine.watch(replay=False):
            self._happened.set()


def status_line(stats: Stats, loads: Sequence[PullProgress], problems: Sequence[str] = ()) -> str:
    """What is wrong, what is where, who holds it, and what moves."""
    parts = [*problems]
    if stats.degraded:
        parts.append(f"degraded: {stats.degraded[0]}{_more(len(stats.degraded) - 1)}")
    parts += [f"{level.level.value.upper()} {_filled(level)}" for level in stats.levels]
    parts.append(_count(stats.lease_count, "lease"))
    if loads:
        parts.append(_loads(loads))
    return ", ".join(parts)


def drain_line(loads: Sequence[PullProgress], lease_count: int, left_s: float) -> str:
    """What a stopping daemon waits for. Leases are not waited for: workers keep their mappings."""
    kept = f"; {_count(lease_count, 'lease')} will be taken up again" if lease_count else ""
    if not loads:
        return f"stopping{kept}"
    return f"draining: {_loads(loads)}, {max(0, round(left_s))} s left{kept}"


def _filled(level: LevelStats) -> str:
    """``42.0/128 GiB``, in the unit of the capacity."""
    number, _, unit = format_size(level.capacity_bytes).partition(" ")
    used = level.used_bytes * float(number) / level.capacity_bytes if level.capacity_bytes else 0.0
    return f"{used:.0f}/{number} {unit}" if used >= 100 or used == 0 else f"{used:.1f}/{number} {unit}"


def _loads(loads: Sequence[PullProgress]) -> str:
    shown = sorted(loads, key=lambda load: -load.total_bytes)[:_SHOWN_LOADS]
    return ", ".join(map(_load, shown)) + _more(len(loads) - len(shown))


def _load(load: PullProgress) -> str:
    if load.from_level is not None:
        return f"recording {load.name}"  # it is ready, and being hashed or copied to L2
    share = f"{100 * load.done_bytes / load.total_bytes:.0f} %" if load.total_bytes else ""
    if load.origin_bytes:
        word = "pulling"
    elif load.disk_bytes:
        word = "promoting"
    else:
        word = "checking" if load.reused_bytes else "beginning"
    return f"{word} {load.name} {share}".rstrip()


def _count(number: int, word: str) -> str:
    return f"{number or 'no'} {word}{'' if number == 1 else 's'}"


def _more(number: int) -> str:
    return f" and {number} more" if number > 0 else ""
