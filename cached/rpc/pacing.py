"""How often a stream speaks: events are merged while its reader is busy or its interval has not passed.

What waits is bounded by the merge, never by the reader's speed, so a stopped worker costs no memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Protocol, TypeVar

from cached.types import AttachEvent, ByteRange, Damaged, Event, PullPhase, PullProgress, RangesReady, VerifyProgress

T = TypeVar("T")
_DROPPED = "events.dropped"


class Merge(Protocol[T]):
    """Joins an event to those that wait."""

    def __call__(self, pending: list[T], event: T) -> bool:
        """Adds ``event`` to ``pending``, bounding it. True when what waits must go at once."""
        ...


async def paced(
    source: AsyncIterator[T], merge: Merge[T], *, interval_s: float, idle_s: float | None = None
) -> AsyncGenerator[T | None, None]:
    """The events of ``source``, merged; None each time that ``idle_s`` passed without one.

    Between two batches at least ``interval_s`` passes, unless ``merge`` says that one may not wait. Ends, or raises, as
    the source does, after everything that waited was given out. Closing it closes the source.
    """
    pending: list[T] = []
    changed, urgent = asyncio.Event(), asyncio.Event()

    async def pump() -> None:
        try:
            async for event in source:
                if merge(pending, event):
                    urgent.set()
                changed.set()
        finally:
            changed.set()
            urgent.set()
            if isinstance(source, AsyncGenerator):
                await source.aclose()

    task = asyncio.create_task(pump())
    try:
        while True:
            if not pending and not task.done() and not await _set_within(changed, idle_s):
                yield None
                continue
            changed.clear()
            urgent.clear()
            batch = list(pending)
            pending.clear()
            for event in batch:
                yield event
            if task.done() and not pending:
                task.result()
                return
            await _set_within(urgent, interval_s)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _set_within(event: asyncio.Event, timeout_s: float | None) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


class PullMerge:
    """Keeps the latest progress of each phase; a new phase goes at once."""

    def __init__(self) -> None:
        self._phase: PullPhase | None = None

    def __call__(self, pending: list[PullProgress], event: PullProgress) -> bool:
        if pending and pending[-1].phase is event.phase:
            pending[-1] = event
        else:
            pending.append(event)
        changed, self._phase = event.phase is not self._phase, event.phase
        return changed


def merge_attach(pending: list[AttachEvent], event: AttachEvent) -> bool:
    """Joins ranges; everything else goes at once. A damage that waits already is not repeated."""
    if isinstance(event, RangesReady):
        if pending and isinstance(last := pending[-1], RangesReady):
            pending[-1] = RangesReady(_joined(last.ranges + event.ranges))
        else:
            pending.append(event)
        return False
    if not (isinstance(event, Damaged) and event in pending):
        pending.append(event)
    return True


def _joined(ranges: tuple[ByteRange, ...]) -> tuple[ByteRange, ...]:
    joined: list[ByteRange] = []
    for item in sorted(ranges, key=lambda item: (item.file_index, item.offset_bytes)):
        last = joined[-1] if joined else None
        if last and last.file_index == item.file_index and item.offset_bytes <= last.offset_bytes + last.length_bytes:
            end = max(last.offset_bytes + last.length_bytes, item.offset_bytes + item.length_bytes)
            joined[-1] = ByteRange(last.file_index, last.offset_bytes, end - last.offset_bytes)
        else:
            joined.append(item)
    return tuple(joined)


def merge_verify(pending: list[VerifyProgress], event: VerifyProgress) -> bool:
    """Keeps the latest moment, and every one that reports damage."""
    if pending and pending[-1].damage is None and not pending[-1].finished:
        pending[-1] = event
    else:
        pending.append(event)
    return event.damage is not None or event.finished


class EventMerge:
    """Keeps the newest ``limit`` events, and says in one of its own how many a slow reader missed."""

    def __init__(self, limit: int = 1024) -> None:
        self._limit = limit
        self._dropped = 0

    def __call__(self, pending: list[Event], event: Event) -> bool:
        pending.append(event)
        if len(pending) <= self._limit:
            return True
        noted = pending[0].kind == _DROPPED
        self._dropped = self._dropped + 1 if noted else 2
        message = f"{self._dropped} events were left out: this reader is too slow"
        pending[:2] = [Event(event.time_s, _DROPPED, message=message, fields={"count": str(self._dropped)})]
        return True
