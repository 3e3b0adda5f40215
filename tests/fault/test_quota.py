"""L2 runs out of room in ways that its free space does not tell: a quota, and a disk that has no block left mid-file.

The quota is a real one: that of a subvolume of btrfs on a loop device (as root, with btrfs-progs). In the middle of a
file no file system that took the allocation says no by itself, so there ``strace`` makes the writes fail.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.fault.strace import require_strace, traced
from tests.integration.harness import wait_for
from tests.integration.support import MB, Site, model_files, refused, total_bytes
from tests.invariants import check_at_rest

pytestmark = pytest.mark.faults
_TOOLS = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_DISK_BYTES = 400 << 20
_QUOTA_BYTES = 24 << 20


@contextlib.contextmanager
def quota_on(folder: Path) -> Iterator[None]:
    """``folder`` is a subvolume of a small btrfs with a quota, until the block ends."""
    tools = {name: shutil.which(name, path=_TOOLS) for name in ("mkfs.btrfs", "btrfs", "mount", "umount")}
    if os.geteuid() or not all(tools.values()):
        pytest.skip("needs root and btrfs-progs for a file system with a quota")
    image, mount = folder.with_suffix(".img"), folder.with_suffix(".mount")
    image.touch()
    os.truncate(image, _DISK_BYTES)
    mount.mkdir()

    def run(name: str, *words: str | Path) -> None:
        subprocess.run([str(tools[name]), *words], check=True, capture_output=True)

    run("mkfs.btrfs", "-q", image)
    try:
        run("mount", "-o", "loop", image, mount)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no loop device can be mounted here: {error.stderr.decode().strip()}")
    try:
        run("btrfs", "quota", "enable", mount)
        run("btrfs", "subvolume", "create", mount / "l2")
        run("btrfs", "qgroup", "limit", str(_QUOTA_BYTES), mount / "l2")
        folder.symlink_to(mount / "l2")
        yield
    finally:
        run("umount", mount)


@pytest.fixture
def limited(site: Site, tmp_path: Path) -> Iterator[Site]:
    """A site whose L2 has a quota; the daemon has ended before its file system goes."""
    folder = tmp_path / "quota"
    with quota_on(folder):
        place = folder.resolve()
        site.settings |= {"l2": {"path": str(place)}}
        site.daemon.l2_dir, site.daemon.l2_dirs = place, [place]
        yield site
        site.close()
        site.check = False


def test_a_quota_is_no_room_and_other_models_are_served(limited: Site) -> None:
    site = limited
    files = site.add("m", model_files(40 * MB))
    site.add("small", model_files(5 * MB, seed=2))
    site.start()
    assert site.pull("m")[-1].phase == "ready"
    assert site.check_served("m").from_level == "l1"
    assert (site.summary("m").l1_bytes, site.summary("m").l2_bytes) == (total_bytes(files), 0)
    site.evict("m")
    with refused("NO_ROOM") as seen:
        site.pull("m", level="l2")
    assert seen["level"] == "l2"
    assert "quota" in seen["message"].lower(), seen
    check_at_rest(site.daemon)
    site.pull("small")
    wait_for(lambda: site.summary("small").l2_bytes == site.summary("small").l1_bytes, "the copy in L2")
    site.check_served("small")


@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("level", ["l1", "l2"])
def test_no_room_in_the_middle_of_a_file_is_a_clean_failure(
    site: Site, error: str, level: str, fault_point: Callable[[str], None]
) -> None:
    require_strace()
    site.add("first", model_files(MB, seed=3))
    files = site.add("m", model_files(40 * MB))
    site.add("small", model_files(5 * MB, seed=2))
    site.start()
    site.pull("first")
    (mover,) = psutil.Process(site.daemon.pid).children()
    log = site.folder / "log"
    with traced(mover.pid, log, calls=["pwritev2"], inject=f"pwritev2:error={error}:when=4+"):
        with refused("NO_ROOM") as seen:
            site.pull("m", level=level)
        assert seen["level"] == level
        assert "(INJECTED)" in log.read_text()
        assert site.check_served("first").from_level == "l1"
    fault_point(f"pwritev2:{error} {level}")
    check_at_rest(site.daemon, kept_ingests=True)
    site.pull("small")
    site.check_served("small")
    site.pull("m")
    site.check_served("m")
    wait_for(lambda: site.summary("m").l2_bytes == total_bytes(files), "the copy in L2, now that there is room")
