"""Runs the shapes that users will ask for before they do: first and stable times of each."""

from __future__ import annotations

import json
import logging
import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from cached_client.coldstart.picture import aligned, seconds
from cached_client.errors import InvalidRequestError, WarmUpError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from cached_client.coldstart.timeline import Phase, Timeline

_log = logging.getLogger("cached_client")

WINDOW = 3
"""So many of the last times must agree for a shape to be stable."""

TOLERANCE = 0.25
"""How far each of them may be from their median. Even a warm model's times scatter by a tenth or two."""


@dataclass(frozen=True, slots=True)
class ShapeTimes:
    """How one shape went.

    Attributes:
        batch_size, length: the shape.
        times_s: of each call that returned.
        stable: the last three times lie within a quarter of their median.
        error: what the call raised, as text; empty if it did not. The shape was not called again.
    """

    batch_size: int
    length: int
    times_s: tuple[float, ...]
    stable: bool
    error: str = ""

    @property
    def name(self) -> str:
        """``b8.s128``: also the name of its phase in a timeline."""
        return f"b{self.batch_size}.s{self.length}"

    @property
    def first_s(self) -> float | None:
        """The first call, with all that is done only once; None if it failed."""
        return self.times_s[0] if self.times_s else None

    @property
    def stable_s(self) -> float | None:
        """The median of the last three calls, or of as many as there were; see ``stable``."""
        return statistics.median(self.times_s[-WINDOW:]) if self.times_s else None


@dataclass(frozen=True, slots=True)
class WarmUp:
    """A warm-up that was run."""

    shapes: tuple[ShapeTimes, ...]
    total_s: float

    @property
    def failed(self) -> tuple[ShapeTimes, ...]:
        """The shapes whose call raised."""
        return tuple(shape for shape in self.shapes if shape.error)

    @property
    def passed(self) -> bool:
        """Every shape could be run. One that did not get stable has passed: it is slow, not wrong."""
        return not self.failed

    def check(self) -> None:
        """Raises WarmUpError if a shape failed."""
        if self.failed:
            names = ", ".join(shape.name for shape in self.failed)
            first = self.failed[0]
            raise WarmUpError(
                f"the warm-up failed for {names}: {first.error}",
                hint="leave out shapes that this worker is not to serve, or give it the memory for them",
                shapes=names,
                cause=first.error,
            )

    def table(self) -> str:
        """One line for each shape."""
        heads = ("SHAPE", "BATCH", "LENGTH", "FIRST", "STABLE", "CALLS", "")
        rows = [
            (
                shape.name,
                str(shape.batch_size),
                str(shape.length),
                "-" if shape.first_s is None else seconds(shape.first_s),
                "-" if shape.stable_s is None else seconds(shape.stable_s),
                str(len(shape.times_s)),
                f"failed: {shape.error}" if shape.error else "" if shape.stable else "not stable",
            )
            for shape in self.shapes
        ]
        return aligned((heads, *rows))

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        shapes = [
            {**asdict(shape), "name": shape.name, "first_s": shape.first_s, "stable_s": shape.stable_s}
            for shape in self.shapes
        ]
        return {"passed": self.passed, "total_s": self.total_s, "shapes": shapes}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)


def warm_up(
    call: Callable[[int, int], object],
    *,
    batch_sizes: Iterable[int] = (1,),
    lengths: Iterable[int] = (1,),
    iterations: int = 10,
    synchronize: Callable[[], object] | None = None,
    timeline: Timeline | None = None,
    keep_going: Callable[[], bool] = lambda: True,
) -> WarmUp:
    """Calls ``call(batch_size, length)`` for every pair of the two, until its times are stable.

    A shape is stable when its last three times lie within a quarter of their median; at most ``iterations`` calls are
    made. ``call`` must return when the result is there; where it only queues the work, as CUDA does, give
    ``synchronize`` (``torch.cuda.synchronize``). The largest shapes come first, so that memory is taken once and
    whatever does not fit shows at once.

    A shape whose call raises is reported with its error and not called again; the others are run, and
    `WarmUp.check` raises. ``timeline`` gets a phase ``warmup`` with a part for each shape. ``keep_going`` is asked
    before each call; False ends the warm-up, and the shapes that are left count as failed.
    """
    shapes = _shapes(tuple(batch_sizes), tuple(lengths), iterations)
    began_s = time.monotonic()
    done: list[ShapeTimes] = []
    with _phase(timeline, "warmup"):
        for batch_size, length in shapes:
            with _phase(timeline, f"b{batch_size}.s{length}") as phase:
                shape = _run(call, batch_size, length, iterations, synchronize, keep_going)
                if shape.error and phase is not None:
                    phase.end(failed=True)
            if shape.error:
                _log.warning("the warm-up of shape %s failed: %s", shape.name, shape.error)
            done.append(shape)
    return WarmUp(tuple(done), time.monotonic() - began_s)


def _shapes(batch_sizes: Sequence[int], lengths: Sequence[int], iterations: int) -> list[tuple[int, int]]:
    for what, values in (("batch size", batch_sizes), ("length", lengths), ("number of iterations", (iterations,))):
        if not values or any(value < 1 for value in values):
            raise InvalidRequestError(f"a {what} of 1 or more is needed, not {list(values)}", value=list(values))
    shapes = {(batch_size, length) for batch_size in batch_sizes for length in lengths}
    return sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape), reverse=True)


def _phase(timeline: Timeline | None, name: str) -> AbstractContextManager[Phase | None]:
    return timeline.phase(name) if timeline is not None else nullcontext()


def _run(
    call: Callable[[int, int], object],
    batch_size: int,
    length: int,
    iterations: int,
    synchronize: Callable[[], object] | None,
    keep_going: Callable[[], bool],
) -> ShapeTimes:
    times_s: list[float] = []
    while len(times_s) < iterations and not _stable(times_s):
        if not keep_going():
            return ShapeTimes(batch_size, length, tuple(times_s), False, "the warm-up was ended")
        began_s = time.perf_counter()
        try:
            call(batch_size, length)
            if synchronize is not None:
                synchronize()
        except Exception as error:  # noqa: BLE001 whatever the model raises belongs to the shape that it raised it for
            text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            return ShapeTimes(batch_size, length, tuple(times_s), False, text)
        times_s.append(time.perf_counter() - began_s)
    return ShapeTimes(batch_size, length, tuple(times_s), _stable(times_s))


def _stable(times_s: Sequence[float]) -> bool:
    """The first call never counts: it is what a warm-up is there to take away."""
    last = times_s[1:][-WINDOW:]
    middle_s = statistics.median(last) if last else 0.0
    return len(last) == WINDOW and all(abs(time_s - middle_s) <= TOLERANCE * middle_s for time_s in last)
