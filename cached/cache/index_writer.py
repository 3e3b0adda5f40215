"""Writes the index behind the loop: an fsync beside gigabytes that are being written takes a tenth of a second."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cached.errors import LevelError
from cached.index import Index
from cached.signals import Signal, Threads

ANSWER_S = 120.0
"""So long a write may take. A disk that hangs longer counts as one that fails, and nobody waits for it any more."""


class IndexWriter:
    """Loop only. Until ``start``, and after ``stop``, each write of the index waits for the disk.

    In between one thread writes: what changes while it does is written together, in the next transaction, so what was
    changed later is never durable before what was changed earlier. ``on_result`` hears what is wrong after each, None
    when nothing is, and that one takes too long. A write that failed is tried again with the next change.
    """

    def __init__(self, index: Index, on_result: Callable[[Exception | None], None]) -> None:
        self._index = index
        self._on_result = on_result
        self._thread: Threads | None = None
        self._task: asyncio.Task[None] | None = None
        self._changed = Signal()
        self._tried = Signal()
        self._changes = 0
        self._tried_changes = 0
        self._began_s: float | None = None
        """When the write that is under way began."""
        self._hangs = False

    @property
    def running(self) -> bool:
        """True between ``start`` and ``stop``."""
        return self._task is not None

    def start(self) -> None:
        """Begins to write behind."""
        self._thread = Threads(1, "index")
        self._index.write_behind(self._note)
        self._task = asyncio.get_running_loop().create_task(self._run(), name="index writer")

    async def durable(self) -> None:
        """Until all that was changed before this call is durable, or has failed to become so: ``on_result`` knows.

        So it does where the disk hangs.
        """
        loop, wanted = asyncio.get_running_loop(), self._changes
        while self.running and self._tried_changes < wanted:
            left_s = ANSWER_S if self._began_s is None else self._began_s + ANSWER_S - loop.time()
            if left_s <= 0:
                self._tell_hang()
                return
            await self._tried.wait(left_s)

    def _tell_hang(self) -> None:
        if not self._hangs:
            self._hangs = True
            hint = "look at the disk of the state folder: dmesg; it is written once the disk answers"
            self._on_result(LevelError(f"its disk has not answered for {ANSWER_S:.0f} s", hint=hint, cause="timeout"))

    async def stop(self) -> bool:
        """Writes what there is and ends the thread; idempotent. False where the disk hangs: then it is to be let be."""
        if self._task is None or self._thread is None:
            return True
        await self.durable()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._index.write_behind(None)
        if not self._hangs:
            # SQLite's connection is the thread's own.
            await asyncio.get_running_loop().run_in_executor(self._thread, self._index.close)
        self._thread.shutdown()
        self._task = self._thread = None
        self._tried.notify()
        return not self._hangs

    def _note(self) -> None:
        self._changes += 1
        self._changed.notify()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if self._tried_changes == self._changes:
                await self._changed.wait()
            changes, unwritten = self._changes, self._index.unwritten
            failure: Exception | None = None
            self._began_s = loop.time()
            try:
                await loop.run_in_executor(self._thread, self._index.write, unwritten)
                self._index.written(unwritten)
            except Exception as error:  # noqa: BLE001 - told, and those who wait must not wait for ever
                failure = error
            self._tried_changes, self._began_s, self._hangs = changes, None, False
            self._on_result(failure)
            self._tried.notify()
