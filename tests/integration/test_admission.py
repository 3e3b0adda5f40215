"""Who gets a place in L1, who is held beside it, and what budgets, quotas and tiers do to that."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import wait_for
from tests.integration.hosts import Host, MovedClock, in_l1, pull, ticks, until
from tests.integration.support import Site, model_files, refused, total_bytes
from tests.integration.test_evict import SMALL, resident
from tests.invariants import check_at_rest

THREE = "abc"


def full_site(site: Site, **l1: str) -> None:
    """L1 full of three models that are asked for often; a fourth, ``d``, is known."""
    site.settings |= {"l1": {"capacity": "70MB", "transient_capacity": "30MB", **l1}}
    for seed, name in enumerate("abcd", 1):
        site.add(name, model_files(SMALL, seed=seed))
    site.start()
    for name in THREE:
        ask_often(site, name)


def ask_often(site: Site, name: str, times: int = 5) -> None:
    for _ in range(times):
        site.check_served(name)


def listed(site: Site) -> Sequence[pb.ModelSummary]:
    with site.rpc() as stub:
        return stub.List(pb.ListRequest()).models


def events(site: Site, kind: str) -> Sequence[pb.Event]:
    with site.rpc() as stub:
        stream = stub.Watch(pb.WatchRequest(replay=True))
        found = []
        for answer in stream:
            found.append(answer.event)
            if answer.event.kind == kind:
                stream.cancel()
                break
        return [event for event in found if event.kind == kind]


def test_a_stranger_is_served_beside_the_budget_and_goes_with_its_last_lease(site: Site) -> None:
    full_site(site)
    first, second = site.worker(), site.worker()
    files = model_files(SMALL, seed=4)
    first.ask("attach", ref="d")
    second.ask("attach", ref="d")
    assert first.ask("digests") == second.ask("digests"), "the workers see no difference"
    assert resident(site) == {"a", "b", "c", "d"}, "nobody had to go for it"
    assert site.level("l1").transient_bytes == total_bytes(files)
    assert [model.name for model in listed(site) if model.transient] == ["d"]
    (kept_out,) = events(site, "kept_out")
    assert (kept_out.name, kept_out.fields["verdict"]) == ("d", "transient")
    first.ask("detach")
    assert resident(site) == {"a", "b", "c", "d"}
    second.kill()
    wait_for(lambda: resident(site) == {"a", "b", "c"}, "the transient segments to go")
    wait_for(lambda: not site.level("l1").transient_bytes, "nothing beside the budget")
    assert events(site, "evicted")[0].fields["reason"] == "transient"
    asked_bytes = site.proxy.get_bytes()
    site.check_served("d")
    assert site.proxy.get_bytes() == asked_bytes, "it was kept in L2"
    wait_for(lambda: resident(site) == {"a", "b", "c"}, "it to go again")
    check_at_rest(site.daemon)


def test_who_is_asked_for_again_and_again_gets_in(site: Site) -> None:
    full_site(site)

    def gets_in() -> bool:
        site.check_served("d")
        return any(model.name == "d" and model.l1_bytes and not model.transient for model in listed(site))

    wait_for(gets_in, "d to be worth a place")
    assert len(resident(site)) == 3
    check_at_rest(site.daemon)


def test_a_pull_gets_its_place_in_any_case(site: Site) -> None:
    full_site(site)
    worker = site.worker()
    worker.ask("attach", ref="d")
    assert site.level("l1").transient_bytes
    site.pull("d")
    wait_for(lambda: len(resident(site)) == 3, "one of the others to go")
    assert "d" in resident(site)
    worker.ask("detach")
    assert not site.level("l1").transient_bytes
    assert "d" in resident(site)


def test_without_memory_beside_the_budget_the_newcomer_takes_a_place(site: Site) -> None:
    full_site(site, transient_capacity="0B")
    site.check_served("d")
    assert len(resident(site)) == 3
    assert "d" in resident(site)
    assert not site.level("l1").transient_bytes


def test_a_restart_keeps_what_is_known_of_demand_and_ends_what_was_beside(site: Site) -> None:
    full_site(site)
    worker = site.worker()
    worker.ask("attach", ref="d")
    site.daemon.restart()
    worker.ask("digests")
    site.daemon.wait_ready()
    worker.kill()
    wait_for(lambda: len(resident(site)) == 3, "L1 to be within its budget")
    assert resident(site) == {"a", "b", "c"}, "it was worth less than the others, and still is"


def test_hot_models_have_a_budget_of_their_own(site: Site) -> None:
    site.settings |= {"l1": {"capacity": "100MB", "hot_capacity": "45MB"}}
    for seed, name in enumerate("ab", 1):
        site.add(name, model_files(SMALL, seed=seed), tier="hot")
    for seed, name in enumerate("cd", 3):
        site.add(name, model_files(SMALL, seed=seed))
    site.start()
    wait_for(lambda: resident(site) == {"a", "b"}, "the hot ones")
    site.pull("c")
    with refused("NO_ROOM") as seen, site.rpc() as stub:
        stub.SetTier(pb.SetTierRequest(ref="c", tier=pb.TIER_HOT))
    assert "hot models" in seen["message"]
    assert "a (" in seen["holders"]
    assert [model.tier for model in listed(site) if model.name == "c"] == [pb.TIER_AUTO], "it stays what it was"
    site.models["c"]["tier"] = site.models["d"]["tier"] = "hot"
    site.reload_catalog()
    wait_for(lambda: any("hot" in why for why in site.daemon.stats().degraded), "the daemon to say that it is too much")
    assert "d" not in resident(site)


def test_a_tenant_has_its_quota_and_its_own_go_first(site: Site) -> None:
    site.settings |= {"l1": {"capacity": "100MB"}}
    site.tenants = {"small": {"l1": "45MB"}}
    for seed, name in enumerate("abc", 1):
        site.add(name, model_files(SMALL, seed=seed), tenant="small")
    site.add("other", model_files(SMALL, seed=9))
    site.start()
    for name in ("other", "a", "b", "c"):
        site.pull(name)
    here = resident(site)
    assert "other" in here, "it is none of the tenant's"
    assert here >= {"c"}
    assert len(here & {"a", "b", "c"}) == 2
    (evicted,) = [event for event in events(site, "evicted") if event.fields["level"] == "l1"][:1]
    assert evicted.fields["reason"] == "over quota"
    check_at_rest(site.daemon)


async def test_room_is_made_ahead_of_need_from_what_nobody_asks_for_any_more(tmp_path: Path) -> None:
    clock = MovedClock("2026-11-20T07:00")
    host = Host(tmp_path, clock, l1__capacity="70MB", l1__free_ahead="20MB")
    for name in THREE:
        host.add(name, SMALL)
    async with host.run() as cache:
        for name in THREE:
            await pull(cache, name)
        await ticks(cache)
        assert all(in_l1(cache, name) for name in THREE), "all of them may be asked for soon"
        clock.pass_by(12 * 3600)
        async with await cache.attach("a"), await cache.attach("c"):
            pass
        await until(lambda: not in_l1(cache, "b"), "the one that nobody asked for to go")
        await ticks(cache)
        assert in_l1(cache, "a")
        assert in_l1(cache, "c")
        gone = [event for event in cache._parts.services.events._recent if event.kind == "evicted"]
        assert [(event.name, event.fields["reason"]) for event in gone] == [("b", "free ahead")]


def test_budgets_change_while_the_daemon_runs(site: Site) -> None:
    full_site(site)
    worker = site.worker()
    worker.ask("attach", ref="a")

    def give(capacity: str) -> None:
        site.daemon.write_config(site.settings | {"l1": site.settings["l1"] | {"capacity": capacity}})
        site.daemon.signal(signal.SIGHUP)

    give("45MB")
    wait_for(lambda: len(resident(site)) == 2, "one to go")
    give("25MB")
    wait_for(lambda: resident(site) == {"a"}, "all but the leased one to go")
    give("10MB")
    wait_for(lambda: site.level("l1").capacity_bytes == 10_000_000, "the budget to be taken")
    assert resident(site) == {"a"}, "what is leased stays, over the budget"
    give("much")
    site.daemon.wait_event("config.refused", lambda item: "capacity" in item["message"])
    assert site.level("l1").capacity_bytes == 10_000_000
    give("70MB")
    wait_for(lambda: site.level("l1").capacity_bytes == 70_000_000, "the budget to grow back")
    ask_often(site, "b")
    assert resident(site) == {"a", "b"}
    worker.ask("detach")
    check_at_rest(site.daemon)
