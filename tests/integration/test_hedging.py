"""Ranges that stall: fetched a second time, into private memory, and never two writers for one range."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from botocore.exceptions import ClientError

from cached.clock import Clock
from cached.levels.base import FileRef
from cached.origins.base import OriginObject, OriginSpec
from cached.transfer.jobs import Fetch, Hedge, Listing, StatObjects
from cached.transfer.lanes import Lanes
from cached.transfer.pool import MoverPool
from cached.units import MIB
from tests.fault_proxy import Fault
from tests.integration.mover_support import (
    Files,
    MovableClock,
    assert_moved,
    content_of,
    pool_of,
    read,
    temporary_files,
    until,
)
from tests.integration.support import MB, Site, model_files
from tests.servers import CountingProxy, RcloneS3

STEP = MIB // 4
COUNT = 40
STALLED = COUNT - 1
BEHIND = 1000
CONTENT = content_of(COUNT * STEP)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    with temporary_files(tmp_path) as made:
        yield made


@pytest.fixture
def proxy(rclone_s3: RcloneS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingProxy]:
    for name, value in rclone_s3.env().items():
        monkeypatch.setenv(name, value)
    with CountingProxy(rclone_s3.endpoint_url) as made:
        with suppress(ClientError):  # an earlier test has made it
            rclone_s3.create_bucket("hedging")
        rclone_s3.put("hedging", "w", CONTENT)
        yield made


@dataclass
class Bench:
    """Ranges of one object on their way to one file."""

    pool: MoverPool
    lanes: Lanes
    proxy: CountingProxy
    spec: OriginSpec
    item: OriginObject
    target: FileRef
    outcomes: list[str] = field(default_factory=list)

    async def fetch(self, number: int) -> None:
        job = Fetch(self.spec, self.item, number * STEP, STEP, self.target)
        assert_moved(await self.lanes.run(job), CONTENT[number * STEP : (number + 1) * STEP])

    def start(self, number: int) -> asyncio.Task[None]:
        return asyncio.create_task(self.fetch(number))

    def stall(self, number: int, *, times: int = 1, kind: str = "garbage") -> Fault:
        return self.proxy.inject(kind, range=self.range(number), after_bytes=BEHIND, times=times)

    def range(self, number: int) -> str:
        return f"bytes={number * STEP}-{(number + 1) * STEP - 1}"

    def asked(self, number: int) -> int:
        return sum(seen.range == self.range(number) for seen in self.proxy.gets())

    def pid_with(self, kind: type) -> int:
        """The mover that works on such a job."""
        return next(
            mover.pid
            for mover in self.pool._movers
            for ticket in mover.in_flight.values()
            if isinstance(ticket.job, kind)
        )


@asynccontextmanager
async def bench_of(
    proxy: CountingProxy, files: Files, *, timed: int = 25, clock: Clock | None = None
) -> AsyncIterator[Bench]:
    """Two movers that have brought ``timed`` ranges, so that it is known what a range takes."""
    clock = clock or MovableClock()
    spec = OriginSpec("s3://hedging", {"endpoint_url": proxy.endpoint_url, "read_timeout_s": "600"})
    outcomes: list[str] = []
    async with pool_of(movers=2, threads=1, ranges=8, clock=clock) as pool:
        lanes = Lanes(pool, clock, start=4, max_ranges=8, on_hedge=outcomes.append)
        listing = await lanes.run(StatObjects(spec, ("w",)))
        assert isinstance(listing, Listing)
        bench = Bench(pool, lanes, proxy, spec, listing.items[0], files.memory(COUNT * STEP), outcomes)
        await asyncio.gather(*(bench.fetch(number) for number in range(timed)))
        await until(lambda: pool.active_movers == 2, "two movers")
        try:
            yield bench
        finally:
            proxy.heal()


async def test_a_stalled_range_is_won_by_its_hedge_and_wakes_to_nothing(proxy: CountingProxy, files: Files) -> None:
    async with bench_of(proxy, files) as bench:
        fault = bench.stall(STALLED)
        await bench.fetch(STALLED)
        assert (bench.outcomes, bench.asked(STALLED)) == (["won"], 2)
        assert bench.pool.in_flight == 0, "the stalled one has ended"
        landed = read(bench.target)
        assert landed[STALLED * STEP :] == CONTENT[STALLED * STEP :]
        fault.release()
        await bench.fetch(STALLED - 1)
        assert read(bench.target)[STALLED * STEP :] == landed[STALLED * STEP :]
        assert bench.pool.restarts == 0


async def test_nothing_is_written_while_the_stalled_range_may_still_write(proxy: CountingProxy, files: Files) -> None:
    clock = MovableClock()
    async with bench_of(proxy, files, clock=clock) as bench:
        bench.stall(STALLED)
        task = bench.start(STALLED)
        await until(lambda: bench.asked(STALLED) == 1 and bench.pool.in_flight == 1, "handed over")
        stopped = bench.pid_with(Fetch)
        os.kill(stopped, signal.SIGSTOP)
        await until(lambda: bench.asked(STALLED) == 2, "hedged")
        await until(lambda: any(t.aborted for m in bench.pool._movers for t in m.in_flight.values()), "aborted")
        assert read(bench.target)[STALLED * STEP + BEHIND :] == bytes(STEP - BEHIND)
        assert not task.done()
        clock.ahead_s += 60.0
        await task
        assert bench.outcomes == ["won"]
        assert not psutil.pid_exists(stopped), "a mover that does not end a read is killed"
        assert bench.pool.restarts == 1


async def test_the_first_one_wins_also_when_it_is_the_original(proxy: CountingProxy, files: Files) -> None:
    async with bench_of(proxy, files) as bench:
        original, hedge = bench.stall(STALLED, kind="hold"), bench.stall(STALLED, kind="hold")
        task = bench.start(STALLED)
        await until(hedge.reached.is_set, "hedged")
        original.release()
        await task
        assert bench.outcomes == ["lost"]
        await bench.lanes.settled(bench.target.path)
        assert bench.pool.in_flight == 0, "the hedge was ended, though it stalls"
        assert read(bench.target)[STALLED * STEP :] == CONTENT[STALLED * STEP :]


async def test_only_one_of_few_is_hedged(proxy: CountingProxy, files: Files) -> None:
    async with bench_of(proxy, files) as bench:
        first, second = bench.stall(STALLED, kind="hold"), bench.stall(STALLED - 1, kind="hold")
        tasks = [bench.start(STALLED), bench.start(STALLED - 1)]
        await until(lambda: len(bench.outcomes) == 1, "one hedged")
        # A third one is timed behind it: whatever else is hedged would be by then.
        bench.stall(STALLED - 2, kind="slow")
        await bench.fetch(STALLED - 2)
        assert bench.asked(STALLED) + bench.asked(STALLED - 1) == 3
        first.release()
        second.release()
        await asyncio.gather(*tasks)
        assert bench.outcomes == ["won"]


async def test_too_little_known_is_no_reason_to_hedge(proxy: CountingProxy, files: Files) -> None:
    clock = MovableClock()
    async with bench_of(proxy, files, timed=10, clock=clock) as bench:
        fault = bench.stall(STALLED, kind="hold")
        task = bench.start(STALLED)
        await until(fault.reached.is_set, "stalled")
        clock.ahead_s += 100.0
        readings = clock.readings
        await until(lambda: clock.readings > readings + 3, "looked at")
        assert bench.asked(STALLED) == 1
        fault.release()
        await task
        assert bench.outcomes == []


@pytest.mark.parametrize("dying", [Fetch, Hedge])
async def test_a_mover_that_dies_costs_neither(proxy: CountingProxy, files: Files, dying: type) -> None:
    async with bench_of(proxy, files) as bench:
        original, hedge = bench.stall(STALLED, kind="hold"), bench.stall(STALLED, kind="hold")
        task = bench.start(STALLED)
        await until(hedge.reached.is_set, "hedged")
        assert bench.pid_with(Fetch) != bench.pid_with(Hedge), "on another mover"
        os.kill(bench.pid_with(dying), signal.SIGKILL)
        if dying is Hedge:
            await until(lambda: bench.outcomes == ["failed"], "given up")
            original.release()
        await task
        assert bench.outcomes == (["failed"] if dying is Hedge else ["lost"])
        assert bench.pool.restarts == 1
        assert read(bench.target)[STALLED * STEP :] == CONTENT[STALLED * STEP :]


async def test_a_cancelled_range_ends_at_once_and_leaves_nothing(proxy: CountingProxy, files: Files) -> None:
    async with bench_of(proxy, files) as bench:
        original, hedge = bench.stall(STALLED, kind="hold"), bench.stall(STALLED, kind="hold")
        task = bench.start(STALLED)
        await until(lambda: original.reached.is_set() and hedge.reached.is_set(), "hedged")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await bench.lanes.settled(bench.target.path)
        assert bench.pool.in_flight == 0
        assert [(origin.in_flight, origin.waiting) for origin in bench.lanes.stats()] == [(0, 0)]
        assert read(bench.target)[STALLED * STEP + BEHIND :] == bytes(STEP - BEHIND)
        await bench.fetch(STALLED - 1)
        assert bench.pool.restarts == 0


async def test_waiting_ranges_go_by_priority_and_can_be_cancelled(proxy: CountingProxy, files: Files) -> None:
    async with bench_of(proxy, files, timed=2) as bench:
        faults = [bench.stall(number, kind="hold") for number in range(10, 14)]
        held = [bench.start(number) for number in range(10, 14)]
        await until(lambda: all(fault.reached.is_set() for fault in faults), "four in flight")
        jobs = {number: Fetch(bench.spec, bench.item, number * STEP, STEP, bench.target) for number in range(20, 23)}
        later = asyncio.create_task(bench.lanes.run(jobs[20], priority=5))
        never = asyncio.create_task(bench.lanes.run(jobs[21], priority=3))
        sooner = asyncio.create_task(bench.lanes.run(jobs[22], priority=1))
        await until(lambda: bench.lanes.stats()[0].waiting == 3, "waiting")
        never.cancel()
        with pytest.raises(asyncio.CancelledError):
            await never
        bench.proxy.clear()
        faults[0].release()
        await asyncio.gather(held[0], sooner, later)
        assert [seen.range for seen in bench.proxy.gets()] == [bench.range(22), bench.range(20)]
        for fault in faults:
            fault.release()
        await asyncio.gather(*held)


def test_a_pull_does_not_wait_for_a_connection_that_stalls(site: Site) -> None:
    files = model_files(MB) | {f"part-{number}.json": b'{"a": 1}' for number in range(24)}
    site.add("m", files)
    site.settings |= {"s3": {"read_timeout_s": 600.0}}
    site.start()
    fault = site.proxy.inject("garbage", path="part-7.json", after_bytes=3)
    assert site.pull("m")[-1].phase == "ready"
    assert fault.hits == 1
    counters = site.daemon.stats().counters
    assert counters['cached_hedges_total{outcome="won"}'] == 1
    assert sum(value for key, value in counters.items() if key.startswith("cached_retries_total")) == 0
    fault.release()
    site.check_served("m")
