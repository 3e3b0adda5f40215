"""Pages: allocated where they are wanted, and a shortage is an error, never a SIGBUS."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest

from cached.errors import LevelError
from cached.levels import memory
from cached.levels.base import FileRef
from cached.levels.memory import allocate_pages, open_mapping
from cached.levels.shm import ShmLevel
from cached.transfer.landing import clear
from tests.small_tmpfs import run_on_small_tmpfs

MIB = 1024 * 1024
PAGE = 4096

PREAMBLE = """
import os, sys
from cached.errors import CachedError, NoRoomError
from cached.levels import memory
from cached.levels.memory import allocate_pages, open_mapping
from cached.levels.shm import ShmLevel
from cached.transfer.landing import clear
MIB = 1024 * 1024
level = ShmLevel("small")
level.scan()

def attempt(call):
    try:
        call()
    except CachedError as error:
        print(type(error).__name__, error.fields.get("level"), error.fields.get("needed_bytes"), error.message)
    else:
        print("done")
"""

SHORTAGE = """
{before}
ref = level.create("big", 64 * MIB)
with open_mapping(ref, writable=True) as mapping:
    attempt(lambda: allocate_pages(mapping, 0, 4 * MIB))
    mapping.view[: 4 * MIB] = b"x" * (4 * MIB)
    attempt(lambda: allocate_pages(mapping, 4 * MIB, 16 * MIB, huge=True))
    attempt(lambda: clear(ref, 0, ref.size_bytes))
    assert bytes(mapping.view[:10]) in (b"x" * 10, bytes(10))
print("alive")
"""


@pytest.fixture
def level() -> Iterator[ShmLevel]:
    level = ShmLevel(secrets.token_hex(6))
    level.scan()
    yield level
    for ingest_id in level.scan().ingests:
        level.discard(ingest_id)
    level.collect()


def allocated_bytes(ref: FileRef) -> int:
    return os.stat(ref.path).st_blocks * 512


@pytest.fixture(params=["populate", "old kernel"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "old kernel":
        monkeypatch.setattr(memory, "_MADV_POPULATE_WRITE", 9999)  # the kernel answers EINVAL, as old ones do for 23


@pytest.mark.usefixtures("_way")
def test_a_range_gets_its_pages_and_nothing_else_does(level: ShmLevel) -> None:
    ref = level.create("one", 8 * MIB + 5)
    with open_mapping(ref, writable=True) as mapping:
        allocate_pages(mapping, 0, 0)
        assert allocated_bytes(ref) == 0
        allocate_pages(mapping, MIB + 1, 2)
        assert allocated_bytes(ref) == PAGE
        allocate_pages(mapping, 2 * MIB, 3 * MIB)
        assert allocated_bytes(ref) == 3 * MIB + PAGE
        allocate_pages(mapping, 8 * MIB, 5)
        allocate_pages(mapping, 0, ref.size_bytes)
        assert allocated_bytes(ref) == 8 * MIB + PAGE
    assert os.stat(ref.path).st_size == ref.size_bytes


@pytest.mark.usefixtures("_way")
def test_allocation_keeps_content(level: ShmLevel) -> None:
    ref = level.create("one", MIB)
    with open_mapping(ref, writable=True) as mapping:
        mapping.view[100:105] = b"hello"
        allocate_pages(mapping, 0, MIB, huge=True)
        assert bytes(mapping.view[100:105]) == b"hello"


def test_clearing_leaves_zeros_with_their_pages(level: ShmLevel) -> None:
    ref = level.create("one", 17 * MIB + 3)
    with open_mapping(ref, writable=True) as mapping:
        mapping.view[:] = b"x" * ref.size_bytes
        clear(ref, 0, ref.size_bytes)
        assert bytes(mapping.view) == bytes(ref.size_bytes)
    assert allocated_bytes(ref) == 17 * MIB + PAGE


def test_an_empty_segment_needs_nothing(level: ShmLevel) -> None:
    ref = level.create("one", 0)
    with open_mapping(ref, writable=True) as mapping:
        allocate_pages(mapping, 0, 0, huge=True)
        clear(ref, 0, ref.size_bytes)
        assert len(mapping.view) == 0


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, MIB + 1), (MIB, 1), (0, -1)])
def test_a_range_outside_is_refused(level: ShmLevel, offset: int, length: int) -> None:
    with open_mapping(level.create("one", MIB), writable=True) as mapping, pytest.raises(ValueError, match="outside"):
        allocate_pages(mapping, offset, length)


def test_a_segment_that_was_cut_short_is_an_error(level: ShmLevel) -> None:
    ref = level.create("one", MIB)
    with open_mapping(ref, writable=True) as mapping:
        os.truncate(ref.path, 0)
        with pytest.raises(LevelError, match="cut short"):
            allocate_pages(mapping, 0, MIB)


def test_a_mapping_cannot_be_closed_under_a_view(level: ShmLevel) -> None:
    mapping = open_mapping(level.create("one", MIB), writable=True)
    part = mapping.view[:10]
    with pytest.raises(BufferError):
        mapping.close()
    part.release()
    mapping.close()
    mapping.close()


@pytest.mark.parametrize("before", ["", "memory._MADV_POPULATE_WRITE = 9999"], ids=["populate", "old kernel"])
@pytest.mark.parametrize("options", ["size=8m", "size=8m,huge=advise"])
def test_a_full_file_system_is_an_error_and_never_a_signal(options: str, before: str) -> None:
    printed = run_on_small_tmpfs("/dev/shm", options, PREAMBLE + SHORTAGE.format(before=before)).splitlines()
    assert printed[0] == "done"
    assert printed[1].startswith(f"NoRoomError l1 {16 * MIB} ")
    assert printed[2].startswith("NoRoomError l1 ")
    assert printed[3] == "alive"


def test_no_inode_left_is_no_room() -> None:
    code = 'level.create("one", 1)\nattempt(lambda: level.create("two", 7))'
    printed = run_on_small_tmpfs("/dev/shm", "size=8m,nr_inodes=2", PREAMBLE + code)
    assert printed.startswith("NoRoomError l1 7 ")


def test_huge_pages_are_used_where_the_mount_allows() -> None:
    code = """
from cached.levels.shm import huge_pages_allowed
print(huge_pages_allowed(open("/proc/self/mounts").read()))
with open_mapping(level.create("one", 16 * MIB), writable=True) as mapping:
    allocate_pages(mapping, 0, 16 * MIB, huge=True)
    huge = [line for line in open("/proc/self/smaps") if line.startswith("ShmemPmdMapped")]
    print(sum(int(line.split()[1]) for line in huge))
"""
    allowed, mapped_kib = run_on_small_tmpfs("/dev/shm", "size=64m,huge=advise", PREAMBLE + code).split()
    assert allowed == "True"
    if not os.path.exists("/sys/kernel/mm/transparent_hugepage"):
        pytest.skip("this kernel has no transparent huge pages")
    assert int(mapped_kib) > 0
