from __future__ import annotations

import asyncio
import contextlib
import gc

import pytest

from cached.errors import OriginError, UnavailableError
from cached.singleflight import SingleFlight


class Work:
    """Work under the test's control, which counts how often it was begun and cancelled."""

    def __init__(self) -> None:
        self.begun = 0
        self.cancelled = 0
        self.go = asyncio.Event()
        self.cleaned = asyncio.Event()
        self.cleaned.set()
        self.error: Exception | None = None

    async def __call__(self) -> int:
        self.begun += 1
        number = self.begun
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            await self.cleaned.wait()
            if self.error is not None:
                raise self.error from None  # as it was clearing up
            raise
        if self.error is not None:
            raise self.error
        return number


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def callers(flights: SingleFlight[str, int], work: Work, number: int, key: str = "k") -> list[asyncio.Task[int]]:
    return [asyncio.create_task(flights.do(key, work)) for _ in range(number)]


async def cancelled(task: asyncio.Task[int]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_all_callers_share_one_result() -> None:
    flights, work = SingleFlight[str, int](), Work()
    tasks = callers(flights, work, 8)
    await settle()
    work.go.set()
    assert await asyncio.gather(*tasks) == [1] * 8
    assert await flights.do("k", work) == 2


async def test_keys_do_not_wait_for_each_other() -> None:
    flights, slow, fast = SingleFlight[str, int](), Work(), Work()
    fast.go.set()
    (task,) = callers(flights, slow, 1, "slow")
    assert await flights.do("fast", fast) == 1
    slow.go.set()
    assert await task == 1


async def test_all_callers_share_one_error_and_the_next_starts_anew() -> None:
    flights, work = SingleFlight[str, int](), Work()
    work.error = OriginError("no")
    tasks = callers(flights, work, 3)
    work.go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert results == [work.error] * 3
    work.error = None
    assert await flights.do("k", work) == 2


async def test_a_cancelled_caller_leaves_the_others_alone() -> None:
    flights, work = SingleFlight[str, int](), Work()
    first, second = callers(flights, work, 2)
    await settle()
    await cancelled(first)
    work.go.set()
    assert await second == 1
    assert work.cancelled == 0


async def test_the_last_caller_takes_the_flight_with_it() -> None:
    flights, work = SingleFlight[str, int](), Work()
    tasks = callers(flights, work, 2)
    await settle()
    for task in tasks:
        await cancelled(task)
    await settle()
    assert work.cancelled == 1


async def test_no_second_flight_while_a_cancelled_one_clears_up() -> None:
    flights, work = SingleFlight[str, int](), Work()
    work.cleaned.clear()
    (task,) = callers(flights, work, 1)
    await settle()
    await cancelled(task)
    late = callers(flights, work, 3)
    await settle()
    assert work.begun == 1
    work.go.set()
    work.cleaned.set()
    assert await asyncio.gather(*late) == [2, 2, 2]


async def test_close_tells_the_callers() -> None:
    flights, work = SingleFlight[str, int](), Work()
    (one,), (two,) = callers(flights, work, 1, "one"), callers(flights, work, 1, "two")
    await settle()
    await flights.close()
    with pytest.raises(UnavailableError, match="one"):
        await one
    with pytest.raises(UnavailableError, match="two"):
        await two
    assert work.cancelled == 2


async def test_an_unwatched_failure_is_retrieved_and_logged(capsys: pytest.CaptureFixture[str]) -> None:
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    flights, work = SingleFlight[str, int](), Work()
    work.error = OriginError("nobody saw this")
    (task,) = callers(flights, work, 1)
    await settle()
    await cancelled(task)
    await settle()
    del task
    gc.collect()
    assert complaints == []
    assert "nobody saw this" in capsys.readouterr().out


async def test_a_finished_flight_is_not_joined() -> None:
    """What is asked for after the work ended is looked at again, even before the loop ran any callback."""
    flights, begun = SingleFlight[str, int](), 0

    async def start() -> int:
        nonlocal begun
        begun += 1
        return begun

    async def again() -> int:
        first = await flights.do("k", start)
        return first * 10 + await flights.do("k", start)

    with contextlib.suppress(asyncio.CancelledError):
        assert await again() == 12
