"""How many ranges of one origin are in flight: found by measuring. Pure; time is given."""

from __future__ import annotations

from dataclasses import dataclass

_WORTH = 1.10
"""A wider window must move this much more, …"""
_NO_LOSS = 0.98
"""… a narrower one at least this much, to be kept."""
_EPOCH_S = 0.3
_EPOCH_RANGES = 12
_FIRST_PAUSE_S = 2.0
_MAX_PAUSE_S = 60.0
_CALM_S = 15.0
_SHRINK = 0.7


@dataclass(slots=True)
class _Window:
    """Measured while the width stays the same and is used up; open from the first range that was started so."""

    since_s: float | None = None
    bytes: int = 0
    ranges: int = 0


class Width:
    """Climbs towards the ``limit`` with the highest throughput, preferring the narrower of equals.

    From ``start`` it doubles as long as that pays, then tries a little more and a little less from time to time, seldom
    where neither is better. Ranges that are refused (the origin says slow down) make it narrower at once.
    """

    def __init__(self, *, start: int, high: int, low: int = 2) -> None:
        self._low, self._high = min(low, high), high
        self.limit = self._within(start)
        self._era = 0
        self._window = _Window()
        self._base: tuple[int, float] | None = None
        self._upwards = True
        self._factor = 2.0
        self._pause_s = _FIRST_PAUSE_S
        self._next_trial_s = 0.0
        self._refused_s = float("-inf")

    def started(self) -> int:
        """A range goes out. Give what this returns to ``finished``."""
        return self._era

    def finished(self, now_s: float, era: int, size_bytes: int, *, full: bool) -> None:
        """A range came in. ``full``: as many as allowed were in flight, so the origin could show what it can."""
        window = self._window
        if not full:
            self._window = _Window()
        elif window.since_s is None:
            # Ranges of an earlier width still took part of what there is.
            window.since_s = now_s if era == self._era else None
        else:
            window.bytes += size_bytes
            window.ranges += 1
            span_s = now_s - window.since_s
            if span_s >= _EPOCH_S and window.ranges >= max(_EPOCH_RANGES, 2 * self.limit):
                self._window = _Window(since_s=now_s)
                self._measured(now_s, window.bytes / span_s)

    def refused(self, now_s: float) -> None:
        """The origin asked for less. Refusals of one moment count once."""
        if now_s - self._refused_s < 1.0:
            return
        self._refused_s = now_s
        self._base = None
        self._next_trial_s = now_s + _CALM_S
        self._factor = 1.5
        self._set(int(self.limit * _SHRINK))

    def _measured(self, now_s: float, rate: float) -> None:
        if self._base is None:
            if now_s >= self._next_trial_s:
                self._try_from(self.limit, rate, now_s)
            return
        limit, base_rate = self._base
        if rate >= base_rate * (_WORTH if self._upwards else _NO_LOSS):
            self._pause_s = _FIRST_PAUSE_S
            self._try_from(self.limit, rate, now_s)
            return
        self._base = None
        self._factor = 1.5
        self._upwards = not self._upwards
        self._pause(now_s)
        self._set(limit)

    def _try_from(self, limit: int, rate: float, now_s: float) -> None:
        trial = self._within(
            max(limit + 1, int(limit * self._factor)) if self._upwards else min(limit - 1, limit * 3 // 4)
        )
        if trial == limit:
            self._base = None
            self._upwards = not self._upwards
            self._pause(now_s)
            return
        self._base = limit, rate
        self._set(trial)

    def _pause(self, now_s: float) -> None:
        self._next_trial_s = now_s + self._pause_s
        self._pause_s = min(self._pause_s * 1.5, _MAX_PAUSE_S)

    def _set(self, limit: int) -> None:
        self.limit = self._within(limit)
        self._era += 1
        self._window = _Window()

    def _within(self, limit: int) -> int:
        return max(self._low, min(self._high, limit))
