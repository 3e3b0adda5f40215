"""Time as the daemon sees it, so that a simulated clock can stand in. Standard library only."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Two clocks and a sleep. Leases, deadlines and rates use ``monotonic_s``; only what people see uses ``wall_s``."""

    def monotonic_s(self) -> float:
        """Seconds from an arbitrary start; never jumps."""
        ...

    def wall_s(self) -> float:
        """Seconds since the Unix epoch; may jump."""
        ...

    async def sleep(self, delay_s: float) -> None:
        """Waits at least ``delay_s``."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def monotonic_s(self) -> float:
        """See Clock."""
        return time.monotonic()

    def wall_s(self) -> float:
        """See Clock."""
        return time.time()

    async def sleep(self, delay_s: float) -> None:
        """See Clock."""
        await asyncio.sleep(delay_s)
