"""The pool of mover processes: started on demand, ended when idle, replaced when they die. Runs in the loop."""

from __future__ import annotations

import asyncio
import contextvars
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress

import structlog

from cached.clock import Clock
from cached.errors import CachedError, MoverError, UnavailableError
from cached.levels.base import FileRef
from cached.transfer.jobs import (
    Clear,
    Copy,
    Fetch,
    Group,
    Hash,
    Hashed,
    Hedge,
    Job,
    PartDigests,
    Prepare,
    Result,
    Threads,
    Upload,
    Word,
    group_of,
)
from cached.transfer.process import Mover, StartMover, Ticket, start_mover
from cached.transfer.waiting import Waiting

_log = structlog.get_logger(__name__)

_MAX_REQUEUES = 2
_START_FAILURES = 4
_START_DELAY_S = 0.05
_MAX_START_DELAY_S = 5.0
_TEND_S = 1.0
_SLOWEST_BYTES_PER_S = 20_000_000
_SLOWEST_ORIGIN_BYTES_PER_S = 10_000
"""A slow link's share for one of many ranges; one that is silent ends by its own timeout, and a straggler is hedged."""
_KEYED_IDLE_FACTOR = 10
_END_GRACE_S = 10.0
_ABORT_S = 10.0
HEDGES_PER_MOVER = 2
"""Threads of each for second tries."""
_PREPARED = 4
"""What is about to come may be small: more of them are started when there is work for more."""


class MoverPool:
    """Runs jobs on up to ``movers`` processes, niced by ``nice``.

    Each works on ``threads`` local jobs at a time, and all together on ``ranges`` jobs that wait for an origin (at
    least on ``threads`` each). All methods are to be called in one running event loop, and ``close`` must be awaited
    before it ends. Processes are started when those running have more than a few jobs each, and ended after
    ``idle_timeout_s`` without work. ``restarts`` counts those that died, and ``on_death`` hears of each. ``on_lost``
    hears of the files of one that was killed and cannot be ended, and what is done when it has ended after all.
    """

    def __init__(
        self,
        *,
        movers: int,
        threads: int,
        nice: int,
        idle_timeout_s: float,
        clock: Clock,
        ranges: int = 0,
        job_timeout_s: float = 300.0,
        on_death: Callable[[MoverError], None] = lambda _error: None,
        on_lost: Callable[[Collection[str], asyncio.Future[None]], None] = lambda _paths, _gone: None,
        start: StartMover = start_mover,
    ) -> None:
        self.capacity = movers * threads
        self.restarts = 0
        self._max_movers = movers
        self._spread = threads
        self._threads = Threads(threads, max(threads, -(-ranges // movers)), HEDGES_PER_MOVER)
        self._nice = nice
        self._idle_timeout_s = idle_timeout_s
        self._job_timeout_s = job_timeout_s
        self._clock = clock
        self._on_death = on_death
        self._on_lost = on_lost
        self._start = start
        self._numbers = 0
        self._waiting = Waiting()
        self._movers: list[Mover] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._delays: set[asyncio.Task[None]] = set()
        self._tender: asyncio.Task[None] | None = None
        self._starting = 0
        self._start_failures = 0
        self._prepare: Prepare | None = None
        self._closed = False
        self._idle_targets: dict[str, list[asyncio.Future[None]]] = {}
        self._lost: Counter[str] = Counter()
        """Targets of movers that were killed and cannot be ended."""

    @property
    def active_movers(self) -> int:
        """Processes that take jobs now."""
        return sum(not mover.ending for mover in self._movers)

    @property
    def in_flight(self) -> int:
        """Jobs that movers work on, including those whose caller was cancelled."""
        return sum(len(mover.in_flight) for mover in self._movers)

    @property
    def waiting(self) -> int:
        """Jobs that no mover has yet."""
        return len(self._waiting)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of all movers, those that are ending included."""
        return tuple(mover.pid for mover in self._movers)

    async def run(self, job: Job, *, key: str | None = None, priority: int = 0) -> Result:
        """The job's result, or its typed error. Jobs of lower ``priority`` go first, equals in order of arrival.

        Jobs of one ``key`` go to one mover while it lives. A job whose mover dies is given to another one, twice at
        most, but for Hash, whose state is lost: then MoverError. After ``close``: UnavailableError.

        Cancellation takes a waiting job away. A mover that reads from an origin is asked to end that; what it works on
        else goes on, unheard. Either may still write to its target until ``settled`` of that path.
        """
        ticket = self.submit(job, key=key, priority=priority)
        try:
            return await ticket.future
        except asyncio.CancelledError:
            self.withdraw(ticket)
            raise

    def submit(self, job: Job, *, key: str | None = None, priority: int = 0, avoid: Ticket | None = None) -> Ticket:
        """``run``, but its result is awaited as the ticket's ``future``; never left to itself: withdraw what is not.

        It goes to another mover than that of ``avoid``, if it can. A Hedge that lost its mover fails.
        """
        if self._closed:
            raise UnavailableError("the daemon is draining")
        self._numbers += 1
        loop = asyncio.get_running_loop()
        ticket = Ticket(
            priority, self._numbers, job, key, loop.create_future(), loop.create_future(), group_of(job),
            avoid=avoid.mover if avoid is not None else None,
        )  # fmt: skip
        self._waiting.add(ticket)
        self._dispatch()
        return ticket

    def prepare(self, job: Prepare) -> None:
        """Starts some movers, and has each one open an origin beside its other work; nobody waits for that.

        So on a cold start they come up beside each other, and while the origin is listed.
        """
        if self._closed:
            return
        for mover in self._movers:
            if not mover.ending:
                self._let_prepare(mover, job)
        missing = min(self._max_movers, _PREPARED) - self.active_movers - self._starting
        for _ in range(missing):
            self._starting += 1
            self._spawn()
        self._prepare = job if self._starting else None

    def _let_prepare(self, mover: Mover, job: Prepare) -> None:
        self._numbers += 1
        loop = asyncio.get_running_loop()
        ticket = Ticket(0, self._numbers, job, None, loop.create_future(), loop.create_future(), group_of(job))
        ticket.future.add_done_callback(_heard)
        self._hand_over(ticket, mover)

    def age_s(self, ticket: Ticket) -> float:
        """For how long a mover has been at work on it."""
        if ticket.mover is None or not ticket.mover.ready:
            return 0.0
        return self._clock.monotonic_s() - max(ticket.sent_s, ticket.mover.ready_s)

    def withdraw(self, ticket: Ticket) -> None:
        """Nobody waits for it any more. A mover that reads from an origin for it is asked to end that."""
        self._ask_to_end(ticket)
        if not ticket.future.cancel() and not ticket.future.cancelled():
            ticket.future.exception()  # it was heard

    async def abort(self, ticket: Ticket) -> Result | None:
        """Ends a Fetch or Hedge. When this returns, no mover works on it; the result, if that came first.

        A mover that does not end it within seconds is killed. Cancellation leaves it to end, unheard.
        """
        self._ask_to_end(ticket)
        ticket.deadline_s = min(ticket.deadline_s, self._clock.monotonic_s() + _ABORT_S)
        try:
            await asyncio.wait({ticket.future})
        finally:
            ticket.future.cancel()
        if ticket.future.cancelled() or ticket.future.exception() is not None:
            return None
        return ticket.future.result()

    def proceed(self, ticket: Ticket) -> None:
        """Lets a Hedge write."""
        if ticket.mover is not None:
            ticket.mover.say(ticket, Word.PROCEED)

    def _ask_to_end(self, ticket: Ticket) -> None:
        ticket.aborted = True
        if self._waiting.remove(ticket):
            ticket.future.cancel()
        elif ticket.mover is not None and ticket.group is not Group.LOCAL:
            ticket.mover.say(ticket, Word.ABORT)

    def prefer(self, path: str, offsets: Collection[int], by: int) -> None:
        """See Runner. What waits for a mover here has its turn at once."""

    async def settled(self, path: str) -> bool:
        """Returns when no mover writes to ``path``, not even for a caller that was cancelled.

        False: one that was killed and cannot be ended may still do so, so nothing may count on what is there.
        """
        while any(_target(ticket.job) == path for mover in self._movers for ticket in mover.in_flight.values()):
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._idle_targets.setdefault(path, []).append(future)
            await future
        return not self._lost[path]

    async def close(self, timeout_s: float) -> None:
        """Refuses what waits, lets movers finish for up to ``timeout_s``, then kills them. Idempotent; none is left."""
        self._closed = True
        self._fail_queue(UnavailableError("the daemon is draining"))
        for mover in self._movers:
            if not mover.ending:
                mover.finish()
        for delay in self._delays:
            delay.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for mover in self._movers:
            mover.kill("the daemon ended it")
        await asyncio.gather(*self._tasks)
        if self._tender is not None:
            self._tender.cancel()
            with suppress(asyncio.CancelledError):
                await self._tender
            self._tender = None

    def _fail_queue(self, error: CachedError) -> None:
        for ticket in self._waiting.drain():
            if not ticket.future.done():
                ticket.future.set_exception(error)

    def _dispatch(self) -> None:
        """Gives what waits to movers with room; starts further movers when there is more than a few jobs for each."""
        for group in Group:
            self._hand_out(group)
        while self.active_movers + self._starting < self._max_movers and self._crowded():
            self._starting += 1
            self._spawn()

    def _hand_out(self, group: Group) -> None:
        queue = self._waiting.of(group)
        position, limit = 0, self._threads.of(group)
        while position < len(queue):
            room = [mover for mover in self._movers if not mover.ending and mover.loads[group] < limit]
            if not room:
                return
            home = self._home(queue[position].key)
            if home is None or home in room:
                ticket = queue.pop(position)
                self._hand_over(ticket, home or min(room, key=lambda mover: _reluctance(mover, ticket)))
            else:
                position += 1

    def _crowded(self) -> bool:
        jobs = sum(len(mover.in_flight) for mover in self._movers if not mover.ending)
        jobs += sum(self._home(ticket.key) is None for group in Group for ticket in self._waiting.of(group))
        return jobs > self._spread * (self.active_movers + self._starting)

    def _home(self, key: str | None) -> Mover | None:
        if key is None:
            return None
        return next((mover for mover in self._movers if key in mover.keys and not mover.ending), None)

    def _hand_over(self, ticket: Ticket, mover: Mover) -> None:
        slowest = _SLOWEST_ORIGIN_BYTES_PER_S if isinstance(ticket.job, Fetch | Hedge) else _SLOWEST_BYTES_PER_S
        allowance_s = self._job_timeout_s + _size_bytes(ticket.job) / slowest
        ticket.sent_s = self._clock.monotonic_s()
        ticket.deadline_s = ticket.sent_s + allowance_s
        if ticket.key is not None:
            mover.keys.add(ticket.key)
        mover.send(ticket)

    def _spawn(self) -> None:
        # A mover outlives the request that it was started for: what it logs is not a part of that.
        task = asyncio.create_task(self._live(), context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self._tender is None:
            self._tender = asyncio.create_task(self._tend(), context=contextvars.Context())

    async def _live(self) -> None:
        """The life of one mover, from its start to what becomes of its jobs."""
        mover: Mover | None = None
        try:
            await self._back_off()
            if not self._closed:
                mover = await self._start(self._threads, self._nice, self._clock.monotonic_s())
        except OSError as error:
            self._start_failed(f"cannot start a mover: {error}")
        finally:
            self._starting -= 1
        if mover is None:
            self._dispatch()
            return
        self._movers.append(mover)
        if self._closed:
            mover.finish()
        elif self._prepare is not None:
            self._let_prepare(mover, self._prepare)
            self._prepare = self._prepare if self._starting else None
        self._dispatch()
        try:
            await mover.converse(
                lambda number, answer: self._answered(mover, number, answer), lambda: self._started(mover)
            )
        finally:
            self._movers.remove(mover)
            self._buried(mover)

    async def _back_off(self) -> None:
        if not self._start_failures:
            return
        delay_s = min(_START_DELAY_S * 2**self._start_failures, _MAX_START_DELAY_S)
        delay = asyncio.create_task(self._clock.sleep(delay_s))
        self._delays.add(delay)
        await asyncio.wait({delay})
        self._delays.discard(delay)

    def _started(self, mover: Mover) -> None:
        mover.ready_s = self._clock.monotonic_s()
        self._start_failures = 0

    def _start_failed(self, why: str) -> None:
        self._start_failures += 1
        _log.error("mover.start_failed", failures=self._start_failures, cause=why)
        if self._start_failures >= _START_FAILURES and not self.active_movers:
            self._fail_queue(MoverError(f"movers keep dying: {why}", hint="see the daemon's log; it goes on trying"))

    def _answered(self, mover: Mover, number: int, answer: Result | CachedError | Word) -> None:
        ticket = mover.in_flight.get(number)
        if ticket is None:
            raise MoverError(f"a mover answered request {number}, which it was not asked")
        if isinstance(answer, Word):
            if not ticket.arrived.done():
                ticket.arrived.set_result(None)
            return
        mover.take_back(number)
        if not mover.in_flight:
            mover.idle_since_s = self._clock.monotonic_s()
        ended = isinstance(answer, CachedError) or (isinstance(answer, Hashed) and answer.sha256)
        if ticket.key is not None and ended:
            mover.keys.discard(ticket.key)
        self._settle(ticket)
        if not ticket.future.done():
            if isinstance(answer, CachedError):
                ticket.future.set_exception(answer)
            else:
                ticket.future.set_result(answer)
        if not self._closed:
            self._dispatch()

    def _buried(self, mover: Mover) -> None:
        """After a mover's end: its jobs go to others, or fail."""
        tickets = sorted(mover.in_flight.values(), key=lambda ticket: ticket.rank)
        for ticket in tickets:
            mover.take_back(ticket.number)
        unexpected = not self._closed and (bool(tickets) or bool(mover.fault) or not mover.ending)
        cause = ": ".join([f"a mover died ({mover.death()})", *list(mover.last_lines)[-3:]])
        if mover.lost is not None:
            self._give_up(tickets, mover.lost)
        for ticket in tickets:
            self._settle(ticket)
            self._again(ticket, mover, cause)
        if unexpected:
            self.restarts += 1
            self._on_death(
                MoverError(
                    f"mover {mover.pid} died: {mover.death()}",
                    hint="see mover.stderr in the log, and dmesg",
                    pid=mover.pid, jobs=len(tickets), last_words=" | ".join(list(mover.last_lines)[-3:]),
                )
            )  # fmt: skip
            if not mover.ready:
                self._start_failed(cause)
        if not self._closed:
            self._dispatch()

    def _give_up(self, tickets: list[Ticket], gone: asyncio.Future[None]) -> None:
        """They are not done by another: what this one still does to their targets would go unnoticed."""
        targets = Counter(path for ticket in tickets if (path := _target(ticket.job)) is not None)
        self._lost.update(targets)
        gone.add_done_callback(lambda _gone: self._lost.subtract(targets))
        refs = [getattr(ticket.job, name, None) for ticket in tickets for name in ("source", "target")]
        self._on_lost({ref.path for ref in refs if isinstance(ref, FileRef)}, gone)

    def _again(self, ticket: Ticket, mover: Mover, cause: str) -> None:
        if ticket.future.done():
            return
        # One that died before it could take a job says nothing about its jobs; _start_failed bounds those deaths.
        ticket.attempts += mover.ready
        stays = isinstance(ticket.job, Hash | Hedge) or ticket.aborted or mover.lost is not None
        if self._closed or stays or ticket.attempts > _MAX_REQUEUES:
            kind = type(ticket.job).__name__
            ticket.future.set_exception(MoverError(f"{kind} was lost: {cause}", attempts=ticket.attempts))
        else:
            self._waiting.add(ticket)

    def _settle(self, ticket: Ticket) -> None:
        path = _target(ticket.job)
        if path is not None:
            for future in self._idle_targets.pop(path, ()):
                if not future.done():
                    future.set_result(None)

    async def _tend(self) -> None:
        """Ends movers that idle, and kills those that hang."""
        while True:
            await self._clock.sleep(min(_TEND_S, self._idle_timeout_s / 2))
            now_s = self._clock.monotonic_s()
            for mover in self._movers:
                late = [ticket for ticket in mover.in_flight.values() if ticket.deadline_s < now_s]
                idle_s = 0.0 if mover.in_flight else now_s - mover.idle_since_s
                if late:
                    mover.kill(f"it hung: {type(late[0].job).__name__} was not answered in time")
                elif mover.ending and idle_s > self._idle_timeout_s + _END_GRACE_S:
                    mover.kill("it did not end when it was told to")
                elif not mover.ending and idle_s > self._idle_timeout_s * (_KEYED_IDLE_FACTOR if mover.keys else 1):
                    mover.finish()


def _reluctance(mover: Mover, ticket: Ticket) -> tuple[bool, bool, int]:
    return mover is ticket.avoid, not mover.ready, len(mover.in_flight)


def _target(job: Job) -> str | None:
    if isinstance(job, Hedge):
        return job.fetch.target.path
    return job.target.path if isinstance(job, Fetch | Copy | Clear) else None


def _size_bytes(job: Job) -> int:
    if isinstance(job, Hedge):
        return job.fetch.length_bytes
    if isinstance(job, Clear):
        return job.target.size_bytes
    if isinstance(job, PartDigests):
        return sum(job.part_sizes_bytes)
    if isinstance(job, Upload):
        return job.source.size_bytes
    return getattr(job, "length_bytes", 0)


def _heard(future: asyncio.Future[Result]) -> None:
    """What it ended with is of no interest: whoever needs the origin meets the same."""
    if not future.cancelled():
        future.exception()
