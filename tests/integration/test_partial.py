"""Attaches of a part of a model: only its bytes are fetched, and the rest later, as far as somebody asks for it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save

import cached_client
from cached.units import CHUNK_BYTES
from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import wait_for
from tests.integration.part_support import INDEX, chunk_bytes, chunks, content, layered, places, range_of
from tests.integration.support import MB, Site, flip_byte, model_files, refused, total_bytes
from tests.invariants import check_at_rest

WEIGHTS = "model.safetensors"
HEAD_BYTES = 65536


def heads(files: dict[str, bytes], *paths: str) -> int:
    """What may be read of weight files to find tensors in them."""
    return sum(min(HEAD_BYTES, len(files[path])) for path in paths)


def check_only(model: cached_client.Model, files: dict[str, bytes], names: list[str]) -> None:
    """The model has these tensors, with their bytes, and no others."""
    assert model.names() == names
    assert model.partial
    for name in names:
        assert bytes(model.raw(name, 60)) == content(files, name), name
    for name in places(files).keys() - set(names):
        with pytest.raises(cached_client.NotFoundError, match="left out"):
            model.raw(name)


def test_only_the_bytes_of_what_is_selected_are_asked_of_the_server(site: Site) -> None:
    files = site.add("m", layered(1, 1, 2, 1))
    site.start()
    names = ["layers.2.weight", "layers.2.norm"]
    with site.cache() as cache, cache.attach("m", only=["layers.2.*"], wait=True) as model:
        check_only(model, files, names)
        wanted = chunks(files, names)
        assert site.proxy.get_bytes() == heads(files, WEIGHTS) + chunk_bytes(files, wanted)
        size_bytes = sum(len(content(files, name)) for name in names)
        assert site.proxy.get_bytes() <= size_bytes + heads(files, WEIGHTS) + 2 * CHUNK_BYTES
        assert model.complete
        assert model.report is not None
        assert (model.report.partial, model.report.checked_by) == (True, "first-seen")
        assert model.report.origin_bytes == chunk_bytes(files, wanted)
        assert list(model.state_dict()) == names
        assert [name for name, _ in model.stream()] == names
        assert not model.files
        with pytest.raises(cached_client.NotFoundError, match="left out"):
            model.view(WEIGHTS)
        with pytest.raises(cached_client.NotFoundError, match="left out"):
            model.read("config.json")
        assert site.leases()[0].size_bytes == size_bytes
        row = site.summary("m")
        assert (row.state, row.l1_bytes, row.l2_bytes) == ("partial", chunk_bytes(files, wanted), 0)
        assert row.progress == pytest.approx(chunk_bytes(files, wanted) / total_bytes(files))
        check_at_rest(site.daemon, leases=1, kept_ingests=True)
        assert not site.segments("blob")
    assert site.summary("m").state == "partial"
    assert site.pull("m")[-1].phase == "ready"
    assert site.proxy.get_bytes() == total_bytes(files) + heads(files, WEIGHTS), "then the rest, and nothing twice"
    assert site.check_served("m").from_level == "l1"
    assert site.summary("m").state == "ready"


def test_a_tensor_without_bytes_is_there_with_nothing_fetched_for_it(site: Site) -> None:
    tensors = {"a": torch.zeros(4), "empty": torch.empty(0, 3), "b": torch.ones(CHUNK_BYTES // 2)}
    site.add("m", {WEIGHTS: save(tensors)})
    site.start()
    for only in (["empty"], ["empty", "b"], ["*"]):
        with site.cache() as cache, cache.attach("m", only=only) as model:
            state = model.state_dict(timeout_s=60)
            assert list(state) == model.names()
            assert state["empty"].shape == (0, 3)
            assert {name for name, _ in model.stream(timeout_s=60)} == set(state)
    site.evict("m")


def test_of_a_sharded_model_only_the_files_that_its_index_names_are_looked_at(site: Site) -> None:
    files = site.add("m", layered(1, 1, 1, 1, shards=4))
    site.start()
    names = ["layers.1.norm", "layers.3.weight"]
    paths = [f"model-{number:05}-of-00004.safetensors" for number in (2, 4)]
    with site.cache() as cache, cache.attach("m", only=names, files=["config.*"], wait=True) as model:
        check_only(model, files, names)
        assert set(model.files) == {"config.json"}
        assert model.read("config.json") == files["config.json"]
        wanted = chunk_bytes(files, chunks(files, names))
        whole = len(files["config.json"])
        assert site.proxy.get_bytes() == wanted + whole + heads(files, *paths) + len(files[INDEX])
        assert not site.proxy.gets("model-00001")
        assert not site.proxy.gets("model-00003")
    check_at_rest(site.daemon, kept_ingests=True)
    site.evict("m")
    check_at_rest(site.daemon)
    assert site.summary("m").state == "absent"


def test_without_an_index_or_with_one_that_is_wrong_the_files_themselves_say_it(site: Site) -> None:
    plain = site.add("plain", layered(1, 1, shards=2, index=False))
    wrong = layered(1, 1, shards=2, index=False, seed=2)
    wrong[INDEX] = b'{"weight_map": {"something.else": "model-00002-of-00002.safetensors"}}'
    site.add("wrong", wrong)
    site.start()
    with site.cache() as cache:
        for ref, files, name in (("plain", plain, "layers.0.norm"), ("wrong", wrong, "layers.1.norm")):
            with cache.attach(ref, only=[name], wait=True) as model:
                assert bytes(model.raw(name)) == content(files, name)
            site.evict(ref)


def test_two_parts_share_what_they_have_in_common(site: Site) -> None:
    files = site.add("m", layered(2, 2, 2))
    site.start()
    with site.cache() as cache:
        first = cache.attach("m", only=["layers.[01].weight"], wait=True)
        check_only(first, files, ["layers.0.weight", "layers.1.weight"])
        second = cache.attach("m", only=["layers.[12].weight"], wait=True)
        check_only(second, files, ["layers.1.weight", "layers.2.weight"])
        check_only(first, files, ["layers.0.weight", "layers.1.weight"])
        asked = [item.range for item in site.proxy.gets(WEIGHTS) if item.range != f"bytes=0-{HEAD_BYTES - 1}"]
        assert len(asked) == len(set(asked)), "no chunk twice"
        everything = chunk_bytes(files, chunks(files, ["layers.0.weight", "layers.1.weight", "layers.2.weight"]))
        assert sum(item.body_bytes for item in site.proxy.gets(WEIGHTS)) == everything + 2 * heads(files, WEIGHTS)
        assert len(site.segments("ingest")) == 1
        assert second.report is not None
        assert second.report.reused_bytes == chunk_bytes(
            files, chunks(files, ["layers.0.weight", "layers.1.weight"]) & chunks(files, second.names())
        )
        with refused("IN_USE"):
            site.evict("m")
        check_at_rest(site.daemon, leases=2, kept_ingests=True)
    site.evict("m")


def test_workers_that_ask_for_the_same_part_at_once_share_its_load(site: Site) -> None:
    files = site.add("m", layered(1, 1, 1))
    site.start()
    names = ["layers.1.weight", "layers.1.norm"]
    held = site.hold(WEIGHTS, range=range_of(files, WEIGHTS, 1))
    with site.cache() as cache, ThreadPoolExecutor(1) as beside:
        models = [cache.attach("m", only=["layers.1.*"]) for _ in range(5)]
        attaching = beside.submit(cache.attach, "m", only=["layers.0.norm"])
        wait_for(lambda: len(site.leases()) == 6, "the other part to wait for this one")
        assert held.reached.wait(60)
        held.release()
        other = attaching.result(60)
        for model in models:
            model.wait(60)
            check_only(model, files, names)
        other.wait(60)
        wanted = chunk_bytes(files, chunks(files, [*names, "layers.0.norm"]))
        assert site.proxy.get_bytes() == wanted + 6 * heads(files, WEIGHTS)
        check_at_rest(site.daemon, leases=6, kept_ingests=True)
    site.evict("m")


def test_a_part_of_a_model_that_is_being_pulled_comes_first_and_is_complete_before_it(site: Site) -> None:
    files = site.add("m", layered(1, 1, 1, 1))
    site.settings |= {"transfer": {"movers": 1, "max_ranges": 1, "hedging": False}}
    site.start()
    held = site.hold(WEIGHTS, range=range_of(files, WEIGHTS, 1))
    later = site.hold(WEIGHTS, range=range_of(files, WEIGHTS, 2))
    site.begin("m")
    assert held.reached.wait(60)
    names = ["layers.3.weight", "layers.3.norm"]
    with site.cache() as cache, cache.attach("m", only=["layers.3.*"]) as model:
        held.release()
        model.wait(60)
        check_only(model, files, names)
        assert model.report is not None
        assert model.report.partial
        assert site.summary("m").state == "pulling"
        later.release()
        wait_for(lambda: site.summary("m").state == "ready", "the pull to end")
        check_only(model, files, names)
        check_at_rest(site.daemon, leases=1)
    assert site.proxy.get_bytes() == total_bytes(files), "the head was there, too"


def test_a_whole_pull_goes_on_where_a_part_ended_while_that_is_held(site: Site) -> None:
    files = site.add("m", layered(1, 1, 1))
    site.start()
    names = ["layers.1.weight", "layers.1.norm"]
    with site.cache() as cache, cache.attach("m", only=["layers.1.*"]) as model:
        model.wait(60)
        assert site.check_served("m").origin_bytes == total_bytes(files) - chunk_bytes(files, chunks(files, names))
        check_only(model, files, names)
        check_at_rest(site.daemon, leases=1)
        with refused("IN_USE"):
            site.evict("m")


def test_a_warm_model_gives_a_part_with_nothing_fetched(site: Site) -> None:
    files = site.add("m", layered(1, 1, shards=2))
    site.start()
    site.pull("m")
    before = len(site.proxy.requests())
    with site.cache() as cache:
        with cache.attach("m", only=["*.norm"], files=["config.json"]) as model:
            assert model.complete
            check_only(model, files, ["layers.0.norm", "layers.1.norm"])
            assert model.read("config.json") == files["config.json"]
        with cache.attach("m", first=["*.norm"]) as model:
            assert not model.partial
            assert model.complete
            assert len(model.names()) == 4
    assert len(site.proxy.requests()) == before
    assert site.summary("m").state == "ready"


def test_a_part_comes_from_disk_where_the_model_is_there(site: Site) -> None:
    files = site.add("m", layered(2, 2))
    site.start()
    site.pull("m")
    check_at_rest(site.daemon)
    site.evict("m")
    site.proxy.clear()
    with site.cache() as cache, cache.attach("m", only=["layers.1.norm"], wait=True) as model:
        check_only(model, files, ["layers.1.norm"])
        assert model.report is not None
        assert (model.report.from_level, model.report.origin_bytes) == ("l2", 0)
        assert model.report.disk_bytes == chunk_bytes(files, chunks(files, ["layers.1.norm"]))
        row = site.summary("m")
        assert (row.state, row.l1_bytes) == ("ready", model.report.disk_bytes)
        check_at_rest(site.daemon, leases=1, kept_ingests=True)
    assert not site.proxy.requests()
    report = site.check_served("m")
    assert report.reused_bytes == chunk_bytes(files, chunks(files, ["layers.1.norm"]))
    check_at_rest(site.daemon)


def test_what_is_wanted_first_is_asked_for_first_and_the_rest_follows(site: Site) -> None:
    files = site.add("m", layered(1, 1, 1, 1, shards=2))
    site.settings |= {"transfer": {"movers": 1, "max_ranges": 2, "hedging": False}}
    site.start()
    shards = [path for path in files if path.endswith(".safetensors")]
    with site.cache() as cache, cache.attach("m", first=["layers.3.*"]) as model:
        assert bytes(model.raw("layers.3.norm", 60)) == content(files, "layers.3.norm")
        model.wait(60)
        assert not model.partial
        assert model.view(shards[0]) == files[shards[0]]
        assert len(model.names()) == 8
    asked = [(item.path.rpartition("/")[2], item.range) for item in site.proxy.gets()]
    asked = [item for item in asked if item[1] != f"bytes=0-{HEAD_BYTES - 1}"]
    wanted = {(path, range_of(files, path, at)) for path, at in chunks(files, ["layers.3.weight", "layers.3.norm"])}
    wanted |= {(shards[1], range_of(files, shards[1], 0))}
    places_of_wanted = [at for at, item in enumerate(asked) if item in wanted]
    others = [at for at, item in enumerate(asked) if item not in wanted and item[0] != INDEX]
    # Two are under way at a time, so neighbours may overtake each other at the proxy.
    assert max(places_of_wanted) <= min(others) + 1
    assert site.proxy.get_bytes() == total_bytes(files) + heads(files, shards[1]) + len(files[INDEX])
    assert site.summary("m").state == "ready"


def test_patterns_that_match_nothing_are_refused_with_what_comes_near(site: Site) -> None:
    site.add("m", layered(1, 1, shards=2))
    site.add("plain", model_files(MB))
    site.start()
    with site.cache() as cache:
        with refused("NOT_FOUND") as seen:
            cache.attach("m", only=["layers.0.*", "layers.1.wieght"])
        assert (seen["pattern"], seen["near"].split(", ")[0]) == ("layers.1.wieght", "layers.1.weight")
        assert "layers.1.wieght" in seen["message"]
        with refused("NOT_FOUND") as seen:
            cache.attach("m", only=["layers.0.*"], files=["tokenizer*"])
        assert seen["pattern"] == "tokenizer*"
        with refused("NOT_FOUND"):
            cache.attach("m", first=["Layers.*"])
        with refused("INVALID_REQUEST"):
            cache.attach("m", only=[])
        with refused("INVALID_REQUEST"):
            cache.attach("m", only="layers.0.*")
        with refused("INVALID_REQUEST"):
            cache.attach("m", only=["a"], first=["b"])
        with refused("INVALID_REQUEST"):
            cache.attach("m", files=["config.json"])
        with cache.attach("plain", only=[], files=["*.json"], wait=True) as model:
            assert sorted(model.files) == ["config.json", "tokenizer.json"]
            assert model.names() == []
    check_at_rest(site.daemon, kept_ingests=True)
    site.evict("plain")


def test_a_weight_file_that_is_none_is_told(site: Site) -> None:
    site.add("m", {"config.json": b"{}", WEIGHTS: b"\xff" * 1000})
    site.start()
    with refused("BAD_FORMAT") as seen, site.cache() as cache:
        cache.attach("m", only=["*"])
    assert WEIGHTS in seen["path"]


def test_a_part_that_nobody_maps_makes_room_and_one_that_is_mapped_does_not(site: Site) -> None:
    files = site.add("m", layered(1, 1, 1, 1))
    site.add("big", model_files(2 * CHUNK_BYTES, seed=7))
    site.settings |= {"l1": {"capacity": f"{3 * CHUNK_BYTES}B", "transient_capacity": "0B"}}
    site.start()
    names = ["layers.0.weight"]
    with site.cache() as cache, cache.attach("m", only=names, wait=True) as model:
        assert len(files[WEIGHTS]) > 3 * CHUNK_BYTES, "all of it would not fit"
        with refused("NO_ROOM"):
            site.pull("big")
        check_only(model, files, names)
        check_at_rest(site.daemon, leases=1, kept_ingests=True)
    del model
    site.pull("big")
    assert site.summary("m").state == "absent"
    check_at_rest(site.daemon, content=False)


def test_a_part_that_a_kill_interrupts_goes_on_when_it_is_asked_for_again(site: Site) -> None:
    files = site.add("m", layered(3, 3))
    site.settings |= {"transfer": {"movers": 1, "max_ranges": 1, "hedging": False}}
    site.start()
    held = site.hold(WEIGHTS, range=range_of(files, WEIGHTS, 1))
    with site.cache() as cache, cache.attach("m", only=["layers.0.weight"]) as model:
        assert held.reached.wait(60)
        site.daemon.kill()
        held.release()
        site.daemon.start()
        model.wait(60)
        check_only(model, files, ["layers.0.weight"])
        assert site.ranges(WEIGHTS).count(range_of(files, WEIGHTS, 0)) == 1, "it was there"
        assert not {range_of(files, WEIGHTS, at) for at in (4, 5)} & set(site.ranges(WEIGHTS))
        check_at_rest(site.daemon, leases=1, kept_ingests=True)
    assert not site.daemon.log_events("pull.resumed"), "nobody asked for all of it"
    assert site.summary("m").state == "partial"
    site.pull("m")


@pytest.mark.parametrize("kill", [True, False])
def test_a_lease_on_a_part_is_taken_up_again_with_nothing_fetched(site: Site, kill: bool) -> None:
    files = site.add("m", layered(2, 2))
    site.start()
    names = ["layers.1.weight", "layers.1.norm"]
    with site.cache() as cache, cache.attach("m", only=["layers.1.*"], files=["config.json"], wait=True) as model:
        before = len(site.proxy.requests())
        site.daemon.restart(kill=kill)
        wait_for(lambda: [lease.complete for lease in site.leases()] == [True], "the lease to be taken up again")
        assert model.lease_lost is None
        check_only(model, files, names)
        assert len(site.proxy.requests()) == before
        check_at_rest(site.daemon, leases=1, kept_ingests=True)
        with refused("IN_USE"):
            site.evict("m")
    site.evict("m")


def test_a_lease_on_a_part_that_is_gone_is_lost_loudly(site: Site) -> None:
    files = site.add("m", layered(2, 2))
    site.start()
    with site.cache() as cache, cache.attach("m", only=["layers.1.weight"], wait=True) as model:
        assert site.daemon.terminate() == 0
        for segment in site.segments("ingest"):
            segment.unlink()
        site.daemon.start()
        lost = wait_for(lambda: model.lease_lost, "the lease to be lost")
        assert "not all that was mapped" in str(lost)
        check_only(model, files, ["layers.1.weight"])
        again = cache.attach("m", only=["layers.1.weight"], wait=True)
        check_only(again, files, ["layers.1.weight"])
        again.close()
    site.evict("m")


def test_a_damaged_chunk_of_a_part_is_brought_again_when_the_lease_is_taken_up(site: Site) -> None:
    files = site.add("m", layered(2, 2))
    site.start()
    with site.cache() as cache, cache.attach("m", only=["layers.0.weight"], wait=True) as model:
        assert site.daemon.terminate() == 0
        flip_byte(site.segments("ingest")[0], CHUNK_BYTES + 17)
        site.proxy.clear()
        site.daemon.start()
        wait_for(lambda: [lease.complete for lease in site.leases()] == [True], "the lease to be taken up again")
        check_only(model, files, ["layers.0.weight"])
        assert site.ranges(WEIGHTS) == [range_of(files, WEIGHTS, 1)]
        check_at_rest(site.daemon, leases=1, kept_ingests=True)
    site.evict("m")


def test_an_object_that_changes_under_a_part_gives_a_part_of_the_new_one(site: Site) -> None:
    old = site.add("m", layered(1, 1))
    site.start()
    with site.cache() as cache, cache.attach("m", only=["layers.0.norm"], wait=True) as model:
        new = site.add("m", layered(1, 1, seed=5))
        with cache.attach("m", only=["layers.0.norm"], wait=True) as other:
            assert model.revision != other.revision
            assert bytes(other.raw("layers.0.norm")) == content(new, "layers.0.norm")
            assert bytes(model.raw("layers.0.norm")) == content(old, "layers.0.norm")
            check_at_rest(site.daemon, leases=2, kept_ingests=True)
    site.pull("m")


def test_a_part_of_a_model_without_room_for_it_is_refused(site: Site) -> None:
    site.add("m", layered(3, 3))
    site.settings |= {"l1": {"capacity": f"{2 * CHUNK_BYTES}B"}}
    site.start()
    with site.cache() as cache:
        with refused("NO_ROOM"):
            cache.attach("m", only=["layers.0.*"], wait=True)
        with cache.attach("m", only=["layers.0.norm"], wait=True):
            check_at_rest(site.daemon, leases=1, kept_ingests=True)
    site.evict("m")


def test_a_removed_model_leaves_nothing_of_its_parts(site: Site) -> None:
    site.add("m", layered(1, 1))
    site.start()
    with site.cache() as cache:
        with cache.attach("m", only=["*.norm"], wait=True), refused("IN_USE"), site.rpc() as stub:
            stub.Remove(pb.RemoveRequest(ref="m"))
        with site.rpc() as stub:
            assert stub.Remove(pb.RemoveRequest(ref="m")).l1_freed_bytes
    check_at_rest(site.daemon)


def test_evicting_gives_up_a_failed_pull_of_the_rest_too(site: Site) -> None:
    """What the part left would otherwise stay in L1 for the pull, which nobody wants any more."""
    site.settings |= {"l1": {"capacity": "60MB"}}
    files = site.add("m", layered(1, 1, 1, 1))
    site.start()
    part = part_of_layer_2(site, files)
    with refused("NO_ROOM"):
        site.pull("m")
    check_at_rest(site.daemon, kept_ingests=True)
    assert site.segments("ingest"), "the pull would go on with it"
    assert site.evict("m").l1_freed_bytes == part
    check_at_rest(site.daemon)
    site.daemon.restart()
    check_at_rest(site.daemon)
    assert not site.daemon.log_events("pull.resumed")


def test_evicting_from_l1_leaves_a_failed_pull_to_l2_to_go_on(site: Site) -> None:
    """It has its bytes in L2; what a part of the model has in L1 is nothing to it."""
    site.settings |= {"l2": {"capacity": "60MB"}}
    files = site.add("m", layered(1, 1, 1, 1))
    site.start()
    part = part_of_layer_2(site, files)
    with refused("NO_ROOM"):
        site.pull("m", level="l2")
    assert site.evict("m").l1_freed_bytes == part
    check_at_rest(site.daemon)
    site.daemon.restart()
    site.daemon.wait_event("pull.resumed")


def test_a_part_of_a_model_that_left_the_catalog_can_be_evicted(site: Site) -> None:
    """A pull from elsewhere that fails must not forget the model: what is here of it would be nobody's."""
    files = site.add("m", layered(1, 1, 1, 1))
    site.start()
    part = part_of_layer_2(site, files)
    del site.models["m"]
    site.reload_catalog()
    with pytest.raises(cached_client.CacheError):
        site.pull("m", source=f"file://{site.folder}/nothing")
    assert site.summary("m").l1_bytes == part
    assert site.evict("m").l1_freed_bytes == part
    check_at_rest(site.daemon)


def part_of_layer_2(site: Site, files: dict[str, bytes]) -> int:
    """Attaches it, and gives it back; the bytes that stay."""
    names = ["layers.2.weight"]
    with site.cache() as cache, cache.attach("m", only=names, wait=True) as model:
        check_only(model, files, names)
    return chunk_bytes(files, chunks(files, names))
