"""What is L2's own: its layout, its commits, and disks that fail. See also tests/conformance/test_levels.py."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from cached.errors import CachedError, LevelError, NotFoundError
from cached.levels.disk import DiskLevel
from tests.small_tmpfs import run_on_small_tmpfs

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
MIB = 1024 * 1024


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "l2"


@pytest.fixture
def level(root: Path) -> DiskLevel:
    level = DiskLevel(root)
    level.scan()
    return level


def ingest(level: DiskLevel, ingest_id: str = "one") -> None:
    ref = level.create(ingest_id, len(CONTENT))
    Path(ref.path).write_bytes(CONTENT)


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


def test_the_layout_is_what_the_documents_say(root: Path, level: DiskLevel) -> None:
    ingest(level)
    assert files(root) == ["FORMAT", "ingests/one/data"]
    level.commit("one", DIGEST)
    assert files(root) == ["FORMAT", f"blobs/{DIGEST[:2]}/{DIGEST}"]
    assert (root / "FORMAT").read_text() == "1\n"
    assert os.listdir(root / "ingests") == []
    folders = [path for path in (root, *root.rglob("*")) if path.is_dir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}


def test_blocks_are_allocated_before_the_first_byte_arrives(level: DiskLevel) -> None:
    ref = level.create("one", 4 * MIB)
    assert os.stat(ref.path).st_blocks * 512 >= 4 * MIB


def test_a_file_system_without_fallocate_gets_the_length(level: DiskLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, mode: int, offset: int, length: int) -> int:
        return -1

    monkeypatch.setattr("cached.levels.disk._fallocate", lambda: refuse)
    monkeypatch.setattr("ctypes.get_errno", lambda: errno.EOPNOTSUPP)
    ref = level.create("one", 4 * MIB)
    assert os.stat(ref.path).st_size == ref.size_bytes == 4 * MIB


@pytest.mark.parametrize("content", ["2\n", "", "1.1", "garbage" * 100])
def test_a_layout_of_another_format_is_set_aside_whole(root: Path, level: DiskLevel, content: str) -> None:
    ingest(level)
    level.commit("one", DIGEST)
    (root / "packs").mkdir()
    (root / "FORMAT").write_text(content)
    found = DiskLevel(root).scan()
    assert (found.blobs, found.ingests) == ({}, {})
    assert (root / "FORMAT").read_text() == "1\n"
    (aside,) = (root / "aside").iterdir()
    assert sorted(os.listdir(aside)) == ["FORMAT", "blobs", "ingests", "packs"]
    assert (aside / "blobs" / DIGEST[:2] / DIGEST).read_bytes() == CONTENT
    assert len(found.set_aside) == 4
    again = DiskLevel(root).scan()
    assert again.set_aside == ()


def test_a_folder_with_other_things_in_it_keeps_them(root: Path) -> None:
    root.mkdir()
    (root / "mine.txt").write_text("precious")
    (root / "blobs").write_text("not a folder of ours")
    found = DiskLevel(root).scan()
    assert (root / "mine.txt").read_text() == "precious"
    (aside,) = (root / "aside").iterdir()
    assert (aside / "blobs").read_text() == "not a folder of ours"
    assert len(found.set_aside) == 1


def test_unknown_files_are_set_aside_and_never_deleted(root: Path, level: DiskLevel) -> None:
    ingest(level)
    level.commit("one", DIGEST)
    ingest(level, "two")
    strange = [
        "blobs/zz/file",
        "blobs/notes",
        f"blobs/00/{DIGEST}",
        "blobs/ab/temp",
        "ingests/two/extra",
        "ingests/a.b",
    ]
    for name in strange:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(name)
    found = DiskLevel(root).scan()
    assert (found.blobs, found.ingests) == ({DIGEST: len(CONTENT)}, {"two": len(CONTENT)})
    assert sorted(path.read_text() for path in (root / "aside").rglob("*") if path.is_file()) == sorted(strange)
    assert DiskLevel(root).scan().set_aside == ()


def test_things_set_aside_twice_in_a_second_do_not_collide(root: Path, level: DiskLevel) -> None:
    for text in ("first", "second"):
        (root / "blobs" / "notes").write_text(text)
        DiskLevel(root).scan()
    assert sorted(p.read_text() for p in (root / "aside").rglob("*") if p.is_file()) == ["first", "second"]


def test_an_ingest_that_was_torn_by_a_crash_is_removed(root: Path, level: DiskLevel) -> None:
    (root / "ingests" / "empty").mkdir()
    (root / "ingests" / "renamed").mkdir()
    assert DiskLevel(root).scan().ingests == {}
    assert os.listdir(root / "ingests") == []


class FailingCalls:
    """Fails the nth call of a function of ``os``, and lists all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, names: list[str], fail_at: int, code: int) -> None:
        self.calls: list[str] = []
        for name in names:
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name), fail_at, code))

    def _wrap(self, name: str, real: Callable, fail_at: int, code: int) -> Callable:
        def call(*args, **kwargs):
            self.calls.append(name)
            if len(self.calls) == fail_at:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        return call


def test_a_commit_syncs_the_bytes_before_the_name_and_the_name_before_it_is_done(
    level: DiskLevel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest(level)
    seen = FailingCalls(monkeypatch, ["fsync", "mkdir", "rename", "unlink", "rmdir"], 0, 0)
    level.commit("one", DIGEST)
    assert seen.calls == ["fsync", "mkdir", "fsync", "rename", "fsync", "unlink", "rmdir"]


@pytest.mark.parametrize("fail_at", range(1, 6))
@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS])
def test_a_commit_that_fails_anywhere_leaves_no_blob(
    root: Path, level: DiskLevel, monkeypatch: pytest.MonkeyPatch, fail_at: int, code: int
) -> None:
    ingest(level)
    with monkeypatch.context() as patch:
        FailingCalls(patch, ["fsync", "mkdir", "rename"], fail_at, code)
        with pytest.raises(LevelError) as caught:
            level.commit("one", DIGEST)
    assert caught.value.fields["errno"] == errno.errorcode[code]
    with pytest.raises(NotFoundError):
        level.blob(DIGEST)
    level.discard("one")
    assert files(root) == ["FORMAT"]
    ingest(level)
    assert level.commit("one", DIGEST).size_bytes == len(CONTENT)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_bytes_that_could_not_be_synced_are_never_taken_up_again(
    root: Path, level: DiskLevel, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The next fsync would succeed without having written them."""
    ingest(level)
    with monkeypatch.context() as patch:
        FailingCalls(patch, ["fsync"], 1, code)
        with pytest.raises(CachedError):
            level.commit("one", DIGEST)
    with pytest.raises(NotFoundError):
        level.ingest("one")
    assert not DiskLevel(root).scan().ingests


DISK = """
import os, sys
from cached.errors import CachedError
from cached.levels.disk import DiskLevel
level = DiskLevel({root!r})

def attempt(call):
    try:
        call()
    except CachedError as error:
        print(type(error).__name__, error.fields.get("level"), error.fields.get("errno", ""))
    else:
        print("done")

attempt(level.scan)
"""


def test_a_full_disk_is_no_room_and_leaves_nothing(tmp_path: Path) -> None:
    code = """
attempt(lambda: level.create("big", 64 << 20))
print(os.listdir(level.root / "ingests"))
attempt(lambda: level.create("small", 1 << 20))
"""
    printed = run_on_small_tmpfs(tmp_path, "size=8m", DISK.format(root=str(tmp_path)) + code)
    assert printed.splitlines() == ["done", "NoRoomError l2 ", "[]", "done"]


def test_a_read_only_disk_serves_and_takes_nothing(tmp_path: Path) -> None:
    code = f"""
digest = {DIGEST!r}
level.create("one", 5)
level.commit("one", digest)
level.create("two", 5)
assert os.system(sys.argv[1]) == 0
attempt(lambda: level.create("three", 5))
attempt(lambda: level.remove(digest))
attempt(lambda: level.discard("two"))
attempt(lambda: os.close(level.open_blob(digest)))
print(sorted(level.scan().blobs) == [digest])
"""
    printed = run_on_small_tmpfs(
        tmp_path, "size=8m", DISK.format(root=str(tmp_path)) + code, remount="mount -o remount,bind,ro {folder}"
    )
    failed = "LevelError l2 EROFS"
    assert printed.splitlines() == ["done", failed, failed, failed, "done", "True"]


def test_a_disk_that_is_gone_is_a_failed_level_and_no_missing_name(
    tmp_path: Path, root: Path, level: DiskLevel
) -> None:
    root.rename(tmp_path / "elsewhere")
    with pytest.raises(LevelError, match="gone"):
        level.create("one", 5)
    (tmp_path / "elsewhere").rename(root)
    level.create("one", 5)


def test_a_root_that_cannot_be_made_is_a_failed_level(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LevelError):
        DiskLevel(tmp_path / "file" / "l2").scan()


def test_a_blob_is_gone_by_name_at_once_and_its_bytes_are_freed_later(level: DiskLevel) -> None:
    ingest(level)
    path = level.commit("one", DIGEST).path
    held: list[Callable[[], None]] = []
    level.remove(DIGEST, later=held.append)
    assert not os.path.exists(path)
    (work,) = held
    open_files = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
    assert any(name.startswith(str(path)) for name in open_files), "what holds the bytes is still open"
    work()
    open_files = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
    assert not any(name.startswith(str(path)) for name in open_files)
