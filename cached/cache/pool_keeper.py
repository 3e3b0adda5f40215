"""Keeps L1's pool ready: clears what came into it, and fills it ahead of the next load while nothing else goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cached.cache.background import repeat
from cached.cache.services import Services
from cached.errors import CachedError
from cached.level import Level
from cached.levels.base import FileRef
from cached.transfer.jobs import Clear
from cached.units import MIB

_TICK_S = 0.5
_RETRY_S = 60.0
_STEP_BYTES = 64 * MIB
_PRIORITY = 2_000_000_000
"""After everything that anybody waits for."""


class PoolKeeper:
    """One background task. ``loading`` says whether a load is under way, which gets the processor and the memory."""

    def __init__(self, services: Services, loading: Callable[[], bool]) -> None:
        self._services = services
        self._loading = loading
        self._grown: set[str] = set()
        self._cleared_bytes: dict[str, int] = {}
        self._no_growth_before_s = 0.0

    async def run(self) -> None:
        """Until cancelled."""
        await repeat(self._services.clock, _TICK_S, self._tick, what="pool", failures=self._services.failures)

    async def _tick(self) -> None:
        """Until all is clear, and the pool has its reserve or a load is under way."""
        while True:
            dirty = self._services.storage.l1.dirty_pool()
            self._grown &= {ref.path for ref in dirty}
            self._cleared_bytes = {ref.path: self._cleared_bytes.get(ref.path, 0) for ref in dirty}
            for ref in dirty:
                await self._clear(ref)
            grown = None if self._busy() else self._services.storage.grow_pool(self._expected())
            if grown is None:
                return
            self._grown.add(grown.path)

    def _busy(self) -> bool:
        return self._loading() or self._services.clock.monotonic_s() < self._no_growth_before_s

    def _expected(self) -> Iterator[int]:
        """Sizes of what is known and not in L1, in the order in which it is likely to come."""
        registry = self._services.registry
        for model in sorted(registry.models.values(), key=lambda model: -model.last_used_s):
            if model.current is not None:
                for digest, size_bytes in model.current.blobs.items():
                    if not registry.blobs[digest].at(Level.L1):
                        yield size_bytes

    async def _clear(self, ref: FileRef) -> None:
        """Zeroes a segment, so that no blob ever shows another's bytes. A fresh one waits for the end of loads."""
        while (at_bytes := self._cleared_bytes[ref.path]) < ref.size_bytes:
            if ref.path in self._grown and self._loading():
                return
            length_bytes = min(_STEP_BYTES, ref.size_bytes - at_bytes)
            try:
                await self._services.runner.run(Clear(ref, at_bytes, length_bytes), priority=_PRIORITY)
            except CachedError:
                if ref not in self._services.storage.l1.dirty_pool():
                    return  # it was given back meanwhile
                self._no_growth_before_s = self._services.clock.monotonic_s() + _RETRY_S
                await self._services.storage.drop_pooled(ref)
                raise
            self._cleared_bytes[ref.path] = at_bytes + length_bytes
        self._services.storage.l1.mark_clean(ref)
