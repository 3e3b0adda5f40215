"""When a range counts as stalled, and how many may be hedged."""

from __future__ import annotations

import math

from cached.transfer.hedge import HedgePolicy

RANGE = 16 << 20


def timed(policy: HedgePolicy, count: int, duration_s: float, size_bytes: int = RANGE) -> HedgePolicy:
    for _ in range(count):
        policy.timed(size_bytes, duration_s)
    return policy


def test_nothing_stalls_before_twenty_ranges_are_known() -> None:
    policy = timed(HedgePolicy(), 19, 0.1)
    assert math.isinf(policy.stalled_after_s(RANGE))
    assert timed(policy, 1, 0.1).stalled_after_s(RANGE) == 1.0


def test_the_age_is_three_times_what_nearly_all_took() -> None:
    policy = timed(timed(HedgePolicy(), 95, 2.0), 5, 50.0)
    assert policy.stalled_after_s(RANGE) == 6.0
    assert timed(policy, 200, 0.5).stalled_after_s(RANGE) == 1.5, "old ranges are forgotten"


def test_what_short_ranges_took_says_nothing_of_long_ones() -> None:
    policy = timed(timed(HedgePolicy(), 50, 0.01, 1000), 19, 5.0)
    assert math.isinf(policy.stalled_after_s(RANGE))
    assert policy.stalled_after_s(1000) == 15.0
    assert timed(policy, 1, 5.0).stalled_after_s(RANGE) == 15.0


def test_one_in_fifty_may_be_hedged_and_always_one() -> None:
    policy = timed(HedgePolicy(), 20, 0.1)
    assert [policy.take() for _ in range(3)] == [True, False, False]
    timed(policy, 130, 0.1)
    assert [policy.take() for _ in range(4)] == [True, True, False, False]
