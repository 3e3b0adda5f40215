"""How fast bytes arrive: what came of late, in steps of time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

WINDOW_S = 15.0
"""Long enough that a slow origin's chunks of 16 MiB make a steady figure, short enough to be about now."""
_STEP_S = 0.25


class Pace:
    """Arrivals of the last window. Times are monotonic, and given by the caller."""

    def __init__(self, now_s: float) -> None:
        self.began_s = now_s
        self._steps: deque[tuple[int, int]] = deque(maxlen=int(WINDOW_S / _STEP_S) + 1)

    def add(self, now_s: float, size_bytes: int) -> None:
        """So many bytes came."""
        step = int(now_s / _STEP_S)
        if self._steps and self._steps[-1][0] == step:
            size_bytes += self._steps.pop()[1]
        self._steps.append((step, size_bytes))

    def bytes_since(self, since_s: float) -> int:
        """What came since then, within the window."""
        first = int(since_s / _STEP_S)
        return sum(size_bytes for step, size_bytes in self._steps if step >= first)


def speed_bytes_per_s(paces: list[Pace], now_s: float) -> float:
    """Of all together, over the window or since the first of them began."""
    since_s = max(now_s - WINDOW_S, min((pace.began_s for pace in paces), default=now_s))
    if now_s - since_s < _STEP_S:
        return 0.0
    return sum(pace.bytes_since(since_s) for pace in paces) / (now_s - since_s)


@dataclass(slots=True)
class Written:
    """How far the write of a blob to L2 is."""

    digest: str
    """Empty while it is unknown."""
    total_bytes: int
    pace: Pace
    done_bytes: int = 0
    counted: set[int] = field(default_factory=set)

    def add(self, index: int, size_bytes: int, now_s: float) -> None:
        """A chunk is there."""
        if index not in self.counted:
            self.counted.add(index)
            self.done_bytes += size_bytes
            self.pace.add(now_s, size_bytes)
