"""When each blob was last found right, all of it, at each level: what the scrubber goes by, across restarts."""

from __future__ import annotations

from dataclasses import replace

from cached.cache.registry import Blob, Registry
from cached.clock import Clock
from cached.index import VerifiedRecord
from cached.level import Level

_AHEAD_S = 60.0
"""A time that is further in the future is from a clock that was wrong."""


class VerifiedTimes:
    """Loop only. Unix times, since they outlive restarts. They are kept in the index; one that is lost costs a look."""

    def __init__(self, registry: Registry, clock: Clock) -> None:
        self._registry = registry
        self._clock = clock
        self._since_s = clock.wall_s()

    def note(self, digest: str, level: Level) -> None:
        """All of a blob was just found right at a level: it came there, was adopted, moved on, or looked at."""
        self._set(digest, level, self._clock.wall_s())

    def doubt(self, digest: str, level: Level) -> None:
        """Some of it is damaged: whoever starts next looks at it first."""
        if self.of(digest, level):
            self._set(digest, level, 0.0)

    def of(self, digest: str, level: Level) -> float:
        """When that was; 0: never, as far as anybody knows. It says nothing of whether the blob is still there."""
        record = self._registry.index.verified(digest)
        time_s = 0.0 if record is None else record.l1_time_s if level is Level.L1 else record.l2_time_s
        return time_s if time_s <= self._clock.wall_s() + _AHEAD_S else 0.0

    def oldest(self, blobs: list[Blob], level: Level) -> float:
        """The earliest of the times of those blobs that are at a level; 0 if one was never verified, or none is."""
        return min((self.of(blob.record.digest, level) for blob in blobs if blob.at(level)), default=0.0)

    def longest_unverified_s(self, level: Level) -> float:
        """For how long the blob that waits longest was not verified; 0 if there is none.

        Of one that never was, nothing is known from before this daemon started.
        """
        blobs = self._registry.blobs.values()
        times = [self.of(blob.record.digest, level) or self._since_s for blob in blobs if blob.at(level)]
        return max(0.0, self._clock.wall_s() - min(times)) if times else 0.0

    def _set(self, digest: str, level: Level, time_s: float) -> None:
        index = self._registry.index
        record = index.verified(digest) or VerifiedRecord(digest)
        changed = replace(record, l1_time_s=time_s) if level is Level.L1 else replace(record, l2_time_s=time_s)
        self._registry.write(lambda: index.put_verified(changed))
