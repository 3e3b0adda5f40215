"""The policy against its promises, for any snapshot: what it does is checked by carrying it out on plain sets."""

from __future__ import annotations

import random
from itertools import combinations

from hypothesis import assume, given
from hypothesis import strategies as st

from cached.level import Level
from cached.policy import (
    Demand,
    DropPool,
    Evict,
    LevelFacts,
    Need,
    Plan,
    RevisionFacts,
    Snapshot,
    plan,
    plan_ahead,
    plan_idle,
)
from cached.policy.plan import eviction_order
from cached.types import Tier

SIZES = dict(zip("abcdefgh", (0, 1, 2, 3, 5, 8, 13, 21), strict=True))
blobs = st.sets(st.sampled_from(sorted(SIZES)), max_size=4).map(lambda digests: {d: SIZES[d] for d in sorted(digests)})

rarely = st.sampled_from([False] * 7 + [True])
demands = st.builds(Demand, st.integers(-9000, 3), st.tuples(*[st.integers(0, 9)] * 3))


@st.composite
def revisions(draw: st.DrawFn) -> tuple[RevisionFacts, ...]:
    return tuple(
        RevisionFacts(
            name=f"m{number // 2}",
            revision=f"r{number}",
            tier=draw(st.sampled_from(Tier)),
            pinned=draw(rarely),
            leased=draw(rarely),
            busy=draw(rarely),
            current=draw(st.booleans()),
            priority=draw(st.integers(0, 2)),
            last_used_s=draw(st.integers(0, 3)),
            l1_blobs=draw(blobs),
            l2_blobs=draw(blobs),
            has_origin=draw(st.booleans()),
            requests=draw(demands),
            misses=draw(demands),
            keep_until_s=draw(st.sampled_from([0.0, 0.0, 99.0])),
        )
        for number in range(draw(st.integers(0, 7)))
    )


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    found = draw(revisions())
    levels = {}
    for level in (Level.L1, Level.L2):
        held = {digest: size for facts in found for digest, size in facts.blobs(level).items()}
        withdrawn, pool = (draw(st.integers(0, 10)), draw(st.integers(0, 10))) if level is Level.L1 else (0, 0)
        used = sum(held.values()) + withdrawn + pool
        reserved = draw(st.integers(0, 10))
        capacity = max(0, used + reserved + draw(st.integers(-10, 20)))
        levels[level] = LevelFacts(level, capacity, used, reserved, withdrawn, pool)
    needs = [
        Need(level, max(0, levels[level].free_bytes + draw(st.integers(-5, levels[level].used_bytes + 5))), "new")
        for level in draw(st.lists(st.sampled_from([*levels]), max_size=3))
    ]
    return Snapshot(found, levels, tuple(needs))


def held_after(snapshot: Snapshot, level: Level, gone: set[tuple[str, str]]) -> int:
    """Bytes of the blobs that the revisions that stay hold."""
    staying = [facts for facts in snapshot.revisions if (facts.name, facts.revision) not in gone]
    return sum({d: s for facts in staying for d, s in facts.blobs(level).items()}.values())


def freed(snapshot: Snapshot, level: Level, gone: set[tuple[str, str]]) -> int:
    return held_after(snapshot, level, set()) - held_after(snapshot, level, gone)


def evicted(outcome: Plan, level: Level) -> list[Evict]:
    return [action for action in outcome.actions if isinstance(action, Evict) and action.level is level]


def dropped(outcome: Plan, level: Level) -> int:
    return sum(
        action.size_bytes for action in outcome.actions if isinstance(action, DropPool) and action.level is level
    )


def missing(snapshot: Snapshot, level: Level) -> int | None:
    """What has to become free there; None when nothing was asked for."""
    wanted = [need.size_bytes for need in snapshot.needs if need.level is level]
    return sum(wanted) - snapshot.levels[level].free_bytes if wanted else None


def may_go(facts: RevisionFacts) -> bool:
    return not (facts.leased or facts.busy or (facts.current and (facts.pinned or facts.tier is Tier.HOT)))


@given(snapshots())
def test_victims_are_never_leased_pinned_hot_or_loading(snapshot: Snapshot) -> None:
    by_key = {(facts.name, facts.revision): facts for facts in snapshot.revisions}
    for outcome in (plan(snapshot, 5.0), plan_idle(snapshot, 5.0), plan_ahead(snapshot, 5.0)):
        for action in outcome.actions:
            if isinstance(action, Evict):
                facts = by_key[action.name, action.revision]
                assert may_go(facts)
                assert facts.blobs(action.level)


@given(snapshots())
def test_a_need_is_met_or_nothing_is_done(snapshot: Snapshot) -> None:
    outcome = plan(snapshot, 5.0)
    if outcome.shortfall is not None:
        assert outcome.actions == ()
        return
    for level, facts in snapshot.levels.items():
        victims = evicted(outcome, level)
        gone = {(action.name, action.revision) for action in victims}
        assert len(gone) == len(victims)
        assert sum(action.frees_bytes for action in victims) == freed(snapshot, level, gone)
        assert dropped(outcome, level) <= facts.pool_bytes
        lacking = missing(snapshot, level)
        if lacking is None:
            assert not victims
        else:
            assert freed(snapshot, level, gone) + dropped(outcome, level) >= lacking


@given(snapshots())
def test_no_victim_and_no_pool_byte_is_superfluous(snapshot: Snapshot) -> None:
    outcome = plan(snapshot, 5.0)
    for level, facts in snapshot.levels.items():
        lacking = missing(snapshot, level) or 0
        gone = {(action.name, action.revision) for action in evicted(outcome, level)}
        for spared in gone:
            assert freed(snapshot, level, gone - {spared}) + facts.pool_bytes < lacking
        if outcome.shortfall is None:
            assert dropped(outcome, level) == max(0, lacking - freed(snapshot, level, gone))


@given(snapshots())
def test_a_shortfall_is_real_and_its_figures_are_right(snapshot: Snapshot) -> None:
    shortfall = plan(snapshot, 5.0).shortfall
    assume(shortfall is not None)
    assert shortfall is not None
    level, facts = shortfall.level, snapshot.levels[shortfall.level]
    all_who_may = {(f.name, f.revision) for f in snapshot.revisions if may_go(f)}
    most = freed(snapshot, level, all_who_may) + facts.pool_bytes
    lacking = missing(snapshot, level)
    assert lacking is not None
    assert shortfall.evictable_bytes == most
    assert most < lacking or shortfall.needed_bytes > facts.capacity_bytes
    assert {(h.name, h.revision) for h in shortfall.holders} == {
        (f.name, f.revision) for f in snapshot.revisions if not may_go(f) and f.blobs(level)
    }
    error = shortfall.error()
    assert error.fields["level"] == level
    assert int(error.fields["available_bytes"]) >= 0


@given(snapshots(), st.randoms(use_true_random=False))
def test_the_order_of_the_facts_does_not_matter(snapshot: Snapshot, shuffle: random.Random) -> None:
    shuffled = list(snapshot.revisions)
    shuffle.shuffle(shuffled)
    assert plan(Snapshot(tuple(shuffled), snapshot.levels, snapshot.needs), 5.0) == plan(snapshot, 5.0)


@given(snapshots())
def test_a_dearer_revision_goes_only_where_no_cheaper_set_would_do(snapshot: Snapshot) -> None:
    """Whoever goes, those who come before the last victim in the order would not have been enough."""
    outcome = plan(snapshot, 5.0)
    for level, facts in snapshot.levels.items():
        lacking = missing(snapshot, level) or 0
        gone = {(action.name, action.revision) for action in evicted(outcome, level)}
        order = [valued.facts for valued in eviction_order(snapshot, level, 5.0)]
        last = max((at for at, f in enumerate(order) if (f.name, f.revision) in gone), default=0)
        before = {(f.name, f.revision) for f in order[:last]}
        for count in range(len(before) + 1) if gone else ():
            for chosen in combinations(sorted(before), count):
                assert freed(snapshot, level, set(chosen)) + facts.pool_bytes < lacking


@given(snapshots())
def test_idle_evictions_are_cold_recoverable_and_free_bytes(snapshot: Snapshot) -> None:
    outcome = plan_idle(snapshot, 5.0, cold_grace_s=3.0)
    by_key = {(facts.name, facts.revision): facts for facts in snapshot.revisions}
    victims = evicted(outcome, Level.L1)
    gone = {(action.name, action.revision) for action in victims}
    assert len(victims) == len(outcome.actions) == len(gone)
    assert sum(action.frees_bytes for action in victims) == freed(snapshot, Level.L1, gone)
    for key in gone:
        facts = by_key[key]
        assert facts.tier is Tier.COLD
        assert facts.keep_until_s <= 5.0
        assert facts.last_used_s <= 2.0
        assert facts.has_origin or set(facts.l1_blobs) <= set(facts.l2_blobs)
        assert freed(snapshot, Level.L1, gone - {key}) < freed(snapshot, Level.L1, gone)
    assert plan_idle(after(snapshot, gone), 5.0, cold_grace_s=3.0).actions == ()


def after(snapshot: Snapshot, gone: set[tuple[str, str]]) -> Snapshot:
    return Snapshot(
        tuple(f for f in snapshot.revisions if (f.name, f.revision) not in gone), snapshot.levels, snapshot.needs
    )
