"""Which drive is read next."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import suppress

from cached.levels.base import FileRef
from cached.transfer.drives import Drives
from cached.transfer.jobs import Checksum, Copy, Job, Moved, Prepare, Result

MEMORY = FileRef("/dev/shm/segment", 1, 100, memory=True)


class Recorder:
    """Runs jobs until it is told that one is done."""

    def __init__(self) -> None:
        self.begun: list[Job] = []
        self._ends: dict[int, asyncio.Future[Result]] = {}

    async def run(self, job: Job, *, key: str | None = None, priority: int = 0) -> Result:
        self.begun.append(job)
        end = self._ends[id(job)] = asyncio.get_running_loop().create_future()
        return await end

    def finish(self, job: Job) -> None:
        self._ends[id(job)].set_result(Moved(0, 0, 0.0, 0.0))

    def prepare(self, job: Prepare) -> None: ...

    def prefer(self, path: str, offsets: Collection[int], by: int) -> None: ...

    async def settled(self, path: str) -> bool:
        return True


class Race:
    """Drives /a, /b and /c, three reads at a time."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.drives = Drives(self.recorder, ["/a", "/b", "/c"], limit=3)
        self.tasks: list[asyncio.Task[Result]] = []

    async def ask(self, path: str, *, priority: int = 0) -> asyncio.Task[Result]:
        source = FileRef(path, 1, 100, memory=False)
        self.tasks.append(asyncio.create_task(self.drives.run(Copy(source, MEMORY, 0, 100), priority=priority)))
        await asyncio.sleep(0)
        return self.tasks[-1]

    @property
    def begun(self) -> list[str]:
        return [job.source.path for job in self.recorder.begun if isinstance(job, Copy | Checksum)]

    async def finish(self, number: int) -> None:
        self.recorder.finish(self.recorder.begun[number])
        for _ in range(5):
            await asyncio.sleep(0)


def test_all_drives_are_read_at_once_though_one_file_is_wanted_first() -> None:
    async def scenario() -> None:
        race = Race()
        for number in range(6):
            await race.ask(f"/a/{number}", priority=1)
        await race.ask("/b/1", priority=2)
        await race.ask("/c/1", priority=3)
        assert race.begun == ["/a/0", "/a/1", "/a/2"]
        for number in range(4):
            await race.finish(number)
        assert race.begun[3:] == ["/b/1", "/c/1", "/a/3", "/a/4"]

    asyncio.run(scenario())


def test_on_a_drive_what_is_wanted_first_goes_first() -> None:
    async def scenario() -> None:
        race = Race()
        for number, priority in enumerate((5, 5, 5, 7, 6, 5)):
            await race.ask(f"/a/{number}", priority=priority)
        for number in range(3):
            await race.finish(number)
        assert race.begun[3:] == ["/a/5", "/a/4", "/a/3"]

    asyncio.run(scenario())


def test_who_is_cancelled_gives_back_the_turn_or_the_place() -> None:
    async def scenario() -> None:
        race = Race()
        tasks = [await race.ask(f"/a/{number}") for number in range(6)]
        for number in (4, 0):
            tasks[number].cancel()
            with suppress(asyncio.CancelledError):
                await tasks[number]
        await race.finish(1)
        assert race.begun == ["/a/0", "/a/1", "/a/2", "/a/3", "/a/5"]
        for number in (2, 3, 4):
            await race.finish(number)
        assert all(task.done() for task in tasks)

    asyncio.run(scenario())


def test_other_jobs_do_not_wait() -> None:
    async def scenario() -> None:
        race = Race()
        for number in range(4):
            await race.ask(f"/a/{number}")
        await race.ask("/elsewhere/file")
        others = [Checksum(MEMORY, 0, 100), Copy(MEMORY, FileRef("/a/new", 1, 100, memory=False), 0, 100)]
        race.tasks += [asyncio.create_task(race.drives.run(job)) for job in others]
        await asyncio.sleep(0)
        assert race.begun == ["/a/0", "/a/1", "/a/2", "/elsewhere/file", MEMORY.path, MEMORY.path]
        for task in race.tasks:
            task.cancel()

    asyncio.run(scenario())
