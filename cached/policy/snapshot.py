"""What the policy may know: plain facts of one moment, gathered by the engine. No clock, no level is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cached.types import Level, Tier


@dataclass(frozen=True, slots=True)
class RevisionFacts:
    """A revision that holds blobs at some local level.

    A revision holds a level's blobs (digest → bytes) from its first committed blob until it is evicted there. One that
    was evicted holds none, even where a blob of it stays for another revision's sake. One that is arriving is ``busy``
    and holds what it has or reuses, so that no blob that it counts on is taken away.

    ``tier`` and ``pinned`` are the model's and speak of its ``current`` revision: a stale one is not protected by them.
    ``last_used_s`` is on the clock of ``plan``'s ``now_s``. ``has_origin``: it could be pulled again.
    """

    name: str
    revision: str
    tier: Tier
    pinned: bool = False
    leased: bool = False
    busy: bool = False
    current: bool = True
    priority: int = 0
    last_used_s: float = 0.0
    l1_blobs: Mapping[str, int] = field(default_factory=dict)
    l2_blobs: Mapping[str, int] = field(default_factory=dict)
    has_origin: bool = True

    def blobs(self, level: Level) -> Mapping[str, int]:
        """What it holds at L1 or L2."""
        return self.l1_blobs if level is Level.L1 else self.l2_blobs

    @property
    def protections(self) -> tuple[str, ...]:
        """Why it may not be evicted, in words for people; empty when it may (invariant 3)."""
        standing = self.current
        reasons = (
            ("leased", self.leased),
            ("pinned", standing and self.pinned),
            ("hot", standing and self.tier is Tier.HOT),
            ("loading", self.busy),
        )
        return tuple(word for word, holds in reasons if holds)


@dataclass(frozen=True, slots=True)
class LevelFacts:
    """The accounts of a level. ``used_bytes`` includes ``withdrawn_bytes`` and ``pool_bytes``."""

    level: Level
    capacity_bytes: int
    used_bytes: int
    reserved_bytes: int = 0
    withdrawn_bytes: int = 0
    pool_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        """Negative by what a lowered capacity is exceeded."""
        return self.capacity_bytes - self.used_bytes - self.reserved_bytes


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that are wanted at a level, beyond all that is reserved. 0 asks only for what exceeds the capacity."""

    level: Level
    size_bytes: int
    for_name: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One moment. ``levels`` has the facts of each level that ``needs`` names."""

    revisions: tuple[RevisionFacts, ...]
    levels: Mapping[Level, LevelFacts]
    needs: tuple[Need, ...] = ()
