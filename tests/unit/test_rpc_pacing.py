"""Merging and pacing of streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from cached.level import Level
from cached.rpc.pacing import EventMerge, PullMerge, merge_attach, merge_verify, paced
from cached.types import (
    AttachEvent,
    ByteRange,
    Damage,
    Damaged,
    Event,
    PullPhase,
    PullProgress,
    RangesReady,
    VerifyProgress,
)
from tests.unit.rpc_support import COMPLETE, OPENED


def ranges(*spans: tuple[int, int, int]) -> RangesReady:
    return RangesReady(tuple(ByteRange(*span) for span in spans))


def test_ranges_join_in_any_order_and_stay_before_what_follows() -> None:
    pending: list[AttachEvent] = []
    assert merge_attach(pending, OPENED)
    assert not merge_attach(pending, ranges((0, 32, 16)))
    assert not merge_attach(pending, ranges((0, 0, 16), (1, 16, 4)))
    assert not merge_attach(pending, ranges((0, 16, 16)))
    assert merge_attach(pending, COMPLETE)
    assert pending == [OPENED, ranges((0, 0, 48), (1, 16, 4)), COMPLETE]


def test_ranges_with_a_gap_stay_apart() -> None:
    pending: list[AttachEvent] = [ranges((0, 0, 16))]
    merge_attach(pending, ranges((0, 17, 3)))
    assert pending == [ranges((0, 0, 16), (0, 17, 3))]


def test_the_same_damage_waits_once() -> None:
    pending: list[AttachEvent] = []
    for _ in range(3):
        merge_attach(pending, Damaged(0, 16, 16))
    assert len(pending) == 1


def test_pull_keeps_the_latest_of_each_phase() -> None:
    merge, pending = PullMerge(), list[PullProgress]()
    urgent = [
        merge(pending, PullProgress(phase, "m", done_bytes=done))
        for done, phase in enumerate([PullPhase.RESOLVING, *[PullPhase.TRANSFERRING] * 3, PullPhase.READY])
    ]
    assert urgent == [True, True, False, False, True]
    assert [item.done_bytes for item in pending] == [0, 3, 4]


def test_verify_never_loses_damage_nor_the_end() -> None:
    damage = Damage("m", "r", "a", "ab", Level.L1, 0, 0, 1, False)
    pending: list[VerifyProgress] = []
    for done, found in enumerate([None, None, damage, None, None]):
        merge_verify(pending, VerifyProgress(9, done, found, False, 0, 0))
    merge_verify(pending, VerifyProgress(9, 9, None, True, 1, 0))
    assert [(item.done_bytes, item.damage is not None, item.finished) for item in pending] == [
        (2, True, False),
        (9, False, True),
    ]


def test_a_slow_watcher_loses_the_oldest_and_is_told_how_many() -> None:
    merge, pending = EventMerge(limit=4), list[Event]()
    for index in range(10):
        merge(pending, Event(float(index), "evicted"))
    assert [event.kind for event in pending] == ["events.dropped", "evicted", "evicted", "evicted"]
    assert pending[0].fields == {"count": "7"}
    assert [event.time_s for event in pending[1:]] == [7, 8, 9]


async def test_errors_come_after_what_was_said_before_them() -> None:
    async def source() -> AsyncIterator[PullProgress]:
        yield PullProgress(PullPhase.RESOLVING, "m")
        raise KeyError("m")

    got = []
    with pytest.raises(KeyError):
        async for item in paced(source(), PullMerge(), interval_s=60):
            got.append(item)
    assert len(got) == 1


async def test_a_new_phase_does_not_wait_for_the_interval() -> None:
    async def source() -> AsyncIterator[PullProgress]:
        for phase in PullPhase:
            yield PullProgress(phase, "m")
            await asyncio.sleep(0)

    async with asyncio.timeout(20):
        got = [item.phase async for item in paced(source(), PullMerge(), interval_s=60) if item is not None]
    assert got == list(PullPhase)


async def test_an_idle_stream_says_so_and_closing_it_closes_its_source() -> None:
    closed = asyncio.Event()

    async def source() -> AsyncIterator[AttachEvent]:
        try:
            yield OPENED
            await asyncio.Event().wait()
        finally:
            closed.set()

    events = paced(source(), merge_attach, interval_s=0, idle_s=0.01)
    async with aclosing(events):
        assert await anext(events) is OPENED
        assert await anext(events) is None
        assert await anext(events) is None
        assert not closed.is_set()
    assert closed.is_set()
