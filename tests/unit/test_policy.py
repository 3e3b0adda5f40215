from __future__ import annotations

from typing import Any

import pytest

from cached.level import Level
from cached.policy import DropPool, Evict, LevelFacts, Need, RevisionFacts, Snapshot, plan, plan_idle
from cached.types import Tier
from cached.units import GIB

L1, L2 = Level.L1, Level.L2


def revision(name: str, size: int = 10, tier: Tier = Tier.AUTO, **facts: Any) -> RevisionFacts:
    """A revision with one blob of its own at L1."""
    values: dict[str, Any] = {"revision": f"{name}-1", "l1_blobs": {f"{name}-blob": size}}
    return RevisionFacts(name=name, tier=tier, **(values | facts))


def snapshot(
    *revisions: RevisionFacts, need: int, capacity: int = 100, used: int | None = None, **facts: int
) -> Snapshot:
    if used is None:
        used = sum({k: v for facts in revisions for k, v in facts.l1_blobs.items()}.values())
        used += facts.get("withdrawn_bytes", 0) + facts.get("pool_bytes", 0)
    return Snapshot(revisions, {L1: LevelFacts(L1, capacity, used, **facts)}, (Need(L1, need, "new"),))


def victims(found: Snapshot) -> list[str]:
    outcome = plan(found, 1000.0)
    assert outcome.shortfall is None
    return [action.name for action in outcome.actions if isinstance(action, Evict)]


def test_nothing_to_do_while_there_is_room() -> None:
    assert plan(snapshot(revision("a", 60), need=40), 0.0).actions == ()


def test_order_stale_then_cold_then_without_demand_priority_and_least_recent_use() -> None:
    order = [
        revision("stale-hot", tier=Tier.HOT, pinned=True, current=False, last_used_s=9),
        revision("cold", tier=Tier.COLD, priority=9, last_used_s=9),
        revision("low", priority=1, last_used_s=9),
        revision("older", tier=Tier.AUTO, priority=2, last_used_s=1),
        revision("newer-a", priority=2, last_used_s=2),
        revision("newer-b", priority=2, last_used_s=2),
    ]
    for count in range(1, len(order) + 1):
        need = 100 - 60 + 10 * count
        assert victims(snapshot(*reversed(order), need=need)) == [facts.name for facts in order[:count]]


@pytest.mark.parametrize("protection", [{"leased": True}, {"pinned": True}, {"tier": Tier.HOT}, {"busy": True}])
def test_the_protected_stay_and_are_named(protection: dict[str, Any]) -> None:
    kept = revision("kept", 60, **protection)
    assert victims(snapshot(kept, revision("other", 40, last_used_s=99), need=40)) == ["other"]
    outcome = plan(snapshot(kept, revision("other", 40), need=41), 0.0)
    assert outcome.actions == ()
    assert outcome.shortfall is not None
    assert [(holder.name, holder.size_bytes) for holder in outcome.shortfall.holders] == [("kept", 60)]


def test_a_lease_protects_a_stale_revision_too() -> None:
    assert plan(snapshot(revision("old", 60, current=False, leased=True), need=50), 0.0).shortfall is not None


def test_a_victim_that_a_later_one_makes_needless_is_spared() -> None:
    small, big = revision("small", 10, last_used_s=1), revision("big", 80, last_used_s=2)
    assert victims(snapshot(small, big, need=85)) == ["big"]
    assert victims(snapshot(small, big, need=95)) == ["small", "big"]


def test_shared_blobs_are_freed_by_the_last_who_goes() -> None:
    a = revision("a", l1_blobs={"shared": 30, "a": 10}, last_used_s=1)
    b = revision("b", l1_blobs={"shared": 30, "b": 10}, last_used_s=2)
    kept = revision("c", l1_blobs={"shared": 30, "c": 10}, leased=True)
    outcome = plan(snapshot(a, b, need=90), 0.0)
    assert [(action.name, action.frees_bytes) for action in outcome.actions if isinstance(action, Evict)] == [
        ("a", 10),
        ("b", 40),
    ]
    assert victims(snapshot(a, b, need=60)) == ["a"]
    outcome = plan(snapshot(a, b, kept, need=61), 0.0)
    assert outcome.shortfall is not None
    assert outcome.shortfall.evictable_bytes == 20


def test_revisions_that_free_nothing_are_left_alone() -> None:
    guest = revision("guest", l1_blobs={"shared": 30}, last_used_s=0)
    host = revision("host", l1_blobs={"shared": 30}, leased=True)
    other = revision("other", 40, last_used_s=9)
    assert victims(snapshot(guest, host, other, need=50)) == ["other"]


def test_the_pool_goes_before_any_model_and_only_as_far_as_needed() -> None:
    model = revision("model", 50)
    assert plan(snapshot(model, need=45, pool_bytes=20), 0.0).actions == (DropPool(L1, 15),)
    first, second = plan(snapshot(model, need=85, pool_bytes=20), 0.0).actions
    assert first == DropPool(L1, 5)
    assert isinstance(second, Evict)
    (only,) = plan(snapshot(model, need=75, pool_bytes=20, capacity=100), 0.0).actions[-1:]
    assert isinstance(only, Evict)


def test_no_room_says_who_holds_the_bytes() -> None:
    llama = revision("llama", 26 * GIB, Tier.HOT)
    qwen = revision("qwen", 8 * GIB, Tier.HOT, leased=True)
    outcome = plan(snapshot(qwen, llama, need=20 * GIB, capacity=40 * GIB), 0.0)
    assert outcome.shortfall is not None
    error = outcome.shortfall.error()
    assert error.message == (
        "l1 has no room for 20.0 GiB of new: 6.0 GiB of 40.0 GiB can be had; "
        "held by llama (hot, 26.0 GiB), qwen (leased, hot, 8.0 GiB)"
    )
    assert error.fields["holders"] == "llama (hot, 26.0 GiB), qwen (leased, hot, 8.0 GiB)"
    assert (error.fields["fits"], error.fields["needed_bytes"]) == ("later", str(20 * GIB))


def test_many_holders_are_summed_up_in_the_message() -> None:
    held = [revision(f"m{number}", 10, leased=True) for number in range(8)]
    outcome = plan(snapshot(*held, need=50), 0.0)
    assert outcome.shortfall is not None
    error = outcome.shortfall.error()
    assert error.message.endswith("m4 (leased, 10 B), 3 more")
    assert "m7" in error.fields["holders"]


def test_withdrawn_bytes_are_told_apart() -> None:
    held = revision("held", 50, leased=True)
    outcome = plan(snapshot(held, need=40, withdrawn_bytes=30), 0.0)
    assert outcome.shortfall is not None
    assert outcome.shortfall.withdrawn_would_do
    assert outcome.shortfall.hint() == "retry later: 30 B are evicted but still mapped by workers"
    outcome = plan(snapshot(held, need=51, withdrawn_bytes=30), 0.0)
    assert outcome.shortfall is not None
    assert not outcome.shortfall.withdrawn_would_do
    outcome = plan(snapshot(held, need=40, reserved_bytes=20), 0.0)
    assert outcome.shortfall is not None
    assert "20 B are being loaded" in outcome.shortfall.hint()


def test_what_never_fits_evicts_nothing() -> None:
    outcome = plan(snapshot(revision("a", 50), need=101), 0.0)
    assert outcome.actions == ()
    assert outcome.shortfall is not None
    assert (outcome.shortfall.never_fits, outcome.shortfall.error().fields["fits"]) == (True, "never")
    assert "never fit" in outcome.shortfall.hint()


def test_a_lowered_capacity_is_a_need_of_nothing() -> None:
    assert victims(
        snapshot(revision("a", 30, last_used_s=1), revision("b", 30, last_used_s=2), need=0, capacity=40)
    ) == ["a"]


def test_needs_at_two_levels_are_met_together_or_not_at_all() -> None:
    both = revision("both", 50, l2_blobs={"both-blob": 50})
    levels = {L1: LevelFacts(L1, 60, 50), L2: LevelFacts(L2, 60, 50)}
    needs = (Need(L1, 20, "new"), Need(L2, 10, "new"), Need(L2, 10, "newer"))
    outcome = plan(Snapshot((both,), levels, needs), 0.0)
    assert [action.level for action in outcome.actions] == [L1, L2]
    outcome = plan(Snapshot((both,), levels, (Need(L1, 20, "new"), Need(L2, 61, "new"))), 0.0)
    assert (outcome.actions, outcome.shortfall is None) == ((), False)


def test_reasons_are_few_and_tell_how_long_it_was_unused() -> None:
    kinds = [
        revision("a", 10, Tier.HOT, current=False, last_used_s=40.0),
        revision("b", 10, Tier.COLD, last_used_s=40.0),
        revision("c", 10, Tier.AUTO, last_used_s=4000.0),
    ]
    assert plan(snapshot(*kinds, need=100), 3700.0).actions == (
        Evict(L1, "a", "a-1", 10, "stale", 3660.0),
        Evict(L1, "b", "b-1", 10, "cold", 3660.0),
        Evict(L1, "c", "c-1", 10, "worth least", 0.0),
    )


def test_cold_revisions_leave_l1_when_idle() -> None:
    cold = revision("cold", tier=Tier.COLD, last_used_s=100.0)
    idle = Snapshot(
        (
            cold,
            revision("leased", tier=Tier.COLD, leased=True),
            revision("pinned", tier=Tier.COLD, pinned=True),
            revision("loading", tier=Tier.COLD, busy=True),
            revision("warm"),
            revision("on-disk", tier=Tier.COLD, has_origin=False, l2_blobs={"on-disk-blob": 10}),
            revision("last-copy", tier=Tier.COLD, has_origin=False),
            revision("guest", tier=Tier.COLD, l1_blobs={"warm-blob": 10}),
        ),
        {},
    )
    assert plan_idle(idle, 200.0).actions == (
        Evict(L1, "cold", "cold-1", 10, "cold and idle", 100.0),
        Evict(L1, "on-disk", "on-disk-1", 10, "cold and idle", 200.0),
    )
    assert [a.name for a in plan_idle(idle, 200.0, cold_grace_s=150.0).actions if isinstance(a, Evict)] == ["on-disk"]
    assert plan_idle(Snapshot((), {}), 0.0).actions == ()


def test_two_cold_revisions_that_share_everything_go_together() -> None:
    twins = (revision("a", tier=Tier.COLD, l1_blobs={"x": 10}), revision("b", tier=Tier.COLD, l1_blobs={"x": 10}))
    assert sum(a.frees_bytes for a in plan_idle(Snapshot(twins, {}), 0.0).actions if isinstance(a, Evict)) == 10


def test_work_grows_in_step_with_the_revisions() -> None:
    """A plan holds the loop up: it looks at each revision's blobs a few times, however many revisions there are."""
    looks = 0

    class Counted(dict[str, int]):
        def items(self) -> Any:
            nonlocal looks
            looks += 1
            return super().items()

        def keys(self) -> Any:
            nonlocal looks
            looks += 1
            return super().keys()

    revisions = tuple(
        revision(f"m{number}", l1_blobs=Counted({f"{number}": 10, "shared": 10}), last_used_s=number)
        for number in range(1000)
    )
    crowded = snapshot(*revisions, need=5_000, used=10_010, capacity=10_010)
    looks = 0
    assert len(victims(crowded)) == 500
    assert looks < 6 * 1000
