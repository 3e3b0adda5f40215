"""One task a key, however many ask for it: N workers that want one model cause one download (invariant 5)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog

from cached.errors import UnavailableError

_log = structlog.get_logger(__name__)

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Flight(Generic[T]):
    task: asyncio.Task[T]
    waiters: int = 0
    cancelled: bool = False


class SingleFlight(Generic[K, T]):
    """Joins callers who want the same thing at the same time. Belongs to the loop.

    A flight whose last caller was cancelled is cancelled. One that fails while nobody waits is logged.
    """

    def __init__(self) -> None:
        self._flights: dict[K, _Flight[T]] = {}

    async def do(self, key: K, start: Callable[[], Awaitable[T]]) -> T:
        """The result of ``start()``, or of the flight for ``key`` that is under way; its exception is shared likewise.

        ``start`` runs in a task of its own and must look again whether the work was done since its caller looked.
        Cancelling a caller ends only its wait. Raises UnavailableError when the flight was cancelled from outside.
        A caller that comes while a cancelled flight is still clearing up waits for that and then starts anew.
        """
        flight = self._flights.get(key)
        while flight is not None and flight.cancelled and not flight.task.done():
            await asyncio.wait({flight.task})
            flight = self._flights.get(key)
        if flight is None or flight.task.done():
            flight = self._launch(key, start)
        flight.waiters += 1
        try:
            await asyncio.wait({flight.task})
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                flight.cancelled = True
                flight.task.cancel()
        if flight.task.cancelled():
            raise UnavailableError(f"work on {key!r} was cancelled", hint="ask again")
        return flight.task.result()

    async def close(self) -> None:
        """Cancels all flights and waits until they ended; their callers get UnavailableError."""
        flights = list(self._flights.values())
        tasks = [flight.task for flight in flights if not flight.task.done()]
        for flight in flights:
            flight.cancelled = True
            flight.task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _launch(self, key: K, start: Callable[[], Awaitable[T]]) -> _Flight[T]:
        async def run() -> T:
            return await start()

        flight = _Flight(asyncio.create_task(run(), name=f"flight {key!r}"))
        self._flights[key] = flight

        def landed(task: asyncio.Task[T]) -> None:
            if self._flights.get(key) is flight:
                del self._flights[key]
            error = None if task.cancelled() else task.exception()
            if error is not None and not flight.waiters:
                _log.warning("flight.failed_unwatched", key=str(key), error=str(error), exc_info=error)

        flight.task.add_done_callback(landed)
        return flight
