"""The names of the levels. Beside `cached.types`, as movers, which have to start quickly, need nothing else of that."""

from __future__ import annotations

from enum import StrEnum


class Level(StrEnum):
    """Where bytes are."""

    L1 = "l1"  # POSIX shared memory
    L2 = "l2"  # local NVMe
    L3 = "l3"  # the origin
