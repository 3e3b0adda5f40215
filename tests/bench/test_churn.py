"""The churn: its own arithmetic, and short runs that fail on whatever is left over. No judgement by the clock."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.churn.crew import Tally
from bench.churn.report import as_result, churn_text
from bench.churn.run import Outcome, Plan, run
from bench.churn.samples import trend
from bench.churn.told import Told

_MORE_THREADS = min(32, (os.cpu_count() or 1) + 4) + 16 + 4
"""Of pools that make them as they need them, up to a bound: the loop's executor, the 16 of L2, and a few of gRPC's."""


def line(begin: float, per_hour: float, minutes: int = 60) -> list[dict[str, float]]:
    """Samples of something that grows evenly, with noise that has no trend."""
    seconds = range(0, minutes * 60, 10)
    noise = (3.0, -1.0, -3.0, 1.0)
    return [{"at_s": at, "x": begin + per_hour * at / 3600 + noise[at // 10 % 4]} for at in seconds]


def test_a_trend_is_seen_through_noise_and_what_was_before_does_not_count() -> None:
    flat = trend(line(100, 0), "x")
    grows = trend(line(100, 12), "x")
    assert flat
    assert grows
    assert abs(flat.per_hour) < 0.5
    assert grows.per_hour == pytest.approx(12, abs=0.5)
    warming = [{"at_s": at, "x": at} for at in range(0, 1200, 10)]
    late = [{"at_s": item["at_s"] + 1200, "x": item["x"]} for item in line(1200, 0, minutes=40)]
    settled = trend(warming + late, "x")
    assert settled
    assert abs(settled.per_hour) < 1
    assert trend(line(1, 0)[:2], "x") is None


def outcome_of(samples: list[dict[str, float]], seconds: float = 3600, **plan: float) -> Outcome:
    leveled = [{"l1_over_mb": 0.0, "l2_over_mb": 0.0, "leases": 9.0, **sample} for sample in samples]
    return Outcome(Plan(**plan), samples=leveled, seconds=seconds)  # type: ignore[arg-type]


def reached(outcome: Outcome, about: str) -> bool | None:
    (found,) = [item.reached for item in as_result(outcome, "x").requirements if about in item.text]
    return found


def test_growth_is_judged_where_the_run_was_long_enough() -> None:
    samples = [{"at_s": item["at_s"], "rss_mb": item["x"]} for item in line(100, 40)]
    assert reached(outcome_of(samples), "daemon: RSS") is False
    assert reached(outcome_of([{**item, "rss_mb": 100.0} for item in samples]), "daemon: RSS") is True
    assert reached(outcome_of(samples, seconds=60), "daemon: RSS") is None
    assert reached(outcome_of(samples, daemon_kill_s=60), "daemon: RSS") is None


def test_wrong_bytes_and_errors_that_nobody_expects_are_failures() -> None:
    outcome = outcome_of(line(1, 0))
    assert reached(outcome, "unexpected kind") is True
    told = Told()
    told.failed("attach", "NO_ROOM", "full")
    told.failed("attach", "UNAVAILABLE", "draining")
    told.is_wrong("a byte")
    outcome.tally.add(told.take())
    assert outcome.tally.unexpected(restarts=True) == {}
    assert outcome.tally.unexpected(restarts=False) == {"attach: UNAVAILABLE": "draining"}
    assert outcome.tally.wrong == ["a byte"]
    assert reached(outcome, "unexpected kind") is False
    outcome.problems += outcome.tally.wrong
    assert reached(outcome, "wrong bytes") is False


def test_what_two_processes_told_is_added_up() -> None:
    tally = Tally()
    for _ in range(2):
        told = Told()
        told.did("attach", 0.25, "attach, from l1")
        told.failed("evict", "IN_USE", "leased")
        tally.add(told.take())
        assert not told.take()["counts"], "it begins anew"
    assert tally.done == 4
    assert list(tally.latencies_ms["attach, from l1"][1]) == [250, 250]


def test_the_document_shows_what_was_written(tmp_path: Path) -> None:
    assert "make churn" in churn_text(tmp_path)
    samples = [{"at_s": item["at_s"], "rss_mb": 100.0} for item in line(0, 0)]
    result = as_result(outcome_of(samples), "hour", "On a moon.")
    result.hardware = {"cores": 2, "started": "2026-11-21", "memory_bytes": 1 << 34}
    result.write(tmp_path)
    text = churn_text(tmp_path)
    assert "On a moon." in text
    assert "| daemon: RSS, MB | – | 100 | 100 | 0 | 100 | 100 | – |" in text


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(
            Plan(duration_s=8, models=12, leases=12, workers=2, threads=1, sample_s=1, worker_kill_s=4, mover_kill_s=2,
                 worker_stop_s=0, catalog_s=1),
            id="seconds", marks=pytest.mark.slow,
        ),
        pytest.param(Plan(duration_s=45, models=60, leases=200, workers=3), id="a minute", marks=pytest.mark.faults),
        pytest.param(
            Plan(duration_s=45, models=60, leases=200, workers=3, daemon_kill_s=12), id="with kills of the daemon",
            marks=pytest.mark.faults,
        ),
    ],
)  # fmt: skip
def test_nothing_is_wrong_and_nothing_is_left_after_everything_at_once(plan: Plan, tmp_path: Path) -> None:
    outcome = run(plan, tmp_path, print)
    assert not outcome.problems
    assert not outcome.tally.unexpected(plan.daemon_kill_s > 0)
    for what in ("attach", "pull", "file read and checked"):
        assert outcome.tally.counts[what], f"nothing was done of: {what}"
    for what in ("workers killed", "catalogs loaded", *(["daemons killed"] if plan.daemon_kill_s else [])):
        assert outcome.happened[what], f"no {what}"
    before, after = outcome.before, outcome.after
    assert after["leases"] == after["loads"] == after["movers"] == 0
    assert after["l1_reserved_mb"] == after["l2_reserved_mb"] == 0
    assert after["descriptors"] <= before["descriptors"], "descriptors are left"
    assert after["threads"] <= before["threads"] + _MORE_THREADS, "threads are left"
    assert after["tasks"] <= before["tasks"], "tasks are left"
    assert max(max(item["l1_over_mb"], item["l2_over_mb"]) for item in outcome.samples) == 0 or plan.daemon_kill_s
