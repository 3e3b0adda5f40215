"""Restarts, in order and by SIGKILL: what was verified is never fetched again, and what was served is served on."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from cached.cache.build import instance_of
from cached.index import Index
from cached.units import CHUNK_BYTES
from tests.integration.harness import wait_for
from tests.integration.support import (
    MB,
    Site,
    Worker,
    chunk_ranges,
    flip_byte,
    model_files,
    refused,
    sha256,
    total_bytes,
)
from tests.invariants import check_at_rest

WEIGHTS = "model.safetensors"
SIZE = 3 * CHUNK_BYTES + 3 * MB
HELD = 2
"""The chunk that the origin does not answer before the daemon ends."""


def range_of(index: int) -> str:
    offset, length = chunk_ranges(SIZE)[index]
    return f"bytes={offset}-{offset + length - 1}"


def counter(site: Site, name: str) -> float:
    """Summed over its labels."""
    return sum(value for key, value in site.daemon.stats().counters.items() if key.partition("{")[0] == name)


def moved(site: Site, hop: str) -> float:
    return site.daemon.stats().counters.get(f'cached_transfer_bytes_total{{hop="{hop}"}}', 0.0)


def interrupted(site: Site, number: int, *, level: str = "l1", on_disk: bool = False) -> None:
    """A pull that has everything but one chunk when the daemon gets a signal; the origin is well afterwards."""
    files = site.add("m", model_files(SIZE))
    site.settings |= {"daemon": {"drain_timeout_s": 0.1}}
    held = site.hold(WEIGHTS, range=range_of(HELD))
    site.start()
    site.begin("m", level=level)
    assert held.reached.wait(60)
    verified_bytes = total_bytes(files) - CHUNK_BYTES
    wait_for(lambda: site.summary("m").progress * total_bytes(files) >= verified_bytes, "all but one chunk")
    if on_disk:
        wait_for(lambda: moved(site, "l1_l2") >= verified_bytes, "the same chunks in L2")
    site.daemon.signal_and_wait(number)
    site.proxy.heal()
    site.proxy.clear()


def finish(site: Site) -> None:
    """The pull goes on by itself."""
    site.start()
    wait_for(lambda: site.summary("m").state == "ready", "the pull to finish by itself")
    check_at_rest(site.daemon)


@pytest.mark.parametrize(("number", "level"), [(signal.SIGKILL, "l1"), (signal.SIGKILL, "l2"), (signal.SIGTERM, "l1")])
def test_a_pull_goes_on_after_a_restart_and_fetches_only_what_was_not_verified(
    site: Site, number: signal.Signals, level: str
) -> None:
    interrupted(site, number, level=level)
    finish(site)
    assert site.ranges(WEIGHTS) == [range_of(HELD)]
    assert site.proxy.get_bytes() == CHUNK_BYTES, "the small files were there too"
    assert counter(site, "cached_checksum_failures_total") == 0
    site.check_served("m")


def test_a_file_that_landed_just_before_the_index_knew_of_it_is_not_fetched_again(site: Site) -> None:
    """The index is written behind: the journals of an interrupted pull say the same."""
    interrupted(site, signal.SIGKILL)
    index = Index(site.daemon.state_dir / "index")
    landed = [record.digest for record in index.blobs()]
    for digest in landed:
        index.delete_blob(digest)
    index.close()
    assert landed
    finish(site)
    assert site.ranges(WEIGHTS) == [range_of(HELD)]
    assert site.proxy.get_bytes() == CHUNK_BYTES
    site.check_served("m")


def test_a_pull_goes_on_from_l2_when_memory_was_lost(site: Site) -> None:
    """As after a reboot: /dev/shm is empty, and L2 has what was written behind."""
    interrupted(site, signal.SIGKILL, on_disk=True)
    for segment in site.daemon.segments():
        segment.unlink()
    finish(site)
    assert site.ranges(WEIGHTS) == [range_of(HELD)]
    assert moved(site, "l2_l1") >= SIZE - CHUNK_BYTES
    assert counter(site, "cached_checksum_failures_total") == 0, "what is gone is not damaged"
    site.check_served("m")


def test_a_pull_goes_on_from_memory_when_l2_was_lost(site: Site) -> None:
    interrupted(site, signal.SIGKILL, on_disk=True)
    shutil.rmtree(site.daemon.l2_dir)
    finish(site)
    assert site.ranges(WEIGHTS) == [range_of(HELD)]
    wait_for(lambda: site.summary("m").l2_bytes == total_bytes(site.files["m"]), "the copy in L2")
    check_at_rest(site.daemon)


def test_a_chunk_that_was_damaged_between_is_fetched_again(site: Site) -> None:
    interrupted(site, signal.SIGKILL)
    (segment,) = (item for item in site.segments("ingest") if item.stat().st_size == SIZE)
    flip_byte(segment, CHUNK_BYTES + 5)
    for data in site.daemon.l2_dir.glob("ingests/*/data"):
        if data.stat().st_size == SIZE:
            flip_byte(data, CHUNK_BYTES + 5)
    finish(site)
    assert sorted(site.ranges(WEIGHTS)) == sorted([range_of(1), range_of(HELD)])
    site.check_served("m")


def test_an_ingest_that_never_got_its_length_is_begun_anew(site: Site) -> None:
    """A crash between the making of a segment and the setting of its length leaves an empty one."""
    interrupted(site, signal.SIGKILL)
    paths = [*site.segments("ingest"), *site.daemon.l2_dir.glob("ingests/*/data")]
    assert paths
    for path in paths:
        os.truncate(path, 0)
    finish(site)
    site.check_served("m")


def test_two_interruptions_lose_nothing(site: Site) -> None:
    interrupted(site, signal.SIGKILL)
    held = site.hold(WEIGHTS, range=range_of(HELD))
    site.start()
    assert held.reached.wait(60)
    site.daemon.kill()
    site.proxy.heal()
    site.proxy.clear()
    finish(site)
    assert site.ranges() == [range_of(HELD)]


def test_an_object_that_was_replaced_between_is_fetched_whole(site: Site) -> None:
    interrupted(site, signal.SIGKILL)
    files = site.add("m", model_files(SIZE, seed=2))
    finish(site)
    assert site.proxy.get_bytes(WEIGHTS) == len(files[WEIGHTS])
    site.check_served("m")


@pytest.mark.parametrize("kill", [False, True])
def test_what_is_in_memory_is_adopted_without_reading_l2_or_l3(site: Site, *, kill: bool) -> None:
    files = site.add("m", model_files(2 * CHUNK_BYTES))
    site.start()
    site.pull("m")
    check_at_rest(site.daemon, content=False)
    inode = site.segment("m", WEIGHTS).stat().st_ino
    site.proxy.clear()
    site.daemon.restart(kill=kill)
    assert site.check_served("m").from_level == "l1"
    assert site.segment("m", WEIGHTS).stat().st_ino == inode, "the very same memory"
    assert not site.proxy.requests()
    assert moved(site, "l2_l1") == 0
    assert counter(site, "cached_adopted_bytes_total") == total_bytes(files)
    check_at_rest(site.daemon)


def test_memory_in_a_folder_of_its_own_is_used_and_adopted(site: Site) -> None:
    """A folder of /dev/shm is on a tmpfs as well."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="test-cached-") as folder:
        site.settings |= {"l1": {"path": folder}}
        site.add("m", model_files(SIZE))
        site.start()
        site.check_served("m")
        assert len(list(Path(folder).glob("cached.*.blob.*"))) == 3
        assert not site.daemon.segments()
        link = site.daemon.models_dir / "m" / WEIGHTS
        assert link.read_bytes() == site.files["m"][WEIGHTS]
        assert str(link.resolve()).startswith(folder)
        site.proxy.clear()
        site.daemon.restart()
        wait_for(lambda: site.summary("m").l1_bytes == total_bytes(site.files["m"]), "the segments to be adopted")
        site.check_served("m")
        assert not site.proxy.gets(WEIGHTS)
        assert moved(site, "l2_l1") == 0
        site.evict("m")
        wait_for(lambda: not list(Path(folder).iterdir()), "the memory to be given back")
        assert site.daemon.terminate() == 0
    site.check = False


@pytest.mark.parametrize("folder", ["here", "nowhere"])
def test_memory_that_is_none_is_refused(site: Site, tmp_path: Path, folder: str) -> None:
    site.check = False
    (tmp_path / "here").mkdir()
    site.settings |= {"l1": {"path": str(tmp_path / folder)}}
    site.daemon.start(wait=False)
    assert site.daemon.wait() == 1
    assert "L1 is memory" in site.daemon.log()
    assert "l1.path" in site.daemon.log()


def test_a_worker_keeps_its_tensors_and_its_lease_over_a_kill(site: Site) -> None:
    files = site.add("m", model_files(CHUNK_BYTES))
    site.settings |= {"daemon": {"restart_grace_s": 5.0}}
    site.start()
    worker = site.worker()
    worker.ask("attach", ref="m")
    check_at_rest(site.daemon, leases=1, content=False)
    site.daemon.kill()
    assert worker.ask("digests") == {path: sha256(data) for path, data in files.items()}
    site.start()
    wait_for(lambda: [lease.client_pid for lease in site.leases()] == [worker.pid], "the lease to come back")
    with refused("IN_USE"):
        site.evict("m")
    assert worker.ask("lease_lost") == ""
    assert worker.ask("digests") == {path: sha256(data) for path, data in files.items()}
    worker.ask("detach")
    wait_for(lambda: not site.leases(), "the lease to end")


def stopped_over_a_kill(site: Site, ref: str) -> Worker:
    """A worker with a model, which cannot take up its lease yet with the daemon that is there now."""
    worker = site.worker()
    worker.ask("attach", ref=ref)
    check_at_rest(site.daemon, leases=1, content=False)
    worker.signal(signal.SIGSTOP)
    site.daemon.kill()
    site.start()
    return worker


def test_a_lease_that_a_limit_refuses_at_first_comes_back_when_there_is_room_for_it(site: Site) -> None:
    site.add("m", model_files(MB))
    site.settings |= {"limits": {"leases_per_uid": 1}}
    site.start()
    worker = stopped_over_a_kill(site, "m")
    with site.attach("m") as other:
        other.wait(60)
        worker.signal(signal.SIGCONT)
        refusals = partial(site.daemon.log_events, "rpc.refused")
        wait_for(lambda: [event for event in refusals() if event["reason"] == "LIMIT_EXCEEDED"], "it to be refused")
        assert worker.ask("lease_lost") == ""
    wait_for(lambda: [lease.client_pid for lease in site.leases()] == [worker.pid], "the lease to come back")
    worker.ask("detach")
    check_at_rest(site.daemon, content=False)


@pytest.mark.faults
def test_nothing_is_evicted_before_workers_could_take_up_their_leases(site: Site) -> None:
    site.add("held", model_files(30 * MB))
    site.add("m", model_files(30 * MB, seed=2))
    site.settings |= {"l1": {"capacity": "50MB"}, "daemon": {"restart_grace_s": 20.0}}
    site.start()
    worker = stopped_over_a_kill(site, "held")
    with ThreadPoolExecutor(1) as pool:
        check_at_rest(site.daemon, content=False)  # it is adopted
        asked = pool.submit(site.pull, "m")
        wait_for(lambda: site.proxy.gets("m/") or site.proxy.requests("HEAD", "m/"), "the pull to begin")
        assert not site.leases()
        worker.signal(signal.SIGCONT)
        with refused("NO_ROOM") as seen:
            asked.result()
    assert "held (leased" in seen["holders"]
    assert worker.ask("lease_lost") == ""
    worker.ask("detach")


def test_a_worker_that_waits_for_a_pull_gets_it_from_the_next_daemon(site: Site) -> None:
    files = site.add("m", model_files(SIZE))
    held = site.hold(WEIGHTS, range=range_of(HELD))
    site.start()
    worker = site.worker()
    worker.ask("attach", ref="m", wait=False)
    assert held.reached.wait(60)
    site.daemon.kill()
    site.proxy.heal()
    site.start()
    assert worker.ask("wait")["from_level"] in {"l1", "l3"}
    assert worker.ask("digests") == {path: sha256(data) for path, data in files.items()}
    assert worker.ask("lease_lost") == ""


def test_what_a_promotion_had_brought_is_adopted_without_anybody_asking(site: Site) -> None:
    """As after a kill in the middle of it: some files of a model of L2 have their names in memory, others not yet."""
    files = site.add("m", model_files(2 * CHUNK_BYTES, 5 * MB))
    site.start()
    site.pull("m")
    check_at_rest(site.daemon, content=False)
    second = sorted(files, key=lambda path: len(files[path]))[-2]
    late, late_bytes = site.segment("m", second), len(files[second])
    site.daemon.kill()
    late.unlink()
    before = {path.name: path.stat().st_ino for path in site.segments("blob")}
    site.proxy.clear()
    site.start()
    adopted_bytes = total_bytes(files) - late_bytes
    wait_for(lambda: counter(site, "cached_adopted_bytes_total") == adopted_bytes, "the adoption")
    check_at_rest(site.daemon)
    assert {path.name: path.stat().st_ino for path in site.segments("blob")} == before
    assert moved(site, "l2_l1") == 0
    assert site.summary("m").l1_bytes == adopted_bytes
    site.check_served("m")
    assert before.items() <= {path.name: path.stat().st_ino for path in site.segments("blob")}.items()
    assert moved(site, "l2_l1") == late_bytes
    assert not site.proxy.requests()


def test_what_a_promotion_had_brought_and_is_damaged_is_mended_by_the_chunk(site: Site) -> None:
    files = site.add("m", model_files(2 * CHUNK_BYTES, 5 * MB))
    site.start()
    site.pull("m")
    check_at_rest(site.daemon, content=False)
    large, small = sorted(files, key=lambda path: -len(files[path]))[:2]
    kept, late = site.segment("m", large), site.segment("m", small)
    site.daemon.kill()
    late.unlink()
    flip_byte(kept, CHUNK_BYTES + 5)
    site.start()
    wait_for(lambda: counter(site, "cached_adopted_bytes_total") == total_bytes(files) - len(files[small]), "adoption")
    check_at_rest(site.daemon)
    assert moved(site, "l2_l1") == CHUNK_BYTES, "that chunk, and no other"
    site.evict("m")
    assert not site.segments("blob")


def test_a_quick_pull_is_finished_before_the_daemon_ends(site: Site) -> None:
    site.add("m", model_files(2 * MB))
    site.settings |= {"daemon": {"drain_timeout_s": 30.0}}
    held = site.hold(WEIGHTS, after_bytes=1000)
    site.start()
    site.begin("m")
    assert held.reached.wait(60)
    site.daemon.signal(signal.SIGTERM)
    site.daemon.wait_event("daemon.draining")
    held.release()
    assert site.daemon.wait() == 0
    site.proxy.clear()
    site.start()
    assert site.check_served("m").from_level == "l1"
    assert not site.proxy.requests()


def test_a_flipped_byte_in_memory_is_found_at_adoption_and_mended_from_l2(site: Site) -> None:
    site.add("m", model_files(2 * CHUNK_BYTES))
    site.start()
    site.pull("m")
    check_at_rest(site.daemon, content=False)
    site.daemon.kill()
    flip_byte(site.segment("m", WEIGHTS), CHUNK_BYTES + 99)
    site.proxy.clear()
    site.start()
    site.check_served("m")
    assert not site.proxy.requests()
    assert moved(site, "l2_l1") == CHUNK_BYTES, "that chunk, and no other"
    assert counter(site, "cached_checksum_failures_total") == 1
    check_at_rest(site.daemon)


def test_everything_here_is_served_when_the_origin_is_gone(site: Site) -> None:
    site.add("memory", model_files(MB, seed=1))
    site.add("disk", model_files(MB, seed=2))
    site.start()
    site.pull("memory")
    site.pull("disk", level="l2")
    check_at_rest(site.daemon, content=False)
    site.daemon.kill()
    site.proxy.close()
    site.start()
    assert site.check_served("memory").from_level == "l1"
    assert site.check_served("disk").from_level == "l2"


def test_l2_is_written_again_from_memory_when_it_was_lost(site: Site) -> None:
    files = site.add("m", model_files(CHUNK_BYTES))
    site.start()
    site.pull("m")
    check_at_rest(site.daemon, content=False)
    site.daemon.kill()
    shutil.rmtree(site.daemon.l2_dir)
    site.proxy.clear()
    site.start()
    assert site.check_served("m").from_level == "l1"
    wait_for(lambda: site.summary("m").l2_bytes == total_bytes(files), "the copy in L2")
    check_at_rest(site.daemon)
    assert not site.proxy.requests()


def test_leftovers_of_ours_are_removed_and_what_is_foreign_is_left_alone(site: Site) -> None:
    site.add("m", model_files(MB))
    site.start()
    site.pull("m")
    check_at_rest(site.daemon, content=False)
    site.daemon.kill()
    prefix = f"/dev/shm/cached.{instance_of(str(site.daemon.state_dir))}."
    unknown = [Path(prefix + f"{kind}.{name}") for kind, name in (
        ("blob", "ab" * 32), ("ingest", "cd" * 16), ("pool", "ef" * 8), ("withdrawn", "01" * 8),
    )]  # fmt: skip
    for path in unknown:
        path.write_bytes(b"old")
        path.chmod(0o600)
    target = site.folder / "precious"
    target.write_bytes(b"do not touch")
    link, strange = Path(prefix + "blob." + "12" * 32), Path(prefix + "what-is-this")
    link.symlink_to(target)
    strange.write_bytes(b"?")
    root = site.daemon.l2_dir
    (root / "blobs" / "ab").mkdir(exist_ok=True)
    orphan = root / "blobs" / "ab" / ("ab" * 32)
    orphan.write_bytes(b"no revision has it")
    notes = root / "blobs" / "notes.txt"
    notes.write_bytes(b"mine")
    (root / "ingests" / ("98" * 16)).mkdir()
    os.mkfifo(root / "blobs" / "ab" / ("34" * 32))
    try:
        site.start()
        wait_for(lambda: not any(path.exists() for path in unknown), "leftovers to be removed")
        assert link.is_symlink()
        assert strange.exists()
        assert target.read_bytes() == b"do not touch"
        assert not orphan.exists()
        assert not notes.exists()
        assert [path.read_bytes() for path in root.glob("aside/*/blobs/notes.txt")] == [b"mine"]
        assert list(root.glob("aside/*/blobs/ab/" + "34" * 32)), "a FIFO is set aside, never opened"
        site.check_served("m")
    finally:
        link.unlink(missing_ok=True)
        strange.unlink(missing_ok=True)
    check_at_rest(site.daemon)


def test_an_unknown_format_of_l2_is_set_aside(site: Site) -> None:
    files = site.add("m", model_files(MB))
    site.start()
    site.pull("m", level="l2")
    site.daemon.kill()
    (site.daemon.l2_dir / "FORMAT").write_text("7\n")
    site.start()
    assert site.summary("m").l2_bytes == 0
    blobs = site.daemon.l2_dir.glob("aside/*/blobs/*/*")
    assert {path.name for path in blobs} == {sha256(data) for data in files.values()}
    site.check_served("m")


def test_a_lost_index_costs_a_pull_and_nothing_else(site: Site) -> None:
    site.add("m", model_files(MB))
    site.start()
    site.pull("m")
    site.daemon.kill()
    shutil.rmtree(site.daemon.state_dir / "index")
    site.start()
    check_at_rest(site.daemon)
    assert {site.level(name).used_bytes for name in ("l1", "l2")} == {0}
    assert site.check_served("m").from_level == "l3"


def test_hot_models_are_brought_by_themselves_and_confirmed_first(site: Site) -> None:
    site.add("cool", model_files(CHUNK_BYTES, seed=1))
    site.add("hot", model_files(CHUNK_BYTES, seed=2), tier="hot")
    site.start()
    wait_for(lambda: site.summary("hot").state == "ready", "the hot model to be brought")
    site.pull("cool")
    check_at_rest(site.daemon, content=False)
    site.daemon.restart(kill=True)
    check_at_rest(site.daemon)
    finished = [event["model"] for event in site.daemon.log_events("load.finished")]
    assert finished == ["hot", "cool"]
    site.daemon.kill()
    for segment in site.daemon.segments():
        segment.unlink()
    site.proxy.clear()
    site.start()
    wait_for(lambda: site.summary("hot").l1_bytes > CHUNK_BYTES, "the hot model to come back from L2")
    assert site.summary("cool").l1_bytes == 0
    assert not site.proxy.requests()
