"""A disk that fails to sync: what it may not have kept is thrown away, and nobody is told that it is safe."""

from __future__ import annotations

import pytest

from tests.fault.strace import require_strace, traced
from tests.integration.harness import wait_for
from tests.integration.support import MB, Site, model_files, total_bytes

pytestmark = pytest.mark.faults
SYNCS = ["fsync", "fdatasync"]


@pytest.mark.parametrize("when", ["1", "2", "1+"], ids=["the-bytes-once", "the-folder-once", "always"])
def test_a_failed_sync_is_never_taken_for_a_good_one(site: Site, when: str) -> None:
    require_strace()
    files = site.add("m", model_files(5 * MB))
    site.start()
    with traced(site.daemon.pid, site.folder / "log", calls=["fsync"], inject=f"fsync:error=EIO:when={when}"):
        site.pull("m")
        site.daemon.wait_event("l2.write_failed")
        wait_for(lambda: not site.daemon.stats().active_load_count, "the load to end")
        assert "(INJECTED)" in (site.folder / "log").read_text()
        site.check_served("m")
        in_l2 = {file.path for file in site.describe("m").files if file.in_l2}
        blobs = {path.name for path in site.daemon.l2_dir.glob("blobs/*/*")}
        assert len(in_l2) < len(files), "one of them was not synced"
        assert when != "1+" or any("l2" in problem.lower() for problem in site.daemon.stats().degraded)
        assert len(blobs) == len(in_l2), "what was not synced has no name"
    site.daemon.restart(kill=True)
    site.pull("m")
    wait_for(lambda: site.summary("m").l2_bytes == total_bytes(files), "the copy in L2")
    site.check_served("m")


def test_a_failed_sync_of_the_index_does_not_stop_the_service(site: Site) -> None:
    require_strace()
    site.add("m", model_files(2 * MB))
    site.start()
    with traced(site.daemon.pid, site.folder / "log", calls=SYNCS, inject="fdatasync:error=EIO"):
        site.pull("m")
        site.check_served("m")
        assert "(INJECTED)" in (site.folder / "log").read_text(), "the index is synced"
    site.daemon.restart(kill=True)
    site.pull("m")
    site.check_served("m")
