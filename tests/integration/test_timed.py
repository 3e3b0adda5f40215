"""What goes by the clock: hot windows, pulls that begin later, keep-alives, habits. The clock is the test's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timedelta
from math import inf, nan
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from cached.cache import ModelCache
from cached.catalog_file import parse_catalog
from cached.config import load_config
from cached.errors import InUseError, InvalidRequestError, NoSourceError
from cached.metrics import Metrics
from cached.types import Level, ModelDetail, PullPhase, Tier
from tests.integration.support import MB, Site, Worker, model_files, refused, safetensors

BERLIN = ZoneInfo("Europe/Berlin")
DEADLINE_S = 30.0


def berlin(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN)


class MovedClock:
    """The machine's clock, put forward (``pass_by``, ``go_to``), or with another time of day (``jump_to``)."""

    def __init__(self, text: str) -> None:
        self._wall_s = berlin(text).timestamp() - time.monotonic()
        self._ahead_s = 0.0

    def monotonic_s(self) -> float:
        return time.monotonic() + self._ahead_s

    def wall_s(self) -> float:
        return time.monotonic() + self._wall_s

    async def sleep(self, delay_s: float) -> None:
        """Never long: what is looked at every second is looked at all the time."""
        await asyncio.sleep(min(delay_s, 0.02))

    def pass_by(self, seconds: float) -> None:
        self._ahead_s += seconds
        self._wall_s += seconds

    def go_to(self, text: str) -> None:
        self.pass_by(berlin(text).timestamp() - self.wall_s())

    def jump_to(self, text: str) -> None:
        self._wall_s += berlin(text).timestamp() - self.wall_s()


class Host:
    """Engines one after the other on the same state, with models in folders."""

    def __init__(self, folder: Path, clock: MovedClock, **settings: str) -> None:
        self.folder = folder
        self.clock = clock
        self.models: dict[str, Any] = {}
        values = {
            "daemon.socket": str(folder / "run.sock"), "daemon.state_dir": str(folder / "state"),
            "daemon.models_dir": str(folder / "models"), "daemon.restart_grace_s": "0", "transfer.movers": "1",
            "l1.capacity": "64MiB", "l1.memory_reserve_bytes": "0B", "l1.free_ahead": "1%", "l2.capacity": "200MiB",
        }  # fmt: skip
        self.config = load_config(None, {}, values | {key.replace("__", "."): v for key, v in settings.items()}).config

    def add(self, name: str, size_bytes: int = MB, **entry: Any) -> None:
        source = self.folder / f"origin-{name}"
        source.mkdir()
        (source / "model.safetensors").write_bytes(safetensors(size_bytes, len(self.models) + 1))
        self.models[name] = {"source": f"file://{source}"} | entry

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[ModelCache]:
        cache = ModelCache.build(self.config, Metrics(), self.clock)
        cache.set_catalog(parse_catalog(json.dumps({"models": self.models}), "json", "catalog"))
        await cache.start()
        try:
            yield cache
            await until(lambda: not cache.stats().active_load_count, "rest")
            cache.check_invariants()
        finally:
            await cache.close()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path, MovedClock("2026-11-20T07:00"))  # a Friday


async def until(condition: Callable[[], bool], what: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.01)


async def ticks(cache: ModelCache, count: int = 3) -> None:
    """Until the engine has looked at everything some more times."""
    clock, seen = cache._parts.services.clock, 0
    asked = clock.sleep

    async def counted(delay_s: float) -> None:
        nonlocal seen
        seen += 1
        await asked(delay_s)

    clock.sleep = counted  # type: ignore[method-assign]
    try:
        await until(lambda: seen > 6 * count, "the engine's rounds")
    finally:
        del clock.sleep


def shown(cache: ModelCache, name: str) -> ModelDetail:
    return cache.describe(name)


def in_l1(cache: ModelCache, name: str) -> bool:
    summary = shown(cache, name).summary
    return 0 < summary.size_bytes == summary.l1_bytes


async def pull(cache: ModelCache, name: str, **options: Any) -> list[PullPhase]:
    return [progress.phase async for progress in cache.pull(name, **options)]


def kinds(cache: ModelCache) -> list[str]:
    return [event.kind for event in cache._parts.services.events._recent]


# Windows.


async def test_a_model_is_there_before_its_window_hot_during_it_and_then_what_it_was(host: Host) -> None:
    host.add("m", tier="cold", hot=["mon-fri 08:00-20:00 Europe/Berlin"])
    async with host.run() as cache:
        await pull(cache, "m", level=Level.L2)
        await ticks(cache)
        assert not shown(cache, "m").summary.l1_bytes
        assert shown(cache, "m").schedule_change_time_s == berlin("2026-11-20T08:00").timestamp()
        host.clock.go_to("2026-11-20T07:59:45")
        await until(lambda: in_l1(cache, "m"), "the model before its window")
        assert shown(cache, "m").summary.tier is Tier.COLD
        host.clock.pass_by(6)  # what is cold and idle would have gone
        await ticks(cache)
        assert in_l1(cache, "m")
        host.clock.go_to("2026-11-20T08:00")
        await until(lambda: shown(cache, "m").summary.tier is Tier.HOT, "the window")
        assert shown(cache, "m").summary.tier_from == "schedule"
        with pytest.raises(InUseError, match="by word of the schedule"):
            await cache.evict("m", Level.L1)
        host.clock.go_to("2026-11-20T20:00")
        await until(lambda: not shown(cache, "m").summary.l1_bytes, "the model to leave after its window")
        assert shown(cache, "m").summary.tier_from == "catalog"
        assert [kind for kind in kinds(cache) if kind.startswith("schedule")] == ["schedule.began", "schedule.ended"]
        assert shown(cache, "m").schedule_change_time_s == berlin("2026-11-23T08:00").timestamp()


async def test_a_clock_that_jumps_moves_into_and_out_of_windows(host: Host) -> None:
    host.add("m", hot=["08:00-20:00 Europe/Berlin"])
    async with host.run() as cache:
        for text, tier in (
            ("2026-11-20T12:00", Tier.HOT),
            ("2026-11-20T06:00", Tier.AUTO),
            ("2026-11-20T21:00", Tier.AUTO),
            ("2026-11-19T12:00", Tier.HOT),
            ("2027-11-19T12:00", Tier.HOT),
            ("1999-01-01T00:00", Tier.AUTO),
        ):
            host.clock.jump_to(text)
            await until(lambda tier=tier: shown(cache, "m").summary.tier is tier, text)  # type: ignore[misc]
        await until(lambda: in_l1(cache, "m"), "the model that was hot")


async def test_within_a_window_a_start_and_a_changed_catalog_count_at_once(host: Host) -> None:
    host.clock.go_to("2026-11-20T09:00")
    host.add("m", hot=["08:00-20:00 Europe/Berlin"])
    async with host.run() as cache:
        await until(lambda: in_l1(cache, "m"), "the hot model")
        host.models["m"]["hot"] = []
        cache.set_catalog(parse_catalog(json.dumps({"models": host.models}), "json", "catalog"))
        await until(lambda: shown(cache, "m").summary.tier is Tier.AUTO, "the model without windows")


async def test_hundreds_of_windows_are_computed_when_they_change_and_not_every_second(host: Host) -> None:
    for number in range(300):
        host.models[f"m{number}"] = {"source": "file:///nowhere", "hot": ["mon-fri 08:00-20:00 Europe/Berlin"]}
    async with host.run() as cache:
        timetable = cache._parts.upkeep._timetable
        timetable.look()
        before = {name: entry.from_s for name, entry in timetable._entries.items()}
        host.clock.pass_by(600)
        timetable.look()
        assert {name: entry.from_s for name, entry in timetable._entries.items()} == before
        assert len(before) == 300


# Pulls that begin later.


async def test_a_timed_pull_begins_by_itself_and_is_remembered_until_then(host: Host) -> None:
    host.add("m")
    at_s = berlin("2026-11-20T08:00").timestamp()
    async with host.run() as cache:
        assert await pull(cache, "m", at_time_s=at_s) == [PullPhase.SCHEDULED]
        assert shown(cache, "m").pull_times_s == (at_s,)
        assert "pull.scheduled" in kinds(cache)
    async with host.run() as cache:
        assert shown(cache, "m").pull_times_s == (at_s,)
        await ticks(cache)
        assert not shown(cache, "m").summary.l1_bytes
        host.clock.go_to("2026-11-20T08:00")
        await until(lambda: in_l1(cache, "m"), "the timed pull")
        assert shown(cache, "m").pull_times_s == ()


async def test_a_timed_pull_that_was_missed_begins_at_the_start(host: Host) -> None:
    host.add("m")
    source = host.models.pop("m")["source"]
    at_s = berlin("2026-11-20T08:00").timestamp()
    async with host.run() as cache:
        await pull(cache, "m", at_time_s=at_s, source=source, level=Level.L2, tier=Tier.WARM)
    host.clock.go_to("2026-11-21T08:00")
    async with host.run() as cache:
        await until(lambda: shown(cache, "m").summary.l2_bytes > 0, "the missed pull")
        summary = shown(cache, "m").summary
        assert (summary.l1_bytes, summary.tier, summary.tier_from) == (0, Tier.WARM, "operator")
        assert shown(cache, "m").pull_times_s == ()


async def test_timed_pulls_are_taken_back_by_never_and_by_rm(host: Host) -> None:
    host.add("m")
    times_s = [berlin(f"2026-11-20T{hour:02}:00").timestamp() for hour in (8, 9)]
    async with host.run() as cache:
        for at_s in times_s:
            await pull(cache, "m", at_time_s=at_s)
        assert shown(cache, "m").pull_times_s == tuple(times_s)
        assert await pull(cache, "m", at_time_s=inf) == [PullPhase.SCHEDULED]
        assert shown(cache, "m").pull_times_s == ()
        await pull(cache, "m", at_time_s=times_s[0])
        await cache.remove("m")
        host.clock.go_to("2026-11-20T10:00")
        await ticks(cache)
        assert shown(cache, "m").pull_times_s == ()
        assert not shown(cache, "m").summary.size_bytes
        assert kinds(cache).count("pull.unscheduled") == 2


async def test_a_timed_pull_that_fails_is_told_as_any_other(host: Host) -> None:
    host.models["m"] = {"source": f"file://{host.folder}/nowhere"}
    async with host.run() as cache:
        await pull(cache, "m", at_time_s=berlin("2026-11-20T08:00").timestamp())
        host.clock.go_to("2026-11-20T08:00")
        await until(lambda: bool(shown(cache, "m").last_error), "the failure")
        assert shown(cache, "m").pull_times_s == ()


@pytest.mark.parametrize("at_s", [1.0, nan, -inf, berlin("2026-11-20T06:58").timestamp(), 1e12])
async def test_a_time_that_makes_no_sense_is_refused(host: Host, at_s: float) -> None:
    host.add("m")
    async with host.run() as cache:
        with pytest.raises(InvalidRequestError, match="the time to begin the pull"):
            await pull(cache, "m", at_time_s=at_s)
        with pytest.raises(NoSourceError):
            await pull(cache, "unheard-of", at_time_s=berlin("2026-11-20T08:00").timestamp())


def test_a_timed_pull_outlives_a_daemon_that_is_killed(site: Site) -> None:
    site.add("m", model_files(MB))
    site.start()
    at_s = time.time() + 1.0
    assert [progress.phase for progress in site.pull("m", at_time_s=at_s)] == ["scheduled"]
    assert list(site.describe("m").pull_times_s) == [at_s]
    site.daemon.restart(kill=True)
    site.daemon.wait_event("load.finished")
    assert list(site.describe("m").pull_times_s) == []
    site.check_served("m")


# Keep-alives.


async def test_a_cold_model_outstays_its_lease_by_its_keep_alive(host: Host) -> None:
    host.add("m", tier="cold")
    async with host.run() as cache:
        async with await cache.attach("m", keep_alive_s=300.0):
            await until(lambda: in_l1(cache, "m"), "the model")
        async with await cache.attach("m", keep_alive_s=10.0):
            pass  # the longer one counts
        host.clock.pass_by(290)
        await ticks(cache)
        assert in_l1(cache, "m")
        host.clock.pass_by(20)
        await until(lambda: not shown(cache, "m").summary.l1_bytes, "the model to leave")


@pytest.mark.parametrize("seconds", [-1.0, nan, inf, 86401.0])
async def test_a_keep_alive_that_makes_no_sense_is_refused(host: Host, seconds: float) -> None:
    host.add("m")
    async with host.run() as cache:
        with pytest.raises(InvalidRequestError, match="a keep-alive of"):
            await cache.attach("m", keep_alive_s=seconds)
        assert cache.stats().active_load_count == 0


def test_the_keep_alive_of_a_worker_that_is_killed_counts(site: Site) -> None:
    site.add("kept", model_files(MB, seed=1), tier="cold")
    site.add("gone", model_files(MB, seed=2), tier="cold")
    site.start()
    with refused("INVALID_REQUEST"), site.cache() as cache:
        cache.attach("kept", keep_alive_s=1e9)
    workers = {name: Worker(site.daemon.socket) for name in ("kept", "gone")}
    with workers["kept"] as kept, workers["gone"] as gone:
        kept.ask("attach", ref="kept", keep_alive_s=3600.0)
        gone.ask("attach", ref="gone")
        kept.kill()
        gone.kill()
        site.daemon.wait_event("evicted", lambda event: event["model"] == "gone")
    assert site.summary("kept").l1_bytes > MB


# Adapters.


async def test_a_cold_adapter_stays_while_its_base_is_leased(host: Host) -> None:
    host.add("big", tier="cold")
    host.add("lora", base="big")
    async with host.run() as cache:
        async with await cache.attach("big") as base:
            async with await cache.attach("lora"):
                await until(lambda: in_l1(cache, "lora") and in_l1(cache, "big"), "both")
            host.clock.pass_by(60)
            await ticks(cache)
            assert in_l1(cache, "lora")
            assert shown(cache, "lora").summary.tier_from == "base"
            base.close()
        host.clock.pass_by(6)
        await until(lambda: not in_l1(cache, "lora") and not in_l1(cache, "big"), "both to leave")


async def test_a_request_for_an_adapter_is_one_for_its_base_unless_that_was_just_asked_for(host: Host) -> None:
    host.add("big")
    for name in ("red", "blue"):
        host.add(name, base="big")

    async with host.run() as cache:
        history = cache._parts.services.history
        await pull(cache, "big")
        misses = history.of("big").misses
        before = history.of("big").requests.at(host.clock.wall_s())[2]

        def asked() -> float:
            """Requests for the base since; the day's half-life hardly shows."""
            return round(history.of("big").requests.at(host.clock.wall_s())[2] - before, 1)

        async with await cache.attach("red"):
            pass
        assert round(history.of("red").requests.at(host.clock.wall_s())[2], 2) == 1.0
        assert asked() == 1.0
        async with await cache.attach("blue"):
            pass
        assert asked() == 1.0
        host.clock.pass_by(61)
        async with await cache.attach("big"):
            host.clock.pass_by(61)
            async with await cache.attach("blue"):
                pass
        assert asked() == 2.0
        host.clock.pass_by(61)
        async with await cache.attach("blue"):
            pass
        assert asked() == 3.0
        assert history.of("big").misses == misses  # it was in L1 all the time


# Habits.


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


async def test_a_window_whose_model_has_no_room_among_the_hot_brings_nothing_ahead(host: Host) -> None:
    host.add("first", 30 * MB, tier="hot")
    host.add("second", 30 * MB, hot=["08:00-20:00 Europe/Berlin"])
    async with host.run() as cache:
        await until(lambda: in_l1(cache, "first"), "the hot model")
        await pull(cache, "second", level=Level.L2)
        host.clock.go_to("2026-11-20T07:59:50")
        await ticks(cache)
        assert not shown(cache, "second").summary.l1_bytes
        host.clock.go_to("2026-11-20T08:00:10")
        await until(lambda: bool(cache.stats().degraded), "what is wrong to be told")
        assert "second" in cache.stats().degraded[0]


async def test_switched_off_it_learns_nothing(tmp_path: Path) -> None:
    host = Host(tmp_path, MovedClock("2026-11-16T02:00"), **settings("off"))
    host.add("m")
    async with host.run() as cache:
        await live(host, cache, 5)
        assert cache._parts.foresight._predictor.to_records()["models"] == {}
        assert cache.stats().prediction_precision is None
