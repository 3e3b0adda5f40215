"""An event loop whose time is virtual: it never waits, it goes to the next moment. What is said to run in threads runs
at a moment of its own, in the loop. A history may stop it between any two steps, as SIGKILL would."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from contextvars import Context, copy_context
from heapq import heappop, heappush
from typing import Any

WALL_START_S = 1_790_000_000.0
_THREAD_S = 0.05
_MAX_STEPS = 2_000_000
_LOOK_EVERY = 20


class StuckError(Exception):
    """Nothing can ever happen again, or too much does: some wait has no end."""


class _Handle(asyncio.TimerHandle):
    """Of what is called soon or later, without what asyncio keeps for debugging."""

    __slots__ = ()

    def __init__(
        self, callback: Callable[..., Any], args: Any, loop: SimLoop, context: Context | None, when_s: float
    ) -> None:
        self._context = copy_context() if context is None else context  # type: ignore[misc]
        self._loop = loop
        self._callback = callback  # type: ignore[misc]
        self._args = args  # type: ignore[misc]
        self._cancelled = False
        self._source_traceback = None
        self._when = when_s
        self._scheduled = False


class SimLoop(asyncio.BaseEventLoop):
    """Deterministic for a seed: what is to be called goes in the order in which it was asked for, timers in that of
    their times. ``kill_at``: before that step it stops for good.

    Time only passes when there is nothing left to do at a moment. asyncio's own loop does the same work in rounds, with
    files to be looked at in between, and takes a third of a history's time for it.
    """

    def __init__(self, rng: random.Random, now_s: float) -> None:
        super().__init__()
        self._rng = rng
        self._now_s = now_s
        self._soon: deque[_Handle] = deque()
        self._timers: list[tuple[float, int, _Handle]] = []
        self._timer_count = 0
        self.steps = 0
        self.kill_at: int | None = None
        self.killed = False
        self.on_step: Callable[[], None] = lambda: None
        """Called between steps, now and then."""

    def time(self) -> float:
        """Virtual seconds."""
        return self._now_s

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> Any:  # type: ignore[override]
        """See asyncio."""
        handle = _Handle(callback, args, self, context, self._now_s)
        self._soon.append(handle)
        return handle

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> Any:  # type: ignore[override]
        """See asyncio."""
        handle = _Handle(callback, args, self, context, when)
        self._timer_count += 1
        heappush(self._timers, (when, self._timer_count, handle))
        return handle

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> Any:  # type: ignore[override]
        """See asyncio."""
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:  # type: ignore[override]
        """Runs it at some moment from now on, and answers at a later one: other tasks see what lies in between."""
        del executor
        future = self.create_future()
        before_s, after_s = (self._rng.choice((0.0, 0.0, self._rng.random() * _THREAD_S)) for _ in range(2))

        def answer(error: BaseException | None, result: Any) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        def work() -> None:
            try:
                result, error = func(*args), None
            except Exception as failure:
                result, error = None, failure
            self.call_later(after_s, answer, error, result)

        self.call_later(before_s, work)
        return future

    def _write_to_self(self) -> None: ...

    def _run_once(self) -> None:
        """Until it is stopped."""
        soon, timers = self._soon, self._timers
        while not self._stopping:  # type: ignore[attr-defined]
            if soon:
                handle = soon.popleft()
            elif timers:
                when_s, _, handle = heappop(timers)
                self._now_s = max(self._now_s, when_s)
            else:
                raise StuckError("every task waits, and no timer is set")
            if handle._cancelled:
                continue
            self.steps += 1
            if self.steps == self.kill_at:
                self.killed = True
                return self.stop()
            handle._run()
            if not self.steps % _LOOK_EVERY:
                self.on_step()
                if self.steps > _MAX_STEPS:
                    raise StuckError(f"{_MAX_STEPS} steps: something spins")
        return None


class SimClock:
    """The daemon's clock, on the loop's time."""

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop

    def monotonic_s(self) -> float:
        """See Clock."""
        return self._loop.time()

    def wall_s(self) -> float:
        """See Clock."""
        return WALL_START_S + self._loop.time()

    async def sleep(self, delay_s: float) -> None:
        """See Clock."""
        await asyncio.sleep(delay_s)
