"""Reads of local drives, shared out among them, so that all that are wanted are read at once. Runs in the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from cached.transfer.fill import Runner
from cached.transfer.jobs import Checksum, Copy, Job, Prepare, Result
from cached.transfer.turns import Turns


class Drives:
    """Runs jobs on ``runner``, at most ``limit`` of those that read a file below one of ``folders`` at a time.

    The next turn goes to the drive that has the fewest, and there to the lowest priority. Without that the chunks of
    the file that is wanted first would take all movers, and one drive would be read after the other.
    """

    def __init__(self, runner: Runner, folders: Sequence[str], *, limit: int) -> None:
        """``folders``: one a drive."""
        self._runner = runner
        self._limit = limit
        self._in_flight = dict.fromkeys(folders, 0)
        self._waiting = {folder: Turns() for folder in folders}

    async def run(self, job: Job, *, key: str | None = None, priority: int = 0) -> Result:
        """See Runner. Cancellation gives the turn back."""
        drive = self._read_by(job)
        if drive is None:
            return await self._runner.run(job, key=key, priority=priority)
        await self._turn(drive, priority)
        try:
            return await self._runner.run(job, key=key, priority=priority)
        finally:
            self._leave(drive)

    def prepare(self, job: Prepare) -> None:
        """See Runner."""
        self._runner.prepare(job)

    def prefer(self, path: str, offsets: Collection[int], by: int) -> None:
        """See Runner."""
        self._runner.prefer(path, offsets, by)

    async def settled(self, path: str) -> bool:
        """See Runner."""
        return await self._runner.settled(path)

    def _read_by(self, job: Job) -> str | None:
        if not isinstance(job, Copy | Checksum) or job.source.memory:
            return None
        return next((folder for folder in self._in_flight if job.source.path.startswith(f"{folder}/")), None)

    async def _turn(self, drive: str, priority: int) -> None:
        turn = self._waiting[drive].add(priority)
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(drive)
            raise

    def _leave(self, drive: str) -> None:
        self._in_flight[drive] -= 1
        self._admit()

    def _admit(self) -> None:
        while sum(self._in_flight.values()) < self._limit:
            wanted = [
                (self._in_flight[drive], rank, drive)
                for drive, turns in self._waiting.items()
                if (rank := turns.first) is not None
            ]
            if not wanted:
                return
            drive = min(wanted)[2]
            self._waiting[drive].give()
            self._in_flight[drive] += 1
