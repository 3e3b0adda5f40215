"""Ranges on their way from origins: as many of each origin as pay, and a second try for one that stalls.

Every other job goes to the movers at once. Runs in the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import structlog

from cached.clock import Clock
from cached.errors import OriginUnavailableError, UnavailableError
from cached.origins.base import OriginSpec
from cached.transfer.hedge import HedgePolicy
from cached.transfer.jobs import Fetch, Hedge, Job, Prepare, Result
from cached.transfer.pool import MoverPool
from cached.transfer.process import Ticket
from cached.transfer.turns import Turns
from cached.transfer.width import Width
from cached.types import OriginStats

_log = structlog.get_logger(__name__)

_LOOK_S = 0.25
_REMEMBERED = 100
"""Origins whose width is known though they are not used."""

_BUSY = frozenset(
    {"SlowDown", "ServiceUnavailable", "Throttling", "TooManyRequests", "RequestLimitExceeded", "503", "429"}
)

HedgeOutcome = Literal["won", "lost", "failed"]


class Lanes:
    """Runs jobs on ``pool``, ranges of each origin (as ``name_of`` calls it) in its own lane.

    Each has no more than ``max_ranges`` in flight.
    """

    def __init__(
        self,
        pool: MoverPool,
        clock: Clock,
        *,
        start: int,
        max_ranges: int,
        hedging: bool = True,
        on_hedge: Callable[[HedgeOutcome], None] = lambda _outcome: None,
    ) -> None:
        self._pool = pool
        self._clock = clock
        self._start = start
        self._max_ranges = max_ranges
        self._hedging = hedging
        self._on_hedge = on_hedge
        self._lanes: dict[str, Lane] = {}

    def stats(self) -> tuple[OriginStats, ...]:
        """Of every origin that was read from."""
        return tuple(lane.stats for lane in self._lanes.values())

    async def run(self, job: Job, *, key: str | None = None, priority: int = 0) -> Result:
        """See MoverPool; a Fetch also waits for its turn, lower priorities first."""
        if not isinstance(job, Fetch):
            return await self._pool.run(job, key=key, priority=priority)
        name = name_of(job.origin)
        lane = self._lanes.get(name)
        if lane is None:
            width = Width(start=self._start, high=self._max_ranges)
            policy = HedgePolicy() if self._hedging and not name.startswith("file:") else None
            self._forget_idle()
            lane = self._lanes[name] = Lane(name, self._pool, self._clock, width, policy, self._on_hedge)
        return await lane.fetch(job, priority)

    def _forget_idle(self) -> None:
        """Anybody may name an origin: what was measured of those that are not used is not kept for ever."""
        if len(self._lanes) >= _REMEMBERED:
            idle = [name for name, lane in self._lanes.items() if not (lane.stats.in_flight or lane.stats.waiting)]
            for name in idle[: len(self._lanes) - _REMEMBERED + 1]:
                del self._lanes[name]

    def prepare(self, job: Prepare) -> None:
        """See MoverPool."""
        self._pool.prepare(job)

    def prefer(self, path: str, offsets: Collection[int], by: int) -> None:
        """See Runner: of what waits for its turn."""
        for lane in self._lanes.values():
            lane.prefer(path, offsets, by)

    async def settled(self, path: str) -> bool:
        """See MoverPool."""
        return await self._pool.settled(path)


def name_of(spec: OriginSpec) -> str:
    """What of an origin shares a server: its endpoint, else its bucket or host."""
    scheme, _, rest = spec.uri.partition("://")
    if scheme == "file":
        return "file:"
    if scheme == "hf":
        return spec.options.get("endpoint") or "hf:"
    place = f"{scheme}://{rest.partition('/')[0]}"
    if scheme in {"az", "gs"}:  # containers of one name are other ones in another account, or at another endpoint
        where = [spec.options[name] for name in ("endpoint", "account") if spec.options.get(name)]
        return f"{place} ({', '.join(where)})" if where else place
    return spec.options.get("endpoint_url") or place


@dataclass(slots=True, eq=False)
class _Flight:
    ticket: Ticket
    size_bytes: int
    stalled: asyncio.Future[None]


class Lane:
    """The ranges of one origin. Its width is measured and stays known when nothing is in flight."""

    def __init__(
        self,
        name: str,
        pool: MoverPool,
        clock: Clock,
        width: Width,
        hedging: HedgePolicy | None,
        on_hedge: Callable[[HedgeOutcome], None],
    ) -> None:
        self._name = name
        self._pool = pool
        self._clock = clock
        self._width = width
        self._hedging = hedging
        self._on_hedge = on_hedge
        self._in_flight = 0
        self._waiting = Turns()
        self._turns: dict[tuple[str, int], asyncio.Future[None]] = {}
        """Of those that wait, by target and offset."""
        self._flights: set[_Flight] = set()
        self._look_later: asyncio.TimerHandle | None = None

    @property
    def stats(self) -> OriginStats:
        """What is under way."""
        return OriginStats(self._name, self._in_flight, len(self._waiting), self._width.limit)

    async def fetch(self, job: Fetch, priority: int) -> Result:
        """The result of a Fetch. Cancellation ends it where it is."""
        await self._enter((job.target.path, job.offset_bytes), priority)
        era = self._width.started()
        moved_bytes = 0
        try:
            result = await self._raced(job, priority)
            moved_bytes = job.length_bytes
        except OriginUnavailableError as error:
            if error.fields.get("cause") in _BUSY:
                self._width.refused(self._clock.monotonic_s())
            raise
        finally:
            full = self._in_flight >= self._width.limit
            self._in_flight -= 1
            if moved_bytes:
                self._width.finished(self._clock.monotonic_s(), era, moved_bytes, full=full)
            self._admit()
        return result

    def prefer(self, path: str, offsets: Collection[int], by: int) -> None:
        """Lowers the priority of these ranges, as far as they wait."""
        for offset_bytes in offsets:
            turn = self._turns.get((path, offset_bytes))
            if turn is not None:
                self._waiting.sooner(turn, by)

    async def _enter(self, place: tuple[str, int], priority: int) -> None:
        turn = self._turns[place] = self._waiting.add(priority)
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._in_flight -= 1
                self._admit()
            raise
        finally:
            self._turns.pop(place, None)

    def _admit(self) -> None:
        while self._in_flight < self._width.limit and self._waiting.first is not None:
            self._waiting.give()
            self._in_flight += 1

    async def _raced(self, job: Fetch, priority: int) -> Result:
        """The result of the range, or of its hedge if that comes first; the other one does not write any more then."""
        original = self._pool.submit(job, priority=priority)
        hedge: Ticket | None = None
        try:
            with self._watched(original, job.length_bytes) as flight:
                await _first_of(original.future, flight.stalled)
            if not original.future.done():
                hedge = self._hedge(job, original, priority)
            if hedge is None:
                return await original.future
            return await self._first(original, hedge)
        finally:
            for ticket in (original, hedge):
                if ticket is not None:
                    self._pool.withdraw(ticket)

    def _hedge(self, job: Fetch, original: Ticket, priority: int) -> Ticket | None:
        _log.info(
            "transfer.stalled", path=job.item.path, offset_bytes=job.offset_bytes, age_s=self._pool.age_s(original)
        )
        try:
            return self._pool.submit(Hedge(job), priority=priority, avoid=original)
        except UnavailableError:
            return None  # draining

    async def _first(self, original: Ticket, hedge: Ticket) -> Result:
        await _first_of(original.future, hedge.arrived, hedge.future)
        if _failed(original):
            await _first_of(hedge.arrived, hedge.future)
        if original.future.done() and (not _failed(original) or not hedge.arrived.done()):
            self._on_hedge("lost" if not _failed(original) else "failed")
            return original.future.result()
        if not hedge.arrived.done():
            self._on_hedge("failed")
            return await original.future
        # Only now that nothing else writes to the range may the hedge do so.
        result = None if original.future.done() else await self._pool.abort(original)
        if result is not None:
            self._on_hedge("lost")
            return result
        self._pool.proceed(hedge)
        result = await hedge.future
        self._on_hedge("won")
        return result

    @contextmanager
    def _watched(self, ticket: Ticket, size_bytes: int) -> Iterator[_Flight]:
        flight = _Flight(ticket, size_bytes, asyncio.get_running_loop().create_future())
        self._flights.add(flight)
        self._look_soon()
        try:
            yield flight
        finally:
            self._flights.discard(flight)
            if self._hedging is not None and ticket.future.done() and not _failed(ticket):
                self._hedging.timed(size_bytes, self._clock.monotonic_s() - ticket.sent_s)
            if not self._flights and self._look_later is not None:
                self._look_later.cancel()
                self._look_later = None

    def _look_soon(self) -> None:
        if self._hedging is not None and self._look_later is None:
            self._look_later = asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def _look(self) -> None:
        self._look_later = None
        assert self._hedging is not None  # noqa: S101 - else nobody looks
        for flight in self._flights:
            late = self._pool.age_s(flight.ticket) > self._hedging.stalled_after_s(flight.size_bytes)
            if late and not flight.stalled.done() and self._hedging.take():
                flight.stalled.set_result(None)
        if self._flights:
            self._look_soon()


async def _first_of(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def _failed(ticket: Ticket) -> bool:
    return ticket.future.done() and (ticket.future.cancelled() or ticket.future.exception() is not None)
