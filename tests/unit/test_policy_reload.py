from __future__ import annotations

import json

import pytest

from cached.errors import NoRoomError
from cached.level import Level
from cached.policy import Hop, HopTimes, reload
from cached.policy.hot import check_hot
from cached.policy.reload import DEFAULT_HOPS
from cached.units import GIB

L2, L3 = Level.L2, Level.L3
PRIORS = {L2: Hop(1.0, 1e9), L3: Hop(3.0, 0.5e9)}


def test_a_hop_is_latency_and_bandwidth() -> None:
    assert Hop(1.0, 6e9).seconds(12_000_000_000) == 3.0
    assert Hop(1.0, 6e9).times(2.0).seconds(12_000_000_000) == 6.0


def test_before_anything_was_measured_the_prior_counts() -> None:
    assert HopTimes().hop(L3, "m") == DEFAULT_HOPS[L3]
    assert HopTimes(PRIORS).hop(L2, "m") == PRIORS[L2]


def test_one_measurement_moves_all_models_of_that_hop_and_no_other_hop() -> None:
    times = HopTimes(PRIORS)
    times.observe(L2, "a", 1_000_000_000, 4.0)  # the prior says 2 s
    assert times.hop(L2, "a").seconds(1_000_000_000) == pytest.approx(4.0)
    assert times.hop(L2, "b").seconds(1_000_000_000) == pytest.approx(4.0)
    assert times.hop(L3, "a") == PRIORS[L3]


def test_a_models_own_measurements_count_the_more_the_more_there_are() -> None:
    times = HopTimes(PRIORS)
    for _ in range(20):
        times.observe(L2, "usual", 1_000_000_000, 2.0)
    found = []
    for _ in range(6):
        times.observe(L2, "slow", 1_000_000_000, 16.0)
        found.append(times.hop(L2, "slow").seconds(1_000_000_000))
        assert times.hop(L2, "usual").seconds(1_000_000_000) < found[-1]
    assert found == sorted(found)
    assert 8.0 < found[-1] <= 16.0


def test_half_and_twice_the_time_cancel() -> None:
    times = HopTimes(PRIORS)
    for _ in range(200):
        times.observe(L2, "m", 1_000_000_000, 4.0)
        times.observe(L2, "m", 1_000_000_000, 1.0)
    assert times.hop(L2, "other").seconds(1_000_000_000) == pytest.approx(2.0, rel=0.05)


def test_loads_of_nothing_teach_nothing_and_absurd_ones_little() -> None:
    times = HopTimes(PRIORS)
    times.observe(L2, "m", 0, 5.0)
    times.observe(L2, "m", 5, 0.0)
    assert times.hop(L2, "m") == PRIORS[L2]
    times.observe(L2, "m", 1, 1e30)
    assert times.hop(L2, "m").seconds(0) <= 1000.0 * PRIORS[L2].seconds(0) * 1.001


def test_the_models_that_were_measured_last_are_kept_and_what_is_removed_is_forgotten(monkeypatch) -> None:
    monkeypatch.setattr(reload, "MODELS", 2)
    times = HopTimes(PRIORS)
    for name in ("a", "b", "a", "c", "d", "e"):
        times.observe(L3, name, 10**9, 3.0)
    assert [name for _, name in times._models] == ["a", "c", "d", "e"], "two for each of two hops"
    times.observe(L2, "e", 10**9, 3.0)
    times.forget("e")
    times.forget("unknown")
    assert [name for _, name in times._models] == ["c", "d"]
    times.observe(L3, "e", 10**9, 3.0)
    records = times.to_records()
    monkeypatch.setattr(reload, "MODELS", 1)
    assert [name for _, name in HopTimes.from_records(records, PRIORS)._models] == ["d", "e"]


def test_what_was_learned_survives_as_plain_data() -> None:
    times = HopTimes(PRIORS)
    for number in range(9):
        times.observe(L3, f"m{number % 2}", 10**9, 3.0 + number)
    again = HopTimes.from_records(json.loads(json.dumps(times.to_records())), PRIORS)
    assert again.hop(L3, "m1") == times.hop(L3, "m1")
    assert again.hop(L3, "new") == times.hop(L3, "new")


def test_hot_models_fit_into_their_budget() -> None:
    hot = {"a": 10 * GIB, "b": 20 * GIB}
    check_hot(hot, "c", 10 * GIB, 40 * GIB)
    check_hot(hot, "b", 30 * GIB, 40 * GIB)  # the one that is hot already does not count twice


def test_more_hot_bytes_than_the_budget_is_a_clear_error() -> None:
    with pytest.raises(NoRoomError) as caught:
        check_hot({"a": 10 * GIB, "b": 20 * GIB}, "c", 11 * GIB, 40 * GIB)
    error = caught.value
    assert error.message == (
        "c (11.0 GiB) does not fit into the 40.0 GiB for hot models: "
        "10.0 GiB are left beside b (20.0 GiB), a (10.0 GiB)"
    )
    assert error.hint == "give hot models at least 41.0 GiB, or make another one warm"
    assert error.fields["fits"] == "later"
    with pytest.raises(NoRoomError) as caught:
        check_hot({f"m{number}": 1 for number in range(9)}, "c", 50 * GIB, 40 * GIB)
    assert "4 more" in caught.value.message
    assert caught.value.fields["fits"] == "never"
    assert "warm" not in caught.value.hint
