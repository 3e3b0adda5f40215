"""What clients do does not make the daemon grow, what it does not foresee reaches who waits, and errors end."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cached.cache import pulls, timed_pulls
from cached.errors import CachedError, NotFoundError, UnavailableError
from cached.level import Level
from cached.levels.base import FileRef
from cached.origins.base import OriginObject, OriginSpec
from cached.transfer import lanes
from cached.transfer.jobs import Fetch, Moved
from tests.integration.hosts import Host, MovedClock, in_l1, kinds, pull, shown, until


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path, MovedClock("2026-11-20T07:00"))


async def test_an_unforeseen_exception_of_a_pull_reaches_everyone_who_waits(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.add("m")
    async with host.run() as cache:

        async def broken(*_arguments: object) -> None:
            raise KeyError("secret")

        monkeypatch.setattr(cache._parts.pulls._resolver, "resolve", broken)
        with pytest.raises(CachedError, match="an internal error") as caught:
            await pull(cache, "m")
        assert caught.value.reason == "INTERNAL"
        assert "internal.error" in kinds(cache)
        monkeypatch.undo()
        await pull(cache, "m")
        assert in_l1(cache, "m")


async def test_pulls_that_nobody_waits_for_are_bounded(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulls, "_MAX_ASKED", 2)
    for name in ("a", "b", "c"):
        host.add(name)
    async with host.run() as cache:
        slots, count = cache._parts.loader._slots, host.config.transfer.max_concurrent_loads
        for _ in range(count):
            await slots.acquire()  # no load gets its turn
        await pull(cache, "a", wait=False)
        await pull(cache, "b", wait=False)
        with pytest.raises(UnavailableError, match="2 pulls that were asked for are under way"):
            await pull(cache, "c", wait=False)
        for _ in range(count):
            slots.release()
        await until(lambda: in_l1(cache, "a") and in_l1(cache, "b"), "the pulls to end")
        await until(lambda: not cache._parts.pulls._runs, "their tasks to end")
        await pull(cache, "c")


async def test_pulls_that_begin_later_are_bounded(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed_pulls, "_MOST", 2)
    host.add("m")
    async with host.run() as cache:
        for hours in (1, 2):
            await pull(cache, "m", at_time_s=host.clock.wall_s() + 3600 * hours)
        with pytest.raises(UnavailableError, match="2 pulls are scheduled already"):
            await pull(cache, "m", at_time_s=host.clock.wall_s() + 3 * 3600)


async def test_origins_that_somebody_named_once_are_forgotten(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane for each bucket that a client made up would stay for ever; those in use stay."""

    async def fetched(_lane: lanes.Lane, job: Fetch, _priority: int) -> Moved:
        return Moved(0, job.length_bytes, 0.0, 0.0)

    monkeypatch.setattr(lanes.Lane, "fetch", fetched)
    async with host.run() as cache:
        for number in range(3 * lanes._REMEMBERED):
            spec = OriginSpec(f"s3://made-up-{number}/m", {})
            job = Fetch(spec, OriginObject("x", 1, "1"), 0, 1, FileRef("/x", 1, 1, memory=True))
            await cache._parts.lanes.run(job)
        assert len(cache._parts.lanes.stats()) == lanes._REMEMBERED


async def test_an_error_is_over_when_the_model_is_well_again(host: Host) -> None:
    host.add("m")
    source, aside = host.folder / "origin-m", host.folder / "aside"
    async with host.run() as cache:
        await pull(cache, "m", level=Level.L2)
        source.rename(aside)
        with pytest.raises(NotFoundError):
            await pull(cache, "m")
        assert shown(cache, "m").last_error
        async with await cache.attach("m") as attachment:  # from L2
            async for _ in attachment.events():
                if in_l1(cache, "m"):
                    break
            await until(lambda: not cache.stats().active_load_count, "the promotion to end")
        assert shown(cache, "m").last_error == ""
    shutil.rmtree(aside)
