"""A disk that hangs and does not fail: what needs no disk goes on, and who waits for it is told."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cached.cache import ModelCache, disk_work
from cached.cache.capacity import Limit
from cached.level import Level
from cached.levels.disk import DiskLevel
from tests.integration.hosts import Host, MovedClock, in_l1, kinds, pull, shown, ticks, until

MODELS = 2 + min(32, (os.cpu_count() or 1) + 4)
"""More than the loop's own executor has threads."""


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path, MovedClock("2026-11-20T07:00"), transfer__max_concurrent_loads=str(MODELS))


class HangingSync:
    """Commits of L2 that do not return until ``answer``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer = threading.Event()
        self.waiting = 0
        commit = DiskLevel.commit

        def hang(level: DiskLevel, ingest_id: str, digest: str):
            self.waiting += 1
            self.answer.wait(60)
            return commit(level, ingest_id, digest)

        monkeypatch.setattr(DiskLevel, "commit", hang)


@pytest.fixture
def sync(monkeypatch: pytest.MonkeyPatch) -> Iterator[HangingSync]:
    made = HangingSync(monkeypatch)
    yield made
    made.answer.set()


async def test_loads_reclaim_and_what_runs_in_threads_go_on_beside_a_disk_that_hangs(
    host: Host, sync: HangingSync
) -> None:
    for number in range(MODELS):
        host.add(f"m{number}", 100_000)
    async with host.run() as cache:
        for number in range(MODELS):
            await pull(cache, f"m{number}", wait=False)
        await until(lambda: all(in_l1(cache, f"m{number}") for number in range(MODELS)), "all of them in L1")
        await until(lambda: sync.waiting >= min(MODELS, 16), "commits that hang")
        storage = cache._parts.services.storage
        storage.l1.create("a" * 32, 4096)
        storage.l1.discard("a" * 32)
        async with asyncio.timeout(20):
            await storage.collect()
            assert await asyncio.to_thread(lambda: 1) == 1, "a catalog could be read, a page rendered"
        assert not storage.withdrawn_bytes(Level.L1)
        sync.answer.set()
        await until(lambda: not cache.stats().active_load_count, "the loads to end")
        assert shown(cache, "m0").summary.l2_bytes


async def test_a_load_ends_in_l1_evict_is_answered_and_l2_is_degraded_until_the_disk_answers(
    host: Host, sync: HangingSync, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_work, "ANSWER_S", 2.0)
    host.add("m")
    host.add("other")
    async with host.run() as cache:
        await pull(cache, "m")
        await until(lambda: not cache.stats().active_load_count, "the load to end")
        assert in_l1(cache, "m")
        assert any("has not answered" in why for why in cache.stats().degraded), cache.stats().degraded
        assert "l2.write_failed" in kinds(cache)
        await pull(cache, "other")
        assert in_l1(cache, "other"), "and it is not written to L2"
        assert sync.waiting == 1
        async with asyncio.timeout(20):
            assert (await cache.evict("other", Level.L1)).l1_bytes
        assert "background.failed" not in kinds(cache)
        disk = cache._parts.services.storage.disk
        assert disk is not None
        sync.answer.set()
        await until(lambda: not disk.hangs, "the disk to answer")
        host.clock.pass_by(61)
        await until(lambda: shown(cache, "m").summary.l2_bytes > 0, "what L2 did not take to be written after all")
        await until(lambda: not cache.stats().degraded, "L2 to be well")


async def test_l2_is_degraded_for_as_long_as_any_reason_is_left(host: Host) -> None:
    host.add("m", 100_000)
    async with host.run() as cache:
        services = cache._parts.services
        limit, gone = services.storage.limits[Level.L2], asyncio.get_running_loop().create_future()
        assert services.storage.disk is not None
        services.storage.disk.hang_until(gone)
        services.storage.limits[Level.L2] = Limit(0, "its folder is gone", is_gone=True)
        services.l2_written("0" * 64)
        assert "l2" in services.degraded, "it hangs, and is gone"
        gone.set_result(None)
        await until(lambda: not services.storage.disk.hangs, "the disk to answer")
        assert "l2" in services.degraded, "it is gone"
        services.storage.limits[Level.L2] = limit
        services.l2_written("0" * 64)
        assert "l2" not in services.degraded


async def test_a_disk_that_hangs_is_not_trimmed_which_would_free_nothing(host: Host) -> None:
    names = ["a", "b", "c"]
    for name in names:
        host.add(name)

    def in_l2(cache: ModelCache) -> list[str]:
        return [name for name in names if shown(cache, name).summary.l2_bytes]

    async with host.run() as cache:
        disk, gone = cache._parts.services.storage.disk, asyncio.get_running_loop().create_future()
        assert disk is not None
        for name in names:
            await pull(cache, name, level=Level.L2)
        disk.hang_until(gone)
        cache.set_budgets(replace(host.config, l2=replace(host.config.l2, capacity="1.5MB")))
        host.clock.pass_by(600)
        await ticks(cache)
        assert in_l2(cache) == names
        gone.set_result(None)
        await until(lambda: len(in_l2(cache)) == 1, "what is beyond the budget to go")


async def test_a_mover_that_cannot_be_ended_hangs_the_disk_that_it_works_on(host: Host) -> None:
    async with host.run() as cache:
        services, lost = cache._parts.services, cache._parts.pool._on_lost
        gone = asyncio.get_running_loop().create_future()
        assert services.storage.disk is not None
        lost(["/dev/shm/cached.x.ingest", f"{host.config.l2.path}-another/ingest"], gone)
        assert not services.storage.disk.hangs
        lost(["/dev/shm/cached.x.ingest", f"{host.config.l2.path}/ingest"], gone)
        assert services.storage.disk.hangs
        assert "l2" in services.degraded
        gone.set_result(None)
        await until(lambda: "l2" not in services.degraded, "the disk to answer")
