"""Those who wait for their turn. Runs in the loop."""

from __future__ import annotations

import asyncio
import heapq
import itertools

_Waiting = tuple[int, int, asyncio.Future[None]]

_arrivals = itertools.count()
"""Shared by all queues, so that ranks of different ones compare by arrival."""


class Turns:
    """A queue by rank: lower priorities first, equals in order of arrival. Who is cancelled waits no more."""

    def __init__(self) -> None:
        self._heap: list[_Waiting] = []

    def __len__(self) -> int:
        return sum(not entry[2].done() for entry in self._heap)

    @property
    def first(self) -> tuple[int, int] | None:
        """The rank of who is next, or None."""
        while self._heap and self._heap[0][2].done():
            heapq.heappop(self._heap)
        return self._heap[0][:2] if self._heap else None

    def add(self, priority: int) -> asyncio.Future[None]:
        """Done when it is this one's turn."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._heap, (priority, next(_arrivals), turn))
        return turn

    def sooner(self, turn: asyncio.Future[None], by: int) -> None:
        """Lowers the priority of one that waits; of one that does not wait any more nothing changes."""
        for at, (priority, arrival, waiting) in enumerate(self._heap):
            if waiting is turn:
                self._heap[at] = (priority - by, arrival, waiting)
                heapq.heapify(self._heap)
                return

    def give(self) -> None:
        """It is the turn of ``first``, which is not None."""
        heapq.heappop(self._heap)[2].set_result(None)
