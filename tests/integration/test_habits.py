"""Habits: a model that is used at the same time of day is in memory when that comes, if that is worth it."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest

from cached.cache import ModelCache
from cached.level import Level
from tests.integration.hosts import BERLIN, Host, MovedClock, in_l1, kinds, pull, ticks, until
from tests.integration.support import MB


async def live(host: Host, cache: ModelCache, days: int, *, name: str = "m", at: str = "09:05") -> None:
    """Days on which a model is used at the same time and out of L1 else; ends in the night."""
    foresight = cache._parts.foresight
    for _ in range(days):
        date = datetime.fromtimestamp(host.clock.wall_s(), BERLIN).date()
        host.clock.go_to(f"{date}T08:50")
        foresight.look()
        host.clock.go_to(f"{date}T{at}")
        foresight.look()
        async with await cache.attach(name) as attachment:
            await until(lambda: in_l1(cache, name), "the model")
            attachment.close()
        await until(lambda: not cache.stats().active_load_count, "the load")
        await cache.evict(name, Level.L1)
        host.clock.go_to(f"{date}T23:00")
        foresight.look()
        host.clock.go_to(f"{date + timedelta(days=1)}T02:00")


def settings(mode: str) -> dict[str, str]:
    return {"policy__predict": mode, "policy__time_zone": "Europe/Berlin"}


@pytest.mark.parametrize("mode", ["on", "auto"])
async def test_a_model_that_is_used_every_day_at_nine_is_in_memory_at_nine(tmp_path: Path, mode: str) -> None:
    host = Host(tmp_path, MovedClock("2026-11-16T02:00"), **settings(mode))  # a Monday
    host.add("m")
    async with host.run() as cache:
        await live(host, cache, 5)
    async with host.run() as cache:  # what was learned outlives restarts
        host.clock.go_to("2026-11-23T02:00")
        await live(host, cache, 4)
        expected = kinds(cache).count("model.expected")
        assert expected > 0 if mode == "on" else expected == 0  # too few were judged yet
        await live(host, cache, 1)
        host.clock.go_to("2026-11-30T08:40")
        await ticks(cache)
        assert not in_l1(cache, "m")
        host.clock.go_to("2026-11-30T08:59:40")
        cache._parts.foresight.look()
        await until(lambda: in_l1(cache, "m"), "the model before nine")
        assert cache.stats().prediction_precision == 1.0
        counters = cache.stats().counters
        assert counters['cached_predictions_total{outcome="right"}'] >= 5
        assert counters['cached_predictions_total{outcome="wrong"}'] == 0
        assert counters['cached_predictions_total{outcome="acted"}'] >= 1


async def test_predictions_that_do_not_come_true_are_not_acted_on(tmp_path: Path) -> None:
    host = Host(tmp_path, MovedClock("2026-11-16T02:00"), **settings("auto"))
    host.add("m")
    async with host.run() as cache:
        await live(host, cache, 5)
        for day in range(23, 28):
            for clock in ("08:59:40", "23:00"):
                host.clock.go_to(f"2026-11-{day}T{clock}")
                cache._parts.foresight.look()
        precision = cache.stats().prediction_precision
        assert precision is not None
        assert precision < 0.6
        assert "model.expected" not in kinds(cache)


async def test_a_predicted_model_takes_no_place_of_what_is_worth_more(tmp_path: Path) -> None:
    host = Host(tmp_path, MovedClock("2026-11-16T02:00"), l1__capacity="24MiB", **settings("on"))
    host.add("m", 14 * MB)
    host.add("busy", 14 * MB)
    async with host.run() as cache:
        await live(host, cache, 5)
        host.clock.go_to("2026-11-23T08:00")
        before = kinds(cache).count("model.expected")
        for _ in range(40):
            host.clock.pass_by(60)
            async with await cache.attach("busy"):
                await until(lambda: in_l1(cache, "busy"), "the busy model")
        host.clock.go_to("2026-11-23T08:59:40")
        cache._parts.foresight.look()
        await ticks(cache)
        assert in_l1(cache, "busy")
        assert kinds(cache).count("model.expected") == before


async def test_a_predicted_model_takes_the_place_of_what_is_worth_less(tmp_path: Path) -> None:
    host = Host(tmp_path, MovedClock("2026-11-16T02:00"), l1__capacity="24MiB", **settings("on"))
    host.add("m", 14 * MB)
    host.add("idle", 14 * MB)
    async with host.run() as cache:
        await live(host, cache, 5)
        host.clock.go_to("2026-11-22T08:00")
        await pull(cache, "idle")
        await until(lambda: in_l1(cache, "idle"), "the idle model")
        host.clock.go_to("2026-11-23T08:59:40")
        cache._parts.foresight.look()
        await until(lambda: in_l1(cache, "m"), "the expected model")
        assert not in_l1(cache, "idle")


async def test_switched_off_it_learns_nothing(tmp_path: Path) -> None:
    host = Host(tmp_path, MovedClock("2026-11-16T02:00"), **settings("off"))
    host.add("m")
    async with host.run() as cache:
        await live(host, cache, 5)
        assert cache._parts.foresight._predictor.to_records()["models"] == {}
        assert cache.stats().prediction_precision is None
