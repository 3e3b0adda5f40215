"""What goes wrong, how often, and for how long."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

KINDS = (
    "origin_5xx", "origin_short", "origin_hang", "origin_slow", "mover_dies", "mover_hangs", "mover_torn",
    "fsync_eio", "fsync_lies", "disk_full", "disk_eio", "store_fails", "thread",
)  # fmt: skip


@dataclass(slots=True)
class Faults:
    """Asked at each place where something can fail. Bounded ones end after ``left``; ``None``: they never do."""

    rng: random.Random
    rate: float
    left: int | None
    enabled: frozenset[str]
    on: bool = True
    hit: dict[str, int] = field(default_factory=dict)

    def strikes(self, kind: str) -> bool:
        """Whether it goes wrong this time."""
        if not self.on or kind not in self.enabled or self.rng.random() >= self.rate:
            return False
        if self.left is not None:
            if self.left <= 0:
                return False
            self.left -= 1
        self.hit[kind] = self.hit.get(kind, 0) + 1
        return True


def random_faults(rng: random.Random, *, unbounded: bool) -> Faults:
    """Some kinds, at some rate: a history in which everything fails at once shows less than several that do not."""
    enabled = frozenset(kind for kind in KINDS if rng.random() < 0.4)
    rate = rng.choice((0.01, 0.03, 0.1, 0.3) if unbounded else (0.0, 0.01, 0.03, 0.1))
    return Faults(random.Random(rng.random()), rate, None if unbounded else rng.randrange(0, 20), enabled)
