"""Why a model is where it is: ``explain(snapshot, name, now_s)``, for people who wonder. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cached.level import Level
from cached.policy.plan import Evict, Plan, eviction_order, plan, plan_idle
from cached.policy.snapshot import Need, RevisionFacts, Snapshot
from cached.policy.worth import Standing, Valued, Valuer, spell
from cached.types import Tier
from cached.units import format_size

_LEVELS = (Level.L1, Level.L2)
_STANDINGS = {
    Standing.STALE: "it is not its model's current revision, so it goes first",
    Standing.COLD: "it is cold, so it goes before others",
    Standing.ORDINARY: "its worth decides",
    Standing.KEPT: "it is within a keep-alive or the last copy, so it goes only where nothing else does",
    Standing.HELD: "it is never evicted",
}


@dataclass(frozen=True, slots=True)
class Place:
    """A revision at one level, or absent from it.

    ``worth_s``: seconds of waiting that its being there is expected to spare in the next six hours; ``requests``: what
    is expected then; ``reload_s``: what each of them would wait without it. ``before``: those that would be evicted
    before it, the first to go first; None when it may not be evicted itself.
    """

    level: Level
    held_bytes: int
    standing: Standing
    worth_s: float
    requests: float
    reload_s: float
    protections: tuple[str, ...]
    before: tuple[str, ...] | None
    why: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """A model's places, one for each of its revisions and each level of the snapshot."""

    name: str
    places: tuple[tuple[str, Place], ...]

    def place(self, level: Level, revision: str = "") -> Place | None:
        """The place of a revision (else of the first that is known) at a level."""
        found = (place for of, place in self.places if place.level is level and revision in {"", of})
        return next(found, None)


def worths(snapshot: Snapshot, level: Level, now_s: float) -> Mapping[tuple[str, str], float]:
    """What each revision of the snapshot is, or would be, worth at a level, by name and revision."""
    valued = {id(item.facts): item for item in eviction_order(snapshot, level, now_s)}
    return {
        (facts.name, facts.revision): (valued.get(id(facts)) or _value(snapshot, level, facts, now_s)).worth_s
        for facts in snapshot.revisions
    }


def explain(snapshot: Snapshot, name: str, now_s: float, *, size_bytes: int = 0) -> Explanation:
    """Every revision of the model that the snapshot has; without any, no places. The current revision comes first.

    ``size_bytes``: how large it is, for one of which not all is here.
    """
    own = sorted((facts for facts in snapshot.revisions if facts.name == name), key=lambda facts: not facts.current)
    places = []
    for level in _LEVELS:
        if level in snapshot.levels and own:
            order = eviction_order(snapshot, level, now_s)
            places += [(facts.revision, _place(snapshot, level, facts, order, now_s, size_bytes)) for facts in own]
    return Explanation(name, tuple(places))


def _place(
    snapshot: Snapshot, level: Level, facts: RevisionFacts, order: list[Valued], now_s: float, size_bytes: int
) -> Place:
    held_bytes = sum(facts.blobs(level).values())
    at = next((index for index, valued in enumerate(order) if valued.facts is facts), None)
    valued = order[at] if at is not None else _value(snapshot, level, facts, now_s, size_bytes)
    before = None if at is None else tuple(other.facts.name for other in order[:at])
    return Place(
        level=level,
        held_bytes=held_bytes,
        standing=valued.standing,
        worth_s=valued.worth_s,
        requests=valued.worth_s / valued.reload_s if valued.reload_s else 0.0,
        reload_s=valued.reload_s,
        protections=facts.protections,
        before=before,
        why=_why(level, facts, valued, held_bytes, before),
    )


def _value(snapshot: Snapshot, level: Level, facts: RevisionFacts, now_s: float, size_bytes: int = 0) -> Valued:
    """What it is, or would be, worth there, though it is no candidate for eviction."""
    size_bytes = max(sum(facts.l1_blobs.values()), sum(facts.l2_blobs.values()), size_bytes)
    time_s = now_s if snapshot.time_s is None else snapshot.time_s
    valuer = Valuer(snapshot.levels[level], lambda one: one.l1_blobs.keys() <= one.l2_blobs.keys(), now_s, time_s)
    return valuer.value_newcomer(facts, size_bytes)


def _why(level: Level, facts: RevisionFacts, valued: Valued, held_bytes: int, before: tuple[str, ...] | None) -> str:
    worth = f"it spares {spell(valued.worth_s)} of waiting in the next six hours"
    if not held_bytes:
        return f"not in {level}: there {worth.replace('spares', 'would spare')}"
    held = f"{format_size(held_bytes)} in {level}"
    if facts.protections:
        return f"{held}: {', '.join(facts.protections)}, so it is not evicted"
    if before is None:
        return f"{held}: all of it is shared with others that stay, so its going would free nothing"
    first = f"{len(before)} would go before it" if before else "it would go first"
    return f"{held}: {worth}; {_STANDINGS[valued.standing]}; {first}"


def what_if(snapshot: Snapshot, name: str, tier: Tier, now_s: float, *, size_bytes: int = 0) -> Plan:
    """What would have to happen if a model had this tier: evictions for one that becomes hot, its own if it gets cold.

    ``size_bytes``: what it would need of L1 if nothing of it is there. Nothing is decided by asking.
    """
    revisions = tuple(
        replace(facts, tier=tier) if facts.name == name and facts.current else facts for facts in snapshot.revisions
    )
    changed = replace(snapshot, revisions=revisions, needs=())
    own = next((facts for facts in revisions if facts.name == name and facts.current), None)
    if tier is Tier.COLD:
        leaving = plan_idle(changed, now_s).actions
        return Plan(tuple(action for action in leaving if isinstance(action, Evict) and action.name == name))
    if tier is not Tier.HOT or (own is not None and own.l1_blobs):
        return Plan()
    newcomer = own or RevisionFacts(name, "", tier)
    return plan(replace(changed, needs=(Need(Level.L1, size_bytes, name, newcomer),)), now_s)
