"""What has to be done: ``plan(snapshot, now_s) -> Plan``. Pure and deterministic; the engine carries the actions out.

Whole revisions are evicted, never one that is leased, pinned, hot or loading: by standing (stale, cold, the others),
then by worth for each byte. A newcomer evicts only those that it is worth more than, all together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from cached.level import Level
from cached.policy.admission import Decision, Newcomer, Verdict, weigh
from cached.policy.residents import Residents
from cached.policy.shortfall import Shortfall, level_shortfall, quota_shortfall
from cached.policy.snapshot import Need, Otherwise, Quota, RevisionFacts, Snapshot
from cached.policy.worth import Standing, Valued, Valuer, spell
from cached.types import Tier
from cached.units import format_size

AHEAD_REQUESTS = 0.25
"""What is expected to be asked for more often than this in the next six hours is not evicted ahead of need."""
REASONS = {
    "stale": "Room was needed, and it was not the current revision of its model.",
    "cold": "Room was needed, and it was cold.",
    "worth least": "Room was needed, and of those that could go it was worth least for each byte.",
    "over quota": "Its tenant needed room within its quota, or the quota was lowered.",
    "cold and idle": "It was cold, and no worker had it for some seconds. Nobody needed the room.",
    "free ahead": "As `worth least`, by the background: so much of the level is kept free ahead of need.",
    "transient": "It was held beside the budget, and its last lease ended.",
}
"""Why a revision went, in words that complete *it left l1:*, and what they mean. Stable: they label a metric."""
_STALE, _COLD, _WORTH, _QUOTA, _IDLE, _AHEAD, TRANSIENT = REASONS


@dataclass(frozen=True, slots=True)
class Evict:
    """Take a revision's blobs out of a level, but for those that a revision which stays there holds too.

    ``frees_bytes`` counts what goes when the plan's actions are carried out in their order. ``reason`` is one of
    ``REASONS``, ``why`` the same for people, with figures. ``worth_s``: the waiting that it is expected to cost.
    """

    level: Level
    name: str
    revision: str
    frees_bytes: int
    reason: str
    unused_s: float
    worth_s: float = field(default=0.0, compare=False)
    why: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class DropPool:
    """Give at least ``size_bytes`` of the level's pool back (or take the need's segments from it)."""

    level: Level
    size_bytes: int


Action = Evict | DropPool


@dataclass(frozen=True, slots=True)
class Plan:
    """Actions in the order to carry them out; none when there is a shortfall. A decision for each level in need."""

    actions: tuple[Action, ...] = ()
    shortfall: Shortfall | None = None
    decisions: tuple[Decision, ...] = ()

    def decision(self, level: Level) -> Decision | None:
        """What was decided of the needs at a level."""
        return next((decision for decision in self.decisions if decision.level is level), None)


def plan(snapshot: Snapshot, now_s: float) -> Plan:
    """Makes room for all of the snapshot's needs, or says why not: then there are no actions at all.

    The needs of one level are decided together. A level at which the newcomer is ``TRANSIENT`` or ``SKIPPED`` is left
    as it is, but for its pool.
    """
    actions: list[Action] = []
    decisions: list[Decision] = []
    for level in sorted({need.level for need in snapshot.needs}):
        outcome = _Round(snapshot, level, now_s).decide([need for need in snapshot.needs if need.level is level])
        if outcome.shortfall is not None:
            return outcome
        actions.extend(outcome.actions)
        decisions.extend(outcome.decisions)
    return Plan(tuple(actions), decisions=tuple(decisions))


def plan_idle(snapshot: Snapshot, now_s: float, *, cold_grace_s: float = 0.0) -> Plan:
    """What leaves L1 without anybody needing the room: cold revisions that no worker has leased for ``cold_grace_s``.

    Only those that can be brought back (from L2 or the origin) and whose going frees bytes, and no keep-alive holds.
    Never a shortfall.
    """
    residents = Residents(snapshot.revisions, Level.L1)
    leaving = [
        facts
        for facts in residents.evictable()
        if facts.tier is Tier.COLD
        and now_s - facts.last_used_s >= cold_grace_s
        and facts.keep_until_s <= now_s
        and (facts.has_origin or facts.l1_blobs.keys() <= facts.l2_blobs.keys())
    ]
    for facts in leaving:
        residents.evict(facts)
    leaving = residents.spare_needless(leaving, 0)
    return Plan(
        tuple(
            Evict(
                Level.L1, facts.name, facts.revision, freed, _IDLE, unused_s := max(0.0, now_s - facts.last_used_s),
                why=f"it is cold, and no worker has had it for {spell(unused_s)}",
            )
            for facts, freed in zip(leaving, residents.freed_in_turn(leaving), strict=True)
        )
    )  # fmt: skip


def plan_ahead(snapshot: Snapshot, now_s: float) -> Plan:
    """What the background does at each level of the snapshot: keeps ``free_ahead_bytes`` free, and tenants to quota.

    As far as that goes: room ahead without those that are likely to be asked for soon, both without those within a
    keep-alive; never a shortfall. What is in the pool counts as free.
    """
    actions: list[Action] = []
    for level in sorted(snapshot.levels):
        actions.extend(_Round(snapshot, level, now_s).free_ahead())
    return Plan(tuple(actions))


def eviction_order(snapshot: Snapshot, level: Level, now_s: float) -> list[Valued]:
    """All that may go from a level, the first to go first."""
    return _Round(snapshot, level, now_s).candidates


class _Round:
    """One level, one moment: who may go, in which order, and what that makes of the needs."""

    def __init__(self, snapshot: Snapshot, level: Level, now_s: float) -> None:
        self._snapshot = snapshot
        self._level = snapshot.levels[level]
        self._now_s = now_s
        time_s = now_s if snapshot.time_s is None else snapshot.time_s
        self.valuer = Valuer(self._level, self._is_in_l2, now_s, time_s)
        self._victims: list[tuple[Valued, str]] = []

    @cached_property
    def _residents(self) -> Residents:
        level = self._level.level
        arriving = [_as_resident(need) for need in self._snapshot.needs if need.level is level and need.shared_blobs]
        return Residents([*self._snapshot.revisions, *arriving], level)

    @cached_property
    def candidates(self) -> list[Valued]:
        """Who may go, and takes something along."""
        residents, value = self._residents, self.valuer.value
        evictable = [(facts, residents.own_bytes(facts)) for facts in residents.evictable()]
        valued = [value(facts, own_bytes) for facts, own_bytes in evictable if own_bytes]
        valued.sort(key=lambda item: item.order)
        return valued

    @cached_property
    def _l2_digests(self) -> set[str]:
        return {digest for facts in self._snapshot.revisions for digest in facts.l2_blobs}

    def _is_in_l2(self, facts: RevisionFacts) -> bool:
        digests = facts.l1_blobs.keys()
        return digests <= facts.l2_blobs.keys() or digests <= self._l2_digests

    # For somebody's need.

    def decide(self, needs: Sequence[Need]) -> Plan:
        """What is to be done about the needs of this level."""
        newcomer = Newcomer.of(needs, self.valuer)
        needed_bytes = sum(need.size_bytes for need in needs)
        shortfall = self._choose_for(needs, needed_bytes)
        if shortfall is not None:
            return self._without_room(newcomer, needed_bytes, shortfall)
        decision = weigh(self._level.level, newcomer, [valued for valued, _ in self._victims])
        if not decision.admitted:
            if newcomer.otherwise is Otherwise.SKIP:
                return Plan(decisions=(decision,))
            if self._has_transient_room(needed_bytes):
                return Plan(self._pool_for_transient(needed_bytes), decisions=(decision,))
            decision = decision.forced()
        return Plan(tuple(self._actions(needed_bytes - self._level.free_bytes)), decisions=(decision,))

    def _choose_for(self, needs: Sequence[Need], needed_bytes: int) -> Shortfall | None:
        """Chooses victims that leave room for the needs within capacity and quotas."""
        for_name = ", ".join(dict.fromkeys(need.for_name for need in needs))
        for quota in self._quotas():
            own = [need for need in needs if need.newcomer and need.newcomer.tenant == quota.tenant]
            if own and (shortfall := self._within_quota(quota, own, for_name)):
                return shortfall
        missing_bytes = needed_bytes - self._level.free_bytes
        if missing_bytes <= 0:
            return None
        fits = needed_bytes <= self._level.capacity_bytes
        if not fits or not self._choose(missing_bytes - min(self._level.pool_bytes, missing_bytes)):
            evictable_bytes = sum(self._residents.evict(valued.facts) for valued in self._remaining())
            evictable_bytes += sum(self._residents.freed_in_turn([valued.facts for valued, _ in self._victims]))
            return level_shortfall(self._snapshot.revisions, self._level, needed_bytes, for_name, evictable_bytes)
        return None

    def _choose(self, wanted_bytes: int) -> bool:
        """Adds victims by order; False when all together would not be enough."""
        wanted_bytes -= sum(self._residents.freed_in_turn([valued.facts for valued, _ in self._victims]))
        remaining = {id(valued.facts): valued for valued in self._remaining()}
        chosen = self._residents.choose([valued.facts for valued in remaining.values()], wanted_bytes)
        if chosen is None:
            return False
        self._victims += [(remaining[id(facts)], _reason(remaining[id(facts)])) for facts in chosen]
        return True

    def _remaining(self) -> list[Valued]:
        if not self._victims:
            return self.candidates
        gone = {id(valued.facts) for valued, _ in self._victims}
        return [valued for valued in self.candidates if id(valued.facts) not in gone]

    def _without_room(self, newcomer: Newcomer, needed_bytes: int, shortfall: Shortfall) -> Plan:
        decision = Decision.refused(self._level.level, newcomer, shortfall)
        if newcomer.otherwise is Otherwise.SKIP:
            return Plan(decisions=(decision,))
        if newcomer.otherwise is Otherwise.TRANSIENT and self._has_transient_room(needed_bytes):
            return Plan(self._pool_for_transient(needed_bytes), decisions=(decision,))
        return Plan(shortfall=shortfall)

    def _has_transient_room(self, needed_bytes: int) -> bool:
        level = self._level
        return needed_bytes <= max(0, level.free_bytes) + level.pool_bytes + level.transient_room_bytes

    def _pool_for_transient(self, needed_bytes: int) -> tuple[Action, ...]:
        level = self._level
        size_bytes = min(level.pool_bytes, needed_bytes - max(0, level.free_bytes) - level.transient_room_bytes)
        return (DropPool(level.level, size_bytes),) if size_bytes > 0 else ()

    # Quotas.

    def _quotas(self) -> list[Quota]:
        return [quota for quota in self._snapshot.quotas if quota.level is self._level.level]

    def _within_quota(self, quota: Quota, needs: Sequence[Need], for_name: str) -> Shortfall | None:
        """The tenant's own models go, until its needs, with what they share with others, are within its quota."""
        size_bytes = sum(need.size_bytes for need in needs)
        own = [facts for facts in self._snapshot.revisions if facts.tenant == quota.tenant]
        accounts = Residents([*own, *(_as_resident(need) for need in needs)], quota.level)
        held_bytes = accounts.held_bytes()
        over_bytes = held_bytes + quota.reserved_bytes + size_bytes - quota.limit_bytes
        if over_bytes <= 0:
            return None
        mine = {id(valued.facts): valued for valued in self._remaining() if valued.facts.tenant == quota.tenant}
        chosen = accounts.choose([valued.facts for valued in mine.values()], over_bytes)
        if chosen is None:
            evictable_bytes = sum(accounts.evict(valued.facts) for valued in mine.values())
            own_bytes = Residents(own, quota.level).held_bytes()
            return quota_shortfall(
                own, quota, size_bytes + held_bytes - own_bytes, for_name,
                held_bytes=own_bytes, evictable_bytes=evictable_bytes,
            )  # fmt: skip
        for facts in chosen:
            self._residents.evict(facts)
            self._victims.append((mine[id(facts)], _QUOTA))
        return None

    # For the background.

    def free_ahead(self) -> list[Action]:
        """Actions that bring tenants to their quotas, then the level to its watermark, as far as that goes."""
        for quota in self._quotas():
            self._trim_to(quota)
        wanted_bytes = self._level.free_ahead_bytes - self._level.free_bytes - self._level.pool_bytes
        ordinary = [valued for valued in self._remaining() if _may_go_ahead(valued)]
        freed_bytes = sum(self._residents.freed_in_turn([valued.facts for valued, _ in self._victims]))
        chosen: list[Valued] = []
        for valued in ordinary:
            if freed_bytes >= wanted_bytes:
                break
            freed_bytes += self._residents.evict(valued.facts)
            chosen.append(valued)
        by_id = {id(valued.facts): valued for valued in chosen}
        surplus_bytes = max(0, freed_bytes - wanted_bytes)
        spared = self._residents.spare_needless([valued.facts for valued in chosen], surplus_bytes)
        self._victims += [(by_id[id(facts)], _AHEAD) for facts in spared]
        return self._actions(0)

    def _trim_to(self, quota: Quota) -> None:
        accounts = Residents([f for f in self._snapshot.revisions if f.tenant == quota.tenant], quota.level)
        over_bytes = accounts.held_bytes() + quota.reserved_bytes - quota.limit_bytes
        mine = [
            valued
            for valued in self._remaining()
            if valued.facts.tenant == quota.tenant and valued.standing <= Standing.ORDINARY
        ]
        for valued in mine:
            if over_bytes <= 0:
                return
            over_bytes -= accounts.evict(valued.facts)
            self._residents.evict(valued.facts)
            self._victims.append((valued, _QUOTA))

    # What it comes to.

    def _actions(self, missing_bytes: int) -> list[Action]:
        """The evictions, each with what it frees in this order, and before them what the pool has to give."""
        freed = self._residents.freed_in_turn([valued.facts for valued, _ in self._victims])
        evictions = [
            self._eviction(valued, reason, frees_bytes)
            for (valued, reason), frees_bytes in zip(self._victims, freed, strict=True)
        ]
        from_pool_bytes = min(self._level.pool_bytes, missing_bytes - sum(freed))
        pool = [DropPool(self._level.level, from_pool_bytes)] if from_pool_bytes > 0 else []
        return [*pool, *evictions]

    def _eviction(self, valued: Valued, reason: str, frees_bytes: int) -> Evict:
        facts = valued.facts
        return Evict(
            level=self._level.level,
            name=facts.name,
            revision=facts.revision,
            frees_bytes=frees_bytes,
            reason=reason,
            unused_s=max(0.0, self._now_s - facts.last_used_s),
            worth_s=valued.worth_s,
            why=_why(valued, reason),
        )


def _may_go_ahead(valued: Valued) -> bool:
    """Nobody needs the room yet, so what somebody is likely to ask for within the horizon stays."""
    return valued.standing <= Standing.ORDINARY and valued.worth_s <= AHEAD_REQUESTS * valued.reload_s


def _as_resident(need: Need) -> RevisionFacts:
    """A newcomer with what it shares with others at the level: it holds that already, whoever of them goes."""
    facts = need.newcomer or RevisionFacts(need.for_name, "", Tier.AUTO)
    if need.level is Level.L1:
        return replace(facts, busy=True, l1_blobs=need.shared_blobs)
    return replace(facts, busy=True, l2_blobs=need.shared_blobs)


def _reason(valued: Valued) -> str:
    return {Standing.STALE: _STALE, Standing.COLD: _COLD}.get(valued.standing, _WORTH)


def _why(valued: Valued, reason: str) -> str:
    size = format_size(valued.own_bytes)
    worth = f"{size} that spare {spell(valued.worth_s)} of waiting in the next six hours"
    return {
        _STALE: "a newer revision of the model has taken its place",
        _COLD: f"it is cold, and cold models go first: {worth}",
        _QUOTA: f"its tenant is over its quota: {worth}, the least for each byte of the tenant's",
        _AHEAD: f"room is kept free ahead of need: {worth}, the least for each byte",
    }.get(reason, f"it was worth least for each byte: {worth}")


__all__ = [
    "REASONS", "Action", "Decision", "DropPool", "Evict", "Plan", "Shortfall", "Verdict", "eviction_order", "plan",
    "plan_ahead", "plan_idle",
]  # fmt: skip
