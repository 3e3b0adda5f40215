"""Value, admission, tiers, quotas and watermarks, each in the smallest case that shows it."""

from __future__ import annotations

from typing import Any

import pytest

from cached.level import Level
from cached.policy import (
    Demand,
    DropPool,
    Evict,
    Hop,
    LevelFacts,
    Need,
    Otherwise,
    Plan,
    Quota,
    RevisionFacts,
    Snapshot,
    Verdict,
    plan,
    plan_ahead,
    plan_idle,
)
from cached.policy.admission import MARGIN, PATIENCE
from cached.policy.plan import eviction_order
from cached.policy.worth import WARM_FACTOR
from cached.types import Tier

L1, L2 = Level.L1, Level.L2
FAST, SLOW = Hop(1.0, 10.0), Hop(4.0, 2.0)
NOW_S = 1000.0


def often(requests: float) -> Demand:
    """So many requests just now."""
    return Demand(NOW_S, (requests, requests, requests))


def model(name: str, size: int = 10, requests: float = 1.0, **facts: Any) -> RevisionFacts:
    """One that is in L1 only."""
    values: dict[str, Any] = {
        "tier": Tier.AUTO, "l1_blobs": {f"{name}-blob": size}, "requests": often(requests),
        "misses": often(requests), "from_l2": FAST, "from_l3": SLOW, "last_used_s": NOW_S,
    }  # fmt: skip
    return RevisionFacts(name, f"{name}-1", **(values | facts))


def newcomer(requests: float = 1.0, **facts: Any) -> RevisionFacts:
    return model("new", requests=requests, **({"l1_blobs": {}} | facts))


def on_disk(facts: RevisionFacts) -> RevisionFacts:
    return model(facts.name, requests=facts.requests.counts[0], l1_blobs=facts.l1_blobs, l2_blobs=facts.l1_blobs)


def offer(
    new: RevisionFacts, *here: RevisionFacts, size: int = 10, otherwise: Otherwise = Otherwise.TRANSIENT,
    level: Level = L1, quotas: tuple[Quota, ...] = (), **facts: int,
) -> Plan:  # fmt: skip
    """A newcomer to a level that its residents fill."""
    used = sum({k: v for facts in here for k, v in facts.blobs(level).items()}.values())
    accounts: dict[str, int] = {"capacity_bytes": used, "used_bytes": used, "transient_room_bytes": 1000}
    need = Need(level, size, new.name, new, otherwise)
    return plan(Snapshot(here, {level: LevelFacts(level, **(accounts | facts))}, (need,), quotas), NOW_S)


def verdict(outcome: Plan) -> Verdict:
    assert len(outcome.decisions) == 1
    return outcome.decisions[0].verdict


def gone(outcome: Plan) -> list[str]:
    return [action.name for action in outcome.actions if isinstance(action, Evict)]


def order(*here: RevisionFacts, level: Level = L1) -> list[str]:
    snapshot = Snapshot(here, {level: LevelFacts(level, 10_000, 10_000)})
    return [valued.facts.name for valued in eviction_order(snapshot, level, NOW_S)]


# Value.


def test_who_is_asked_for_least_goes_first() -> None:
    assert order(model("often", requests=9), model("seldom", requests=1), model("never", requests=0)) == [
        "never", "seldom", "often",
    ]  # fmt: skip


def test_requests_of_long_ago_count_less() -> None:
    old = model("old", requests=1)
    faded = RevisionFacts("faded", "1", Tier.AUTO, l1_blobs={"f": 10}, requests=Demand(NOW_S - 86_400, (2.0, 2.0, 2.0)))
    assert order(old, faded) == ["faded", "old"]


def test_who_can_be_brought_back_from_disk_goes_before_who_must_come_from_the_origin() -> None:
    assert order(model("origin"), on_disk(model("disk"))) == ["disk", "origin"]


def test_a_copy_on_disk_counts_whoever_holds_it_there() -> None:
    twin = model("twin", l1_blobs={}, l2_blobs={"shared": 10})
    assert order(model("origin"), model("disk", l1_blobs={"shared": 10}), twin) == ["disk", "origin"]


def test_half_a_copy_on_disk_is_none() -> None:
    half = model("half", l1_blobs={"a": 5, "b": 5}, l2_blobs={"a": 5}, requests=1.01)
    assert order(half, model("origin")) == ["origin", "half"]


def test_a_large_model_goes_before_a_small_one_that_takes_as_long_for_each_byte_or_longer() -> None:
    assert order(model("small", 10), model("large", 100)) == ["large", "small"]


def test_shared_blobs_count_for_what_their_going_frees() -> None:
    """Two that share most of their bytes free little, and cost as much as one whose bytes are its own."""
    one = model("one", l1_blobs={"base": 90, "one": 10})
    two = model("two", l1_blobs={"base": 90, "two": 10}, leased=True)
    assert order(one, two, model("alone", 100)) == ["alone", "one"]


def test_what_frees_nothing_is_no_candidate() -> None:
    guest = model("guest", l1_blobs={"base": 90}, requests=0)
    host = model("host", l1_blobs={"base": 90, "own": 10}, leased=True)
    assert order(guest, host, model("other")) == ["other"]


def test_l2_is_worth_the_misses_of_l1_and_the_difference_between_the_hops() -> None:
    hit = model("hit", l2_blobs={"h": 10}, misses=often(0), requests=often(9))
    missed = model("missed", l2_blobs={"m": 10}, misses=often(1), requests=often(1))
    assert order(hit, missed, level=L2) == ["hit", "missed"]
    near = model("near", l2_blobs={"n": 10}, from_l3=FAST)  # the origin is as near as the disk: no use for a copy
    assert order(near, missed, level=L2) == ["near", "missed"]


def test_priority_doubles() -> None:
    assert order(model("a", requests=3), model("b", requests=1, priority=1)) == ["b", "a"]
    assert order(model("a", requests=3), model("b", requests=1, priority=2)) == ["a", "b"]
    assert order(model("a", requests=0, priority=2), model("b", requests=0, priority=1)) == ["b", "a"]
    assert order(model("a", priority=1000), model("b", priority=999, requests=0)) == ["b", "a"]


def test_a_request_for_a_warm_model_counts_more_and_one_that_nobody_asks_for_a_little() -> None:
    warm = model("warm", tier=Tier.WARM)
    assert order(warm, model("less", requests=WARM_FACTOR - 0.1)) == ["less", "warm"]
    assert order(warm, model("more", requests=WARM_FACTOR + 0.1)) == ["warm", "more"]
    assert order(model("unasked", tier=Tier.WARM, requests=0), model("seldom", requests=0.01)) == ["seldom", "unasked"]


def test_standing_comes_before_worth() -> None:
    assert order(
        model("stale", requests=99, current=False, tier=Tier.HOT, pinned=True),
        model("cold", requests=99, tier=Tier.COLD),
        model("auto", requests=0),
        model("kept", requests=0, tier=Tier.COLD, keep_until_s=NOW_S + 1),
        model("last-copy", requests=0, has_origin=False),
        model("hot", tier=Tier.HOT),
        model("pinned", pinned=True),
        model("leased", leased=True),
        model("loading", busy=True),
    ) == ["stale", "cold", "auto", "kept", "last-copy"]
    assert order(model("over", keep_until_s=NOW_S), model("auto", requests=9)) == ["over", "auto"]


def test_without_an_origin_a_copy_on_disk_makes_that_in_memory_ordinary() -> None:
    safe = model("safe", has_origin=False, requests=0, l2_blobs={"safe-blob": 10})
    assert order(safe, model("auto")) == ["safe", "auto"]
    assert order(model("other", l2_blobs={"o": 10}), safe, level=L2) == ["other", "safe"]


def test_an_eviction_tells_what_it_costs_in_words_and_figures() -> None:
    (action,) = offer(newcomer(50), model("a", 40)).actions
    assert isinstance(action, Evict)
    assert action.reason == "worth least"
    assert action.worth_s > 0
    assert action.why.startswith("it was worth least for each byte: 40 B that spare ")
    for facts, words in ((model("a", current=False), "newer revision"), (model("a", tier=Tier.COLD), "it is cold")):
        (action,) = offer(newcomer(50), facts).actions
        assert words in action.why


# Admission.


def test_where_there_is_room_anybody_may_come() -> None:
    outcome = offer(newcomer(0), model("a"), capacity_bytes=20)
    assert (verdict(outcome), outcome.actions) == (Verdict.ROOM, ())


def test_a_newcomer_evicts_whom_it_is_worth_more_than() -> None:
    outcome = offer(newcomer(2), model("a", requests=1))
    assert (verdict(outcome), gone(outcome)) == (Verdict.WORTH, ["a"])
    assert outcome.decisions[0].admitted
    assert outcome.decisions[0].worth_s == pytest.approx(2 * outcome.decisions[0].against_s)


def test_a_newcomer_that_is_worth_less_is_transient_and_nothing_is_done() -> None:
    outcome = offer(newcomer(1), model("a", requests=2))
    assert (verdict(outcome), outcome.actions, outcome.shortfall) == (Verdict.TRANSIENT, (), None)
    assert not outcome.decisions[0].admitted
    assert "of waiting in the next six hours" in outcome.decisions[0].why


def test_a_newcomer_must_be_worth_more_than_its_victims_together() -> None:
    here = model("a", 5, requests=1), model("b", 5, requests=1)
    assert verdict(offer(newcomer(1.2), *here, size=10)) is Verdict.TRANSIENT
    assert verdict(offer(newcomer(3), *here, size=10)) is Verdict.WORTH


def test_it_must_be_worth_clearly_more() -> None:
    assert verdict(offer(newcomer(MARGIN * 0.99), model("a"))) is Verdict.TRANSIENT
    assert verdict(offer(newcomer(MARGIN * 1.01), model("a"))) is Verdict.WORTH


def test_what_the_newcomer_would_cost_from_disk_is_what_it_is_worth() -> None:
    assert verdict(offer(newcomer(2, l2_blobs={"new-blob": 10}), model("a"))) is Verdict.TRANSIENT


def test_where_nothing_of_worth_goes_nobody_is_kept_out() -> None:
    assert verdict(offer(newcomer(0), model("a", requests=0))) is Verdict.WORTH


def test_who_stands_lower_does_not_count_and_who_stands_higher_is_not_displaced() -> None:
    assert verdict(offer(newcomer(1), model("a", requests=99, tier=Tier.COLD))) is Verdict.WORTH
    assert verdict(offer(newcomer(99, tier=Tier.COLD), model("a", requests=1))) is Verdict.TRANSIENT
    assert verdict(offer(newcomer(99), model("a", requests=0, keep_until_s=NOW_S + 9))) is Verdict.TRANSIENT
    assert verdict(offer(newcomer(0, tier=Tier.HOT), model("a", requests=99, keep_until_s=NOW_S + 9))) is Verdict.WORTH
    assert verdict(offer(newcomer(0, pinned=True), model("a", requests=99))) is Verdict.WORTH


def test_at_l2_it_does_without() -> None:
    resident = model("a", requests=9, l2_blobs={"a": 10})
    outcome = offer(newcomer(1), resident, level=L2, otherwise=Otherwise.SKIP)
    assert (verdict(outcome), outcome.actions, outcome.shortfall) == (Verdict.SKIPPED, (), None)
    outcome = offer(newcomer(1), model("a", l2_blobs={"a": 10}, leased=True), level=L2, otherwise=Otherwise.SKIP)
    assert (verdict(outcome), outcome.shortfall) == (Verdict.SKIPPED, None)


def test_without_room_beside_the_level_it_is_let_in_all_the_same() -> None:
    outcome = offer(newcomer(1), model("a", requests=2), transient_room_bytes=9)
    assert (verdict(outcome), gone(outcome)) == (Verdict.FORCED, ["a"])
    assert "no room beside the level" in outcome.decisions[0].why
    assert verdict(offer(newcomer(1), model("a", requests=2), transient_room_bytes=10)) is Verdict.TRANSIENT


def test_a_transient_segment_takes_free_bytes_first_then_room_beside_then_the_pool() -> None:
    resident = model("a", 80, requests=9)
    outcome = offer(
        newcomer(1), resident, size=25, capacity_bytes=100, used_bytes=95, pool_bytes=15, transient_room_bytes=10
    )
    assert (verdict(outcome), outcome.actions) == (Verdict.TRANSIENT, (DropPool(L1, 10),))


def test_where_all_is_protected_a_transient_segment_still_serves() -> None:
    held = model("held", leased=True)
    outcome = offer(newcomer(1), held)
    assert (verdict(outcome), outcome.shortfall, outcome.actions) == (Verdict.TRANSIENT, None, ())
    assert "held by held" in outcome.decisions[0].why
    assert offer(newcomer(1), held, transient_room_bytes=0).shortfall is not None


def test_who_must_have_room_is_not_weighed() -> None:
    outcome = offer(newcomer(0), model("a", requests=99), otherwise=Otherwise.EVICT)
    assert (verdict(outcome), gone(outcome)) == (Verdict.MUST, ["a"])


def test_a_need_of_which_nothing_is_known_must_have_its_room() -> None:
    facts = LevelFacts(L1, 10, 10, transient_room_bytes=99)
    outcome = plan(Snapshot((model("a"),), {L1: facts}, (Need(L1, 5, "x", None, Otherwise.TRANSIENT),)), NOW_S)
    assert (verdict(outcome), gone(outcome)) == (Verdict.MUST, ["a"])


def test_who_was_waited_for_long_enough_is_let_in() -> None:
    resident, reload_s = model("a", requests=99), SLOW.seconds(10)
    assert verdict(offer(newcomer(1, waited_l1_s=PATIENCE * reload_s - 1), resident)) is Verdict.TRANSIENT
    outcome = offer(newcomer(1, waited_l1_s=PATIENCE * reload_s), resident)
    assert (verdict(outcome), gone(outcome)) == (Verdict.WAITED, ["a"])
    at_l2 = model("a", requests=99, l2_blobs={"a": 10})
    patient = newcomer(1, waited_l1_s=1e9), newcomer(1, waited_l2_s=1e9)
    assert [verdict(offer(new, at_l2, level=L2, otherwise=Otherwise.SKIP)) for new in patient] == [
        "skipped",
        "waited long",
    ]
    kept = model("a", requests=99, keep_until_s=NOW_S + 1)
    assert verdict(offer(newcomer(1, waited_l1_s=1e9), kept)) is Verdict.TRANSIENT


def test_needs_of_one_level_are_decided_together() -> None:
    here = model("a", 20, requests=3)
    needs = tuple(Need(L1, 10, name, newcomer(3), Otherwise.TRANSIENT) for name in ("x", "y"))
    facts = LevelFacts(L1, 20, 20, transient_room_bytes=99)
    outcome = plan(Snapshot((here,), {L1: facts}, needs), NOW_S)
    assert (verdict(outcome), outcome.decisions[0].for_name, gone(outcome)) == (Verdict.WORTH, "x, y", ["a"])


def test_demand_has_its_own_clock() -> None:
    """``time_s`` is the time that survives a restart; ``now_s`` need not."""
    new, resident = newcomer(2), model("a", requests=1)
    late = Snapshot(
        (resident,), {L1: LevelFacts(L1, 10, 10, transient_room_bytes=99)},
        (Need(L1, 10, "new", new, Otherwise.TRANSIENT),), time_s=NOW_S + 86_400,
    )  # fmt: skip
    faded = plan(late, 5.0).decisions[0]
    assert 0 < faded.worth_s < offer(new, resident).decisions[0].worth_s / 2


# Quotas.


def test_over_its_quota_a_tenants_own_models_go_first() -> None:
    mine = model("mine", requests=5, tenant="t")
    other = model("other", requests=0)
    quotas = (Quota("t", L1, 15),)
    outcome = offer(newcomer(50, tenant="t"), mine, other, quotas=quotas)
    assert [(a.name, a.reason) for a in outcome.actions if isinstance(a, Evict)] == [("mine", "over quota")]
    assert gone(offer(newcomer(50), mine, other, quotas=quotas)) == ["other"]


def test_a_quota_bounds_even_where_the_level_has_room() -> None:
    mine = model("mine", tenant="t")
    outcome = offer(newcomer(9, tenant="t"), mine, quotas=(Quota("t", L1, 15),), capacity_bytes=1000)
    assert gone(outcome) == ["mine"]
    outcome = offer(newcomer(0, tenant="t"), mine, quotas=(Quota("t", L1, 15),), capacity_bytes=1000)
    assert verdict(outcome) is Verdict.TRANSIENT
    outcome = offer(newcomer(0, tenant="t"), mine, quotas=(Quota("t", L1, 20),), capacity_bytes=1000)
    assert verdict(outcome) is Verdict.ROOM


def test_what_a_tenant_loads_counts_against_its_quota() -> None:
    mine = model("mine", tenant="t")
    assert gone(offer(newcomer(9, tenant="t"), mine, quotas=(Quota("t", L1, 25, 10),), capacity_bytes=1000)) == ["mine"]


def test_a_quota_of_another_level_or_tenant_does_not_bind() -> None:
    mine = model("mine", tenant="t")
    quotas = (Quota("t", L2, 1), Quota("other", L1, 1))
    assert verdict(offer(newcomer(0, tenant="t"), mine, quotas=quotas, capacity_bytes=1000)) is Verdict.ROOM


def test_a_quota_that_does_not_suffice_says_whose_it_is() -> None:
    mine = model("mine", tenant="t", leased=True)
    outcome = offer(
        newcomer(9, tenant="t"), mine, size=12, quotas=(Quota("t", L1, 15),), capacity_bytes=99,
        otherwise=Otherwise.EVICT,
    )  # fmt: skip
    assert outcome.actions == ()
    assert outcome.shortfall is not None
    error = outcome.shortfall.error()
    assert error.message == (
        "the quota of t at l1 has no room for 12 B of new: 5 B of 15 B can be had; held by mine (leased, 10 B)"
    )
    assert error.fields["tenant"] == "t"
    outcome = offer(
        newcomer(9, tenant="t"), size=12, quotas=(Quota("t", L1, 11),), capacity_bytes=99, otherwise=Otherwise.EVICT
    )
    assert outcome.shortfall is not None
    assert outcome.shortfall.hint() == "it can never fit: give the tenant t a quota of at least 12 B of l1"


def test_a_victim_does_not_free_what_the_newcomer_shares_with_it() -> None:
    victim = model("a", requests=0, l1_blobs={"base": 10, "own": 5})
    other = model("b", requests=1)
    need = Need(L1, 12, "new", newcomer(9), Otherwise.TRANSIENT, {"base": 10})
    outcome = plan(Snapshot((victim, other), {L1: LevelFacts(L1, 25, 25, transient_room_bytes=99)}, (need,)), NOW_S)
    assert [(action.name, action.frees_bytes) for action in outcome.actions if isinstance(action, Evict)] == [
        ("a", 5),
        ("b", 10),
    ]


def test_what_a_newcomer_shares_with_others_counts_against_its_quota_too() -> None:
    base = model("of all", l1_blobs={"base": 10})
    new = newcomer(9, tenant="t")

    def outcome(*here: RevisionFacts, limit: int) -> Plan:
        facts = LevelFacts(L1, 1000, 100, transient_room_bytes=0)
        need = Need(L1, 10, "new", new, Otherwise.EVICT, {"base": 10})
        return plan(Snapshot((base, *here), {L1: facts}, (need,), (Quota("t", L1, limit),)), NOW_S)

    assert verdict(outcome(limit=20)) is Verdict.ROOM
    shortfall = outcome(limit=19).shortfall
    assert shortfall is not None
    assert "at least 20 B" in shortfall.hint()
    mine = model("mine", tenant="t", l1_blobs={"base": 10, "own": 5})
    assert verdict(outcome(mine, limit=25)) is Verdict.ROOM
    assert gone(outcome(mine, limit=24)) == ["mine"]
    assert outcome(mine, limit=19).shortfall is not None


def test_victims_of_the_quota_make_room_in_the_level_too() -> None:
    mine, other = model("mine", tenant="t"), model("other", requests=0)
    outcome = offer(newcomer(50, tenant="t"), mine, other, size=15, quotas=(Quota("t", L1, 20),))
    assert gone(outcome) == ["mine", "other"]
    outcome = offer(newcomer(50, tenant="t"), mine, other, size=10, quotas=(Quota("t", L1, 15),))
    assert gone(outcome) == ["mine"]


# The background.


def ahead(*here: RevisionFacts, quotas: tuple[Quota, ...] = (), **facts: int) -> list[tuple[str, str]]:
    used = sum({k: v for facts in here for k, v in facts.l1_blobs.items()}.values()) + facts.get("pool_bytes", 0)
    level = LevelFacts(L1, **({"capacity_bytes": used, "used_bytes": used} | facts))
    outcome = plan_ahead(Snapshot(here, {L1: level}, quotas=quotas), NOW_S)
    return [(action.name, action.reason) for action in outcome.actions if isinstance(action, Evict)]


def test_room_is_freed_ahead_of_need() -> None:
    here = model("a", requests=0.1), model("b", requests=0.2), model("c", requests=0.3)
    assert ahead(*here) == []
    assert ahead(*here, free_ahead_bytes=10) == [("a", "free ahead")]
    assert ahead(*here, free_ahead_bytes=11) == [("a", "free ahead"), ("b", "free ahead")]
    assert ahead(*here, free_ahead_bytes=10, capacity_bytes=40) == []
    assert ahead(*here, free_ahead_bytes=10, pool_bytes=10) == []
    assert ahead(*here, free_ahead_bytes=15, pool_bytes=10) == [("a", "free ahead")]


def test_room_ahead_is_not_freed_at_the_cost_of_what_is_likely_to_be_asked_for() -> None:
    here = model("seldom", requests=0.1), model("often", requests=3)
    assert ahead(*here, free_ahead_bytes=30) == [("seldom", "free ahead")]


def test_room_ahead_is_freed_as_far_as_it_goes_and_not_at_the_cost_of_a_promise() -> None:
    kept, leased = model("kept", keep_until_s=NOW_S + 9), model("leased", leased=True)
    assert ahead(kept, leased, model("a", requests=0), free_ahead_bytes=25) == [("a", "free ahead")]


def test_room_ahead_spares_whom_it_does_not_need() -> None:
    here = model("small", 10, requests=0), model("big", 80, requests=0.1)
    assert ahead(*here, free_ahead_bytes=80) == [("big", "free ahead")]


def test_a_lowered_quota_is_reached_in_the_background() -> None:
    here = model("a", requests=1, tenant="t"), model("b", requests=2, tenant="t"), model("c", requests=0)
    assert ahead(*here, quotas=(Quota("t", L1, 10),)) == [("a", "over quota")]
    assert ahead(*here, quotas=(Quota("t", L1, 10),), free_ahead_bytes=20) == [("a", "over quota"), ("c", "free ahead")]
    assert ahead(*here, quotas=(Quota("t", L1, 20),)) == []


def test_a_keep_alive_holds_a_cold_model_that_is_idle() -> None:
    facts = model("a", tier=Tier.COLD, keep_until_s=NOW_S + 1)
    assert plan_idle(Snapshot((facts,), {}), NOW_S).actions == ()
    assert len(plan_idle(Snapshot((facts,), {}), NOW_S + 2).actions) == 1


def test_words_are_found_for_what_was_never_used_and_for_the_highest_priority() -> None:
    never = model("never", tier=Tier.COLD, last_used_s=float("-inf"))
    (action,) = plan_idle(Snapshot((never,), {}), NOW_S).actions
    assert isinstance(action, Evict)
    assert action.why == "it is cold, and no worker has had it for years"
    outcome = offer(newcomer(9, priority=1000), model("a", priority=1000))
    assert "it spares years of waiting" in outcome.decisions[0].why
    (action,) = outcome.actions
    assert isinstance(action, Evict)
    assert "that spare years" in action.why
