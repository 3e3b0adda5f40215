"""What is L2's own when it lies on several drives: where blobs go, and drives that fail. See also the conformance."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cached.cache.capacity import l2_limit
from cached.errors import LevelError, NotFoundError
from cached.levels.disk import DiskLevel
from cached.levels.striped import StripedDisk
from tests.small_tmpfs import run_on_small_tmpfs

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
MIB = 1024 * 1024


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    return [tmp_path / f"drive{number}" for number in range(3)]


@pytest.fixture
def level(roots: list[Path]) -> StripedDisk:
    return opened(roots)


def opened(roots: list[Path]) -> StripedDisk:
    level = StripedDisk([DiskLevel(root) for root in roots])
    level.scan()
    return level


def store(level: StripedDisk, content: bytes = CONTENT, ingest_id: str = "one") -> Path:
    ref = level.create(ingest_id, len(content))
    Path(ref.path).write_bytes(content)
    return Path(level.commit(ingest_id, hashlib.sha256(content).hexdigest()).path)


def drive_of(path: str | Path) -> str:
    return next(part for part in Path(path).parts if part.startswith("drive"))


def test_files_that_arrive_together_lie_on_different_drives(level: StripedDisk) -> None:
    refs = [level.create(f"shard{number}", MIB) for number in range(6)]
    assert Counter(drive_of(ref.path) for ref in refs) == {"drive0": 2, "drive1": 2, "drive2": 2}


def test_a_blob_is_whole_on_one_drive(roots: list[Path], level: StripedDisk) -> None:
    path = store(level)
    assert path.read_bytes() == CONTENT
    assert [file for root in roots for file in root.rglob(DIGEST)] == [path]
    assert level.blob(DIGEST).path == str(path)
    assert opened(roots).blob(DIGEST).path == str(path)


def test_the_same_content_on_another_drive_is_kept_and_the_ingest_dropped(roots: list[Path]) -> None:
    first = store(opened(roots[1:2]))
    level = opened(roots)
    assert store(level) == first
    with pytest.raises(NotFoundError):
        level.ingest("one")
    assert len([file for root in roots for file in root.rglob(DIGEST)]) == 1


def test_a_damaged_blob_on_another_drive_is_replaced(roots: list[Path]) -> None:
    damaged = store(opened(roots[1:2]))
    damaged.write_bytes(b"short")
    level = opened(roots)
    store(level)
    assert Path(level.blob(DIGEST).path).read_bytes() == CONTENT
    assert len([file for root in roots for file in root.rglob(DIGEST)]) == 1


def test_of_a_blob_on_two_drives_one_is_kept(roots: list[Path]) -> None:
    paths = [store(opened([root])) for root in roots[:2]]
    level = StripedDisk([DiskLevel(root) for root in roots])
    found = level.scan()
    assert found.blobs == {DIGEST: len(CONTENT)}
    assert [path.exists() for path in paths] == [True, False]
    assert any(str(paths[1]) in line for line in found.set_aside)


def test_a_drive_that_cannot_be_used_costs_only_its_own_blobs(roots: list[Path]) -> None:
    lost, kept = b"lost" * 100, b"kept" * 100
    store(opened(roots[:1]), lost)
    store(opened(roots[1:2]), kept)
    shutil.rmtree(roots[0])
    roots[0].write_text("this is no folder")
    level = StripedDisk([DiskLevel(root) for root in roots])
    found = level.scan()
    assert list(found.blobs) == [hashlib.sha256(kept).hexdigest()]
    assert len(found.failed) == 1
    assert str(roots[0]) in found.failed[0]
    assert drive_of(store(level, lost)) != "drive0"


def test_without_any_drive_the_level_fails(roots: list[Path]) -> None:
    for root in roots:
        root.write_text("this is no folder")
    with pytest.raises(LevelError, match="drive0"):
        StripedDisk([DiskLevel(root) for root in roots]).scan()


def test_a_drive_that_goes_away_takes_its_blobs_with_it_and_nothing_else(
    roots: list[Path], level: StripedDisk, tmp_path: Path
) -> None:
    lost = store(level)
    root = next(root for root in roots if lost.is_relative_to(root))
    root.rename(tmp_path / "unmounted")
    for call in (level.blob, level.open_blob):
        with pytest.raises(NotFoundError):
            call(DIGEST)
    assert drive_of(store(level)) != root.name
    assert level.free_bytes() > 0
    level.remove(DIGEST)
    with pytest.raises(NotFoundError):
        level.remove(DIGEST)


def test_a_blob_that_went_with_its_drive_is_removed_without_an_error(
    roots: list[Path], level: StripedDisk, tmp_path: Path
) -> None:
    lost = store(level)
    next(root for root in roots if lost.is_relative_to(root)).rename(tmp_path / "unmounted")
    level.remove(DIGEST)
    with pytest.raises(NotFoundError):
        level.remove(DIGEST)


def test_the_only_drive_counts_as_gone_once_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    level = opened([tmp_path / "one"])
    path = store(level)
    stat = os.lstat

    def failing(name: Any, *more: Any, **named: Any) -> os.stat_result:
        if os.fspath(name) == str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return stat(name, *more, **named)

    monkeypatch.setattr(os, "lstat", failing)
    with pytest.raises(NotFoundError, match="Input/output error"):
        level.blob(DIGEST)
    level.remove(DIGEST)  # gone with its drive


def test_the_budget_is_a_share_of_all_file_systems_each_counted_once(roots: list[Path], level: StripedDisk) -> None:
    one, all_of_one = (l2_limit("0.1%", list(map(str, some)), ours_bytes=0) for some in (roots[:1], roots))
    assert one.size_bytes == all_of_one.size_bytes
    missing = l2_limit("0.1%", ["/nowhere", str(roots[0])], ours_bytes=0)
    assert missing.size_bytes == one.size_bytes
    nothing = l2_limit("0.1%", ["/nowhere"], ours_bytes=0)
    assert (nothing.size_bytes, "/nowhere" in nothing.because) == (0, True)


DRIVES = """
import os, sys
from cached.cache.capacity import l2_limit
from cached.errors import CachedError
from cached.levels.disk import DiskLevel
from cached.levels.striped import StripedDisk
base = {base!r}
for name, size in (("a", "8m"), ("b", "16m")):
    os.mkdir(f"{{base}}/{{name}}")
    assert os.system(f"mount -t tmpfs -o size={{size}} none {{base}}/{{name}}") == 0
folders = [f"{{base}}/a/l2", f"{{base}}/b/l2"]
level = StripedDisk([DiskLevel(folder) for folder in folders])
level.scan()

def place(name, mib):
    try:
        print(name, level.create(name, mib << 20).path.split("/l2")[0][-1])
    except CachedError as error:
        print(name, type(error).__name__)
"""


def test_the_roomier_drive_is_taken_and_a_full_one_passed_over(tmp_path: Path) -> None:
    code = """
print(16 < l2_limit("100%", folders, ours_bytes=0).size_bytes >> 20 <= 24)
place("first", 6)
place("second", 5)
place("third", 6)
place("fourth", 3)
place("fifth", 4)
"""
    printed = run_on_small_tmpfs(tmp_path, "size=1m", DRIVES.format(base=str(tmp_path)) + code)
    assert printed.splitlines() == ["True", "first b", "second a", "third b", "fourth b", "fifth NoRoomError"]


def test_a_read_only_drive_serves_what_it_has_and_is_passed_over(tmp_path: Path) -> None:
    code = f"""
digest = {DIGEST!r}
place("one", 1)
level.commit("one", digest)
os.system("mount -o remount,bind,ro " + base + "/b")
place("two", 1)
print(level.blob(digest).path.split("/l2")[0][-1])
again = StripedDisk([DiskLevel(folder) for folder in folders])
print(sorted(again.scan().blobs) == [digest])
try:
    again.remove(digest)
except CachedError as error:
    print(type(error).__name__, error.fields["errno"])
"""
    printed = run_on_small_tmpfs(tmp_path, "size=1m", DRIVES.format(base=str(tmp_path)) + code)
    assert printed.splitlines() == ["one b", "two a", "b", "True", "LevelError EROFS"]
