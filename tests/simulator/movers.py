"""Simulated mover processes: the real worker's code on the real pool's jobs, at moments and with deaths of the seed's
choosing. What a mover that dies had begun to write stays half written."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from dataclasses import replace

from cached.errors import CachedError, LevelError, MoverError
from cached.level import Level
from cached.levels.base import FileRef
from cached.transfer.jobs import (
    Copy,
    Fetch,
    Group,
    Hedge,
    Job,
    Listing,
    ReadTexts,
    Result,
    StatObjects,
    Texts,
    Threads,
    Word,
    group_of,
)
from cached.transfer.process import Mover
from cached.transfer.worker import Worker
from tests.simulator.faults import Faults
from tests.simulator.origin import Bucket

_LOCAL_S, _ORIGIN_S, _SLOW_S = 0.02, 0.2, 30.0
_START_S = 0.3

Answer = tuple[int, Result | CachedError | Word] | None


class SimMover(Mover):
    """As MoverProcess, in the loop."""

    def __init__(self, pid: int, now_s: float, bucket: Bucket, faults: Faults, rng: random.Random) -> None:
        super().__init__(now_s)
        self._pid = pid
        self._faults = faults
        self._rng = rng
        self._worker = Worker(bucket.open)
        self._loop = asyncio.get_running_loop()
        self._answers: asyncio.Queue[Answer] = asyncio.Queue()
        self._jobs: dict[int, Job] = {}
        self._waiting: dict[int, Job] = {}
        self._finishing = False
        self._dead = False

    @property
    def pid(self) -> int:
        """See Mover."""
        return self._pid

    def start(self) -> None:
        """It says that it is ready after a moment, or dies before."""
        if self._faults.strikes("mover_dies"):
            self._loop.call_later(_START_S, self._die, "it died at its start")
        else:
            self._loop.call_later(self._rng.random() * _START_S, self._answers.put_nowait, (-1, Word.ARRIVED))

    def _give(self, number: int, job: Job) -> None:
        self._jobs[number] = job
        if self._faults.strikes("mover_hangs"):
            return
        longest_s = _LOCAL_S if group_of(job) is Group.LOCAL else _ORIGIN_S
        if longest_s == _ORIGIN_S and self._faults.strikes("origin_hang"):
            return
        if longest_s == _ORIGIN_S and self._faults.strikes("origin_slow"):
            longest_s = _SLOW_S
        self._loop.call_later(self._rng.random() * longest_s, self._work, number)

    def _tell(self, number: int, word: Word) -> None:
        job = self._jobs.get(number)
        if job is None:
            return
        if word is Word.ABORT:
            self._loop.call_later(self._rng.random() * _LOCAL_S, self._aborted, number)
        elif word is Word.PROCEED and number in self._waiting:
            self._loop.call_later(self._rng.random() * _LOCAL_S, self._proceed, number)

    def _work(self, number: int) -> None:
        job = self._jobs.get(number)
        if self._dead or job is None:
            return
        if self._faults.strikes("mover_dies"):
            self._die("killed by signal 9")
        elif isinstance(job, Hedge):
            self._waiting[number] = job.fetch
            self._answers.put_nowait((number, Word.ARRIVED))
        elif isinstance(job, Fetch | Copy) and self._faults.strikes("mover_torn"):
            tear(job.target, job.offset_bytes, job.length_bytes, self._rng)
            self._die("killed by signal 9 while it wrote")
        else:
            self._perform(number, job)

    def _perform(self, number: int, job: Job) -> None:
        if isinstance(job, Copy) and self._faults.strikes("disk_eio"):
            self._answer(number, LevelError("simulated: input/output error", level=Level.L2, path=job.source.path))
            return
        try:
            answer: Result | CachedError = self._result(job)
        except CachedError as error:
            answer = error
        self._answer(number, answer)

    def _result(self, job: Job) -> Result:
        """One object after the other, where the worker would take threads."""
        perform = self._worker.perform
        if isinstance(job, StatObjects):
            stats = [perform(replace(job, paths=(path,))) for path in job.paths]
            return Listing(tuple(item for answer in stats if isinstance(answer, Listing) for item in answer.items))
        if isinstance(job, ReadTexts):
            texts = [perform(replace(job, items=(item,))) for item in job.items]
            return Texts(tuple(value for answer in texts if isinstance(answer, Texts) for value in answer.values))
        return perform(job)

    def _proceed(self, number: int) -> None:
        job = self._waiting.pop(number, None)
        if job is not None and not self._dead:
            self._perform(number, job)

    def _aborted(self, number: int) -> None:
        if not self._dead and self._jobs.get(number) is not None:
            self._waiting.pop(number, None)
            self._answer(number, MoverError("it was ended early, as asked"))

    def _answer(self, number: int, answer: Result | CachedError) -> None:
        if self._jobs.pop(number, None) is None:
            return
        self._answers.put_nowait((number, answer))
        if self._finishing and not self._jobs:
            self._die("")

    def finish(self) -> None:
        """See Mover."""
        self.ending = self._finishing = True
        if not self._jobs:
            self._die("")

    def kill(self, why: str) -> None:
        """See Mover. In the middle of what it writes."""
        self.ending = True
        self.fault = self.fault or why
        if not self._dead:
            for job in self._jobs.values():
                if isinstance(job, Fetch | Copy):
                    tear(job.target, job.offset_bytes, job.length_bytes, self._rng)
        self._die(why)

    def death(self) -> str:
        """See Mover."""
        return self.fault or "exit status 0"

    async def converse(
        self, on_answer: Callable[[int, Result | CachedError | Word], None], on_ready: Callable[[], None]
    ) -> None:
        """See Mover."""
        try:
            while (answer := await self._answers.get()) is not None:
                if answer[0] < 0:
                    self.ready = True
                    on_ready()
                else:
                    on_answer(*answer)
        except asyncio.CancelledError:
            self.kill("the daemon's loop ended")
            raise

    def _die(self, why: str) -> None:
        if not self._dead:
            self._dead = True
            self.fault = self.fault or why
            self._answers.put_nowait(None)


class SimMovers:
    """Starts them."""

    def __init__(self, bucket: Bucket, faults: Faults, rng: random.Random) -> None:
        self._bucket = bucket
        self._faults = faults
        self._rng = rng
        self._started = 0

    async def __call__(self, threads: Threads, nice: int, now_s: float) -> SimMover:
        """See StartMover."""
        del threads, nice
        self._started += 1
        mover = SimMover(100 + self._started, now_s, self._bucket, self._faults, self._rng)
        mover.start()
        return mover


def tear(target: FileRef, offset_bytes: int, length_bytes: int, rng: random.Random) -> None:
    """Writes junk over the beginning of a range, as one that dies within it leaves it.

    Of a blob that is being mended nothing: what is written there is what its chunk should hold, so that it would be
    mended as far as that came.
    """
    if "ingest" not in target.path:
        return
    try:
        fd = os.open(target.path, os.O_WRONLY)
    except OSError:
        return
    try:
        found = os.fstat(fd)
        if (found.st_ino, found.st_size) == (target.inode, target.size_bytes):
            os.pwrite(fd, rng.randbytes(rng.randrange(length_bytes + 1)), offset_bytes)
    finally:
        os.close(fd)
