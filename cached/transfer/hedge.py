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

    That is max(1 s, three times the 95th percentile) of what the last ranges took that were not much shorter, once 20
    such are known, and one in fifty (but always one).
    """

    def __init__(self) -> None:
        self._last: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)
        self._ranges = 0
        self._hedges = 0
        self._ages_s: dict[int, float] = {}

    def timed(self, size_bytes: int, duration_s: float) -> None:
        """A range came in."""
        self._last.append((size_bytes, duration_s))
        self._ranges += 1
        self._ages_s.clear()

    def stalled_after_s(self, size_bytes: int) -> float:
        """The age, for a range of this size; infinite while too little is known."""
        age_s = self._ages_s.get(size_bytes)
        if age_s is None:
            age_s = self._ages_s[size_bytes] = self._age_s(size_bytes)
        return age_s

    def _age_s(self, size_bytes: int) -> float:
        known = sorted(duration_s for size, duration_s in self._last if 2 * size >= size_bytes)
        if len(known) < _MIN_RANGES:
            return math.inf
        return max(_MIN_AGE_S, _FACTOR * known[math.ceil(0.95 * len(known)) - 1])

    def take(self) -> bool:
        """Whether one more may be hedged now; it counts as hedged then."""
        allowed = self._hedges < max(1, int(_SHARE * self._ranges))
        self._hedges += allowed
        return allowed
