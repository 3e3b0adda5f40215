from __future__ import annotations

import json
import math

import pytest

from cached.level import Level
from cached.policy import Demand, History, Mix, ModelHistory, demand
from cached.policy.demand import HALF_LIVES_S, HORIZON_S, NEVER

L1, L2 = Level.L1, Level.L2


def asked_at(*times_s: float) -> Demand:
    demand = NEVER
    for time_s in times_s:
        demand = demand.asked(time_s)
    return demand


def test_a_count_halves_with_each_half_life() -> None:
    demand = asked_at(1000.0)
    for index, half_life_s in enumerate(HALF_LIVES_S):
        assert demand.at(1000.0)[index] == 1.0
        assert demand.at(1000.0 + half_life_s)[index] == pytest.approx(0.5)
        assert demand.at(1000.0 + 3 * half_life_s)[index] == pytest.approx(0.125)


def test_requests_add_up() -> None:
    assert asked_at(0.0, 0.0, 7200.0).counts == pytest.approx((2 / 2**8 + 1, 2.0, 2 * 2 ** (-1 / 12) + 1))


def test_a_clock_that_goes_back_stands_still() -> None:
    demand = asked_at(5000.0)
    assert demand.at(10.0) == demand.counts
    back = demand.asked(10.0)
    assert (back.time_s, back.counts) == (5000.0, (2.0, 2.0, 2.0))


def test_what_is_expected_is_what_fades_within_the_horizon() -> None:
    only_long = Mix((0.0, 0.0, 1.0))
    assert only_long.expected(Demand(0.0, (9.0, 9.0, 1.0)), 0.0) == pytest.approx(1 - 2 ** (-HORIZON_S / 86_400))
    assert Mix().expected(NEVER, 1e9) == 0.0


def test_more_and_more_recent_requests_promise_more() -> None:
    mix = Mix()
    once, twice = asked_at(0.0), asked_at(0.0, 0.0)
    assert mix.expected(twice, 60.0) == pytest.approx(2 * mix.expected(once, 60.0))
    assert mix.expected(once, 60.0) > mix.expected(once, 6000.0) > mix.expected(once, 600_000.0) > 0


def test_the_mix_learns_which_half_life_foretells() -> None:
    bursts, steady = History(), History()
    for burst in range(60):
        for number in range(6):
            bursts.asked("m", burst * 500_000.0 + number * 60.0, hit=True)
    for number in range(360):
        steady.asked("m", number * 80_000.0, hit=True)
    short, long = bursts.mixes[L1].weights[0], steady.mixes[L1].weights[2]
    assert short > 0.5 > Mix().weights[0]
    assert long > 0.8 > Mix().weights[2]
    for history in (bursts, steady):
        assert sum(history.mixes[L1].weights) == pytest.approx(1.0)
        assert history.mixes[L2] == Mix()  # no misses, nothing learned


def test_a_first_request_teaches_nothing() -> None:
    history = History()
    for number in range(50):
        history.asked(f"m{number}", float(number), hit=False)
    assert history.mixes == {L1: Mix(), L2: Mix()}


def test_l2_counts_misses_of_l1_only() -> None:
    history = History()
    history.asked("m", 0.0, hit=False)
    history.asked("m", 0.0, hit=True)
    history.asked("m", 0.0, hit=True)
    assert history.of("m").demand(L1).counts[2] == 3.0
    assert history.of("m").demand(L2).counts[2] == 1.0


def test_waiting_adds_up_at_each_level_until_the_model_is_kept_there() -> None:
    history = History()
    history.waited("m", Level.L3, 5.0)
    history.waited("m", Level.L2, 7.0)
    history.waited("m", Level.L3, -1.0)
    assert (history.of("m").waited_s(L1), history.of("m").waited_s(L2)) == (12.0, 5.0)
    history.kept("m", L1)
    history.kept("unknown", L1)
    assert (history.of("m").waited_s(L1), history.of("m").waited_s(L2)) == (0.0, 5.0)
    history.kept("m", L2)
    assert history.of("m").waited_s(L2) == 0.0
    assert "unknown" not in history.models


def test_history_survives_as_plain_numbers() -> None:
    history = History()
    for number in range(20):
        history.asked(f"m{number % 3}", number * 100.0, hit=number % 2 == 0)
    history.waited("m1", Level.L3, 3.5)
    again = History.from_records(json.loads(json.dumps(history.to_records())))
    assert again == history
    assert History.from_records(History().to_records()) == History()


def test_the_models_that_were_asked_for_last_are_kept_and_what_is_removed_is_forgotten(monkeypatch) -> None:
    monkeypatch.setattr(demand, "MODELS", 3)
    history = History()
    for time_s, name in enumerate(("a", "b", "c", "a", "d")):
        history.asked(name, float(time_s), hit=False)
    assert list(history.models) == ["c", "a", "d"]
    history.waited("c", Level.L3, 1.0)
    history.asked("e", 9.0, hit=True)
    assert list(history.models) == ["d", "c", "e"]
    assert list(History.from_records(history.to_records()).models) == ["c", "d", "e"]
    monkeypatch.setattr(demand, "MODELS", 2)
    assert list(History.from_records(history.to_records()).models) == ["d", "e"], "what an earlier daemon kept too many"
    history.forget("c")
    history.forget("unknown")
    assert list(history.models) == ["d", "e"]
    assert history.of("c") == ModelHistory()


def test_a_record_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="ten numbers, not 2"):
        ModelHistory.from_record([1.0, 2.0])
    with pytest.raises(ValueError, match="not finite"):
        ModelHistory.from_record([1.0] * 9 + [float("nan")])
    with pytest.raises(KeyError):
        History.from_records({})


def test_counts_never_overflow_and_never_go_below_zero() -> None:
    demand = NEVER
    for number in range(10_000):
        demand = demand.asked(number * 1e-3)
    assert all(math.isfinite(count) and count <= 10_000 for count in demand.counts)
    assert all(count >= 0 for count in demand.at(1e12))
