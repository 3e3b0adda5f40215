"""The scrubber by the test's own clock: how fast it reads, in which order, what it waits for, what counts as a look."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cached.cache import ModelCache
from cached.cache.inspector import Place
from cached.cache.scrub import Scrubber
from cached.errors import LevelError
from cached.level import Level
from cached.transfer.jobs import Copy, Fetch, Job, Result
from cached.types import RevisionState, ScrubStats, Stats
from cached.units import CHUNK_BYTES
from tests.integration.hosts import Host, MovedClock, kinds, pull, shown, until
from tests.integration.support import MB, flip_byte

RATE = 10 * MB
DAY_S = 86400.0
SIZE = 2 * CHUNK_BYTES + 5 * MB


class SteppedClock(MovedClock):
    """A test's own sleeps pass at once, and are kept; those of the engine's tasks are MovedClock's."""

    def __init__(self) -> None:
        super().__init__("2026-11-20T07:00")
        self.slept_s: list[float] = []
        self.main: asyncio.Task[None] | None = None

    async def sleep(self, delay_s: float) -> None:
        if asyncio.current_task() is not self.main:
            await super().sleep(delay_s)
            return
        self.slept_s.append(delay_s)
        self.pass_by(delay_s)
        await asyncio.sleep(0)


class Bench:
    """An engine whose scrubber takes its steps when the test says so, and what it looked at."""

    def __init__(self, cache: ModelCache, clock: SteppedClock) -> None:
        self.cache = cache
        self.clock = clock
        self.looks: list[tuple[str, str, int]] = []
        self.times_s: list[float] = []
        self.scrubber: Scrubber = cache._parts.scrubber
        inspector = cache._parts.inspector
        look = inspector.look

        async def noted(place: Place, **options: bool | int) -> object:
            self.looks.append((place.manifest.name, place.level.value, place.index))
            self.times_s.append(clock.monotonic_s())
            return await look(place, **options)  # type: ignore[arg-type]

        inspector.look = noted  # type: ignore[method-assign, assignment]

    async def step(self) -> None:
        self.looks.clear()
        self.times_s.clear()
        await self.scrubber.step()

    def read_bytes(self, level: str) -> float:
        return self.stats().counters[f'cached_scrubbed_bytes_total{{level="{level}"}}']

    def stats(self) -> Stats:
        return self.cache.stats()

    def file(self, name: str, level: Level) -> Path:
        (entry,) = (item for item in shown(self.cache, name).files if item.path == "model.safetensors")
        return Path(self.cache._parts.services.storage.level(level).blob(entry.sha256).path)


@contextlib.asynccontextmanager
async def benched(host: Host, *names: str) -> AsyncIterator[Bench]:
    """Runs the host, has these models pulled, one after the other."""
    assert isinstance(host.clock, SteppedClock)
    async with host.run() as cache:
        host.clock.main = asyncio.current_task()
        for task in asyncio.all_tasks():
            if task.get_name() == "scrub":
                task.cancel()
        for name in names:
            await pull(cache, name)
            await until(lambda: not cache.stats().active_load_count, "the copy in L2")
            host.clock.pass_by(60.0)
        yield Bench(cache, host.clock)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(tmp_path, SteppedClock(), scrub__bytes_per_s=f"{RATE}B", l1__capacity="200MiB")
    made.add("m", SIZE)
    return made


def in_order(name: str, level: str, size_bytes: int = SIZE) -> list[tuple[str, str, int]]:
    return [(name, level, index) for index in range(-(-size_bytes // CHUNK_BYTES))]


async def test_both_levels_are_read_at_the_rate_and_each_when_it_is_due(host: Host) -> None:
    async with benched(host, "m") as bench:
        bench.clock.pass_by(0.8 * DAY_S)
        await bench.step()
        assert not bench.looks
        bench.clock.pass_by(0.2 * DAY_S)
        began_s = bench.clock.monotonic_s()
        await bench.step()
        assert bench.looks == in_order("m", "l1")
        assert (bench.read_bytes("l1"), bench.read_bytes("l2")) == (SIZE, 0)
        bench.clock.pass_by(6 * DAY_S)
        began_s = bench.clock.monotonic_s()
        await bench.step()
        assert sorted(bench.looks) == in_order("m", "l1") + in_order("m", "l2")
        for number, at_s in enumerate(bench.times_s):
            earlier_bytes = sum(min(CHUNK_BYTES, SIZE - index * CHUNK_BYTES) for _, _, index in bench.looks[:number])
            assert at_s - began_s >= earlier_bytes / RATE - 1e-6
        assert sum(bench.clock.slept_s) <= (3 * SIZE) / RATE
        assert kinds(bench.cache).count("scrub.finished") == 2
        await bench.step()
        assert not bench.looks


async def test_the_most_overdue_goes_first_and_what_is_due_soon_goes_with_it(host: Host) -> None:
    for number in range(3):
        host.add(f"x{number}", (number + 1) * MB)
    async with benched(host, "x2", "x0", "x1") as bench:
        bench.clock.pass_by(DAY_S - 150)  # x2 is due now, the others within minutes
        await bench.step()
        assert [name for name, _, _ in bench.looks] == ["x2", "x0", "x1"]
        assert bench.clock.slept_s, "small files count for something, too"


async def test_it_waits_for_loads_unless_what_it_looks_at_is_overdue_by_a_period(host: Host) -> None:
    async with benched(host, "m") as bench:
        loading, seen = [True] * 5, list[ScrubStats]()

        def is_loading() -> bool:
            seen.append(bench.stats().scrub)
            return bool(loading) and loading.pop()

        bench.scrubber._loading = is_loading
        bench.clock.pass_by(DAY_S)
        await bench.step()
        assert not loading
        assert [stats.waiting for stats in seen[:6]] == [False, True, True, True, True, True]
        assert seen[5] == ScrubStats(RATE, SIZE, 0, waiting=True)
        assert bench.looks == in_order("m", "l1")
        bench.scrubber._loading = lambda: True
        bench.clock.pass_by(2.1 * DAY_S)
        await bench.step()
        assert bench.looks == in_order("m", "l1")


async def test_times_outlive_a_restart_and_arrival_adoption_promotion_and_verify_are_looks(host: Host) -> None:
    def times(cache: ModelCache) -> list[float]:
        return [place.verified_time_s for place in shown(cache, "m").places]

    async with benched(host, "m") as bench:
        arrived = times(bench.cache)
        assert all(arrived)
        bench.clock.pass_by(DAY_S)
        await bench.step()
        scrubbed = times(bench.cache)
        assert scrubbed[0] >= arrived[0] + DAY_S
        assert scrubbed[1] == arrived[1]
        assert DAY_S <= bench.stats().levels[1].longest_unverified_s < 2 * DAY_S
    host.clock.pass_by(DAY_S)
    async with benched(host) as bench:
        await until(lambda: times(bench.cache)[0] > scrubbed[0], "its adoption")
        assert times(bench.cache)[1] == scrubbed[1]
        await bench.cache.evict("m", Level.L1)
        assert times(bench.cache)[0] == 0
        host.clock.pass_by(DAY_S)
        await bench.cache.attach("m")
        await until(lambda: all(time_s > scrubbed[1] + DAY_S for time_s in times(bench.cache)), "the promotion")
        host.clock.pass_by(DAY_S)
        now_s = host.clock.wall_s()
        async for _ in bench.cache.verify("m", repair=False):
            pass
        assert min(times(bench.cache)) >= now_s


async def test_a_blob_in_quarantine_is_tried_where_it_is_stuck_ever_more_seldom_and_released_once_it_is_right(
    host: Host,
) -> None:
    origin = host.folder / "origin-m"
    async with benched(host, "m") as bench:
        await bench.cache.evict("m", Level.L1)
        for index in (1, 2):
            flip_byte(bench.file("m", Level.L2), index * CHUNK_BYTES + 7)
        origin.rename(host.folder / "elsewhere")
        bench.clock.pass_by(8 * DAY_S)
        await bench.step()
        assert bench.looks == in_order("m", "l2"), "what else is damaged is found, too"
        assert shown(bench.cache, "m").summary.state is RevisionState.QUARANTINED
        assert "m: chunk 2 of model.safetensors" in bench.stats().degraded[0], "the last that was found"
        for wait_s in (60, 120, 240):
            bench.clock.pass_by(wait_s - 1)
            await bench.step()
            assert not bench.looks
            bench.clock.pass_by(1)
            await bench.step()
            assert bench.looks == [("m", "l2", 1)]
        assert kinds(bench.cache).count("damage.found") == 2, "each once"
        assert bench.stats().counters['cached_checksum_failures_total{level="l2"}'] == 2
    async with benched(host) as bench:
        assert not bench.stats().degraded, "a quarantine is not remembered"
        await bench.step()
        assert bench.looks == in_order("m", "l2"), "but what was damaged is looked at first"
        assert bench.stats().degraded
        (host.folder / "elsewhere").rename(origin)
        bench.clock.pass_by(60)
        await bench.step()
        assert bench.looks == [("m", "l2", 1), ("m", "l2", 2), ("m", "l2", 0)]
        assert bench.stats().counters['cached_checksum_failures_total{level="l2"}'] == 2
        assert bench.stats().counters['cached_repaired_chunks_total{level="l2"}'] == 2
        assert not bench.stats().degraded
        assert shown(bench.cache, "m").summary.state is RevisionState.READY


async def test_a_disk_copy_that_takes_no_repair_is_given_up_and_written_again_from_memory(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with benched(host, "m") as bench:
        path, runner = bench.file("m", Level.L2), bench.cache._parts.services.runner
        run = runner.run

        async def run_or_refuse(job: Job, *, key: str | None = None, priority: int = 0) -> Result:
            if isinstance(job, Copy | Fetch) and job.target.path == str(path):
                raise LevelError(f"l2: cannot write {path}: Input/output error", errno="EIO")
            return await run(job, key=key, priority=priority)

        monkeypatch.setattr(runner, "run", run_or_refuse)
        flip_byte(path, 5)
        bench.clock.pass_by(8 * DAY_S)
        await bench.step()
        assert not bench.stats().degraded
        assert "l2.lost" in kinds(bench.cache)
        blob = bench.cache._parts.services.registry.blobs[path.name]
        await until(lambda: blob.l2, "the new copy in L2")
        assert path.read_bytes() == (host.folder / "origin-m" / "model.safetensors").read_bytes()
        bench.cache._parts.services.registry.check_usable(bench.cache._parts.services.registry.models["m"].current)


async def test_other_bytes_of_the_origin_never_get_into_memory_that_somebody_has_mapped(host: Host) -> None:
    async with benched(host, "m") as bench:
        segment, source = bench.file("m", Level.L1), host.folder / "origin-m" / "model.safetensors"
        await bench.cache.evict("m", Level.L2)
        right = source.read_bytes()
        flip_byte(segment, 3 * MB)
        damaged = segment.read_bytes()
        source.write_bytes(bytes(len(damaged)))
        bench.clock.pass_by(2 * DAY_S)
        await bench.step()
        assert segment.read_bytes() == damaged
        assert shown(bench.cache, "m").summary.state is RevisionState.QUARANTINED
        source.write_bytes(right)
        bench.clock.pass_by(60)
        await bench.step()
        assert segment.read_bytes() == right
        assert shown(bench.cache, "m").summary.state is RevisionState.READY, "every byte was verified"


async def test_switched_off_it_does_nothing(tmp_path: Path) -> None:
    host = Host(tmp_path, MovedClock("2026-11-20T07:00"), scrub__bytes_per_s="0")
    async with host.run() as cache:
        await asyncio.wait_for(cache._parts.scrubber.run(), 10)
        assert cache.stats().scrub == ScrubStats()
