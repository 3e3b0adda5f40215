"""The pool of mover processes: started on demand, ended when idle, replaced when they die. Runs in the loop."""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Callable
from contextlib import suppress

import structlog

from cached.clock import Clock
from cached.errors import CachedError, MoverError, UnavailableError
from cached.transfer.jobs import Clear, Copy, Fetch, Hash, Hashed, Job, PartDigests, Result
from cached.transfer.process import MoverProcess, Ticket, start_mover

_log = structlog.get_logger(__name__)

_MAX_REQUEUES = 2
_START_FAILURES = 4
_START_DELAY_S = 0.05
_MAX_START_DELAY_S = 5.0
_TEND_S = 1.0
_SLOWEST_BYTES_PER_S = 20_000_000
_KEYED_IDLE_FACTOR = 10
_END_GRACE_S = 10.0


class MoverPool:
    """Runs jobs on up to ``movers`` processes of ``threads`` threads each, niced by ``nice``.

    All methods are to be called in one running event loop, and ``close`` must be awaited before it ends. Processes
    are started when there is work that those running cannot take at once, and ended after ``idle_timeout_s`` without
    work. ``restarts`` counts those that died, and ``on_restart`` hears of each.
    """

    def __init__(
        self,
        *,
        movers: int,
        threads: int,
        nice: int,
        idle_timeout_s: float,
        clock: Clock,
        job_timeout_s: float = 300.0,
        on_restart: Callable[[], None] = lambda: None,
    ) -> None:
        self.capacity = movers * threads
        self.restarts = 0
        self._max_movers = movers
        self._threads = threads
        self._nice = nice
        self._idle_timeout_s = idle_timeout_s
        self._job_timeout_s = job_timeout_s
        self._clock = clock
        self._on_restart = on_restart
        self._numbers = 0
        self._queue: list[Ticket] = []
        self._movers: list[MoverProcess] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._delays: set[asyncio.Task[None]] = set()
        self._tender: asyncio.Task[None] | None = None
        self._starting = 0
        self._start_failures = 0
        self._closed = False
        self._idle_targets: dict[str, list[asyncio.Future[None]]] = {}

    @property
    def active_movers(self) -> int:
        """Processes that take jobs now."""
        return sum(not mover.ending for mover in self._movers)

    @property
    def in_flight(self) -> int:
        """Jobs that movers work on, including those whose caller was cancelled."""
        return sum(len(mover.in_flight) for mover in self._movers)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of all movers, those that are ending included."""
        return tuple(mover.pid for mover in self._movers)

    async def run(self, job: Job, *, key: str | None = None, priority: int = 0) -> Result:
        """The job's result, or its typed error. Jobs of lower ``priority`` go first, equals in order of arrival.

        Jobs of one ``key`` go to one mover while it lives. A job whose mover dies is given to another one, twice at
        most, but for Hash, whose state is lost: then MoverError. After ``close``: UnavailableError.

        Cancellation takes a waiting job away. One that a mover works on goes on, unheard: it may still write to its
        target until ``settled`` of that path.
        """
        if self._closed:
            raise UnavailableError("the daemon is draining")
        self._numbers += 1
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        ticket = Ticket(priority, self._numbers, job, key, future)
        self._enqueue(ticket)
        self._dispatch()
        try:
            return await future
        except asyncio.CancelledError:
            if ticket in self._queue:
                self._queue.remove(ticket)
            raise

    async def settled(self, path: str) -> None:
        """Returns when no mover writes to ``path``, not even for a caller that was cancelled."""
        while any(_target(ticket.job) == path for mover in self._movers for ticket in mover.in_flight.values()):
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._idle_targets.setdefault(path, []).append(future)
            await future

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

    def _enqueue(self, ticket: Ticket) -> None:
        bisect.insort(self._queue, ticket, key=lambda queued: queued.rank)

    def _fail_queue(self, error: CachedError) -> None:
        queue, self._queue = self._queue, []
        for ticket in queue:
            if not ticket.future.done():
                ticket.future.set_exception(error)

    def _dispatch(self) -> None:
        """Gives what waits to movers with room; starts another mover when there is not enough room."""
        waiting: list[Ticket] = []
        for position, ticket in enumerate(self._queue):
            room = [mover for mover in self._movers if not mover.ending and len(mover.in_flight) < self._threads]
            if not room:
                waiting += self._queue[position:]
                break
            home = self._home(ticket.key)
            if home is None:
                self._hand_over(ticket, min(room, key=lambda mover: len(mover.in_flight)))
            elif home in room:
                self._hand_over(ticket, home)
            else:
                waiting.append(ticket)
        self._queue = waiting
        homeless = sum(self._home(ticket.key) is None for ticket in waiting)
        while homeless > self._starting * self._threads and self.active_movers + self._starting < self._max_movers:
            self._starting += 1
            self._spawn()

    def _home(self, key: str | None) -> MoverProcess | None:
        if key is None:
            return None
        return next((mover for mover in self._movers if key in mover.keys and not mover.ending), None)

    def _hand_over(self, ticket: Ticket, mover: MoverProcess) -> None:
        allowance_s = self._job_timeout_s + _size_bytes(ticket.job) / _SLOWEST_BYTES_PER_S
        ticket.deadline_s = self._clock.monotonic_s() + allowance_s
        if ticket.key is not None:
            mover.keys.add(ticket.key)
        mover.send(ticket)

    def _spawn(self) -> None:
        task = asyncio.create_task(self._live())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self._tender is None:
            self._tender = asyncio.create_task(self._tend())

    async def _live(self) -> None:
        """The life of one mover, from its start to what becomes of its jobs."""
        mover: MoverProcess | None = None
        try:
            await self._back_off()
            if not self._closed:
                mover = await start_mover(self._threads, self._nice, self._clock.monotonic_s())
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
        self._dispatch()
        try:
            await mover.converse(lambda number, answer: self._answered(mover, number, answer), self._started)
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

    def _started(self) -> None:
        self._start_failures = 0

    def _start_failed(self, why: str) -> None:
        self._start_failures += 1
        _log.error("mover.start_failed", failures=self._start_failures, cause=why)
        if self._start_failures >= _START_FAILURES and not self.active_movers:
            self._fail_queue(MoverError(f"movers keep dying: {why}", hint="see the daemon's log; it goes on trying"))

    def _answered(self, mover: MoverProcess, number: int, answer: Result | CachedError) -> None:
        ticket = mover.in_flight.pop(number, None)
        if ticket is None:
            raise MoverError(f"a mover answered request {number}, which it was not asked")
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

    def _buried(self, mover: MoverProcess) -> None:
        """After a mover's end: its jobs go to others, or fail."""
        tickets = sorted(mover.in_flight.values(), key=lambda ticket: ticket.rank)
        mover.in_flight.clear()
        unexpected = not self._closed and (bool(tickets) or bool(mover.fault) or not mover.ending)
        cause = ": ".join([f"a mover died ({mover.death()})", *list(mover.last_lines)[-3:]])
        for ticket in tickets:
            self._settle(ticket)
            self._again(ticket, mover, cause)
        if unexpected:
            self.restarts += 1
            _log.error("mover.died", pid=mover.pid, cause=mover.death(), jobs=len(tickets), ready=mover.ready)
            self._on_restart()
            if not mover.ready:
                self._start_failed(cause)
        if not self._closed:
            self._dispatch()

    def _again(self, ticket: Ticket, mover: MoverProcess, cause: str) -> None:
        if ticket.future.done():
            return
        # One that died before it could take a job says nothing about its jobs; _start_failed bounds those deaths.
        ticket.attempts += mover.ready
        if self._closed or isinstance(ticket.job, Hash) or ticket.attempts > _MAX_REQUEUES:
            kind = type(ticket.job).__name__
            ticket.future.set_exception(MoverError(f"{kind} was lost: {cause}", attempts=ticket.attempts))
        else:
            self._enqueue(ticket)

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


def _target(job: Job) -> str | None:
    return job.target.path if isinstance(job, Fetch | Copy | Clear) else None


def _size_bytes(job: Job) -> int:
    if isinstance(job, Clear):
        return job.target.size_bytes
    if isinstance(job, PartDigests):
        return sum(job.part_sizes_bytes)
    return getattr(job, "length_bytes", 0)
