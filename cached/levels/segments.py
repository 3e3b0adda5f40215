"""L1's segments that hold no content any more: the proof that one is free, and the pool of those that are kept."""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass
from enum import Enum
from math import inf

from cached.level import Level
from cached.levels.base import FileRef
from cached.levels.files import open_checked

_CUT_PER_SPARED = 4
"""How much of a segment may be cut off for each byte of fresh memory that it spares.

A GB of fresh pages costs up to 2 s of processor time, most of it while the load is under way; cutting a GB off costs
0.15 s, before the load begins, and the pool has to be filled again later. So at worst a load waits 0.6 s for each 2 s
that it is spared.
"""


@dataclass(frozen=True, slots=True)
class Segment:
    """A shared-memory object without a blob or ingest name."""

    segment_id: str
    ref: FileRef
    pages_bytes: int | None = None
    """What its pages take up, where that is less than its length: a part of a blob, or a pull that was given up."""

    @property
    def size_bytes(self) -> int:
        """What it counts for: its length, as far as it has pages."""
        return self.ref.size_bytes if self.pages_bytes is None else self.pages_bytes

    @property
    def is_sparse(self) -> bool:
        """It has holes."""
        return self.pages_bytes is not None


@dataclass(frozen=True, slots=True)
class Collected:
    """A withdrawn segment that is free now. ``kept``: its memory went to the pool (dirty), else to the kernel.

    ``proven``: the kernel confirmed that nobody has it open or mapped. Otherwise it could not tell (no leases on this
    file system), and the memory comes back when its last user goes.
    """

    size_bytes: int
    kept: bool
    proven: bool


class Use(Enum):
    """What the kernel says about a segment."""

    FREE = "free"
    IN_USE = "in use"
    UNKNOWN = "unknown"


def probe(segment: Segment) -> Use:
    """Whether any process still has the segment open or mapped. Raises NotFoundError or LevelError.

    A write lease is granted only to the holder of the one descriptor in the world, with no mapping beside it
    (fcntl(2), F_SETLEASE); measured for MAP_SHARED and MAP_PRIVATE, with the descriptor closed, in any process.
    """
    fd = open_checked(Level.L1, segment.ref.path, os.O_RDONLY, segment.ref)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        # EAGAIN is the kernel's answer for "in use"; anything else means that it cannot tell.
        return Use.IN_USE if error.errno == errno.EAGAIN else Use.UNKNOWN
    finally:
        os.close(fd)
    return Use.FREE


class Pool:
    """Which pooled segments there are, dirty or clean. Bookkeeping only.

    Every change is one dictionary operation, so that a thread that gives memory back does not disturb the loop.
    """

    def __init__(self) -> None:
        self._dirty: dict[str, Segment] = {}
        self._clean: dict[str, Segment] = {}
        self._fitted: dict[str, Segment] = {}
        """By the ingest that each is meant for."""

    @property
    def bytes(self) -> int:
        """Of all segments."""
        return sum(self.sizes())

    def sizes(self) -> list[int]:
        """Of all segments."""
        return [
            segment.size_bytes for where in (self._dirty, self._clean, self._fitted) for segment in list(where.values())
        ]

    def add_dirty(self, segment: Segment) -> None:
        """Takes in a segment that still has old bytes, or no pages yet."""
        self._dirty[segment.segment_id] = segment

    def dirty(self) -> tuple[FileRef, ...]:
        """Those to be cleared."""
        return tuple(segment.ref for segment in list(self._dirty.values()))

    def mark_clean(self, ref: FileRef) -> bool:
        """A dirty segment was cleared; False if it has left the pool meanwhile."""
        segment = self._take(self._dirty, ref)
        if segment is None:
            return False
        self._clean[segment.segment_id] = segment
        return True

    def take(self, ref: FileRef) -> Segment | None:
        """Takes a segment out; None if it has left already."""
        return self._take(self._clean, ref) or self._take(self._dirty, ref)

    def match(self, size_bytes: int) -> Segment | None:
        """The clean segment that spares a blob of this size the most fresh pages, less the price of what is cut off.

        None where that is more than it spares: a small file never costs the pool a big segment.
        """

        def gain(segment: Segment) -> int:
            surplus_bytes = max(0, segment.size_bytes - size_bytes)
            return _CUT_PER_SPARED * min(segment.size_bytes, size_bytes) - surplus_bytes

        best = max(list(self._clean.values()), key=gain, default=None)
        return best if best is not None and gain(best) > 0 else None

    def fit(self, ingest_id: str, size_bytes: int) -> None:
        """Sets the match of a size aside for this ingest, if there is one; nobody else is given it."""
        segment = self.match(size_bytes)
        if segment is None:
            return
        self._fitted[ingest_id] = segment  # first, so that a thread that sums up never misses it
        if self._clean.pop(segment.segment_id, None) is None:
            del self._fitted[ingest_id]

    def fitted(self) -> dict[str, Segment]:
        """What is set aside, by ingest."""
        return dict(self._fitted)

    def resized(self, ingest_id: str, segment: Segment) -> None:
        """What is set aside for an ingest is this long now."""
        self._fitted[ingest_id] = segment

    def take_fitted(self, ingest_id: str) -> Segment | None:
        """Takes out what is set aside for an ingest."""
        return self._fitted.pop(ingest_id, None)

    def unfit(self) -> None:
        """What is set aside is anybody's again."""
        for ingest_id, segment in list(self._fitted.items()):
            self._clean[segment.segment_id] = segment
            del self._fitted[ingest_id]

    def victims(self, needed_bytes: int, *, below_bytes: float = inf) -> list[Segment]:
        """Segments to give back for at least ``needed_bytes``, or all: dirty ones first, then the smallest.

        Of those only that are smaller than ``below_bytes``.
        """
        dirty = sorted(self._dirty.values(), key=lambda segment: segment.size_bytes)
        clean = sorted(self._clean.values(), key=lambda segment: segment.size_bytes)
        chosen: list[Segment] = []
        for segment in (item for item in (*dirty, *clean) if item.size_bytes < below_bytes):
            if needed_bytes <= 0:
                break
            chosen.append(segment)
            needed_bytes -= segment.size_bytes
        return chosen

    @staticmethod
    def _take(where: dict[str, Segment], ref: FileRef) -> Segment | None:
        for segment in list(where.values()):
            if segment.ref.path == ref.path:
                return where.pop(segment.segment_id, None)
        return None
