"""What goes by the clock: hot windows, pulls that begin later, keep-alives, habits. The clock is the test's."""

from __future__ import annotations

import asyncio
import json
import time
from math import inf, nan
from pathlib import Path

import pytest

from cached.catalog_file import parse_catalog
from cached.errors import CachedError, InUseError, InvalidRequestError, NoSourceError, UnavailableError
from cached.level import Level
from cached.refs import Ref
from cached.types import PullPhase, Tier
from tests.integration.hosts import Host, MovedClock, berlin, in_l1, kinds, pull, shown, ticks, until
from tests.integration.support import MB, Site, Worker, model_files, refused


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path, MovedClock("2026-11-20T07:00"))  # a Friday


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


async def test_a_clock_that_jumps_ends_no_lease_and_no_keep_alive(host: Host) -> None:
    host.add("m", tier="cold")
    async with host.run() as cache:
        async with await cache.attach("m", keep_alive_s=300.0):
            await until(lambda: in_l1(cache, "m"), "the model")
            for text in ("2026-11-20T06:00", "2026-11-20T08:00", "2016-11-20T07:00", "2036-11-20T07:00"):
                host.clock.jump_to(text)
                await ticks(cache)
                assert cache.stats().lease_count == 1
                with pytest.raises(InUseError):
                    await cache.evict("m", Level.L1)
        for text in ("2046-11-20T07:00", "2026-11-20T07:00"):
            host.clock.jump_to(text)
            await ticks(cache)
            assert in_l1(cache, "m")
        host.clock.pass_by(310)
        await until(lambda: not shown(cache, "m").summary.l1_bytes, "the model to leave")


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


async def test_names_of_timed_pulls_that_were_taken_back_refused_or_failed_are_not_kept(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, at_s = f"file://{host.folder}/nowhere", berlin("2026-11-20T08:00").timestamp()
    async with host.run() as cache:
        for number in range(5):
            await pull(cache, f"m{number}", at_time_s=at_s, source=source)
            await pull(cache, f"m{number}", at_time_s=inf)
        assert cache.list_models() == ()
        await pull(cache, "first", at_time_s=at_s, source=source)
        monkeypatch.setattr("cached.cache.timed_pulls._MOST", 1)
        with pytest.raises(UnavailableError, match="1 pulls are scheduled already"):
            await pull(cache, "second", at_time_s=at_s, source=source)
        with pytest.raises(CachedError):
            await pull(cache, "first", source=source)
        assert [model.name for model in cache.list_models()] == ["first"], "its timed pull is still to come"
        host.clock.go_to("2026-11-20T08:00")
        await until(lambda: cache.list_models() == (), "the name to go with the pull that failed")


async def test_a_name_stays_while_a_pull_of_it_is_under_way(host: Host) -> None:
    host.add("m")
    source = host.models.pop("m")["source"]
    async with host.run() as cache:
        run = cache._parts.pulls.begin(Ref("m"), source=source)
        await asyncio.sleep(0)
        await pull(cache, "m", at_time_s=inf)
        await run.until_planned()
        assert shown(cache, "m").summary.source == source


async def test_what_was_learned_of_a_model_goes_with_it(host: Host) -> None:
    host.add("m")
    host.add("other")
    async with host.run() as cache:
        for name in ("m", "other"):
            async with await cache.attach(name):
                await until(lambda name=name: in_l1(cache, name), "the model")  # type: ignore[misc]
        await cache.remove("m")
    async with host.run() as cache:
        parts = cache._parts
        learned = parts.services.history._requests.models, parts.foresight._predictor._uses
        assert [set(names) for names in learned] == [{"other"}, {"other"}]
        assert {name for _, name in parts.services.history._hops._models} == {"other"}


async def test_a_timed_pull_that_fails_is_told_as_any_other(host: Host) -> None:
    host.models["m"] = {"source": f"file://{host.folder}/nowhere"}
    async with host.run() as cache:
        await pull(cache, "m", at_time_s=berlin("2026-11-20T08:00").timestamp())
        host.clock.go_to("2026-11-20T08:00")
        await until(lambda: bool(shown(cache, "m").last_error), "the failure")
        await until(lambda: not shown(cache, "m").pull_times_s, "that it is forgotten")


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
