from __future__ import annotations

import pytest

from cached.level import Level
from cached.policy import Demand, Evict, LevelFacts, Plan, RevisionFacts, Snapshot
from cached.policy.explain import explain, what_if, worths
from cached.policy.worth import Standing
from cached.types import Tier

NOW_S = 1000.0
L1, L2 = Level.L1, Level.L2


def facts(name: str, requests: float, tier: Tier = Tier.AUTO, **more: object) -> RevisionFacts:
    values: dict[str, object] = {"l1_blobs": {name: 10}, "requests": Demand(NOW_S, (requests,) * 3)}
    return RevisionFacts(name, f"{name}-1", tier, **(values | more))  # type: ignore[arg-type]


SNAPSHOT = Snapshot(
    (
        facts("a", 1.0), facts("b", 2.0), facts("c", 3.0, l2_blobs={"c": 10}), facts("hot", 0.0, Tier.HOT),
        facts("cold", 9.0, Tier.COLD), facts("guest", 0.0, l1_blobs={"hot": 10}),
        facts("old", 0.0, current=False, l1_blobs={"old": 5}),
    ),
    {L1: LevelFacts(L1, 100, 55), L2: LevelFacts(L2, 100, 10)},
)  # fmt: skip


def test_it_tells_the_worth_and_who_goes_before() -> None:
    place = explain(SNAPSHOT, "b", NOW_S).place(L1)
    assert place is not None
    assert place.before is not None
    assert place.before[:2] == ("old", "cold")
    assert set(place.before) >= {"a"}
    assert place.worth_s == pytest.approx(place.requests * place.reload_s)
    assert place.worth_s > 0
    assert place.held_bytes == 10
    assert "its worth decides" in place.why
    assert f"{len(place.before)} would go before it" in place.why


def test_the_first_to_go_is_told_so() -> None:
    place = explain(SNAPSHOT, "old", NOW_S).place(L1)
    assert place is not None
    assert (place.before, place.standing) == ((), Standing.STALE)
    assert place.why.endswith("it would go first")


def test_the_protected_are_told_why() -> None:
    place = explain(SNAPSHOT, "hot", NOW_S).place(L1)
    assert place is not None
    assert (place.before, place.protections, place.standing) == (None, ("hot",), Standing.HELD)
    assert place.why == "10 B in l1: hot, so it is not evicted"


def test_what_is_elsewhere_is_told_what_it_would_be_worth() -> None:
    place = explain(SNAPSHOT, "b", NOW_S).place(L2)
    assert place is not None
    assert place.held_bytes == 0
    assert place.why.startswith("not in l2: there it would spare")


def test_what_frees_nothing_is_told_so() -> None:
    place = explain(SNAPSHOT, "guest", NOW_S).place(L1)
    assert place is not None
    assert "its going would free nothing" in place.why


def test_an_unknown_model_has_no_place() -> None:
    explanation = explain(SNAPSHOT, "nobody", NOW_S)
    assert explanation.places == ()
    assert explanation.place(L1) is None


def test_levels_that_the_snapshot_lacks_are_left_out_and_the_current_revision_comes_first() -> None:
    stale = RevisionFacts("b", "b-0", Tier.AUTO, current=False)
    explanation = explain(Snapshot((stale, *SNAPSHOT.revisions), {L1: SNAPSHOT.levels[L1]}), "b", NOW_S)
    assert [(revision, place.level) for revision, place in explanation.places] == [("b-1", L1), ("b-0", L1)]
    assert explanation.place(L1, "b-0") is explanation.places[1][1]


def gone(outcome: Plan) -> list[str]:
    return [action.name for action in outcome.actions if isinstance(action, Evict)]


def test_what_if_it_were_hot() -> None:
    assert gone(what_if(SNAPSHOT, "new", Tier.HOT, NOW_S, size_bytes=50)) == ["old"]
    assert what_if(SNAPSHOT, "new", Tier.HOT, NOW_S, size_bytes=45).actions == ()
    assert what_if(SNAPSHOT, "new", Tier.HOT, NOW_S, size_bytes=101).shortfall is not None
    assert what_if(SNAPSHOT, "a", Tier.HOT, NOW_S, size_bytes=99) == Plan()  # it is there already


def test_what_if_it_were_cold_or_warm() -> None:
    assert gone(what_if(SNAPSHOT, "a", Tier.COLD, NOW_S)) == ["a"]
    assert what_if(SNAPSHOT, "a", Tier.WARM, NOW_S) == Plan()


def test_what_all_are_worth_is_what_each_is_worth() -> None:
    for level in (L1, L2):
        together = worths(SNAPSHOT, level, NOW_S)
        assert together.keys() == {(facts.name, facts.revision) for facts in SNAPSHOT.revisions}
        for (name, revision), worth_s in together.items():
            place = explain(SNAPSHOT, name, NOW_S).place(level, revision)
            assert place is not None
            assert worth_s == place.worth_s


def test_what_is_nowhere_is_worth_something_for_its_size() -> None:
    nowhere = Snapshot((facts("a", 1.0, l1_blobs={}),), SNAPSHOT.levels)
    small, large = (explain(nowhere, "a", NOW_S, size_bytes=size_bytes).place(L1) for size_bytes in (10**9, 10**11))
    assert small is not None
    assert large is not None
    assert 0 < small.worth_s < large.worth_s
    assert (small.held_bytes, small.before) == (0, None)
