"""Signals: who is woken, and that nothing is missed."""

from __future__ import annotations

import asyncio

import pytest

from cached.signals import Signal, run_all


async def test_everyone_who_waits_is_woken_once() -> None:
    signal = Signal()
    waits = [asyncio.create_task(signal.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    signal.notify()
    assert await asyncio.gather(*waits) == [True] * 3
    assert not await signal.wait(0)


async def test_a_change_before_the_wait_is_awaited_is_not_missed() -> None:
    signal = Signal()
    change = signal.next()
    signal.notify()
    await change
    later = signal.next()
    assert not later.done()
    later.cancel()


async def test_a_wait_that_is_given_up_leaves_nothing() -> None:
    signal = Signal()
    assert not await signal.wait(0.001)
    given_up = asyncio.create_task(signal.wait())
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    cancelled = signal.next()
    cancelled.cancel()
    await asyncio.sleep(0)
    assert not signal._waiters
    signal.notify()


async def test_the_first_failure_ends_the_others_and_is_raised_as_it_is() -> None:
    ended: list[str] = []

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("endless")

    async def failing() -> None:
        await asyncio.sleep(0)
        raise LookupError("first")

    with pytest.raises(LookupError, match="first"):
        await run_all(endless(), failing())
    assert ended == ["endless"]
