"""What every local level must do; see the protocol in cached/levels/base.py."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cached.errors import InvalidRequestError, LevelError, NotFoundError
from cached.levels.base import FileRef, Found, LocalLevel
from cached.levels.disk import DiskLevel
from cached.levels.memory import open_mapping
from cached.levels.shm import SHM_FOLDER, ShmLevel
from cached.levels.striped import StripedDisk

CONTENT = b"weights " * 700 + b"tail"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()

PLANTS: dict[str, Callable[[str], None]] = {
    "symlink": lambda path: os.symlink("/etc/hostname", path),
    "dangling-symlink": lambda path: os.symlink("/nowhere", path),
    "fifo": os.mkfifo,
    "folder": os.mkdir,
}


@dataclass(frozen=True)
class Place:
    """A level's storage, which outlives the level object as it outlives a daemon."""

    open_level: Callable[[], LocalLevel]
    blob_path: Callable[[str], str]
    ingest_path: Callable[[str], str]

    def restarted(self) -> tuple[LocalLevel, Found]:
        level = self.open_level()
        return level, level.scan()


def _shm_place(folder: str = SHM_FOLDER) -> Iterator[Place]:
    instance = secrets.token_hex(6)
    prefix = f"{folder}/cached.{instance}."
    yield Place(
        lambda: ShmLevel(instance, folder=folder),
        lambda digest: f"{prefix}blob.{digest}",
        lambda ingest_id: f"{prefix}ingest.{ingest_id}",
    )
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if path.startswith(prefix):
            os.rmdir(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)


def _disk_place(tmp_path: Path) -> Iterator[Place]:
    root = tmp_path / "l2"
    yield Place(
        lambda: DiskLevel(root),
        lambda digest: str(root / "blobs" / digest[:2] / digest),
        lambda ingest_id: str(root / "ingests" / ingest_id / "data"),
    )


def _striped_place(tmp_path: Path) -> Iterator[Place]:
    roots = [tmp_path / "drive0", tmp_path / "drive1"]
    yield Place(
        lambda: StripedDisk([DiskLevel(root) for root in roots]),
        lambda digest: str(roots[1] / "blobs" / digest[:2] / digest),
        lambda ingest_id: str(roots[1] / "ingests" / ingest_id / "data"),
    )


@pytest.fixture(params=["l1", "l1-folder", "l2", "l2-striped"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "l1":
        yield from _shm_place()
    elif request.param == "l1-folder":
        with tempfile.TemporaryDirectory(dir=SHM_FOLDER, prefix="test-cached-") as folder:
            yield from _shm_place(folder)
    else:
        yield from _disk_place(tmp_path) if request.param == "l2" else _striped_place(tmp_path)


@pytest.fixture
def level(place: Place) -> LocalLevel:
    return place.restarted()[0]


def fill(ref: FileRef, content: bytes = CONTENT) -> None:
    """As a mover does: through a shared mapping."""
    with open_mapping(ref, writable=True) as mapping:
        mapping.view[: len(content)] = content


def read(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        return file.read()


def commit_content(level: LocalLevel, ingest_id: str = "one", content: bytes = CONTENT) -> FileRef:
    fill(level.create(ingest_id, len(content)), content)
    return level.commit(ingest_id, hashlib.sha256(content).hexdigest())


def test_an_ingest_becomes_a_blob_with_its_bytes(level: LocalLevel) -> None:
    ingest = level.create("one", len(CONTENT))
    fill(ingest)
    blob = level.commit("one", DIGEST)
    assert read(level.open_blob(DIGEST)) == CONTENT
    assert blob == level.blob(DIGEST)
    assert (blob.inode, blob.size_bytes, blob.memory) == (ingest.inode, len(CONTENT), level.level == "l1")
    with pytest.raises(NotFoundError):
        level.ingest("one")


@pytest.mark.parametrize("size_bytes", [0, 1, 4095, 4096, 4097, 3 * 1024 * 1024 + 5])
def test_the_length_is_exact(level: LocalLevel, size_bytes: int) -> None:
    content = os.urandom(size_bytes)
    ref = commit_content(level, content=content)
    assert os.stat(ref.path).st_size == ref.size_bytes == size_bytes
    assert read(level.open_blob(hashlib.sha256(content).hexdigest())) == content


def test_a_new_ingest_reads_as_zeros_and_can_be_opened_while_it_arrives(level: LocalLevel) -> None:
    ref = level.create("one", len(CONTENT))
    fd = level.open_ingest("one")
    fill(ref, CONTENT[:100])
    assert read(fd) == CONTENT[:100] + bytes(len(CONTENT) - 100)
    assert level.ingest("one") == ref


def test_an_ingest_is_never_visible_as_a_blob(place: Place, level: LocalLevel) -> None:
    fill(level.create(DIGEST[:32], len(CONTENT)))
    with pytest.raises(NotFoundError):
        level.blob(DIGEST)
    with pytest.raises(NotFoundError):
        level.open_blob(DIGEST)
    assert place.restarted()[1].blobs == {}


def test_committing_a_blob_that_exists_keeps_the_first(level: LocalLevel) -> None:
    first = commit_content(level, "one")
    second = commit_content(level, "two")
    assert second == first
    with pytest.raises(NotFoundError):
        level.ingest("two")


def test_a_blob_of_the_wrong_length_is_replaced(place: Place, level: LocalLevel) -> None:
    damaged = commit_content(level)
    os.truncate(damaged.path, 10)
    whole = commit_content(level, "two")
    assert whole.inode != damaged.inode
    assert read(level.open_blob(DIGEST)) == CONTENT
    assert place.restarted()[1].blobs == {DIGEST: len(CONTENT)}


def test_an_ingest_that_changed_its_length_is_not_committed(level: LocalLevel) -> None:
    ref = level.create("one", len(CONTENT))
    os.truncate(ref.path, len(CONTENT) + 1)
    with pytest.raises(LevelError, match="length"):
        level.commit("one", DIGEST)
    with pytest.raises(NotFoundError):
        level.blob(DIGEST)


def test_creation_is_exclusive(level: LocalLevel) -> None:
    ref = level.create("one", len(CONTENT))
    fill(ref)
    with pytest.raises(LevelError) as caught:
        level.create("one", 5)
    assert caught.value.fields["errno"] == errno.errorcode[errno.EEXIST]
    assert level.ingest("one") == ref
    assert read(level.open_ingest("one")) == CONTENT


def test_a_discarded_ingest_is_gone_and_its_id_may_be_used_again(level: LocalLevel) -> None:
    level.create("one", 10)
    level.discard("one")
    level.discard("one")
    level.discard("never-was")
    with pytest.raises(NotFoundError):
        level.open_ingest("one")
    assert commit_content(level, "one").size_bytes == len(CONTENT)


def test_a_removed_blob_is_gone_but_open_descriptors_keep_its_bytes(level: LocalLevel) -> None:
    commit_content(level)
    fd = level.open_blob(DIGEST)
    level.remove(DIGEST)
    with pytest.raises(NotFoundError):
        level.blob(DIGEST)
    with pytest.raises(NotFoundError):
        level.remove(DIGEST)
    assert read(fd) == CONTENT


def test_unknown_names_are_not_found(level: LocalLevel) -> None:
    for by_digest in [level.blob, level.open_blob, level.remove]:
        with pytest.raises(NotFoundError):
            by_digest(OTHER)
    for by_id in [level.ingest, level.open_ingest]:
        with pytest.raises(NotFoundError):
            by_id("never-was")
    with pytest.raises(NotFoundError):
        level.commit("never-was", DIGEST)


@pytest.mark.parametrize("name", ["", "..", "a/b", "../x", "a.b", "\0", "a" * 65, DIGEST.upper(), DIGEST[:-1], "x\n"])
def test_names_that_could_leave_the_level_are_refused(level: LocalLevel, name: str) -> None:
    for call in [level.blob, level.open_blob, level.remove]:
        with pytest.raises(InvalidRequestError):
            call(name)
    with pytest.raises((InvalidRequestError, NotFoundError)):
        level.commit(name, DIGEST)
    if name not in {DIGEST.upper(), DIGEST[:-1]}:  # fine as the id of an ingest
        for call in [level.ingest, level.open_ingest, level.discard, lambda name: level.create(name, 1)]:
            with pytest.raises(InvalidRequestError):
                call(name)


def test_files_are_private_whatever_the_umask(level: LocalLevel) -> None:
    old = os.umask(0)
    try:
        ref = commit_content(level)
    finally:
        os.umask(old)
    found = os.stat(ref.path)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_nlink == 1


def test_descriptors_are_read_only_and_not_inherited(level: LocalLevel) -> None:
    commit_content(level)
    level.create("two", 10)
    for fd in (level.open_blob(DIGEST), level.open_ingest("two")):
        assert not os.get_inheritable(fd)
        with pytest.raises(OSError):
            os.write(fd, b"x")
        with pytest.raises(OSError):
            os.ftruncate(fd, 1)
        with pytest.raises(PermissionError):
            mmap.mmap(fd, 10, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        os.close(fd)


def test_writes_to_a_private_mapping_stay_private(level: LocalLevel) -> None:
    commit_content(level)
    fd = level.open_blob(DIGEST)
    with mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as private:
        private[:5] = b"XXXXX"
        assert private[:] == b"XXXXX" + CONTENT[5:]
        assert read(level.open_blob(DIGEST)) == CONTENT
    os.close(fd)
    assert read(level.open_blob(DIGEST)) == CONTENT


def test_blobs_and_ingests_survive_a_restart(place: Place, level: LocalLevel) -> None:
    blob = commit_content(level)
    ingest = level.create("half", len(CONTENT))
    fill(ingest, CONTENT[:4096])
    level.create("empty", 0)
    again, found = place.restarted()
    assert found == Found(blobs={DIGEST: len(CONTENT)}, ingests={"half": len(CONTENT), "empty": 0}, set_aside=())
    assert again.blob(DIGEST) == blob
    assert again.ingest("half") == ingest
    fill(again.ingest("half"))
    again.discard("half")
    again.remove(DIGEST)
    assert place.restarted()[1] == Found(blobs={}, ingests={"empty": 0}, set_aside=())


def test_an_ingest_found_at_a_restart_can_be_committed(place: Place, level: LocalLevel) -> None:
    fill(level.create("half", len(CONTENT)))
    again, _ = place.restarted()
    again.commit("half", DIGEST)
    assert read(again.open_blob(DIGEST)) == CONTENT
    assert place.restarted()[1] == Found(blobs={DIGEST: len(CONTENT)}, ingests={}, set_aside=())


@pytest.mark.parametrize("plant", PLANTS)
def test_what_was_planted_under_a_blobs_name_is_never_served(place: Place, level: LocalLevel, plant: str) -> None:
    path = place.blob_path(DIGEST)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    PLANTS[plant](path)
    with pytest.raises(LevelError):
        level.blob(DIGEST)
    with pytest.raises(LevelError):
        os.close(level.open_blob(DIGEST))
    found = place.restarted()[1]
    assert found.blobs == {}
    assert any(path in line for line in found.set_aside)


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_ingest_is_neither_overwritten_nor_followed(place: Place, level: LocalLevel, plant: str) -> None:
    path = place.ingest_path("one")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    PLANTS[plant](path)
    with pytest.raises(LevelError):
        level.create("one", 10)
    with pytest.raises(LevelError):
        os.close(level.open_ingest("one"))
    with pytest.raises(LevelError):
        level.commit("one", DIGEST)
    found = place.restarted()[1]
    assert found.ingests == {}
    assert any(path in line for line in found.set_aside)


def test_a_file_with_a_second_name_is_not_ours(place: Place, level: LocalLevel, tmp_path: Path) -> None:
    ref = commit_content(level)
    link = ref.path + ".link"
    os.link(ref.path, link)
    with pytest.raises(LevelError, match="2 names"):
        level.blob(DIGEST)
    os.unlink(link)
    assert level.blob(DIGEST) == ref


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_not_ours(place: Place, level: LocalLevel) -> None:
    ref = commit_content(level)
    os.chown(ref.path, 12345, -1)
    with pytest.raises(LevelError, match="uid 12345"):
        level.blob(DIGEST)
    with pytest.raises(LevelError, match="uid 12345"):
        level.open_blob(DIGEST)
    assert place.restarted()[1].blobs == {}


def test_a_name_that_was_reused_is_noticed_when_it_is_mapped(level: LocalLevel) -> None:
    old = level.create("one", len(CONTENT))
    held = level.open_ingest("one")  # so that its inode is not used again
    level.discard("one")
    new = level.create("one", len(CONTENT))
    with pytest.raises(LevelError, match="not the file it was"):
        open_mapping(old, writable=True)
    with open_mapping(new, writable=False) as mapping:
        assert mapping.view.readonly
        assert bytes(mapping.view) == bytes(len(CONTENT))
    os.close(held)


def test_no_descriptor_is_left_behind(level: LocalLevel) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    commit_content(level, "one")
    commit_content(level, "two")
    level.create("three", 10)
    level.discard("three")
    level.scan()
    os.close(level.open_blob(DIGEST))
    with pytest.raises(LevelError):
        level.create("four", 10)
        level.create("four", 10)
    level.remove(DIGEST)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_free_bytes_is_what_the_file_system_says(place: Place, level: LocalLevel) -> None:
    assert 0 < level.free_bytes() < 1 << 60
