"""Evictions: who goes, who never does, and when the memory of one that went is free."""

from __future__ import annotations

from pathlib import Path

from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import wait_for
from tests.integration.support import MB, Site, model_files, refused, sha256, total_bytes
from tests.invariants import check_at_rest

SMALL = 20 * MB
ROOM = {"l1": {"capacity": "70MB"}}
"""L1 for three models of SMALL, not for four."""


def resident(site: Site) -> set[str]:
    """Models that are whole in L1."""
    with site.cache() as cache:
        return {model.name for model in cache.list() if model.l1_bytes == model.size_bytes > 0}


def fill(site: Site, *names: str) -> None:
    for name in names:
        site.pull(name)


def four_models(site: Site, **tiers: str) -> None:
    site.settings |= ROOM
    for seed, name in enumerate("abcd", 1):
        entry = {"tier": tiers[name]} if name in tiers else {}
        site.add(name, model_files(SMALL, seed=seed), **entry)


def test_the_least_recently_used_goes_and_comes_back_from_l2(site: Site) -> None:
    four_models(site)
    site.start()
    fill(site, "a", "b", "c")
    site.check_served("a")
    site.pull("d")
    assert resident(site) == {"a", "c", "d"}
    asked_bytes = site.proxy.get_bytes()
    assert site.check_served("b").from_level == "l2"
    assert site.proxy.get_bytes() == asked_bytes, "it comes back from L2"
    assert resident(site) == {"a", "b", "d"}


def test_cold_goes_before_warm_and_leased_pinned_and_hot_never_go(site: Site) -> None:
    four_models(site, a="warm", b="cold", c="hot")
    site.start()
    site.pull("c")
    worker = site.worker()
    worker.ask("attach", ref="b")
    site.pull("a")
    worker.ask("detach")
    site.pull("d")
    assert resident(site) == {"a", "c", "d"}, "the cold one goes, though the warm one was used before"
    with site.rpc() as stub:
        stub.Pin(pb.PinRequest(ref="a"))
    worker.ask("attach", ref="d")
    with refused("NO_ROOM") as seen:
        site.pull("b")
    for name, why in (("a", "pinned"), ("c", "hot"), ("d", "leased")):
        assert f"{name} ({why}" in seen["holders"], seen
    assert seen["fits"] == "later"
    assert resident(site) == {"a", "c", "d"}, "never evict and then fail"
    for name in "acd":
        with refused("IN_USE"):
            site.evict(name)
    with site.rpc() as stub:
        stub.Unpin(pb.UnpinRequest(ref="a"))
    site.pull("b")
    assert resident(site) >= {"b", "c", "d"}
    check_at_rest(site.daemon, leases=1)


def test_what_can_never_fit_is_refused_at_once_and_nothing_goes(site: Site) -> None:
    four_models(site)
    site.add("big", model_files(100 * MB, seed=9))
    site.start()
    fill(site, "a", "b", "c")
    site.proxy.clear()
    with refused("NO_ROOM") as seen:
        site.pull("big")
    assert (seen["fits"], seen["level"]) == ("never", "l1")
    assert "capacity" in seen["hint"]
    assert resident(site) == {"a", "b", "c"}
    assert not site.proxy.get_bytes(), "not a byte was fetched"
    with refused("NO_ROOM"), site.cache() as cache:
        cache.attach("big")


def test_evicted_memory_counts_until_its_worker_ends(site: Site) -> None:
    site.settings |= {"l1": {"capacity": "45MB"}}
    old = site.add("a", model_files(SMALL, seed=1))
    site.add("b", model_files(SMALL, seed=2), tier="hot")
    site.add("c", model_files(SMALL, seed=3))
    site.start()
    site.pull("b")
    worker = site.worker()
    worker.ask("attach", ref="a")
    worker.ask("forget_lease")
    wait_for(lambda: not site.leases(), "the lease to end")
    assert site.evict("a").l1_freed_bytes == total_bytes(old)
    assert site.level("l1").withdrawn_bytes >= SMALL
    assert site.segments("withdrawn")
    with refused("NO_ROOM") as seen:
        site.pull("c")
    assert int(seen["withdrawn_bytes"]) >= SMALL
    assert worker.ask("digests") == {path: sha256(data) for path, data in old.items()}, "the worker reads on"
    with refused("NO_ROOM"):
        site.pull("c")
    worker.close()
    site.pull("c")
    assert not site.level("l1").withdrawn_bytes
    site.check_served("c")


def test_recycled_memory_never_shows_old_bytes(site: Site) -> None:
    site.settings |= {"l1": {"capacity": "64MB", "pool_bytes": "64MB"}}
    site.add("a", model_files(40 * MB, seed=1))
    site.add("shorter", model_files(33 * MB + 123, seed=2))
    site.add("longer", model_files(45 * MB + 7, seed=3))
    site.start()
    inodes = set()
    for name in ("a", "shorter", "longer", "a"):
        site.check_served(name)
        inodes.add(site.segment(name, "model.safetensors").stat().st_ino)
        site.evict(name)
        wait_for(lambda: site.level("l1").pool_bytes >= 30 * MB, "the segment to go to the pool")
        wait_for(lambda: not any(map(_has_old_bytes, site.segments("pool"))), "the pool to be cleared")
    assert len(inodes) < 4, "memory was recycled"
    check_at_rest(site.daemon)


def _has_old_bytes(path: Path) -> bool:
    data = path.read_bytes()
    return data.count(0) != len(data)


def test_evict_from_each_level_and_remove(site: Site) -> None:
    files = site.add("m", model_files(SMALL))
    site.start()
    site.pull("m")
    freed = site.evict("m", "l1")
    assert (freed.l1_freed_bytes, freed.l2_freed_bytes) == (total_bytes(files), 0)
    assert site.check_served("m").from_level == "l2"
    freed = site.evict("m", "all")
    assert (freed.l1_freed_bytes, freed.l2_freed_bytes) == (total_bytes(files),) * 2
    check_at_rest(site.daemon)
    assert site.summary("m").state == "absent"
    site.proxy.clear()
    assert site.check_served("m").from_level == "l3"
    assert site.proxy.get_bytes() == total_bytes(files)
    with site.rpc() as stub:
        assert stub.Remove(pb.RemoveRequest(ref="m")).l2_freed_bytes == total_bytes(files)
    check_at_rest(site.daemon)
    assert site.level("l2").used_bytes == 0
    assert site.summary("m").revision == "", "the catalog's entry stays, what was known of it does not"
    site.check_served("m")


def test_a_cold_model_leaves_l1_by_itself_when_its_last_lease_ends(site: Site) -> None:
    site.add("m", model_files(MB), tier="cold")
    site.start()
    with site.attach("m") as model:
        model.wait(60)
        wait_for(lambda: resident(site) == {"m"}, "the load to be recorded")
    wait_for(lambda: not resident(site), "the cold model to leave L1")
    assert site.summary("m").l2_bytes > 0


def test_what_l2_has_no_room_for_stays_in_l1_or_makes_room(site: Site) -> None:
    site.settings |= {"l2": {"capacity": "45MB"}}
    for seed, name in enumerate("abc", 1):
        site.add(name, model_files(SMALL, seed=seed))
    site.add("big", model_files(60 * MB, seed=9))
    site.start()
    fill(site, "a", "b", "c")
    with site.cache() as cache:
        on_disk = {model.name for model in cache.list() if model.l2_bytes}
    # Which two is the policy's word, by what bringing each took: that differs from run to run.
    assert len(on_disk) == 2
    assert resident(site) == {"a", "b", "c"}
    site.pull("big")
    assert site.summary("big").l2_bytes == 0
    assert site.check_served("big").from_level == "l1"
    with refused("NO_ROOM") as seen:
        site.evict("a", "all")
        site.pull("big", level="l2")
    assert (seen["level"], seen["fits"]) == ("l2", "never")


def test_a_lease_that_comes_while_an_eviction_is_asked_for_wins_or_finds_nothing(site: Site) -> None:
    files = site.add("m", model_files(2 * MB))
    site.start()
    site.pull("m")
    evicted = 0
    for _ in range(20):
        with site.rpc() as stub:
            future = stub.Evict.future(pb.EvictRequest(ref="m", level=pb.LEVEL_L1))
            with site.attach("m") as model:
                assert model.view("model.safetensors", 60) == files["model.safetensors"]
            evicted += future.exception() is None
    assert evicted, "some must have come first"
    check_at_rest(site.daemon)


def test_a_shared_blob_that_leaves_l1_is_shown_on_disk_to_all_who_have_it(site: Site) -> None:
    shared = model_files(SMALL, seed=7)["model.safetensors"]
    for seed, name in enumerate("ab", 1):
        site.add(name, model_files(MB, seed=seed) | {"shared.safetensors": shared})
    site.start()
    fill(site, "a", "b")
    site.evict("a", "l1")
    site.evict("b", "l1")
    for name in "ab":
        assert sha256(Path(site.describe(name).path, "shared.safetensors").read_bytes()) == sha256(shared)
    check_at_rest(site.daemon)


def test_removing_a_model_whose_pull_failed_takes_nothing_from_another_that_is_on_its_way(site: Site) -> None:
    """They share a file, and so its ingest: the one that is removed must not take it from under the other."""
    shared = model_files(SMALL, seed=7)["model.safetensors"]
    names = {"shared.safetensors": sha256(shared)}
    site.settings |= ROOM
    extra = model_files(60 * MB, seed=1)
    site.add("large", extra | {"shared.safetensors": shared}, sha256=names)
    site.add("other", {"config.json": b"{}", "shared.safetensors": shared}, sha256=names)
    site.start()
    with refused("NO_ROOM"):
        site.pull("large")
    held = site.hold("other/shared.safetensors")
    site.begin("other")
    assert held.reached.wait(30)
    with site.rpc() as stub:
        stub.Remove(pb.RemoveRequest(ref="large"))
    held.release()
    site.check_served("other")
    check_at_rest(site.daemon)
