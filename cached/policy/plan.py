"""Who has to go: ``plan(snapshot, now_s) -> Plan``. Pure and deterministic; the engine carries the actions out.

Whole revisions are evicted, never one that is leased, pinned, hot or loading: stale revisions first, then cold ones,
then by priority and least recent use. This order, and only it, is to give way to a value per byte (decayed rate of use
times seconds to bring it back, over bytes freed) and to admission. The accounting of shared blobs, the sparing of
victims that turn out to be needless, and *never evict and then fail* stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from cached.errors import NoRoomError
from cached.policy.snapshot import LevelFacts, RevisionFacts, Snapshot
from cached.types import Level, Tier
from cached.units import format_size

_HOLDERS_NAMED = 5
_STALE, _COLD, _LEAST_USED, _IDLE = REASONS = ("stale", "cold", "least recently used", "cold and idle")
"""Why a revision went, in words that complete *it left l1:*."""


@dataclass(frozen=True, slots=True)
class Evict:
    """Take a revision's blobs out of a level, but for those that a revision which stays there holds too.

    ``frees_bytes`` counts what goes when the plan's actions are carried out in their order. ``reason`` is one of
    ``REASONS``, so that it can label a metric.
    """

    level: Level
    name: str
    revision: str
    frees_bytes: int
    reason: str
    unused_s: float


@dataclass(frozen=True, slots=True)
class DropPool:
    """Give at least ``size_bytes`` of the level's pool back (or take the need's segments from it)."""

    level: Level
    size_bytes: int


Action = Evict | DropPool


@dataclass(frozen=True, slots=True)
class Holder:
    """A revision whose bytes may not be evicted, and why: ``llama (hot, leased, 26.0 GiB)``."""

    name: str
    revision: str
    protections: tuple[str, ...]
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.name} ({', '.join((*self.protections, format_size(self.size_bytes)))})"


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Why a need cannot be met. ``evictable_bytes``: what evicting all that may go, and the pool, would have freed."""

    level: Level
    for_name: str
    needed_bytes: int
    free_bytes: int
    evictable_bytes: int
    withdrawn_bytes: int
    reserved_bytes: int
    capacity_bytes: int
    holders: tuple[Holder, ...]

    @property
    def never_fits(self) -> bool:
        """The level is too small even when empty."""
        return self.needed_bytes > self.capacity_bytes

    @property
    def withdrawn_would_do(self) -> bool:
        """It is enough to wait until workers let go of segments that are evicted already."""
        return self.needed_bytes <= self.free_bytes + self.evictable_bytes + self.withdrawn_bytes

    def hint(self) -> str:
        """What to do, for people."""
        if self.never_fits:
            return f"it can never fit: give {self.level} a capacity of at least {format_size(self.needed_bytes)}"
        if self.withdrawn_would_do:
            return f"retry later: {format_size(self.withdrawn_bytes)} are evicted but still mapped by workers"
        if self.reserved_bytes:
            return f"end leases, unpin or cool a model, or wait: {format_size(self.reserved_bytes)} are being loaded"
        return "end leases, unpin or cool a model, or give the level more capacity"

    def error(self) -> NoRoomError:
        """The error for whoever needs the bytes."""
        named = [str(holder) for holder in self.holders[:_HOLDERS_NAMED]]
        if len(self.holders) > _HOLDERS_NAMED:
            named.append(f"{len(self.holders) - _HOLDERS_NAMED} more")
        held = f"; held by {', '.join(named)}" if named else ""
        available_bytes = max(0, self.free_bytes) + self.evictable_bytes
        return NoRoomError(
            f"{self.level} has no room for {format_size(self.needed_bytes)} of {self.for_name}: "
            f"{format_size(available_bytes)} of {format_size(self.capacity_bytes)} can be had{held}",
            hint=self.hint(),
            level=self.level,
            needed_bytes=self.needed_bytes,
            available_bytes=available_bytes,
            capacity_bytes=self.capacity_bytes,
            withdrawn_bytes=self.withdrawn_bytes,
            holders=", ".join(str(holder) for holder in self.holders),
            fits="never" if self.never_fits else "later",
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """Actions in the order to carry them out; none when there is a shortfall."""

    actions: tuple[Action, ...] = ()
    shortfall: Shortfall | None = None


def plan(snapshot: Snapshot, now_s: float) -> Plan:
    """Makes room for all of the snapshot's needs, or says why not: then there are no actions at all."""
    actions: list[Action] = []
    for level in sorted({need.level for need in snapshot.needs}):
        facts = snapshot.levels[level]
        wanted = [need for need in snapshot.needs if need.level is level]
        needed_bytes = sum(need.size_bytes for need in wanted)
        outcome = _make_room(snapshot, facts, needed_bytes, now_s)
        if outcome is None:
            for_name = ", ".join(dict.fromkeys(need.for_name for need in wanted))
            return Plan(shortfall=_shortfall(snapshot, facts, needed_bytes, for_name))
        actions.extend(outcome)
    return Plan(tuple(actions))


def plan_idle(snapshot: Snapshot, now_s: float, *, cold_grace_s: float = 0.0) -> Plan:
    """What leaves L1 without anybody needing the room: cold revisions that no worker has leased for ``cold_grace_s``.

    Only those that can be brought back (from L2 or the origin) and whose going frees bytes. Never a shortfall.
    """
    residents = _Residents(snapshot, Level.L1)
    leaving = [
        facts
        for facts in residents.evictable()
        if facts.tier is Tier.COLD
        and now_s - facts.last_used_s >= cold_grace_s
        and (facts.has_origin or facts.l1_blobs.keys() <= facts.l2_blobs.keys())
    ]
    for facts in leaving:
        residents.evict(facts)
    leaving = residents.spare_needless(leaving, 0)
    return Plan(tuple(residents.evictions(leaving, lambda _: _IDLE, now_s)))


def _make_room(snapshot: Snapshot, facts: LevelFacts, needed_bytes: int, now_s: float) -> list[Action] | None:
    """Actions that leave ``needed_bytes`` free at the level, or None when there are none that do."""
    missing_bytes = needed_bytes - facts.free_bytes
    if missing_bytes <= 0:
        return []
    if needed_bytes > facts.capacity_bytes:
        return None
    from_revisions_bytes = missing_bytes - min(facts.pool_bytes, missing_bytes)
    residents = _Residents(snapshot, facts.level)
    victims: list[RevisionFacts] = []
    freed_bytes = 0
    for candidate in sorted(residents.evictable(), key=_eviction_order):
        if freed_bytes >= from_revisions_bytes:
            break
        freed_bytes += residents.evict(candidate)
        victims.append(candidate)
    if freed_bytes < from_revisions_bytes:
        return None
    victims = residents.spare_needless(victims, freed_bytes - from_revisions_bytes)
    evictions = residents.evictions(victims, _reason, now_s)
    from_pool_bytes = missing_bytes - sum(eviction.frees_bytes for eviction in evictions)
    pool = [DropPool(facts.level, from_pool_bytes)] if from_pool_bytes > 0 else []
    return [*pool, *evictions]


def _eviction_order(facts: RevisionFacts) -> tuple[bool, bool, int, float, str, str]:
    """Least worth keeping first; names break ties, so that a plan can be repeated."""
    return (
        facts.current,
        facts.tier is not Tier.COLD,
        facts.priority,
        facts.last_used_s,
        facts.name,
        facts.revision,
    )


def _reason(facts: RevisionFacts) -> str:
    if not facts.current:
        return _STALE
    return _COLD if facts.tier is Tier.COLD else _LEAST_USED


def _shortfall(snapshot: Snapshot, facts: LevelFacts, needed_bytes: int, for_name: str) -> Shortfall:
    residents = _Residents(snapshot, facts.level)
    evictable_bytes = sum(residents.evict(candidate) for candidate in residents.evictable())
    holders = [
        Holder(revision.name, revision.revision, revision.protections, sum(revision.blobs(facts.level).values()))
        for revision in snapshot.revisions
        if revision.protections and revision.blobs(facts.level)
    ]
    return Shortfall(
        level=facts.level,
        for_name=for_name,
        needed_bytes=needed_bytes,
        free_bytes=facts.free_bytes,
        evictable_bytes=evictable_bytes + facts.pool_bytes,
        withdrawn_bytes=facts.withdrawn_bytes,
        reserved_bytes=facts.reserved_bytes,
        capacity_bytes=facts.capacity_bytes,
        holders=tuple(sorted(holders, key=lambda holder: (-holder.size_bytes, holder.name, holder.revision))),
    )


class _Residents:
    """Counts how many revisions hold each blob of a level, so that a shared one is freed by the last of them only."""

    def __init__(self, snapshot: Snapshot, level: Level) -> None:
        self._level = level
        self._revisions = snapshot.revisions
        self._holders: Counter[str] = Counter()
        for facts in snapshot.revisions:
            self._holders.update(facts.blobs(level).keys())

    def evictable(self) -> list[RevisionFacts]:
        return [facts for facts in self._revisions if facts.blobs(self._level) and not facts.protections]

    def evict(self, facts: RevisionFacts) -> int:
        """Bytes that its going frees."""
        freed_bytes = 0
        holders = self._holders
        for digest, size_bytes in facts.blobs(self._level).items():
            holders[digest] -= 1
            if not holders[digest]:
                freed_bytes += size_bytes
        return freed_bytes

    def spare(self, facts: RevisionFacts) -> int:
        """Takes ``evict`` back; bytes that it no longer frees."""
        kept_bytes = 0
        holders = self._holders
        for digest, size_bytes in facts.blobs(self._level).items():
            if not holders[digest]:
                kept_bytes += size_bytes
            holders[digest] += 1
        return kept_bytes

    def spare_needless(self, victims: list[RevisionFacts], surplus_bytes: int) -> list[RevisionFacts]:
        """The victims that remain when those are spared, dearest first, whose bytes the surplus makes up for.

        One pass is enough: the fewer the victims, the less a shared blob is freed, so what was needed stays needed.
        """
        needed: list[RevisionFacts] = []
        for facts in reversed(victims):
            kept_bytes = self.spare(facts)
            if kept_bytes <= surplus_bytes:
                surplus_bytes -= kept_bytes
            else:
                self.evict(facts)
                needed.append(facts)
        return needed[::-1]

    def evictions(
        self, victims: list[RevisionFacts], reason: Callable[[RevisionFacts], str], now_s: float
    ) -> list[Evict]:
        """The actions for revisions that were evicted here, each with what it frees in this order."""
        for facts in victims:
            self.spare(facts)
        return [
            Evict(
                level=self._level,
                name=facts.name,
                revision=facts.revision,
                frees_bytes=self.evict(facts),
                reason=reason(facts),
                unused_s=max(0.0, now_s - facts.last_used_s),
            )
            for facts in victims
        ]
