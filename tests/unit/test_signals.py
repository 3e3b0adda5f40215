"""Signals: who is woken, and that nothing is missed."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cached.signals import Signal, in_thread, run_all


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


async def test_who_is_cancelled_goes_on_only_when_its_thread_is_through() -> None:
    begun, go_on, through = threading.Event(), threading.Event(), threading.Event()

    def work(word: str, *, twice: bool) -> str:
        begun.set()
        go_on.wait(10)
        through.set()
        return word * (2 if twice else 1)

    task = asyncio.create_task(in_thread(work, "a", twice=True))
    await asyncio.to_thread(begun.wait, 10)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert through.is_set()
    assert await in_thread(work, "a", twice=True) == "aa"


async def test_what_a_thread_raises_is_raised() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        await in_thread(int, "x")
