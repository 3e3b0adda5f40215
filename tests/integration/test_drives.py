"""L2 on two drives of different size: files of a model on both, a kill, and a drive that goes away."""

from __future__ import annotations

from pathlib import Path

from tests.small_tmpfs import run_on_small_tmpfs

CODE = """
import hashlib, os, sys
from pathlib import Path
import cached_client
from cached.units import CHUNK_BYTES
from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import DaemonProcess, wait_for
from tests.integration.support import model_files
from tests.invariants import check_at_rest

base = Path({base!r})
drives = [base / "small", base / "large"]
for drive, size in zip(drives, ("130m", "200m")):
    drive.mkdir()
    assert os.system(f"mount -t tmpfs -o size={{size}} none {{drive}}") == 0
origin = base / "origin"
origin.mkdir()
files = model_files(*(CHUNK_BYTES + number for number in range(6)))
for name, content in files.items():
    (origin / name).write_bytes(content)
folders = [drive / "l2" for drive in drives]
settings = {{"l2": {{"path": "", "paths": list(map(str, folders)), "capacity": "90%"}}}}
daemon = DaemonProcess(base / "daemon", models={{"m": {{"source": f"file://{{origin}}"}}}}, settings=settings)
daemon.l2_dirs = folders

def on(drive):
    return len([path for path in (drive / "l2" / "blobs").glob("*/*") if path.stat().st_size > CHUNK_BYTES - 1])

def check():
    with cached_client.connect(str(daemon.socket)) as cache, cache.attach("m") as model:
        report = model.wait()
    check_at_rest(daemon)  # each blob is what its name says
    with daemon.stub() as stub:
        found = {{file.path: file.sha256 for file in stub.Describe(pb.DescribeRequest(ref="m")).files}}
    assert found == {{name: hashlib.sha256(content).hexdigest() for name, content in files.items()}}
    print(report.from_level, report.origin_bytes)

def evict():
    with daemon.stub() as stub:
        stub.Evict(pb.EvictRequest(ref="m", level=pb.LEVEL_L1))

def in_l2():
    with daemon.stub() as stub:
        return all(file.in_l2 for file in stub.Describe(pb.DescribeRequest(ref="m")).files)
"""


def run(tmp_path: Path, code: str) -> list[str]:
    return run_on_small_tmpfs(tmp_path, "size=400m", CODE.format(base=str(tmp_path)) + code).splitlines()


def test_a_model_lies_on_both_drives_and_survives_a_kill(tmp_path: Path) -> None:
    code = """
with daemon:
    check()
    print(on(drives[0]), on(drives[1]))
    daemon.restart(kill=True)
    check_at_rest(daemon)
    evict()
    check()
"""
    lines = run(tmp_path, code)
    assert lines[0].startswith("l3 ")
    assert lines[1:] == ["3 3", "l2 0"]


def test_a_drive_that_goes_away_costs_only_its_own_files(tmp_path: Path) -> None:
    code = """
with daemon:
    check()
    assert os.system(f"umount -l {drives[1]}") == 0
    evict()
    check()
    wait_for(in_l2, "all of it on the drive that is left")
    check_at_rest(daemon)
    print(on(drives[0]), on(drives[1]))
"""
    lines = run(tmp_path, code)
    lost = int(lines[1].split()[1])
    assert 3 * 16 * 1024 * 1024 <= lost < 4 * 16 * 1024 * 1024
    assert lines[2] == "6 0"


def test_a_drive_that_is_missing_at_the_start_is_told_and_done_without(tmp_path: Path) -> None:
    code = """
with daemon:
    check()
    evict()
    assert daemon.terminate() == 0
    folders[1].rename(drives[1] / "away")
    folders[1].write_text("no folder")
    daemon.start()
    print([line for line in daemon.stats().degraded if str(folders[1]) in line] != [])
    check()
    wait_for(in_l2, "all of it on the drive that is left")
    print(on(drives[0]))
"""
    lines = run(tmp_path, code)
    assert lines[1] == "True"
    assert int(lines[2].split()[1]) > 0
    assert lines[3] == "6"
