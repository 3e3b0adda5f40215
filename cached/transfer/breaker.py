"""Whether an origin that failed is asked again: after a pause, which grows while it fails. Pure; time is given."""

from __future__ import annotations

import random

_FAILURES = 3
_FIRST_PAUSE_S = 5.0
_MAX_PAUSE_S = 300.0


class Breaker:
    """Of one origin. After three failures in a row it is left alone, for 5 s at first and 5 minutes at most.

    Then one request tries whether it is back, while others still go elsewhere. Pauses are jittered: a fleet must not
    come back in step.
    """

    def __init__(self) -> None:
        self.cause = ""
        self._failures = 0
        self._pauses = 0
        self._until_s = 0.0
        self._trying = False

    @property
    def is_open(self) -> bool:
        """It is left alone, or being tried."""
        return self._pauses > 0

    def left_s(self, now_s: float) -> float:
        """For how long it is still left alone."""
        return max(0.0, self._until_s - now_s) if self.is_open else 0.0

    def take(self, now_s: float) -> bool:
        """Whether to ask it now. Then tell ``succeeded`` or ``failed``, or ``gave_up`` if neither can be said."""
        if not self.is_open:
            return True
        if self._trying or now_s < self._until_s:
            return False
        self._trying = True
        return True

    def gave_up(self) -> None:
        """What it was asked was cancelled, or failed for a reason of our own."""
        self._trying = False

    def succeeded(self) -> bool:
        """Whether that ended a pause."""
        ended = self.is_open
        self.cause = ""
        self._failures = self._pauses = 0
        self._trying = False
        return ended

    def failed(self, now_s: float, cause: str, *, at_once: bool = False) -> bool:
        """Whether that began a pause. ``at_once``: once is enough. What fails during a pause was asked before it."""
        self._failures += 1
        during = self.is_open and not self._trying
        self._trying = False
        if during or (not self.is_open and not at_once and self._failures < _FAILURES):
            return False
        self.cause = cause
        self._pauses += 1
        pause_s = min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** (self._pauses - 1))
        self._until_s = now_s + pause_s * random.uniform(0.75, 1.25)  # noqa: S311 not a secret
        return self._pauses == 1
