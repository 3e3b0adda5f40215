"""Waiting, within one loop: broadcasts, works that fail together, threads. Standard library only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Signal:
    """``notify`` wakes everyone who is waiting now; those who come later wait for the next one.

    Waiters must look at the state they are interested in again: a signal carries nothing and may be spurious.
    """

    def __init__(self) -> None:
        self._waiters: dict[asyncio.Future[None], None] = {}
        """In the order of their coming: they go on in that order, the same in every run."""

    def notify(self) -> None:
        """Wakes all. Loop only."""
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def next(self) -> asyncio.Future[None]:
        """Done with the next ``notify`` after this call. Cancel it when it is not waited for any more."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        waiter.add_done_callback(lambda done: self._waiters.pop(done, None))
        return waiter

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Until the next ``notify``; False if ``timeout_s`` passed first. Cancellation leaves nothing behind."""
        try:
            await asyncio.wait_for(self.next(), timeout_s)
        except TimeoutError:
            return False
        return True


async def run_all(*works: Coroutine[Any, Any, None]) -> None:
    """Runs all; the first failure cancels the others, waits for them, and is raised as it is (no group around it)."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        if tasks:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def in_thread(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """As ``asyncio.to_thread``, but nobody goes on before it is through: a thread cannot be cancelled, so who is waits.

    What a thread that ended after the cancellation returned or raised is lost.
    """
    thread = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.wait([thread])
        if not thread.cancelled():
            thread.exception()  # retrieved, so that nothing is logged of it
        raise
