"""Ranges of memory whose pages are huge are read in place. See also tests/integration/test_movers.py."""

from __future__ import annotations

import ctypes
import os
import random
import re
from pathlib import Path

import pytest

from cached.checksum import crc64nvme
from cached.levels.base import FileRef
from cached.levels.memory import huge_buffer
from cached.levels.shm import mount_of
from cached.transfer import ranges
from cached.units import CHUNK_BYTES, MIB
from tests.small_tmpfs import run_on_small_tmpfs

PREAMBLE = """
import os, sys
from cached.checksum import crc64nvme
from cached.errors import CachedError
from cached.levels.base import FileRef
from cached.transfer import ranges
MIB = 1 << 20
folder, disk = {folder!r}, {disk!r}

def made(path, size_bytes, memory):
    with open(path, "wb") as file:
        os.truncate(path, size_bytes)
        return FileRef(path, os.fstat(file.fileno()).st_ino, size_bytes, memory)
"""

IN_PLACE = """
size_bytes = 5 * MIB + 77
content = os.urandom(size_bytes)
source, target = made(folder + "/memory", size_bytes, True), made(disk + "/file", size_bytes, False)
with ranges.pages_for(source, 0, size_bytes) as view:
    view[:] = content
no_slab = memoryview(bytearray())
for at, length in ((0, size_bytes), (MIB, 2 * MIB), (4 * MIB, MIB + 77), (0, 0)):
    part = content[at : at + length]
    assert b"".join(map(bytes, ranges.pieces(source, at, length, no_slab))) == part
    assert ranges.checksum(source, at, length, no_slab) == crc64nvme(part)
    assert ranges.copy_to_disk(source, target, at, length, crc64nvme(part), no_slab) == crc64nvme(part)
assert open(target.path, "rb").read() == content
try:
    ranges.copy_to_disk(source, target, 0, MIB, 1, no_slab)
except CachedError as error:
    print(error.reason)
"""

SHORTAGE = """
hole = made(folder + "/hole", 16 * MIB, True)
with open(folder + "/filler", "wb") as filler:
    try:
        while True:
            filler.write(bytes(65536))
            filler.flush()
    except OSError:
        pass
for read in (ranges.checksum, lambda *where: list(ranges.pieces(*where))):
    try:
        read(hole, 0, 16 * MIB, memoryview(bytearray()))
    except CachedError as error:
        print(error.reason)
"""


def test_huge_pages_are_read_in_place(tmp_path: Path) -> None:
    assert run(tmp_path, IN_PLACE) == ["INTEGRITY"]


def test_a_hole_that_gets_no_page_is_an_error_and_kills_nobody(tmp_path: Path) -> None:
    assert run(tmp_path, SHORTAGE) == ["NO_ROOM", "NO_ROOM"]


def test_a_buffer_is_of_huge_pages_where_the_kernel_gives_them() -> None:
    buffer = huge_buffer(4 * MIB)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    assert (len(buffer), address % (2 * MIB), bytes(buffer) == bytes(4 * MIB)) == (4 * MIB, 0, True)
    buffer[:] = b"\1" * len(buffer)
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("this kernel gives no huge pages")
    assert huge_bytes(address) >= 2 * MIB


def huge_bytes(address: int) -> int:
    """Of the mapping that this address lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return 0


def run(tmp_path: Path, code: str) -> list[str]:
    folder, disk = tmp_path / "memory", tmp_path / "disk"
    folder.mkdir()
    disk.mkdir()
    preamble = PREAMBLE.format(folder=str(folder), disk=str(disk))
    return run_on_small_tmpfs(folder, "size=12m,huge=advise", preamble + code).splitlines()


def test_a_checksum_of_a_file_is_of_what_the_disk_has(tmp_path: Path) -> None:
    """Also of its last page, which is too short to be read past the page cache."""
    path, content = tmp_path / "file", random.Random(1).randbytes(3 * 4096 + 77)
    with path.open("wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    for _ in range(2):
        before = read_from_disks()
        assert path.read_bytes() == content
    if before != read_from_disks() or on_tmpfs(tmp_path):
        pytest.skip("this file system has no page cache of its own")
    ref = FileRef(str(path), path.stat().st_ino, len(content), memory=False)
    assert ranges.checksum(ref, 0, len(content), huge_buffer(CHUNK_BYTES)) == crc64nvme(content)
    assert read_from_disks() - before == 4 * 4096


def read_from_disks() -> int:
    """Bytes that this process caused to be read; see proc_pid_io(5)."""
    return int(re.findall(r"^read_bytes: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)[0])


def on_tmpfs(folder: Path) -> bool:
    return mount_of(Path("/proc/self/mounts").read_text(), str(folder))[0] == "tmpfs"
