"""Shortages that are real: a full or read-only disk, a small or filled /dev/shm, each in its own mount namespace."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cached.units import CHUNK_BYTES
from tests.integration.harness import wait_for
from tests.integration.support import MB, Site, model_files, refused, total_bytes
from tests.integration.test_restart import WEIGHTS, range_of

_MOUNT = 'mount -t tmpfs -o "$0" none "$1" && shift && exec "$@"'


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    try:
        probe = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "true"], capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("needs unshare(1) of util-linux")
    if probe.returncode:
        pytest.skip(f"needs a mount namespace of its own: {probe.stderr.decode().strip()}")


@pytest.fixture
def within(site: Site) -> Iterator[Site]:
    """The daemon sees other mounts than the tests, so the tests ask it instead of looking."""
    site.check = False
    yield site
    assert site.daemon.is_running, site.daemon.log()
    wait_for(lambda: not site.daemon.stats().active_load_count, "loads to end")
    assert {level.reserved_bytes for level in site.daemon.stats().levels} == {0}
    assert site.daemon.terminate() == 0


def mounted(site: Site, folder: Path, options: str) -> None:
    """The daemon is to start with a tmpfs on ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    site.around = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _MOUNT, options, str(folder))


def inside(site: Site, command: str) -> None:
    """Runs a shell command in the daemon's namespaces."""
    subprocess.run(
        ["nsenter", "--preserve-credentials", "--user", "--mount", f"--target={site.daemon.pid}", "sh", "-c", command],
        check=True, capture_output=True,
    )  # fmt: skip


def l2(site: Site) -> Path:
    return site.folder / "d" / "l2"


def test_a_disk_too_small_keeps_the_model_in_memory(within: Site) -> None:
    site = within
    files = site.add("m", model_files(40 * MB))
    site.add("small", model_files(5 * MB, seed=2))
    mounted(site, l2(site), "size=20m,mode=0700")
    site.start()
    assert site.pull("m")[-1].phase == "ready"
    assert site.check_served("m").from_level == "l1"
    assert (site.summary("m").l1_bytes, site.summary("m").l2_bytes) == (total_bytes(files), 0)
    with refused("NO_ROOM") as seen:
        site.pull("m", level="l2")
        site.evict("m")
        site.pull("m", level="l2")
    assert seen["level"] == "l2"
    site.pull("small")
    assert site.summary("small").l2_bytes == site.summary("small").l1_bytes > 0


def test_a_disk_that_others_fill_is_no_room_and_not_a_failed_pull(within: Site) -> None:
    site = within
    site.add("m", model_files(20 * MB))
    mounted(site, l2(site), "size=40m,mode=0700")
    site.start()
    inside(site, f"head -c 30000000 /dev/zero > {l2(site)}/others")
    site.pull("m")
    assert site.summary("m").l2_bytes == 0
    site.check_served("m")


def test_a_disk_that_becomes_read_only_is_reported_and_pulls_go_on_in_memory(within: Site) -> None:
    site = within
    site.add("before", model_files(3 * MB, seed=1))
    site.add("m", model_files(20 * MB, seed=2))
    mounted(site, l2(site), "size=200m,mode=0700")
    site.start()
    site.pull("before")
    wait_for(lambda: site.summary("before").l2_bytes > 0, "the copy in L2")
    site.evict("before", "l1")
    inside(site, f"mount -o remount,ro {l2(site)}")
    site.pull("m")
    site.check_served("m")
    assert any("l2" in problem.lower() for problem in site.daemon.stats().degraded), site.daemon.stats().degraded
    assert site.check_served("before").from_level == "l2", "what is on it is served"


def test_a_full_disk_that_becomes_read_only_goes_on_serving_what_is_on_it(within: Site) -> None:
    """Nothing of it can be removed, so nothing that was to leave it counts as gone."""
    site = within
    for seed, name in enumerate(("one", "two", "new"), 1):
        site.add(name, model_files(12 * MB, seed=seed))
    mounted(site, l2(site), "size=30m,mode=0700")
    site.start()
    for name in ("one", "two"):
        site.pull(name)
        wait_for(lambda name=name: site.summary(name).l2_bytes > 0, "the copy in L2")  # type: ignore[misc]
        site.evict(name, "l1")
    inside(site, f"mount -o remount,ro {l2(site)}")
    site.pull("new")
    assert site.summary("new").l2_bytes == 0
    with refused("NO_ROOM"):
        site.evict("new", "l1")
        site.pull("new", level="l2")
    with refused("LEVEL_FAILED") as seen:
        site.evict("one", "l2")
    assert seen["cause"] == "Read-only file system"
    assert any("cannot be freed" in problem for problem in site.daemon.stats().degraded), site.daemon.stats().degraded
    for name in ("one", "two"):
        assert site.check_served(name).from_level == "l2", site.daemon.log()
    inside(site, f"mount -o remount,rw {l2(site)}")
    site.evict("one", "l2")
    assert site.summary("one").l2_bytes == 0
    assert not site.daemon.stats().degraded
    site.pull("new")
    wait_for(lambda: site.summary("new").l2_bytes > 0, "the disk to be used again")


def test_a_disk_that_becomes_read_only_under_a_pull_fails_no_load(within: Site) -> None:
    """What was begun there cannot even be removed; the next pull of the same finds it in nobody's way."""
    site = within
    site.add("m", model_files(2 * CHUNK_BYTES + MB, seed=1))
    mounted(site, l2(site), "size=200m,mode=0700")
    site.start()
    held = site.hold("m/" + WEIGHTS, range=range_of(1))
    site.begin("m")
    assert held.reached.wait(60)
    inside(site, f"for _ in $(seq 100); do mount -o remount,ro {l2(site)} && exit; sleep 0.1; done; exit 1")
    held.release()
    wait_for(lambda: site.summary("m").state == "ready", "the pull to end")
    assert not site.daemon.log_events("load.failed"), site.daemon.log()
    assert site.check_served("m").from_level == "l1"


def test_a_read_only_disk_is_read_at_the_start_whatever_else_lies_on_it(within: Site) -> None:
    site = within
    site.add("m", model_files(3 * MB, seed=1))
    site.start()
    site.pull("m")
    wait_for(lambda: site.summary("m").l2_bytes, "the copy in L2")
    site.evict("m", "l1")
    site.daemon.terminate()
    folder = l2(site) / "blobs" / "00"
    folder.mkdir(exist_ok=True)
    (folder / ("0" * 64)).write_bytes(b"of no revision")
    (l2(site) / "ingests" / "left").mkdir()
    (l2(site) / "ingests" / "left" / "data").write_bytes(b"begun")
    read_only = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    site.started_by("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", read_only, str(l2(site)))
    site.start()
    assert site.check_served("m").from_level == "l2"
    assert site.daemon.log_events("recovery.not_removed")
    assert site.daemon.log_events("l2.not_discarded")


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_what_is_damaged_on_a_disk_that_takes_no_mend_is_given_up_and_written_anew(within: Site) -> None:
    site = within
    size_bytes = total_bytes(site.add("m", model_files(3 * MB, seed=1)))
    mounted(site, l2(site), "size=200m,mode=0700")
    site.start()
    site.pull("m")
    wait_for(lambda: site.summary("m").l2_bytes == size_bytes, "the copy in L2")
    site.evict("m", "l1")
    inside(site, f"echo junk | dd bs=1 seek=100 conv=notrunc of=$(find {l2(site)}/blobs -size +1M)")
    inside(site, f"mount -o remount,ro {l2(site)}")
    site.check_served("m")
    wait_for(lambda: site.summary("m").l2_bytes < size_bytes, "the damaged copy to be given up")
    site.check_served("m")
    inside(site, f"mount -o remount,rw {l2(site)}")
    wait_for(lambda: site.summary("m").l2_bytes == size_bytes, "a copy that is right", 200)
    site.evict("m", "l1")
    found = len(site.daemon.log_events("damage.found"))
    assert site.check_served("m").from_level == "l2"
    assert len(site.daemon.log_events("damage.found")) == found


def test_journals_that_cannot_be_written_fail_no_pull(within: Site) -> None:
    site = within
    site.add("m", model_files(3 * MB, seed=1))
    site.add("later", model_files(3 * MB, seed=2))
    journals = site.folder / "d" / "state" / "journals"
    mounted(site, journals, "size=1m,mode=0700")
    site.start()
    inside(site, f"mount -o remount,ro {journals}")
    site.pull("m")
    assert site.check_served("m").from_level == "l1"
    assert any("journal" in problem for problem in site.daemon.stats().degraded), site.daemon.stats().degraded
    inside(site, f"mount -o remount,rw {journals}")
    site.pull("later")
    assert not site.daemon.stats().degraded


def test_shared_memory_smaller_than_configured_bounds_l1(within: Site) -> None:
    site = within
    site.add("m", model_files(40 * MB))
    site.add("small", model_files(10 * MB, seed=2))
    mounted(site, Path("/dev/shm"), "size=30m,mode=1777")
    site.start()
    assert "free" in site.level("l1").limited_by
    with refused("NO_ROOM") as seen:
        site.pull("m")
    assert seen["level"] == "l1"
    site.pull("small")
    site.check_served("small")
    assert site.pull("m", level="l2")[-1].phase == "ready"


def test_shared_memory_that_others_fill_under_the_pull_is_an_error_and_no_signal(within: Site) -> None:
    site = within
    site.add("m", model_files(2 * CHUNK_BYTES))
    site.add("small", model_files(2 * MB, seed=2))
    site.settings |= {"transfer": {"max_attempts": 2, "retry_budget_s": 2.0}}
    mounted(site, Path("/dev/shm"), "size=40m,mode=1777")
    site.start()
    gate = site.hold("m/config.json", method="GET")
    site.begin("m")
    assert gate.reached.wait(60)
    inside(site, "head -c 90000000 /dev/zero > /dev/shm/others || true")
    gate.release()
    failed = site.daemon.wait_event("load.failed")
    assert (failed["reason"], failed.get("at", failed.get("level"))) == ("NO_ROOM", "l1"), failed
    assert site.summary("m").state != "ready"
    assert not site.daemon.log_events("mover.died"), "SIGBUS ends a process"
    assert not site.daemon.stats().counters.get("cached_mover_restarts_total")
    inside(site, "rm /dev/shm/others")
    site.pull("small")
    site.check_served("small")
    site.pull("m")
    site.check_served("m")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("how", ["renamed", "unmounted"])
def test_a_disk_that_goes_away_under_the_daemon_is_reported_and_done_without(within: Site, how: str) -> None:
    site = within
    for seed, name in enumerate(("memory", "disk", "later"), 1):
        site.add(name, model_files(3 * MB, seed=seed))
    if how == "unmounted":
        mounted(site, l2(site), "size=200m,mode=0700")
    site.start()
    for name in ("memory", "disk"):
        site.pull(name)
        wait_for(lambda name=name: site.summary(name).l2_bytes > 0, "the copy in L2")  # type: ignore[misc]
    site.evict("disk", "l1")
    away = l2(site).with_name("away")
    if how == "unmounted":
        inside(site, f"umount -l {l2(site)}")
    else:
        l2(site).rename(away)
    assert site.check_served("memory").from_level == "l1"
    assert site.check_served("disk").from_level == "l3"
    site.pull("later")
    site.check_served("later")
    wait_for(lambda: any("l2" in problem.lower() for problem in site.daemon.stats().degraded), "it to say so")
    if how == "renamed":
        shutil.rmtree(l2(site), ignore_errors=True)
        away.rename(l2(site))
        wait_for(lambda: not site.daemon.stats().degraded, "L2 to be well again")
        wait_for(lambda: site.summary("later").l2_bytes > 0, "the copy in L2")
        for name in ("memory", "disk", "later"):
            site.evict(name, "l1")
            assert site.check_served(name).from_level == "l2"
