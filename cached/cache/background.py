"""What the engine does again and again beside its requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from cached.cache.failures import Failures
from cached.clock import Clock
from cached.errors import CachedError
from cached.failures import OTHER


class Background:
    """Tasks that run until ``stop``. Loop only. One that ends by an exception is told, and the daemon is degraded."""

    def __init__(self, failures: Failures) -> None:
        self._failures = failures
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Begins it now."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def stop(self) -> None:
        """Cancels all, and waits for their ends."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)  # _ended tells

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        failure = None if task.cancelled() else task.exception()
        if failure is None:
            return
        error = failure if isinstance(failure, CachedError) else self._failures.bug(task.get_name(), failure)
        why = f"{task.get_name()} does not run any more: {error.message}; a restart starts it again"
        self._failures.degraded.began(OTHER, why, error)


async def cancel(failures: Failures, where: str, *tasks: asyncio.Future[Any]) -> None:
    """Cancels tasks and waits for their ends. One that had ended by what nobody foresaw is told."""
    for task in tasks:
        task.cancel()
    for end in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(end, Exception) and not isinstance(end, CachedError):
            failures.bug(where, end)


async def run_each(failures: Failures, steps: dict[str, Callable[[], Awaitable[object]]]) -> None:
    """One after the other; one that fails is told, and keeps none of the others from being taken."""
    for what, step in steps.items():
        with failures.survived(what):
            await step()


async def repeat(
    clock: Clock, period_s: float, step: Callable[[], Awaitable[None]], *, what: str, failures: Failures
) -> None:
    """Takes the step after each period, until cancelled. One that fails is told as ``what``; the next is taken.

    What fails in the same way again and again is counted and logged each time, and an event and a traceback once.
    """
    before = ""
    while True:
        await clock.sleep(period_s)
        try:
            await step()
        except CachedError as error:
            failures.background(what, error, known=before == error.message)
            before = error.message
        except Exception as bug:  # noqa: BLE001 - told; a task that ended would never be missed
            failures.bug(what, bug, known=before == repr(bug))
            before = repr(bug)
        else:
            before = ""
