"""What is L1's own: withdrawn segments, the kernel's proof, the pool. The rest: tests/conformance/test_levels.py."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest

from cached.errors import InvalidRequestError, LevelError
from cached.levels.base import FileRef
from cached.levels.memory import open_mapping
from cached.levels.segments import Collected
from cached.levels.shm import SHM_FOLDER, ShmLevel, huge_pages_allowed, mount_of

MIB = 1024 * 1024
SECRET = b"the bytes of another tenant"
DIGEST = hashlib.sha256(b"a blob").hexdigest()

HOLDER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
if sys.argv[2] != "descriptor":
    flags = mmap.MAP_PRIVATE if sys.argv[2] == "private" else mmap.MAP_SHARED
    mapping = mmap.mmap(fd, 0, flags=flags, prot=mmap.PROT_READ)
    os.close(fd)
    os.closerange(3, 100)  # the mmap object keeps a duplicate: only the mapping itself shall be left
    assert not [name for name in os.listdir("/proc/self/fd") if int(name) > 2][1:], "a descriptor is left"
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def instance() -> Iterator[str]:
    instance = secrets.token_hex(6)
    yield instance
    for name in os.listdir(SHM_FOLDER):
        if name.startswith(f"cached.{instance}."):
            os.unlink(os.path.join(SHM_FOLDER, name))


@pytest.fixture
def level(instance: str) -> ShmLevel:
    level = ShmLevel(instance)
    level.scan()
    return level


@contextmanager
def held(path: str, how: str) -> Iterator[None]:
    """Another process that maps or holds open the file."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, path, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "held\n"
        yield
        process.stdin.close()
        assert process.wait(30) == 0


def commit(level: ShmLevel, size_bytes: int = MIB, digest: str = DIGEST) -> str:
    """A blob whose pages are all there; its path."""
    ref = level.create("ingest", size_bytes)
    with open_mapping(ref, writable=True) as mapping:
        mapping.view[:] = (SECRET * (size_bytes // len(SECRET) + 1))[:size_bytes]
    return level.commit("ingest", digest).path


def test_a_blob_can_be_read_by_path_at_every_moment_of_its_commit(level: ShmLevel) -> None:
    level.create("ingest", MIB)
    heard: list[str] = []

    def moved(source: str, target: str) -> None:
        assert os.path.samefile(source, target)
        heard.extend((source, target))

    blob = level.commit("ingest", DIGEST, moved)
    ingest, spare = heard[:2]
    assert heard[2:] == [spare, blob.path]
    assert [os.path.exists(path) for path in (ingest, spare, blob.path)] == [False, False, True]
    again = level.create("ingest", MIB)
    assert level.commit("ingest", DIGEST, lambda source, target: heard.extend((source, target))) == blob
    assert heard[4:] == [again.path, blob.path]


def test_who_maps_a_segment_already_is_shown_with_the_name_of_the_blob(level: ShmLevel) -> None:
    ref = level.create("ingest", MIB)
    with open_mapping(ref, writable=False):
        blob = level.commit("ingest", DIGEST)
        assert any(line.endswith(blob.path) for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("names", [1, 2])
def test_a_commit_that_a_kill_cut_short_leaves_one_name(level: ShmLevel, instance: str, names: int) -> None:
    class Killed(BaseException):
        """Nothing after it runs."""

    heard = []

    def killed(source: str, target: str) -> None:
        heard.append((source, target))
        if len(heard) == names:
            raise Killed

    level.create("ingest", MIB)
    with pytest.raises(Killed):
        level.commit("ingest", DIGEST, killed)
    found = ShmLevel(instance).scan()
    expected = ({}, {"ingest": MIB}) if names == 1 else ({DIGEST: MIB}, {})
    assert (found.blobs, found.ingests, found.set_aside) == (*expected, ())
    assert not os.path.exists(heard[0][1])


def test_a_commit_that_fails_leads_back_to_where_the_content_is(
    level: ShmLevel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_source: str, _target: str) -> None:
        raise OSError(errno.EIO, "broken")

    ingest, heard = level.create("ingest", MIB), []
    monkeypatch.setattr("cached.levels.shm.rename_new", refuse)
    with pytest.raises(LevelError):
        level.commit("ingest", DIGEST, lambda source, target: heard.append((source, target)))
    spare = heard[0][1]
    assert heard == [(ingest.path, spare), (spare, ingest.path)]
    assert (os.path.exists(ingest.path), os.path.exists(spare)) == (True, False)


def matched(level: ShmLevel, size_bytes: int) -> int:
    """The bytes that leave the pool if ``create`` is called with this size now."""
    segment = level._pool.match(size_bytes)
    return segment.size_bytes if segment else 0


def path(level: ShmLevel, name: str) -> str:
    return f"{SHM_FOLDER}/cached.{level.instance}.{name}"


def pooled(level: ShmLevel, size_bytes: int) -> None:
    """One clean pool segment more."""
    ref = level.grow_pool(size_bytes)
    zero(ref)
    assert level.mark_clean(ref)


def zero(ref: FileRef) -> None:
    """What a mover does to it before it is reused."""
    with open(ref.path, "r+b") as file:
        file.write(bytes(ref.size_bytes))


def names(level: ShmLevel) -> list[str]:
    prefix = f"cached.{level.instance}."
    return sorted(name.removeprefix(prefix) for name in os.listdir(SHM_FOLDER) if name.startswith(prefix))


@pytest.mark.parametrize("how", ["private", "shared", "descriptor"])
def test_a_withdrawn_segment_counts_until_no_other_process_has_it(level: ShmLevel, how: str) -> None:
    path = commit(level)
    with held(path, how):
        level.remove(DIGEST)
        assert not os.path.exists(path)
        assert level.withdrawn_bytes == MIB
        assert level.collect(lambda _size: True) == []
        assert level.withdrawn_bytes == MIB
    assert level.collect() == [Collected(MIB, kept=False, proven=True)]
    assert level.withdrawn_bytes == 0
    assert names(level) == []


def test_our_own_mapping_blocks_the_proof_too(level: ShmLevel) -> None:
    ref = level.create("ingest", MIB)
    with open_mapping(ref, writable=True):
        level.discard("ingest")
        assert level.collect() == []
    assert level.collect() == [Collected(MIB, kept=False, proven=True)]


def test_withdrawn_segments_are_found_again_by_the_next_daemon(level: ShmLevel) -> None:
    path = commit(level)
    with held(path, "private"):
        level.remove(DIGEST)
        again = ShmLevel(level.instance)
        found = again.scan()
        assert (found.blobs, found.ingests, found.set_aside) == ({}, {}, ())
        assert again.withdrawn_bytes == MIB
        assert again.collect() == []
    assert again.collect() == [Collected(MIB, kept=False, proven=True)]


def test_a_recycled_segment_keeps_its_memory_and_none_of_its_bytes(level: ShmLevel) -> None:
    path = commit(level, 4 * MIB)
    inode = os.stat(path).st_ino
    level.remove(DIGEST)
    assert level.collect(lambda _size: True) == [Collected(4 * MIB, kept=True, proven=True)]
    assert (level.withdrawn_bytes, level.pool_sizes(), matched(level, 4 * MIB)) == (0, [4 * MIB], 0)

    assert matched(level, 4 * MIB) == 0, "a dirty segment must not be reused"
    (dirty,) = level.dirty_pool()
    with open(dirty.path, "rb") as file:
        assert SECRET in file.read()
    zero(dirty)
    assert level.mark_clean(dirty)
    assert matched(level, 4 * MIB - 1) == 4 * MIB

    ref = level.create("next", 4 * MIB - 1)
    assert ref.inode == inode
    assert level.pool_bytes == 0
    found = os.stat(ref.path)
    assert found.st_size == 4 * MIB - 1
    assert found.st_blocks * 512 == 4 * MIB, "its pages are still there"
    with os.fdopen(level.open_ingest("next"), "rb") as file:
        assert file.read() == bytes(4 * MIB - 1)


def test_a_bigger_blob_takes_a_smaller_segment_and_grows_it(level: ShmLevel) -> None:
    pooled(level, MIB)
    assert matched(level, 3 * MIB) == MIB
    ref = level.create("next", 3 * MIB)
    assert os.stat(ref.path).st_size == ref.size_bytes == 3 * MIB
    assert level.pool_bytes == 0
    with os.fdopen(level.open_ingest("next"), "rb") as file:
        assert file.read() == bytes(3 * MIB)


def test_the_pool_gives_what_spares_most_and_never_a_big_segment_for_a_small_file(level: ShmLevel) -> None:
    pooled(level, 40 * MIB)
    pooled(level, 2 * MIB)
    assert matched(level, 2 * MIB) == 2 * MIB
    assert matched(level, 8 * MIB) == 2 * MIB, "cutting 32 MiB off costs more than 6 MiB of fresh memory"
    assert matched(level, 10 * MIB) == 40 * MIB
    assert matched(level, 60 * MIB) == 40 * MIB
    assert matched(level, 1000) == 0
    assert matched(level, 0) == 0
    level.create("small", 1000)
    assert level.pool_bytes == 42 * MIB


def test_the_pool_is_cut_ahead_for_those_whom_it_spares_most(level: ShmLevel) -> None:
    pooled(level, 8 * MIB)
    pooled(level, 6 * MIB)
    before = {os.stat(path(level, name)).st_ino for name in names(level)}
    sizes = {"small": 3 * MIB, "large": 7 * MIB, "third": 4 * MIB}
    assert level.fit_pool(sizes)
    assert (level.pool_bytes, level.drop_pool(100 * MIB)) == (14 * MIB, 0), "it is promised"
    level.cut_pool(sizes)
    assert sorted(level.pool_sizes()) == [4 * MIB, 7 * MIB]
    refs = {ingest_id: level.create(ingest_id, size_bytes) for ingest_id, size_bytes in sizes.items()}
    assert {refs["large"].inode, refs["third"].inode} == before
    assert {ingest_id: ref.size_bytes for ingest_id, ref in refs.items()} == sizes
    assert {os.stat(ref.path).st_size for ref in refs.values()} == set(sizes.values())
    assert not level.pool_bytes


def test_what_the_pool_promised_and_nobody_took_is_anybodys_again(level: ShmLevel) -> None:
    pooled(level, 4 * MIB)
    assert level.fit_pool({"one": 3 * MIB})
    assert matched(level, 3 * MIB) == 0
    level.unfit_pool()
    assert (matched(level, 3 * MIB), level.pool_bytes) == (4 * MIB, 4 * MIB)
    assert not level.fit_pool({"one": 4 * MIB}), "there is nothing to cut"
    level.unfit_pool()
    assert level.drop_pool(1) == 4 * MIB


def test_pool_memory_that_vanished_is_not_promised(level: ShmLevel) -> None:
    pooled(level, 4 * MIB)
    (name,) = names(level)
    sizes = {"one": 3 * MIB}
    assert level.fit_pool(sizes)
    os.unlink(path(level, name))
    level.cut_pool(sizes)
    assert (level.pool_bytes, level.withdrawn_bytes) == (0, 0)
    assert level.create("one", 3 * MIB).size_bytes == 3 * MIB


def test_an_existing_ingest_costs_the_pool_nothing(level: ShmLevel) -> None:
    pooled(level, MIB)
    level.create("taken", 100)
    with pytest.raises(LevelError):
        level.create("taken", MIB)
    assert matched(level, MIB) == MIB


def test_the_pool_is_given_back_dirty_and_small_ones_first(level: ShmLevel) -> None:
    pooled(level, 4 * MIB)
    pooled(level, 2 * MIB)
    dirty = level.grow_pool(8 * MIB)
    assert level.pool_bytes == 14 * MIB
    assert level.drop_pool(1) == 8 * MIB
    assert not level.mark_clean(dirty), "it has left the pool"
    assert level.drop_pool(2 * MIB) == 2 * MIB
    assert level.drop_pool(100 * MIB) == 4 * MIB
    assert level.drop_pool(1) == 0
    assert (level.pool_bytes, names(level)) == (0, [])


def test_a_large_segment_takes_the_place_of_small_ones_in_a_full_pool(level: ShmLevel) -> None:
    for size_bytes in (4 * MIB, 6 * MIB, 30 * MIB):
        level.grow_pool(size_bytes)
    assert level.make_pool_room(10 * MIB, 50 * MIB)
    assert sorted(level.pool_sizes()) == [4 * MIB, 6 * MIB, 30 * MIB], "there was room"
    assert not level.make_pool_room(5 * MIB, 36 * MIB), "what is smaller would not make room enough"
    assert not level.make_pool_room(51 * MIB, 50 * MIB)
    assert sorted(level.pool_sizes()) == [4 * MIB, 6 * MIB, 30 * MIB], "nothing goes in vain"
    assert level.make_pool_room(10 * MIB, 41 * MIB)
    assert level.pool_sizes() == [30 * MIB]


def test_the_pool_can_be_filled_ahead(level: ShmLevel) -> None:
    ref = level.grow_pool(MIB)
    assert matched(level, MIB) == 0
    zero(ref)
    assert os.stat(ref.path).st_blocks * 512 == MIB
    assert level.mark_clean(ref)
    assert matched(level, MIB) == MIB
    assert level.drop_pooled(ref) == MIB
    assert level.drop_pooled(ref) == 0


def test_pool_segments_of_an_earlier_daemon_are_given_back(level: ShmLevel) -> None:
    pooled(level, MIB)
    again = ShmLevel(level.instance)
    again.scan()
    assert (again.pool_bytes, names(level)) == (0, [])


def test_pool_memory_that_vanished_is_replaced_by_fresh_memory(level: ShmLevel) -> None:
    pooled(level, MIB)
    (name,) = names(level)
    os.unlink(f"{SHM_FOLDER}/cached.{level.instance}.{name}")
    assert level.create("next", MIB).size_bytes == MIB
    assert level.pool_bytes == 0


def test_pool_memory_that_cannot_be_opened_is_given_back(level: ShmLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    pooled(level, MIB)
    with monkeypatch.context() as short:
        short.setattr(os, "open", Mock(side_effect=OSError(errno.EMFILE, os.strerror(errno.EMFILE))))
        with pytest.raises(LevelError, match="Too many open files"):
            level.create("next", MIB)
    assert (level.pool_bytes, level.withdrawn_bytes, names(level)) == (0, 0, [])


def test_a_withdrawn_segment_that_somebody_removed_counts_as_free(level: ShmLevel) -> None:
    commit(level)
    level.remove(DIGEST)
    (name,) = names(level)
    os.unlink(f"{SHM_FOLDER}/cached.{level.instance}.{name}")
    assert level.collect() == [Collected(MIB, kept=False, proven=False)]
    assert level.withdrawn_bytes == 0


def test_without_leases_a_segment_is_never_recycled(level: ShmLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a kernel with fs.leases-enable=0 answers; the setting is the machine's, so it cannot be changed for a test.
    def refuse(fd: int, command: int, argument: int = 0) -> int:
        raise OSError(22, "Invalid argument")

    commit(level)
    level.remove(DIGEST)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert level.collect(lambda _size: True) == [Collected(MIB, kept=False, proven=False)]
    assert (level.pool_bytes, level.withdrawn_bytes, names(level)) == (0, 0, [])


def test_what_cannot_be_examined_stays_counted_and_does_not_stop_the_others(level: ShmLevel) -> None:
    commit(level)
    level.remove(DIGEST)
    (name,) = names(level)
    commit(level, 2 * MIB)
    level.remove(DIGEST)
    link = f"{SHM_FOLDER}/cached.{level.instance}.link"
    os.link(f"{SHM_FOLDER}/cached.{level.instance}.{name}", link)
    assert level.collect() == [Collected(2 * MIB, kept=False, proven=True)]
    assert level.withdrawn_bytes == MIB
    os.unlink(link)
    assert level.collect() == [Collected(MIB, kept=False, proven=True)]


def test_the_lease_that_proves_is_given_back(level: ShmLevel) -> None:
    commit(level)
    fd = level.open_blob(DIGEST)
    assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_UNLCK
    os.close(fd)
    level.remove(DIGEST)
    level.collect(lambda _size: True)
    (dirty,) = level.dirty_pool()
    with open_mapping(dirty, writable=True) as mapping:
        assert fcntl.fcntl(mapping.fd, fcntl.F_GETLEASE) == fcntl.F_UNLCK


def test_mode_and_group_hold_only_while_a_segment_may_be_opened(instance: str) -> None:
    level = ShmLevel(instance, mode=0o640, group=os.getgid())
    path = commit(level)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o640
    level.remove(DIGEST)
    (name,) = names(level)
    assert stat.S_IMODE(os.stat(f"{SHM_FOLDER}/cached.{instance}.{name}").st_mode) == 0o600
    level.collect(lambda _size: True)
    (dirty,) = level.dirty_pool()
    level.mark_clean(dirty)
    assert stat.S_IMODE(os.stat(level.create("next", MIB).path).st_mode) == 0o640


def test_instances_do_not_see_each_other(level: ShmLevel) -> None:
    commit(level)
    other = ShmLevel(level.instance + "0")
    found = other.scan()
    assert (found.blobs, found.ingests, found.set_aside) == ({}, {}, ())
    assert level.blob(DIGEST).size_bytes == MIB


def test_names_of_ours_that_mean_nothing_are_left_alone_and_reported(level: ShmLevel) -> None:
    prefix = f"{SHM_FOLDER}/cached.{level.instance}."
    strange = [prefix + name for name in ("blob.1234", "ingest.", "new-kind.1", "x")]
    for path in strange:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    found = level.scan()
    assert (found.blobs, found.ingests) == ({}, {})
    assert len(found.set_aside) == len(strange)
    assert all(os.path.exists(path) for path in strange)


@pytest.mark.parametrize("name", ["", "a/b", "a.b", "..", "x" * 33])
def test_an_instance_that_could_not_be_told_apart_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError):
        ShmLevel(name)


def test_huge_pages_depend_on_the_mount_that_is_seen() -> None:
    root = "/dev/vda / ext4 rw 0 0\n"
    plain = "tmpfs /dev/shm tmpfs rw,nosuid,size=10k 0 0\n"
    advise = "tmpfs /dev/shm tmpfs rw,nosuid,huge=advise,size=10k 0 0\n"
    assert not huge_pages_allowed(root + plain)
    assert huge_pages_allowed(root + advise)
    assert huge_pages_allowed(plain + advise)
    assert not huge_pages_allowed(advise + plain)
    assert not huge_pages_allowed("tmpfs /mnt tmpfs rw,huge=always 0 0\n")
    assert not huge_pages_allowed("")


def test_the_mount_of_a_folder_is_the_nearest_and_the_last() -> None:
    mounts = (
        "/dev/vda / ext4 rw 0 0\ndevtmpfs /dev devtmpfs rw 0 0\ntmpfs /dev/cached tmpfs rw,huge=advise 0 0\n"
        "tmpfs /mnt/a\\040b tmpfs rw,size=1k 0 0\n"
    )
    assert mount_of(mounts, "/dev/cached") == ("tmpfs", "rw,huge=advise")
    assert mount_of(mounts, "/dev/cached/l1")[0] == "tmpfs"
    assert mount_of(mounts, "/dev/cached2")[0] == "devtmpfs"
    assert mount_of(mounts, "/mnt/a b") == ("tmpfs", "rw,size=1k")
    assert mount_of(mounts, "/mnt")[0] == "ext4"
    assert mount_of(mounts + "overlay /dev/cached overlay rw 0 0\n", "/dev/cached")[0] == "overlay"
    assert huge_pages_allowed(mounts, "/dev/cached")
