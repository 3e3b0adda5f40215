"""A disk that fails to sync: what it may not have kept is thrown away, and nobody is told that it is safe."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from cached.level import Level
from tests.fault.strace import require_strace, traced
from tests.integration.harness import wait_for
from tests.integration.hosts import Host, MovedClock, pull, shown, until
from tests.integration.support import MB, Site, model_files, total_bytes

pytestmark = pytest.mark.faults
SYNCS = ["fsync", "fdatasync"]


@pytest.mark.parametrize("when", ["1", "2", "1+"], ids=["the-bytes-once", "the-folder-once", "always"])
def test_a_failed_sync_is_never_taken_for_a_good_one(site: Site, when: str) -> None:
    require_strace()
    files = site.add("m", model_files(5 * MB))
    site.add("late", model_files(MB, seed=2))
    held = site.hold("late/model.safetensors")
    site.start()
    site.begin("late")  # as long as anything is loaded, what failed is not written again
    assert held.reached.wait(60)
    wait_for(lambda: len(named(site)) == len(site.files["late"]) - 1, "the rest of it in L2")
    late = named(site)
    with traced(site.daemon.pid, site.folder / "log", calls=["fsync"], inject=f"fsync:error=EIO:when={when}"):
        site.pull("m")
        site.daemon.wait_event("l2.write_failed")
        wait_for(lambda: site.daemon.stats().active_load_count == 1, "the load to end")
        assert "(INJECTED)" in (site.folder / "log").read_text()
        site.check_served("m")
        in_l2 = {file.path for file in site.describe("m").files if file.in_l2}
        blobs = named(site) - late
        assert len(in_l2) < len(files), "one of them was not synced"
        assert when != "1+" or any("l2" in problem.lower() for problem in site.daemon.stats().degraded)
        assert len(blobs) == len(in_l2), "what was not synced has no name"
    site.proxy.heal()
    site.daemon.restart(kill=True)
    site.pull("m")
    wait_for(lambda: site.summary("m").l2_bytes == total_bytes(files), "the copy in L2")
    site.check_served("m")


def named(site: Site) -> set[str]:
    """The blobs of L2."""
    return {path.name for path in site.daemon.l2_dir.glob("blobs/*/*")}


def index_problems(site: Site) -> list[str]:
    return [problem for problem in site.daemon.stats().degraded if "the index cannot be written" in problem]


def test_a_failed_sync_of_the_index_does_not_stop_the_service(site: Site) -> None:
    require_strace()
    site.add("m", model_files(2 * MB))
    site.start()
    with traced(site.daemon.pid, site.folder / "log", calls=SYNCS, inject="fdatasync:error=EIO"):
        site.pull("m")
        site.check_served("m")
        assert "(INJECTED)" in (site.folder / "log").read_text(), "the index is synced"
        wait_for(lambda: index_problems(site), "the daemon to say that its index is not written")
    site.daemon.restart(kill=True)
    assert not index_problems(site)
    site.pull("m")
    site.check_served("m")


async def test_after_one_failed_sync_l2_is_degraded_until_that_blob_is_there_after_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only until L2 takes another one. What is there then was written anew from memory."""
    host = Host(tmp_path, MovedClock("2026-11-20T07:00"))
    host.add("m", 3 * MB)
    host.add("other", 2 * MB)
    synced: list[int] = []
    again = threading.Event()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        if found.st_size == 3 * MB:
            synced.append(found.st_ino)
            if len(synced) == 1:
                raise OSError(errno.EIO, "Input/output error")
            assert again.wait(60)
        real(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    async with host.run() as cache:
        await pull(cache, "m")
        await until(lambda: len(synced) == 2, "another try")
        await pull(cache, "other")
        await until(lambda: bool(shown(cache, "other").summary.l2_bytes), "the other model in L2")
        assert any("L2 could not be written" in problem for problem in cache.stats().degraded)
        assert not shown(cache, "m").summary.l2_bytes
        again.set()
        await until(lambda: bool(shown(cache, "m").summary.l2_bytes), "the model in L2 after all")
        assert not cache.stats().degraded


async def test_a_blob_that_has_left_memory_keeps_l2_from_being_well_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path, MovedClock("2026-11-20T07:00"))
    host.add("m", 3 * MB)
    host.add("other", 2 * MB)
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.fstat(descriptor).st_size == 3 * MB:
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    async with host.run() as cache:
        await pull(cache, "m")
        await until(lambda: bool(cache.stats().degraded), "the failure")
        await cache.evict("m", Level.L1)
        await pull(cache, "other")
        await until(lambda: not cache.stats().degraded, "L2 to be well")
