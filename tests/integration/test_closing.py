"""Engines that end while something is still to be done: no fault of anybody's, and the next one does it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from tests.integration.hosts import Host, MovedClock, in_l1, kinds, pull, shown, until


@contextlib.asynccontextmanager
async def all_taken(slots: asyncio.Semaphore) -> AsyncIterator[None]:
    taken = 0
    try:
        while not slots.locked():
            await slots.acquire()
            taken += 1
        yield
    finally:
        for _ in range(taken):
            slots.release()


async def test_what_was_still_to_be_written_to_l2_is_written_by_the_next(tmp_path: Path) -> None:
    host = Host(tmp_path, MovedClock("2026-11-20T07:00"))
    host.add("m")
    async with host.run() as cache:
        async with all_taken(cache._parts.services.write_slots):
            await pull(cache, "m", wait=False)
            await until(lambda: in_l1(cache, "m"), "it to be in L1")
            await cache._background.stop()
            await cache._parts.pool.close(1)
        await until(lambda: not cache.stats().active_load_count, "the load to end")
        assert "l2.write_failed" not in kinds(cache)
        assert not cache.stats().degraded
        assert not shown(cache, "m").summary.l2_bytes
    async with host.run() as cache:
        host.clock.pass_by(61)
        await until(lambda: shown(cache, "m").summary.l2_bytes > 0, "it to be written")
