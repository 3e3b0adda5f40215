"""An event loop whose time is virtual: it never waits, it goes to the next moment. What is said to run in threads runs
at a moment of its own, in the loop. A history may stop it between any two steps, as SIGKILL would."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

WALL_START_S = 1_790_000_000.0
_THREAD_S = 0.05
_MAX_ITERATIONS = 400_000


class StuckError(Exception):
    """Nothing can ever happen again, or too much does: some wait has no end."""


class _NoFiles:
    """The loop's selector: no file ever becomes ready, and waiting is going to the next timer."""

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise StuckError("every task waits, and no timer is set")
        self._loop.advance(timeout)
        return []

    def close(self) -> None: ...


class SimLoop(asyncio.BaseEventLoop):
    """Deterministic for a seed. ``kill_at``: after so many iterations it stops for good."""

    def __init__(self, rng: random.Random, now_s: float) -> None:
        super().__init__()
        self._selector = _NoFiles(self)
        self._rng = rng
        self._now_s = now_s
        self.iterations = 0
        self.kill_at: int | None = None
        self.killed = False

    def time(self) -> float:
        """Virtual seconds."""
        return self._now_s

    def advance(self, delay_s: float) -> None:
        """Goes on in time."""
        self._now_s += delay_s

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

    def _process_events(self, event_list: Any) -> None: ...

    def _write_to_self(self) -> None: ...

    def _run_once(self) -> None:
        self.iterations += 1
        if self.kill_at is not None and self.iterations >= self.kill_at:
            self.killed = True
            self.stop()
            return
        if self.iterations > _MAX_ITERATIONS:
            raise StuckError(f"{_MAX_ITERATIONS} iterations: something spins")
        super()._run_once()  # type: ignore[misc]


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
