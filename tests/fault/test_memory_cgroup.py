"""Memory that others of the same cgroup take: a typed error, a real OOM kill; and a container that is removed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cached.cgroups import Cgroups
from tests.fault.memory_cgroup import Cgroup, memory_cgroup
from tests.integration.harness import wait_for
from tests.integration.support import MB, Site, model_files, refused, sha256, total_bytes
from tests.invariants import check_at_rest

pytestmark = pytest.mark.faults
LIMIT_BYTES = 600 * MB
_HOG = """
import sys
held = []
for line in sys.stdin:
    held.append(b"x" * int(line))
    print(len(held), flush=True)
"""


class Hog:
    """A process of the cgroup that takes memory, and that the kernel spares when there is none left."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        with suppress(PermissionError):  # where even root may not
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("-1000")

    def take(self, size_bytes: int) -> None:
        """Takes more; returns when it has it."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{size_bytes}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline(), "it was killed"


@contextmanager
def hog_in(cgroup: Cgroup) -> Iterator[Hog]:
    command = [*cgroup.entry, sys.executable, "-c", _HOG]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Hog(process)
        finally:
            process.kill()


@pytest.fixture
def cgroup(site: Site) -> Iterator[Cgroup]:
    """The site's daemon runs in a memory cgroup."""
    with memory_cgroup(LIMIT_BYTES) as made:
        site.started_by(*made.entry)
        yield made
        site.close()
        site.check = False


def test_a_filled_cgroup_is_a_typed_error_and_no_signal(site: Site, cgroup: Cgroup) -> None:
    files = site.add("m", model_files(90 * MB))
    site.add("small", model_files(5 * MB, seed=2))
    daemon = site.start()
    site.pull("small")
    (mover,) = set(cgroup.processes()) - {daemon.pid}
    with hog_in(cgroup) as hog:
        left_bytes = Cgroups(pid=str(daemon.pid)).memory()[0].left_bytes
        assert left_bytes is not None
        hog.take(left_bytes - 60 * MB)
        wait_for(lambda: site.level("l1").capacity_bytes < total_bytes(files), "L1 to be what the cgroup leaves")
        assert "cgroup" in site.level("l1").limited_by
        with refused("NO_ROOM") as seen:
            site.pull("m")
        assert seen["level"] == "l1"
        assert site.check_served("small").from_level == "l1"
        check_at_rest(daemon)
    assert cgroup.oom_kills() == 0
    assert {daemon.pid, mover} <= set(cgroup.processes()), "nobody was killed"
    wait_for(lambda: cgroup.used_bytes() < LIMIT_BYTES - total_bytes(files), "the memory to be given back")
    wait_for(lambda: site.level("l1").capacity_bytes > total_bytes(files), "L1 to grow again")
    assert site.check_served("m").from_level == "l3"


def test_a_mover_that_is_killed_for_want_of_memory_costs_only_its_ranges(site: Site, cgroup: Cgroup) -> None:
    site.add("m", model_files(60 * MB))
    held = site.hold("m/model.safetensors", after_bytes=MB)
    daemon = site.start()
    site.begin("m")
    assert held.reached.wait(60)
    (mover,) = set(cgroup.processes()) - {daemon.pid}
    Path(f"/proc/{mover}/oom_score_adj").write_text("1000")  # so that the kernel chooses the mover
    with hog_in(cgroup) as hog:
        while not cgroup.oom_kills():
            hog.take(8 * MB)
        daemon.wait_event("mover.died")
    held.release()
    check_at_rest(daemon)
    site.check_served("m")
    assert cgroup.oom_kills() == daemon.stats().counters["cached_mover_restarts_total"] == 1
    assert mover not in cgroup.processes()


def test_a_daemon_that_is_killed_for_want_of_memory_adopts_l1_and_its_leases(
    site: Site, cgroup: Cgroup, fault_figure: Callable[[str], None]
) -> None:
    files = site.add("m", model_files(60 * MB))
    site.settings |= {"daemon": {"restart_grace_s": 5.0}}
    daemon = site.start()
    worker = site.worker()
    worker.ask("attach", ref="m")
    check_at_rest(daemon, leases=1, content=False)
    site.proxy.clear()
    pid = daemon.pid
    Path(f"/proc/{pid}/oom_score_adj").write_text("1000")  # so that the kernel chooses the daemon
    with hog_in(cgroup) as hog:
        while not cgroup.oom_kills():
            hog.take(8 * MB)
        assert daemon.wait() == -9
    assert worker.ask("digests") == {path: sha256(data) for path, data in files.items()}
    began_s = time.monotonic()
    site.start()
    fault_figure(f"after an OOM kill the next daemon was ready in {time.monotonic() - began_s:.1f} s")
    wait_for(lambda: [lease.client_pid for lease in site.leases()] == [worker.pid], "the lease to come back")
    assert worker.ask("lease_lost") == ""
    assert worker.ask("digests") == {path: sha256(data) for path, data in files.items()}
    worker.ask("detach")
    assert site.check_served("m").from_level == "l1"
    assert not site.proxy.requests(), "adopted, and not fetched again"


def test_a_container_that_is_removed_and_made_anew_adopts_l1_and_its_leases(site: Site, cgroup: Cgroup) -> None:
    """All processes killed at once, the cgroup and the sockets' folder gone; L1 and the state are the host's."""
    files = site.add("m", model_files(60 * MB))
    site.settings |= {"daemon": {"restart_grace_s": 5.0}}
    site.start()
    worker = site.worker()
    worker.ask("attach", ref="m")
    check_at_rest(site.daemon, leases=1, content=False)
    site.proxy.clear()
    cgroup.remove()
    site.daemon.wait()
    run = site.daemon.socket.parent
    for entry in run.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    assert not os.listdir(run)
    with memory_cgroup(LIMIT_BYTES) as another:
        site.started_by(*another.entry)
        site.start()
        wait_for(lambda: [lease.client_pid for lease in site.leases()] == [worker.pid], "the lease to come back")
        assert worker.ask("lease_lost") == ""
        assert worker.ask("digests") == {path: sha256(data) for path, data in files.items()}
        worker.ask("detach")
        assert site.check_served("m").from_level == "l1"
        assert not site.proxy.requests(), "adopted, and not fetched again"
        site.close()
        site.check = False
