"""When a pull that nobody waits for begins: after a share of a delay, and where configured with a slot of the fleet.

So a catalog that changes, or a window that begins, on a thousand hosts at once does not bring all of them to one bucket
in the same second. A pull that somebody waits for, an attach or `cached pull`, never passes here.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cached.cache.events import EventBus
from cached.clock import Clock
from cached.fleet.slots import Slots
from cached.metrics import Metrics


def start_delay_s(jitter_s: float, rng: random.Random) -> float:
    """How long a pull is put off: anywhere up to the setting, evenly."""
    return rng.uniform(0.0, jitter_s)


class Stagger:
    """Loop only. Without a delay and slots it lets everything pass at once."""

    def __init__(
        self, clock: Clock, metrics: Metrics, events: EventBus, *, jitter_s: float, slots: Slots | None, count: int
    ) -> None:
        self._clock = clock
        self._metrics = metrics
        self._events = events
        self._jitter_s = jitter_s
        self._slots = slots
        self._count = count
        self._rng = random.Random()  # noqa: S311 not a secret
        self._one = asyncio.Lock()
        self._waiting: dict[str, str] = {}

    def why_waiting(self, name: str) -> str:
        """What a model's pull waits for, for people; empty: for nothing."""
        return self._waiting.get(name, "")

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        """The block may use the origin. One pull of this host at a time holds a slot."""
        if self._jitter_s > 0:
            await self._put_off(name)
        if self._slots is None:
            yield
            return
        began_s = self._clock.monotonic_s()
        self._waiting[name] = f"its pull waits for one of the {self._count} slots of the fleet"
        self._events.emit("pull.waiting", f"{name}: {self._waiting[name]}", name=name)
        try:
            async with self._one, self._slots.held() as slot:
                self._waiting.pop(name, None)
                self._metrics.stagger_seconds.labels(kind="slot").inc(self._clock.monotonic_s() - began_s)
                self._events.emit(
                    "pull.turn", f"{name} is pulled with {f'the slot {slot}' if slot else 'no slot: the API is away'}",
                    name=name, slot=slot,
                )  # fmt: skip
                yield
        finally:
            self._waiting.pop(name, None)

    async def _put_off(self, name: str) -> None:
        delay_s = start_delay_s(self._jitter_s, self._rng)
        self._waiting[name] = f"its pull is put off by {delay_s:.0f} s, so that not all hosts begin at once"
        self._events.emit("pull.put_off", f"{name}: {self._waiting[name]}", name=name, delay_s=round(delay_s, 1))
        try:
            await self._clock.sleep(delay_s)
        finally:
            self._waiting.pop(name, None)
        self._metrics.stagger_seconds.labels(kind="jitter").inc(delay_s)
