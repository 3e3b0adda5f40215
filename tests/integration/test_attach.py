"""Attaches: many workers and one copy, reading while the pull runs, and leases that end with their worker."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import cached_client
from cached.cache import ModelCache
from cached.catalog_file import parse_catalog
from cached.config import load_config
from cached.errors import IntegrityError
from cached.level import Level
from cached.metrics import Metrics
from cached.types import Client, Opened, Peer
from cached.units import CHUNK_BYTES
from tests.integration.harness import wait_for
from tests.integration.hosts import Host, MovedClock, in_l1, until
from tests.integration.support import MB, Site, model_files, refused, sha256, total_bytes
from tests.invariants import check_at_rest

WORKERS = 8


@pytest.mark.slow
def test_eight_workers_that_attach_cold_cause_one_download_and_share_one_copy(site: Site) -> None:
    files = site.add("m", model_files(80 * MB, 60 * MB))
    site.add("tiny", model_files(MB, seed=2))
    site.start()
    workers = [site.worker() for _ in range(WORKERS)]
    for worker in workers:  # what a first attach loads (grpc, threads) is no model's memory
        for request in ({"do": "attach", "ref": "tiny"}, {"do": "digests"}, {"do": "detach"}):
            worker.ask(**request)
    site.proxy.clear()
    before_bytes = sum(worker.ask("pss_bytes") for worker in workers)
    for worker in workers:
        worker.send("attach", ref="m")
    answers = [worker.receive() for worker in workers]
    assert all(answer["complete"] for answer in answers)
    assert len({answer["revision"] for answer in answers}) == 1
    assert site.proxy.get_bytes() == total_bytes(files), "one download, whoever asks"
    for worker in workers:
        worker.send("digests")
    for worker in workers:
        assert worker.receive() == {path: sha256(data) for path, data in files.items()}
    grown_bytes = sum(worker.ask("pss_bytes") for worker in workers) - before_bytes
    assert grown_bytes <= 1.1 * total_bytes(files)
    assert sum(path.stat().st_blocks * 512 for path in site.daemon.segments()) <= 1.01 * total_bytes(files)
    assert len(site.leases()) == WORKERS
    check_at_rest(site.daemon, leases=WORKERS)


def test_the_first_tensor_is_there_while_the_last_chunk_is_not(site: Site) -> None:
    files = site.add("m", model_files(3 * CHUNK_BYTES))
    last = f"bytes={2 * CHUNK_BYTES}-{3 * CHUNK_BYTES - 1}"
    site.start()
    held = site.hold("model.safetensors", range=last)
    with site.attach("m") as model:
        assert model.read("config.json", 60) == files["config.json"]
        info = model.info("t0.weight", 60)
        assert bytes(model.raw("t0.weight", 60)) == files["model.safetensors"][info.begin : info.end]
        assert held.reached.wait(60)
        assert not model.complete
        with pytest.raises(cached_client.TimeoutExpiredError):
            model.raw("t2.weight", 0.05)
        lease = site.leases()[0]
        assert (lease.complete, lease.name) == (False, "m")
        held.release()
        assert model.wait(60).from_level == "l3"
        assert model.view("model.safetensors") == files["model.safetensors"]
        assert site.leases()[0].complete
        assert model.timings["first_range"] < model.timings["complete"]


def test_a_final_check_that_fails_reaches_the_worker_that_has_streamed(site: Site) -> None:
    files = model_files(2 * CHUNK_BYTES)
    site.add("m", files, sha256={"model.safetensors": "f" * 64})
    site.start()
    with site.attach("m") as model:
        assert model.read("config.json", 60) == files["config.json"]
        with pytest.raises(cached_client.IntegrityError) as caught:
            model.wait(60)
        assert caught.value.fields["found"] == sha256(files["model.safetensors"])
        with pytest.raises(cached_client.IntegrityError):
            model.tensor("t0.weight")
    check_at_rest(site.daemon)
    assert not site.segments("blob")


async def test_who_asks_for_descriptors_of_a_load_that_failed_is_told_why(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    source.joinpath("model.safetensors").write_bytes(model_files(MB)["model.safetensors"])
    entry = {"source": f"file://{source}", "sha256": {"model.safetensors": "f" * 64}}
    settings = {
        "daemon.socket": str(tmp_path / "run.sock"), "daemon.state_dir": str(tmp_path / "state"),
        "daemon.models_dir": str(tmp_path / "models"), "transfer.movers": "1",
    }  # fmt: skip
    cache = ModelCache.build(load_config(None, {}, settings).config, Metrics())
    await cache.start()
    try:
        cache.set_catalog(parse_catalog(json.dumps({"models": {"m": entry}}), "json", "catalog.json"))
        async with await cache.attach("m", client=Client("test", 1)) as attachment:
            events = attachment.events()
            opened = await anext(events)
            assert isinstance(opened, Opened)
            with pytest.raises(IntegrityError):
                async for _ in cache.pull("m"):
                    pass
            with pytest.raises(IntegrityError):  # and not that some file of ours is not there
                cache.open_descriptors(opened.token, [0], Peer(1, 0, 0))
            with pytest.raises(IntegrityError):
                async for _ in events:
                    pass
    finally:
        await cache.close()


def test_workers_that_come_at_different_moments_share_the_pull(site: Site) -> None:
    files = site.add("m", model_files(3 * CHUNK_BYTES))
    site.start()
    held = site.hold("model.safetensors", range=f"bytes={2 * CHUNK_BYTES}-{3 * CHUNK_BYTES - 1}")
    first = site.worker()
    first.ask("attach", ref="m", wait=False)
    assert held.reached.wait(60)
    second = site.worker()
    second.ask("attach", ref="m", wait=False)
    held.release()
    for worker in (first, second):
        assert worker.ask("wait") == {"from_level": "l3"}
        assert worker.ask("digests") == {path: sha256(data) for path, data in files.items()}
    third = site.worker()
    assert third.ask("attach", ref="m")["complete"]
    assert site.proxy.get_bytes() == total_bytes(files)


def test_a_killed_workers_lease_ends_and_a_stopped_ones_holds(site: Site, fault_figure: Callable[[str], None]) -> None:
    site.add("m", model_files(2 * MB))
    site.start()
    killed, stopped = site.worker(), site.worker()
    for worker in (killed, stopped):
        worker.ask("attach", ref="m")
    assert {lease.peer_pid for lease in site.leases()} == {killed.pid, stopped.pid}
    stopped.signal(signal.SIGSTOP)
    killed.kill()
    began_s = time.monotonic()
    wait_for(lambda: len(site.leases()) == 1, "the killed worker's lease to end")
    fault_figure(f"a killed worker's lease had ended after {time.monotonic() - began_s:.2f} s")
    assert site.leases()[0].peer_pid == stopped.pid
    with refused("IN_USE") as seen:
        site.evict("m")
    assert str(stopped.pid) in seen["holders"]
    stopped.signal(signal.SIGCONT)
    stopped.ask("detach")
    wait_for(lambda: not site.leases(), "the lease to be given back")
    assert site.evict("m").l1_freed_bytes > 2 * MB


def test_a_worker_killed_during_the_pull_does_not_end_it(site: Site) -> None:
    site.add("m", model_files(2 * CHUNK_BYTES))
    site.start()
    held = site.hold("model.safetensors", after_bytes=1000)
    worker = site.worker()
    worker.ask("attach", ref="m", wait=False)
    assert held.reached.wait(60)
    worker.kill()
    wait_for(lambda: not site.leases(), "the lease to end")
    held.release()
    check_at_rest(site.daemon)
    assert site.check_served("m").from_level == "l1"


async def test_a_lease_is_gone_even_if_what_is_done_at_its_end_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path, MovedClock("2026-11-20T07:00"))
    host.add("m")
    async with host.run() as cache:
        leases = [await cache.attach("m") for _ in range(3)]
        await until(lambda: in_l1(cache, "m"), "the model")

        def fail(_lease: object) -> None:
            raise OSError("no trace can be written")

        monkeypatch.setattr(cache._parts.trace, "closed", fail)
        for left, lease in enumerate(leases, 1):
            with pytest.raises(OSError, match="no trace"):
                lease.close()
            assert cache.stats().lease_count == len(leases) - left
        await cache.evict("m", Level.L1)


def test_a_segment_that_somebody_removed_is_brought_again(site: Site) -> None:
    site.add("m", model_files(3 * MB))
    site.start()
    site.pull("m")
    wait_for(lambda: site.summary("m").l2_bytes, "the copy in L2")
    site.segment("m", "model.safetensors").unlink()
    with refused("NOT_FOUND"):
        site.check_served("m")
    assert site.check_served("m").from_level == "l2"
    assert site.daemon.log_events("l1.lost")


def test_only_if_resident_never_loads(site: Site) -> None:
    site.add("m", model_files(MB))
    site.start()
    with refused("NOT_FOUND"), site.cache() as cache:
        cache.attach("m", only_if_resident=True)
    assert not site.proxy.requests()
    site.pull("m")
    with site.cache() as cache, cache.attach("m", only_if_resident=True) as model:
        assert model.complete


def test_an_attach_of_a_revision_by_name(site: Site) -> None:
    site.add("m", model_files(MB, seed=1))
    site.start()
    old = site.pull("m")[-1].revision
    files = site.add("m", model_files(MB, seed=2))
    new = site.pull("m")[-1].revision
    assert old != new
    assert site.check_served("m").from_level == "l1"
    with site.attach(f"m@{old[:8]}") as model:
        assert model.revision == old
        assert model.read("config.json") != files["config.json"]
    with refused("NO_SOURCE"), site.cache() as cache:
        cache.attach("m@0123456789abcdef")
    assert list(site.describe("m").revisions) == [new, old]


def test_hundreds_of_attaches_at_once_make_one_download_and_leave_nothing(site: Site) -> None:
    files = site.add("m", model_files(CHUNK_BYTES))
    site.start()
    with site.cache() as cache:
        held = site.hold("model.safetensors", after_bytes=1000)
        models = [cache.attach("m", timeout_s=60) for _ in range(100)]
        held.release()
        models += [cache.attach("m", timeout_s=60) for _ in range(100)]
        assert {model.wait(60).checked_by for model in models} == {"first-seen"}
        assert len(site.leases()) == len(models)
        assert site.proxy.get_bytes() == total_bytes(files)
        for model in models:
            model.close()
    wait_for(lambda: not site.leases(), "every lease to end")
    check_at_rest(site.daemon)
