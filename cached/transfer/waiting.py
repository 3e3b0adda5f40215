"""Jobs that wait for a mover: by group, lower ranks first. Runs in the loop."""

from __future__ import annotations

import bisect

from cached.transfer.jobs import Group
from cached.transfer.process import Ticket


class Waiting:
    """An ordered queue for each group of jobs; adding and removing take no time that grows much with their length."""

    def __init__(self) -> None:
        self._queues: dict[Group, list[Ticket]] = {group: [] for group in Group}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def of(self, group: Group) -> list[Ticket]:
        """The queue of a group, for looking and for taking from."""
        return self._queues[group]

    def add(self, ticket: Ticket) -> None:
        """At its place by rank."""
        bisect.insort(self._queues[ticket.group], ticket, key=_rank)

    def remove(self, ticket: Ticket) -> bool:
        """Whether it waited."""
        queue = self._queues[ticket.group]
        position = bisect.bisect_left(queue, ticket.rank, key=_rank)
        waited = position < len(queue) and queue[position] is ticket
        if waited:
            del queue[position]
        return waited

    def drain(self) -> list[Ticket]:
        """Takes all."""
        tickets = [ticket for queue in self._queues.values() for ticket in queue]
        for queue in self._queues.values():
            queue.clear()
        return tickets


def _rank(ticket: Ticket) -> tuple[int, int]:
    return ticket.rank
