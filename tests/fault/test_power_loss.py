"""A host that loses power: memory is gone, and of the disk only what was synced is sure. Dropped, torn, or a lie.

No machine is switched off here. What stands in: the daemon is killed, its shared memory removed, and what it had not
synced by then is damaged as a disk might leave it; and ``strace`` shows that names follow the sync of their bytes.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from cached.units import CHUNK_BYTES
from tests.fault.strace import require_strace, traced
from tests.integration.harness import wait_for
from tests.integration.support import MB, Site, model_files, total_bytes
from tests.invariants import check_at_rest

pytestmark = pytest.mark.faults
SEEDS = range(3)


def lose_memory(site: Site) -> None:
    site.daemon.kill()
    for segment in site.daemon.segments():
        segment.unlink()


def damage(path: Path, chance: random.Random) -> str:
    """Zeroed, cut, torn at a page, or gone."""
    data = path.read_bytes()
    how = chance.choice(["zeroed", "cut", "torn", "gone"])
    at = chance.randrange(max(1, len(data)))
    match how:
        case "zeroed":
            path.write_bytes(bytes(len(data)))
        case "cut":
            path.write_bytes(data[:at])
        case "torn":
            at -= at % 4096
            path.write_bytes(data[:at] + bytes(len(data) - at))
        case _:
            path.unlink()
    return f"{how} at {at}: {path.name}"


@pytest.mark.parametrize("seed", SEEDS)
def test_an_ingest_that_was_never_synced_is_fetched_again_where_it_is_torn(site: Site, seed: int) -> None:
    chance = random.Random(seed)
    site.add("m", model_files(3 * CHUNK_BYTES))
    site.start()
    held = site.hold("m/model.safetensors", range=f"bytes={2 * CHUNK_BYTES}-{3 * CHUNK_BYTES - 1}")
    site.begin("m", level="l2")
    assert held.reached.wait(60)
    wait_for(lambda: site.daemon.segments() or list(site.daemon.l2_dir.glob("ingests/*/data")), "an ingest")
    lose_memory(site)
    held.release()
    torn = [*site.daemon.l2_dir.glob("ingests/*/data"), *(site.daemon.state_dir / "journals").iterdir()]
    for path in torn:
        print(f"seed {seed}: {damage(path, chance)}")
    site.start()
    site.pull("m")
    site.check_served("m")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_disk_that_lied_about_a_sync_is_found_out_before_anybody_reads_it(site: Site, seed: int) -> None:
    chance = random.Random(seed)
    files = site.add("m", model_files(CHUNK_BYTES + MB))
    site.start()
    site.pull("m")
    wait_for(lambda: site.summary("m").l2_bytes == total_bytes(files), "the copy in L2")
    check_at_rest(site.daemon)
    lose_memory(site)
    print(f"seed {seed}: {damage(site.l2_blob('m', 'model.safetensors'), chance)}")
    site.start()
    site.check_served("m")


def test_no_blob_has_its_name_before_its_bytes_are_synced(site: Site) -> None:
    require_strace()
    site.add("m", model_files(3 * MB, 2 * MB))
    site.start()
    log = site.folder / "log"
    with traced(site.daemon.pid, log, calls=["openat", "fsync", "rename"]):
        site.pull("m")
        wait_for(lambda: len(list(site.daemon.l2_dir.glob("blobs/*/*"))) == len(site.files["m"]), "the blobs in L2")
    opened: dict[tuple[str, str], str] = {}
    opening: dict[str, str] = {}  # of a busy host strace writes a call's begin and end apart
    synced: set[str] = set()
    renamed = 0
    for line in log.read_text().splitlines():
        thread = line.split(maxsplit=1)[0]
        if match := re.search(r'openat\(AT_FDCWD, "([^"]+)".* = (\d+)$', line):
            opened[thread, match[2]] = match[1]
        elif match := re.search(r'openat\(AT_FDCWD, "([^"]+)".*<unfinished', line):
            opening[thread] = match[1]
        elif match := re.search(r"openat resumed>.* = (\d+)$", line):
            opened[thread, match[1]] = opening.pop(thread)
        elif match := re.search(r"fsync\((\d+)", line):
            synced.add(opened.get((thread, match[1]), ""))
        elif match := re.search(r'rename\("([^"]+)", "[^"]+/blobs/', line):
            assert match[1] in synced, f"{match[1]} was named before it was synced"
            renamed += 1
    assert renamed == len(site.files["m"])
