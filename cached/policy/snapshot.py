"""What the policy may know: plain facts of one moment, gathered by the engine. No clock, no level is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from cached.level import Level
from cached.policy.demand import NEVER, Demand, Mix
from cached.policy.reload import DEFAULT_HOPS, Hop
from cached.types import Tier


@dataclass(frozen=True, slots=True)
class RevisionFacts:
    """A revision that holds blobs at some local level.

    A revision holds a level's blobs (digest → bytes) from its first committed blob until it is evicted there. One that
    was evicted holds none, even where a blob of it stays for another revision's sake. One that is arriving is ``busy``
    and holds what it has or reuses, so that no blob that it counts on is taken away.

    ``tier`` and ``pinned`` are the model's and speak of its ``current`` revision: a stale one is not protected by them.
    ``last_used_s`` and ``keep_until_s`` (the keep-alive of its last lease) are on the clock of ``plan``'s ``now_s``.
    ``has_origin``: it could be pulled again. ``requests``, ``misses`` and what was waited are of its ModelHistory, the
    hops of HopTimes. ``tenant``: the group of models whose quota it counts against; none when empty.
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
    requests: Demand = NEVER
    misses: Demand = NEVER
    waited_l1_s: float = 0.0
    waited_l2_s: float = 0.0
    from_l2: Hop = DEFAULT_HOPS[Level.L2]
    from_l3: Hop = DEFAULT_HOPS[Level.L3]
    keep_until_s: float = float("-inf")
    tenant: str = ""

    def blobs(self, level: Level) -> Mapping[str, int]:
        """What it holds at L1 or L2."""
        return self.l1_blobs if level is Level.L1 else self.l2_blobs

    def demand(self, level: Level) -> Demand:
        """The requests that count at L1 or L2."""
        return self.requests if level is Level.L1 else self.misses

    def waited_s(self, level: Level) -> float:
        """What was waited for want of a place at L1 or L2."""
        return self.waited_l1_s if level is Level.L1 else self.waited_l2_s

    @property
    def protected(self) -> bool:
        """It may not be evicted; ``protections`` says why."""
        return self.leased or self.busy or (self.current and (self.pinned or self.tier is Tier.HOT))

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
    """The accounts of a level. ``used_bytes`` includes ``withdrawn_bytes`` and ``pool_bytes``.

    ``transient_room_bytes``: what may be held beside the capacity by segments that go with their last lease.
    ``free_ahead_bytes``: what the background keeps free (the watermark). ``mix``: what was learned from the level's
    requests.
    """

    level: Level
    capacity_bytes: int
    used_bytes: int
    reserved_bytes: int = 0
    withdrawn_bytes: int = 0
    pool_bytes: int = 0
    transient_room_bytes: int = 0
    free_ahead_bytes: int = 0
    mix: Mix = Mix()  # noqa: RUF009 immutable

    @property
    def free_bytes(self) -> int:
        """Negative by what a lowered capacity is exceeded."""
        return self.capacity_bytes - self.used_bytes - self.reserved_bytes


class Otherwise(StrEnum):
    """What becomes of a newcomer that is not worth what would have to go for it."""

    EVICT = "evict"  # it gets its room nevertheless
    TRANSIENT = "transient"  # it is held beside the capacity until its last lease ends
    SKIP = "skip"  # it does without a place at this level


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that are wanted at a level, beyond all that is reserved. 0 asks only for what exceeds the capacity.

    ``newcomer``: the revision that they are for, as it will be: its demand with this request, and in ``l2_blobs`` what
    L2 holds or is getting. Without it, or with ``Otherwise.EVICT``, there is no question of admission.
    ``shared_blobs``: those of its blobs (digest → bytes) that are at the level already; they are its tenant's too.
    """

    level: Level
    size_bytes: int
    for_name: str
    newcomer: RevisionFacts | None = None
    otherwise: Otherwise = Otherwise.EVICT
    shared_blobs: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Quota:
    """A bound on what a tenant's models take of a level together. ``reserved_bytes``: of its loads in flight."""

    tenant: str
    level: Level
    limit_bytes: int
    reserved_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One moment. ``levels`` has the facts of each level that ``needs`` names.

    ``time_s`` is the Unix time that demand is counted on; without it that is ``plan``'s ``now_s``.
    """

    revisions: tuple[RevisionFacts, ...]
    levels: Mapping[Level, LevelFacts]
    needs: tuple[Need, ...] = ()
    quotas: tuple[Quota, ...] = ()
    time_s: float | None = None
