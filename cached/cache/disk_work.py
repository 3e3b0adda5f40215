"""What L2's disk is asked for: in threads of its own, and nobody waits for ever where it hangs and does not fail."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

import structlog

from cached.errors import CachedError, LevelError, NotFoundError
from cached.ledger import Ledger, whatever_fits
from cached.level import Level
from cached.levels.base import FileRef, Found, LocalLevel
from cached.signals import Signal, Threads, in_executor

_log = structlog.get_logger(__name__)
_P = ParamSpec("_P")
_T = TypeVar("_T")

ANSWER_S = 120.0
"""So long a call that promises something (fsync, fallocate, unlink) may take, beside the time for its bytes."""
SLOWEST_BYTES_PER_S = 20_000_000
"""As of movers' jobs: a disk that writes slower than this is one that hangs."""
_THREADS = 16
_END_S = 3.0
"""What a daemon that stops waits for what is being freed: what is not is free once the disk answers."""


class DiskWork:
    """Loop only. The calls on L2 that may take long, with the accounts of what the disk has not carried out yet.

    A call that is given up goes on in its thread, since nothing ends it. Until it has ended, and what it left is taken
    back, its bytes count, the level ``hangs``, and everything else that is asked of it fails at once.
    ``on_hang`` hears why, and None when the disk has answered after all.
    """

    def __init__(self, store: LocalLevel, ledger: Ledger, closed: Signal) -> None:
        """``closed``: told whenever bytes that counted for the disk's sake are free."""
        self._store = store
        self._ledger = ledger
        self._closed = closed
        self._threads = Threads(_THREADS, "l2")
        self._freeing: set[asyncio.Future[None]] = set()
        self._late: set[asyncio.Task[None]] = set()
        self._committing: Counter[str] = Counter()
        self._left: set[str] = set()
        """Ingests that the disk did not let go, and nobody counts."""
        self._distrusted: set[str] = set()
        self.on_hang: Callable[[LevelError | None], None] = lambda _error: None

    @property
    def hangs(self) -> bool:
        """A call has been given up and has not ended."""
        return bool(self._late)

    def hang_until(self, gone: asyncio.Future[None]) -> None:
        """A mover that works on the disk cannot be ended: the disk hangs, at least until it has."""
        self._follow(self._ended({gone}, lambda: None, []))
        self.on_hang(LevelError("l2: a mover waits for the disk and cannot be ended", level=Level.L2, cause="timeout"))

    async def in_thread(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """As ``signals.in_thread``, without a bound, for what writes in small steps for somebody who waits."""
        return await in_executor(self._threads, partial(function, *args, **kwargs))

    async def scan(self) -> Found:
        """See LocalLevel. Who is cancelled does not wait for its end: it changes nothing that anybody else uses."""
        call = self._begin(self._store.scan)
        await asyncio.wait([call], timeout=ANSWER_S)
        if not call.done():
            raise self._give_up([call], "list", (), ANSWER_S, lambda: None)
        return call.result()

    async def create(self, sizes: Mapping[str, int]) -> None:
        """Makes these ingests, which are reserved. An error may leave some, but not one of a call that was given up."""
        left = self._left.intersection(sizes)

        def make(ids: Mapping[str, int]) -> None:
            for ingest_id in left:
                self._store.discard(ingest_id)
            for ingest_id, size_bytes in ids.items():
                self._store.create(ingest_id, size_bytes)

        def undo() -> None:
            for ingest_id in sizes:
                self._store.discard(ingest_id)

        if sizes:
            await self._answer(partial(make, dict(sizes)), "allocate", sizes, sum(sizes.values()), undo)
            self._left -= left

    async def commit(self, ingest_id: str, digest: str, size_bytes: int, is_known: Callable[[], bool]) -> FileRef:
        """See LocalLevel. Who is cancelled meanwhile takes back what it made.

        ``is_known``: whether somebody counts the blob, which may have come another way meanwhile.
        """

        def undo() -> None:
            self._store.discard(ingest_id)
            if not self._committing[digest] and not is_known():
                with suppress(NotFoundError):
                    self._store.remove(digest)

        distrusted = digest in self._distrusted

        def work() -> FileRef:
            if distrusted:
                with suppress(NotFoundError):
                    self._store.remove(digest)
            return self._store.commit(ingest_id, digest)

        self._committing[digest] += 1
        try:
            ref = await self._answer(work, "commit", (ingest_id,), size_bytes, undo)
        except asyncio.CancelledError:
            # Of two who commit the same, the other may have made it, and not have heard of that yet.
            if self._committing[digest] == 1 and not is_known() and not self.hangs:
                with suppress(CachedError):  # what is left is found at the next start, and has no owner
                    self.remove(digest, size_bytes)
            raise
        finally:
            self._committing[digest] -= 1
            self._committing = +self._committing
        self._distrusted.discard(digest)
        return ref

    def discard(self, ingest_id: str, size_bytes: int) -> None:
        """Drops an ingest of which the accounts know no more; at once, unless the disk hangs.

        One that the disk keeps (it became read-only, say) fails nobody: it goes before another of its name is made, or
        at the next start.
        """
        if self.hangs:
            self._put_off(partial(self._store.discard, ingest_id), ingest_id, size_bytes)
            return
        try:
            self._store.discard(ingest_id, later=self._free)
        except CachedError as error:
            self._left.add(ingest_id)
            _log.warning("l2.not_discarded", ingest=ingest_id, chain=error.chain)

    def remove(self, digest: str, size_bytes: int) -> None:
        """Takes a blob away; one whose file is gone is no error. At once, unless the disk hangs.

        Raises LevelError or NoRoomError where the disk does not let it go; it is there as before then.
        """

        def remove(later: Callable[[Callable[[], None]], None]) -> None:
            with suppress(NotFoundError):
                self._store.remove(digest, later=later)

        if self.hangs:
            self._put_off(partial(remove, lambda work: work()), digest, size_bytes)
        else:
            remove(self._free)

    def distrust(self, digest: str) -> None:
        """A file of this name that nobody counts is damaged, and makes way for a blob of that content."""
        self._distrusted.add(digest)

    async def freed(self) -> None:
        """Until the disk has the bytes back of all that was removed from it. LevelError if that does not come."""
        self.check()
        freeing = set(self._freeing)
        if freeing and (pending := (await asyncio.wait(freeing, timeout=ANSWER_S))[1]):
            raise self._give_up(pending, "free", (), ANSWER_S, lambda: None)

    async def close(self) -> None:
        """Waits a moment for what is being freed. Threads that hang end with the process."""
        if self._freeing:
            await asyncio.wait(self._freeing, timeout=_END_S)
        self._threads.shutdown(wait=False)

    def check(self) -> None:
        """Raises LevelError while it hangs."""
        if self.hangs:
            raise LevelError(
                "l2: the disk has not answered an earlier call yet", hint="see dmesg; it is used again once it answers",
                level=Level.L2, cause="timeout",
            )  # fmt: skip

    def _begin(self, work: Callable[[], _T]) -> asyncio.Future[_T]:
        loop = asyncio.get_running_loop()
        return asyncio.ensure_future(loop.run_in_executor(self._threads, copy_context().run, work))

    def _free(self, work: Callable[[], None]) -> None:
        freeing = self._begin(work)
        self._freeing.add(freeing)
        freeing.add_done_callback(self._freeing.discard)

    async def _answer(
        self, work: Callable[[], _T], what: str, ids: Collection[str], size_bytes: int, undo: Callable[[], None]
    ) -> _T:
        """What the call returns or raises. Who is cancelled waits for its end, too: a thread cannot be cancelled."""
        self.check()
        allowance_s = ANSWER_S + size_bytes / SLOWEST_BYTES_PER_S
        call = self._begin(work)
        try:
            await asyncio.wait([call], timeout=allowance_s)
        except asyncio.CancelledError:
            await asyncio.wait([call], timeout=allowance_s)
            if not call.done():
                self._give_up([call], what, ids, allowance_s, undo)
            elif not call.cancelled():
                call.exception()  # retrieved, so that nothing is logged of it
            raise
        if not call.done():
            raise self._give_up([call], what, ids, allowance_s, undo)
        return call.result()

    def _give_up(
        self,
        calls: Collection[asyncio.Future[_T]],
        what: str,
        ids: Collection[str],
        waited_s: float,
        undo: Callable[[], None],
    ) -> LevelError:
        """Counts these ingests, which are reserved, until the calls have ended and ``undo`` has run after them."""
        for ingest_id in ids:
            self._ledger.commit(ingest_id, _late(ingest_id))
        self._follow(self._ended(set(calls), undo, [_late(ingest_id) for ingest_id in ids]))
        error = LevelError(
            f"l2: the disk has not answered for {waited_s:.0f} s ({what})",
            hint="see dmesg; it is used again once it answers", level=Level.L2, cause="timeout",
        )  # fmt: skip
        self.on_hang(error)
        return error

    def _put_off(self, work: Callable[[], None], key: str, size_bytes: int) -> None:
        """A call that nobody waits for, after those that hang. Its bytes count until it has ended."""
        with whatever_fits(self._ledger, size_bytes):
            self._ledger.add(_late(key), size_bytes)
        self._follow(self._ended({self._begin(work)}, lambda: None, [_late(key)]))

    def _follow(self, ended: asyncio.Task[None]) -> None:
        self._late.add(ended)
        ended.add_done_callback(self._came_late)

    def _ended(self, calls: set[asyncio.Future[_T]], undo: Callable[[], None], keys: list[str]) -> asyncio.Task[None]:
        async def follow() -> None:
            await asyncio.wait(calls)
            await self._quietly(calls)
            await self._quietly({self._begin(undo)})
            for key in keys:
                self._ledger.remove(key)
            self._closed.notify()

        return asyncio.get_running_loop().create_task(follow(), name="l2 answers late")

    async def _quietly(self, calls: set[asyncio.Future[_T]]) -> None:
        """Nobody waits for them any more: what they raise is logged."""
        for end in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(end, BaseException):
                _log.warning("l2.late", chain=end.chain if isinstance(end, CachedError) else repr(end))

    def _came_late(self, ended: asyncio.Task[None]) -> None:
        self._late.discard(ended)
        if not self._late and not ended.cancelled():
            self.on_hang(None)


def _late(key: str) -> str:
    """The entry of what the disk has not carried out yet."""
    return f"late:{key}"
