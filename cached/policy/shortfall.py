"""Why there is no room, and who has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cached.errors import NoRoomError
from cached.level import Level
from cached.policy.snapshot import LevelFacts, Quota, RevisionFacts
from cached.units import format_size

_HOLDERS_NAMED = 5


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
    """Why a need cannot be met. ``evictable_bytes``: what evicting all that may go, and the pool, would have freed.

    With a ``quota``, it is that which is too small, and the byte counts are of the tenant's share.
    """

    level: Level
    for_name: str
    needed_bytes: int
    free_bytes: int
    evictable_bytes: int
    withdrawn_bytes: int
    reserved_bytes: int
    capacity_bytes: int
    holders: tuple[Holder, ...]
    quota: Quota | None = None

    @property
    def never_fits(self) -> bool:
        """The level, or the quota, is too small even when empty."""
        return self.needed_bytes > self.capacity_bytes

    @property
    def withdrawn_would_do(self) -> bool:
        """It is enough to wait until workers let go of segments that are evicted already."""
        return self.needed_bytes <= self.free_bytes + self.evictable_bytes + self.withdrawn_bytes

    def hint(self) -> str:
        """What to do, for people."""
        needed = format_size(self.needed_bytes)
        if self.quota is not None and self.never_fits:
            return f"it can never fit: give the tenant {self.quota.tenant} a quota of at least {needed} of {self.level}"
        if self.never_fits:
            return f"it can never fit: give {self.level} a capacity of at least {needed}"
        if self.withdrawn_would_do:
            return f"retry later: {format_size(self.withdrawn_bytes)} are evicted but still mapped by workers"
        if self.reserved_bytes:
            return f"end leases, unpin or cool a model, or wait: {format_size(self.reserved_bytes)} are being loaded"
        return f"end leases, unpin or cool a model, or give the {'tenant' if self.quota else 'level'} more capacity"

    def error(self) -> NoRoomError:
        """The error for whoever needs the bytes."""
        named = [str(holder) for holder in self.holders[:_HOLDERS_NAMED]]
        if len(self.holders) > _HOLDERS_NAMED:
            named.append(f"{len(self.holders) - _HOLDERS_NAMED} more")
        held = f"; held by {', '.join(named)}" if named else ""
        available_bytes = max(0, self.free_bytes) + self.evictable_bytes
        where = f"the quota of {self.quota.tenant} at {self.level}" if self.quota else str(self.level)
        return NoRoomError(
            f"{where} has no room for {format_size(self.needed_bytes)} of {self.for_name}: "
            f"{format_size(available_bytes)} of {format_size(self.capacity_bytes)} can be had{held}",
            hint=self.hint(),
            level=self.level,
            needed_bytes=self.needed_bytes,
            available_bytes=available_bytes,
            capacity_bytes=self.capacity_bytes,
            withdrawn_bytes=self.withdrawn_bytes,
            holders=", ".join(str(holder) for holder in self.holders),
            fits="never" if self.never_fits else "later",
            **({"tenant": self.quota.tenant} if self.quota else {}),
        )


def holders_of(revisions: Sequence[RevisionFacts], level: Level) -> tuple[Holder, ...]:
    """Those that hold bytes there which may not be evicted, the largest first."""
    holders = [
        Holder(facts.name, facts.revision, facts.protections, sum(facts.blobs(level).values()))
        for facts in revisions
        if facts.protected and facts.blobs(level)
    ]
    return tuple(sorted(holders, key=lambda holder: (-holder.size_bytes, holder.name, holder.revision)))


def level_shortfall(
    revisions: Sequence[RevisionFacts], facts: LevelFacts, needed_bytes: int, for_name: str, evictable_bytes: int
) -> Shortfall:
    """What the level lacks."""
    return Shortfall(
        level=facts.level,
        for_name=for_name,
        needed_bytes=needed_bytes,
        free_bytes=facts.free_bytes,
        evictable_bytes=evictable_bytes + facts.pool_bytes,
        withdrawn_bytes=facts.withdrawn_bytes,
        reserved_bytes=facts.reserved_bytes,
        capacity_bytes=facts.capacity_bytes,
        holders=holders_of(revisions, facts.level),
    )


def quota_shortfall(
    revisions: Sequence[RevisionFacts],
    quota: Quota,
    needed_bytes: int,
    for_name: str,
    *,
    held_bytes: int,
    evictable_bytes: int,
) -> Shortfall:
    """What a tenant lacks. ``revisions`` are its own."""
    return Shortfall(
        level=quota.level,
        for_name=for_name,
        needed_bytes=needed_bytes,
        free_bytes=quota.limit_bytes - held_bytes - quota.reserved_bytes,
        evictable_bytes=evictable_bytes,
        withdrawn_bytes=0,
        reserved_bytes=quota.reserved_bytes,
        capacity_bytes=quota.limit_bytes,
        holders=holders_of(revisions, quota.level),
        quota=quota,
    )
