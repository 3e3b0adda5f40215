"""Which chunks a fill brings, and in which order: some only, some first, and others after those of another fill."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import pytest

from cached.clock import SystemClock
from cached.errors import OriginError
from cached.levels.base import FileRef
from cached.origins.base import OriginObject, OriginSpec
from cached.transfer.fill import Fill, HeadStart, OriginSource, RetryPolicy, Sources
from cached.transfer.jobs import Fetch, Job, Moved, Prepare, Result
from cached.units import CHUNK_BYTES

SIZE_BYTES = 6 * CHUNK_BYTES - 1


class Recorder:
    """Remembers which chunks were asked for, and how urgently; each is there at once, unless it fails."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.priorities: dict[int, int] = {}
        self.preferred: list[tuple[str, tuple[int, ...]]] = []
        self.failing = ""

    async def run(self, job: Job, *, key: str | None = None, priority: int = 0) -> Result:
        assert isinstance(job, Fetch)
        index = job.offset_bytes // CHUNK_BYTES
        self.asked.append((job.target.path, index))
        self.priorities[index] = priority
        await asyncio.sleep(0)
        if job.target.path == self.failing:
            raise OriginError("as told by the test")
        return Moved(7, job.length_bytes, 0.0, 0.0)

    def prepare(self, job: Prepare) -> None: ...

    def prefer(self, path: str, offsets: Collection[int], by: int) -> None:
        self.preferred.append((path, tuple(sorted(offsets))))

    async def settled(self, path: str) -> bool:
        return True


def fill_of(
    runner: Recorder,
    path: str = "a",
    *,
    chunks: frozenset[int] | None = None,
    first: frozenset[int] = frozenset(),
    head_start: HeadStart | None = None,
    width: int = 1,
) -> Fill:
    item = OriginObject(path=path, size_bytes=SIZE_BYTES, version="1")
    return Fill(
        key=path,
        runner=runner,
        clock=SystemClock(),
        target=FileRef(path, 1, SIZE_BYTES, memory=True),
        sources=Sources(origin=OriginSource(OriginSpec("file:///x"), item)),
        retry=RetryPolicy(max_attempts=1, budget_s=1.0),
        width=width,
        priority=1000,
        chunks=chunks,
        first=first,
        head_start=head_start,
    )


async def test_only_the_chunks_that_are_wanted_are_brought() -> None:
    runner = Recorder()
    fill = fill_of(runner, chunks=frozenset({1, 5}), width=4)
    await fill.run()
    assert sorted(runner.asked) == [("a", 1), ("a", 5)]
    assert fill.chunks_done
    assert fill.done_bytes == 2 * CHUNK_BYTES - 1
    nothing = fill_of(runner, chunks=frozenset())
    await nothing.run()
    assert nothing.chunks_done


async def test_what_is_wanted_first_goes_first_and_is_more_urgent() -> None:
    runner = Recorder()
    await fill_of(runner, first=frozenset({3, 4})).run()
    assert [index for _, index in runner.asked] == [3, 4, 0, 1, 2, 5]
    assert max(runner.priorities[3], runner.priorities[4]) < runner.priorities[0] == 1000


async def test_what_somebody_comes_to_want_goes_before_what_was_not_begun() -> None:
    runner = Recorder()
    fill = fill_of(runner, width=2)
    task = asyncio.create_task(fill.run())
    while len(runner.asked) < 2:
        await asyncio.sleep(0)
    fill.prefer({4, 5, 99})
    await task
    assert [index for _, index in runner.asked] == [0, 1, 4, 5, 2, 3]
    assert runner.preferred == [("a", (4 * CHUNK_BYTES, 5 * CHUNK_BYTES))]


async def test_others_wait_until_all_that_has_a_head_start_was_asked_for() -> None:
    runner, head_start = Recorder(), HeadStart(3)
    fills = [
        fill_of(runner, "a", head_start=head_start, width=2),
        fill_of(runner, "b", first=frozenset({2, 3, 5}), head_start=head_start, width=2),
    ]
    await asyncio.gather(*(fill.run() for fill in fills))
    assert sorted(runner.asked[:3]) == [("b", 2), ("b", 3), ("b", 5)]
    assert len(runner.asked) == 12


async def test_nobody_waits_for_a_head_start_that_failed() -> None:
    runner, head_start = Recorder(), HeadStart(3)
    runner.failing = "b"
    failing = fill_of(runner, "b", first=frozenset({2, 3, 5}), head_start=head_start)
    waiting = asyncio.create_task(fill_of(runner, "a", head_start=head_start).run())
    with pytest.raises(OriginError):
        await failing.run()
    await asyncio.wait_for(waiting, 10)
    assert len([item for item in runner.asked if item[0] == "a"]) == 6
