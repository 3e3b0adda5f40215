"""Contestants that take turns, so that whatever else the machine does hits all of them alike.

Before each measured run as much memory as the run will use is touched and freed: on a virtual machine whose host takes
free memory back, the first touch of a page costs whoever comes first up to two seconds of processor time per GB.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from bench.results import Contest, Role, Sample, Standing, Unavailable

T = TypeVar("T")
_POPULATE_WRITE = 23
_STEP_BYTES = 64 << 20


class Contestant(Protocol):
    """One way of doing what the contest is about. ``version`` is read after the last round."""

    name: str
    title: str
    role: Role
    version: str

    def prepare(self) -> None:
        """Untimed, before each round: leaves nothing of earlier rounds, and is warm. Raises Unavailable."""

    def run(self) -> Sample:
        """The measured run. Raises whatever goes wrong: that is recorded as the reason."""

    def close(self) -> None:
        """Untimed, at the end, whatever happened."""


def hold(
    contest: Contest,
    contestants: Sequence[Contestant],
    *,
    rounds: int,
    memory_bytes: int,
    report: Callable[[int, Standing], None] = lambda _round, _standing: None,
) -> Contest:
    """All rounds; the order rotates. Fills ``contest`` with the standings, in the order given.

    A contestant that fails is out, with its reason and the samples that it has. ``report`` is called after each turn.
    """
    standings = {item.name: Standing(item.name, item.title, item.role) for item in contestants}
    contest.standings = list(standings.values())
    try:
        for number in range(rounds):
            for contestant in rotated(contestants, number):
                standing = standings[contestant.name]
                if not standing.reason:
                    _take_turn(contestant, standing, memory_bytes)
                    report(number, standing)
    finally:
        for contestant in contestants:
            standings[contestant.name].version = contestant.version
            contestant.close()
    return contest


def rotated(contestants: Sequence[T], number: int) -> list[T]:
    """The order of round ``number``."""
    start = number % len(contestants) if contestants else 0
    return [*contestants[start:], *contestants[:start]]


def touch_and_free(size_bytes: int) -> None:
    """Has the host back this much memory, then gives it back to the kernel."""
    if not size_bytes:
        return
    with mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for offset in range(0, size_bytes, _STEP_BYTES):
            memory.madvise(_POPULATE_WRITE, offset, min(_STEP_BYTES, size_bytes - offset))


def _take_turn(contestant: Contestant, standing: Standing, memory_bytes: int) -> None:
    try:
        contestant.prepare()
        touch_and_free(memory_bytes)
        standing.samples.append(contestant.run())
    except Unavailable as reason:
        standing.reason = str(reason)
    except Exception as error:
        standing.failed = True
        standing.reason = f"{type(error).__name__}: {error}".strip()
