"""When a range that takes too long is fetched a second time. Pure."""

from __future__ import annotations

import math
from collections import deque

_MIN_RANGES = 20
_REMEMBERED = 200
_MIN_AGE_S = 1.0
_FACTOR = 3.0
_SHARE = 0.02


class HedgePolicy:
    """For the ranges of one origin: from what age one is taken for stalled, and how many may be hedged.

    That is max(1 s, three times the 95th percentile) of what the last ranges took, once 20 are known, and one in fifty
    (but always one).
    """

    def __init__(self) -> None:
        self._durations_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._ranges = 0
        self._hedges = 0
        self._age_s: float | None = None

    def timed(self, duration_s: float) -> None:
        """A range came in."""
        self._durations_s.append(duration_s)
        self._ranges += 1
        self._age_s = None

    def stalled_after_s(self) -> float:
        """The age; infinite while too little is known."""
        if len(self._durations_s) < _MIN_RANGES:
            return math.inf
        if self._age_s is None:
            known = sorted(self._durations_s)
            self._age_s = max(_MIN_AGE_S, _FACTOR * known[math.ceil(0.95 * len(known)) - 1])
        return self._age_s

    def take(self) -> bool:
        """Whether one more may be hedged now; it counts as hedged then."""
        allowed = self._hedges < max(1, int(_SHARE * self._ranges))
        self._hedges += allowed
        return allowed
