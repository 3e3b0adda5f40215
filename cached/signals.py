"""Waiting, within one loop: broadcasts, works that fail together, threads. Standard library only."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from contextvars import copy_context
from functools import partial
from queue import Empty, SimpleQueue
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


class Threads(Executor):
    """At most ``most`` threads, begun as they are needed. They are daemons: nobody waits for one that hangs.

    Those of concurrent.futures are joined when the process ends. To be used from one thread.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._count = 0
        self._shut = False

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """See Executor. Raises RuntimeError after ``shutdown``."""
        if self._shut:
            raise RuntimeError(f"the threads of {self._name} have ended")
        future: Future[_T] = Future()
        self._calls.put(partial(_call, future, partial(fn, *args, **kwargs)))
        if not self._idle.acquire(blocking=False) and self._count < self._most:
            self._count += 1
            threading.Thread(target=self._run, name=f"{self._name}_{self._count}", daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002 - Executor's
        """Lets threads end once there is nothing to do; waits for none of them."""
        del wait, cancel_futures
        self._shut = True
        for _ in range(self._count):
            self._calls.put(None)

    def _run(self) -> None:
        while True:
            try:
                call = self._calls.get_nowait()
            except Empty:
                self._idle.release()
                call = self._calls.get()
            if call is None:
                return
            call()
            del call  # what it holds must not live until the next one comes


def _call(future: Future[_T], function: Callable[[], _T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as error:  # noqa: BLE001 - raised to whoever waits
        future.set_exception(error)
    else:
        future.set_result(result)


async def in_thread(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """As ``asyncio.to_thread``, but nobody goes on before it is through: a thread cannot be cancelled, so who is waits.

    What a thread that ended after the cancellation returned or raised is lost.
    """
    return await in_executor(None, partial(function, *args, **kwargs))


async def in_executor(executor: Executor | None, call: Callable[[], _T]) -> _T:
    """``in_thread``, in a thread of this executor; None: of the loop's own."""
    loop = asyncio.get_running_loop()
    thread = asyncio.ensure_future(loop.run_in_executor(executor, copy_context().run, call))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.wait([thread])
        if not thread.cancelled():
            thread.exception()  # retrieved, so that nothing is logged of it
        raise
