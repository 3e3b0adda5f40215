"""Jobs in real mover processes, on real shared memory and real files."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from cached.checksum import crc64nvme, part_digest
from cached.errors import (
    IntegrityError,
    InvalidRequestError,
    LevelError,
    MoverError,
    NotFoundError,
    ObjectChangedError,
    OriginProtocolError,
)
from cached.levels.base import FileRef
from cached.origins.base import OriginObject, OriginSpec
from cached.transfer import ranges
from cached.transfer.jobs import (
    Checksum,
    Clear,
    Copy,
    Digests,
    Fetch,
    Hash,
    Hashed,
    Listing,
    ListObjects,
    Moved,
    PartDigests,
    StatObjects,
)
from cached.transfer.worker import Worker
from cached.units import CHUNK_BYTES, MIB
from tests.integration.mover_support import (
    DEADLINE_S,
    Files,
    assert_moved,
    content_of,
    pool_of,
    read,
    temporary_files,
    until,
)

SIZES = [1, 4095, 4096, 4097, 5 * MIB, CHUNK_BYTES, CHUNK_BYTES + 3]


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    with temporary_files(tmp_path) as made:
        yield made


async def test_every_size_goes_every_way(files: Files) -> None:
    async with pool_of() as pool:
        for size_bytes in SIZES:
            content = content_of(size_bytes)
            item = files.object(f"{size_bytes}.bin", content)
            memory, disk, again = files.memory(size_bytes), files.disk(size_bytes), files.memory(size_bytes)
            direct = files.disk(size_bytes)
            crc64 = crc64nvme(content)
            assert_moved(await pool.run(Fetch(files.spec, item, 0, size_bytes, memory)), content)
            assert_moved(await pool.run(Fetch(files.spec, item, 0, size_bytes, direct)), content)
            assert_moved(await pool.run(Copy(memory, disk, 0, size_bytes, crc64)), content)
            assert_moved(await pool.run(Copy(disk, again, 0, size_bytes, crc64)), content)
            assert [read(ref) == content for ref in (memory, direct, disk, again)] == [True] * 4, size_bytes
            assert_moved(await pool.run(Checksum(memory, 0, size_bytes)), content)
            assert_moved(await pool.run(Checksum(disk, 0, size_bytes)), content)


async def test_copies_within_a_level(files: Files) -> None:
    content = content_of(5 * MIB + 1)
    async with pool_of() as pool:
        for make in (files.memory, files.disk):
            source, target = make(len(content), content), make(len(content))
            assert_moved(await pool.run(Copy(source, target, 0, len(content), crc64nvme(content))), content)
            assert read(target) == content


async def test_ranges_go_to_their_own_place_and_nowhere_else(files: Files) -> None:
    content = content_of(CHUNK_BYTES + 70_000)
    item = files.object("model.bin", content)
    size_bytes = len(content)
    async with pool_of() as pool:
        for offset, length in [(0, 10), (4096, 8192), (12_345, 54_321), (CHUNK_BYTES, 70_000), (size_bytes - 1, 1)]:
            part = content[offset : offset + length]
            expected = bytes(offset) + part + bytes(size_bytes - offset - length)
            for make in (files.memory, files.disk):
                source, fetched, copied = make(size_bytes, content), make(size_bytes), make(size_bytes)
                assert_moved(await pool.run(Fetch(files.spec, item, offset, length, fetched)), part)
                assert_moved(await pool.run(Copy(source, copied, offset, length)), part)
                assert_moved(await pool.run(Checksum(source, offset, length)), part)
                assert read(fetched) == read(copied) == expected
            memory, disk = files.memory(size_bytes, content), files.disk(size_bytes)
            assert_moved(await pool.run(Copy(memory, disk, offset, length)), part)
            assert read(disk) == expected
            back = files.memory(size_bytes)
            assert_moved(await pool.run(Copy(disk, back, offset, length)), part)
            assert read(back) == expected


@pytest.mark.parametrize("size_bytes", [3 * MIB, CHUNK_BYTES + 5])
async def test_damage_is_found_and_never_written_to_disk(files: Files, size_bytes: int) -> None:
    content = content_of(size_bytes)
    wrong = crc64nvme(content) ^ 1
    async with pool_of() as pool:
        for source in (files.memory(len(content), content), files.disk(len(content), content)):
            target = files.disk(len(content))
            with pytest.raises(IntegrityError) as caught:
                await pool.run(Copy(source, target, 0, len(content), wrong))
            assert caught.value.fields == {
                "check": "chunk-crc64nvme",
                "path": source.path,
                "expected": f"{wrong:016x}",
                "found": f"{wrong ^ 1:016x}",
                "offset_bytes": "0",
                "length_bytes": str(len(content)),
            }
            assert read(target) == bytes(len(content))
            with pytest.raises(IntegrityError):
                await pool.run(Copy(source, files.memory(len(content)), 0, len(content), wrong))


async def test_hashes_run_over_jobs_in_order(files: Files) -> None:
    content = content_of(2 * CHUNK_BYTES + 3)
    memory, disk = files.memory(len(content), content), files.disk(len(content), content)
    async with pool_of(movers=2, threads=2) as pool:

        async def whole(key: str, source: FileRef) -> str:
            for offset in range(0, len(content), CHUNK_BYTES):
                length = min(CHUNK_BYTES, len(content) - offset)
                final = offset + length == len(content)
                result = await pool.run(Hash(key, source, offset, length, final), key=key, priority=-1)
                assert isinstance(result, Hashed)
                assert bool(result.sha256) == final
            return result.sha256

        found = await asyncio.gather(*(whole(f"{number}", ref) for number, ref in enumerate([memory, disk] * 4)))
        assert set(found) == {hashlib.sha256(content).hexdigest()}
        empty = files.memory(0)
        nothing = await pool.run(Hash("empty", empty, 0, 0, True), key="empty")
        assert isinstance(nothing, Hashed)
        assert nothing.sha256 == hashlib.sha256(b"").hexdigest()


async def test_a_hash_that_does_not_continue_starts_again(files: Files) -> None:
    content = content_of(3 * MIB)
    source = files.memory(len(content), content)
    async with pool_of(movers=1, threads=1) as pool:
        await pool.run(Hash("a", source, 0, MIB, False), key="a")
        with pytest.raises(MoverError, match="no running SHA-256"):
            await pool.run(Hash("a", source, 2 * MIB, MIB, True), key="a")
        await pool.run(Hash("b", source, 0, MIB, False), key="b")
        os.kill(pool.pids[0], signal.SIGKILL)
        with pytest.raises(MoverError) as caught:
            await pool.run(Hash("b", source, MIB, MIB, False), key="b")
        assert caught.value.retryable
        await pool.run(Hash("b", source, 0, MIB, False), key="b")
        result = await pool.run(Hash("b", source, MIB, 2 * MIB, True), key="b")
        assert isinstance(result, Hashed)
        assert result.sha256 == hashlib.sha256(content).hexdigest()
        assert pool.restarts == 1


async def test_a_hash_in_flight_is_lost_with_its_mover(files: Files) -> None:
    source = files.memory(MIB, content_of(MIB))
    async with pool_of(movers=1, threads=1) as pool:
        await pool.run(Checksum(source, 0, MIB))
        os.kill(pool.pids[0], signal.SIGSTOP)
        running = asyncio.create_task(pool.run(Hash("a", source, 0, MIB, True), key="a"))
        await until(lambda: pool.in_flight == 1, "handed over")
        os.kill(pool.pids[0], signal.SIGKILL)
        with pytest.raises(MoverError, match="killed by signal 9"):
            await running


async def test_parts_have_their_digests(files: Files) -> None:
    content = content_of(11 * MIB + 5)
    parts = (5 * MIB, 6 * MIB, 5)
    slices = [content[: 5 * MIB], content[5 * MIB : 11 * MIB], content[11 * MIB :]]
    async with pool_of() as pool:
        for source in (files.memory(len(content), content), files.disk(len(content), content)):
            for algorithm in ("sha256", "sha1", "crc64nvme", "crc32c", "crc32"):
                result = await pool.run(PartDigests(source, algorithm, parts))
                assert result == Digests(tuple(part_digest(algorithm, part) for part in slices))
        with pytest.raises(InvalidRequestError):
            await pool.run(PartDigests(source, "md5", parts))
        with pytest.raises(InvalidRequestError):
            await pool.run(PartDigests(source, "sha256", (len(content), 1)))


async def test_clearing_leaves_zeroed_pages(files: Files) -> None:
    size_bytes = 5 * MIB + 9
    ref = files.memory(size_bytes, content_of(3 * MIB))
    async with pool_of() as pool:
        result = await pool.run(Clear(ref, 0, size_bytes))
    assert isinstance(result, Moved)
    assert (result.crc64, result.length_bytes) == (0, size_bytes)
    assert read(ref) == bytes(size_bytes)
    assert os.stat(ref.path).st_blocks * 512 >= size_bytes


async def test_origins_are_listed_and_statted(files: Files) -> None:
    items = tuple(files.object(f"folder/{number}", content_of(number + 1)) for number in range(5))
    async with pool_of() as pool:
        assert await pool.run(ListObjects(files.spec)) == Listing(items)
        paths = tuple(item.path for item in reversed(items))
        assert await pool.run(StatObjects(files.spec, paths)) == Listing(tuple(reversed(items)))
        with pytest.raises(NotFoundError):
            await pool.run(StatObjects(files.spec, (*paths, "missing")))


async def test_failures_keep_their_type(files: Files) -> None:
    size_bytes = 10_000
    item = files.object("a", content_of(size_bytes))
    memory, disk = files.memory(size_bytes), files.disk(size_bytes)
    async with pool_of() as pool:
        gone = FileRef(f"{files.prefix}gone", 1, size_bytes, True)
        renamed = FileRef(memory.path, memory.inode + 1, size_bytes, True)
        for job in (
            Checksum(gone, 0, 1),
            Checksum(renamed, 0, 1),
            Copy(disk, gone, 0, 1),
            Copy(gone, disk, 0, 1),
            Copy(renamed, disk, 0, 1),
            Fetch(files.spec, item, 0, 1, renamed),
            Fetch(files.spec, item, 0, 1, FileRef(disk.path, disk.inode, 1, False)),
            Clear(gone, 0, size_bytes),
        ):
            with pytest.raises(LevelError):
                await pool.run(job)
        for offset, length in [(0, size_bytes + 1), (-1, 2), (0, -1), (size_bytes, 1)]:
            with pytest.raises(InvalidRequestError):
                await pool.run(Fetch(files.spec, item, offset, length, memory))
        longer = OriginObject(item.path, 2 * size_bytes, item.version)
        with pytest.raises(OriginProtocolError):
            await pool.run(Fetch(files.spec, longer, size_bytes - 5, 10, files.memory(2 * size_bytes)))
        other = OriginObject(item.path, size_bytes, "other")
        with pytest.raises(ObjectChangedError):
            await pool.run(Fetch(files.spec, other, 0, 10, memory))
        with pytest.raises(InvalidRequestError):
            await pool.run(ListObjects(OriginSpec("gopher://somewhere")))
        assert pool.restarts == 0


def test_nothing_is_left_open_or_mapped_after_a_failed_fetch(files: Files) -> None:
    item = files.object("a", content_of(100))
    longer = OriginObject(item.path, 200, item.version)
    memory = files.memory(200)
    worker = Worker()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OriginProtocolError) as caught:
        worker.perform(Fetch(files.spec, longer, 0, 200, memory))
    assert caught.value.retryable  # and its traceback lives until here
    assert memory.path not in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert os.listdir("/proc/self/fd") == before
    worker.close()


def test_without_direct_io_bytes_are_the_same(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv, os.pwritev
    refused = []

    def refusing(call):
        def moved(fd, buffers, offset):
            import fcntl

            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                refused.append(offset)
                raise OSError(errno.EINVAL, "no direct I/O here")
            return call(fd, buffers, offset)

        return moved

    monkeypatch.setattr(os, "preadv", refusing(real[0]))
    monkeypatch.setattr(os, "pwritev", refusing(real[1]))
    content = content_of(ranges.STEP_BYTES * 2 + 77)
    memory, disk, back = files.memory(len(content), content), files.disk(len(content)), files.memory(len(content))
    worker = Worker()
    assert_moved(worker.perform(Copy(memory, disk, 0, len(content))), content)
    assert_moved(worker.perform(Copy(disk, back, 0, len(content))), content)
    assert refused == [0, 0]
    assert read(disk) == read(back) == content


SHORTAGE = """
import asyncio, os, sys
from cached.clock import SystemClock
from cached.errors import NoRoomError
from cached.levels.base import FileRef
from cached.origins.base import OriginSpec
from cached.transfer.jobs import Clear, Copy, Fetch, ListObjects
from cached.transfer.pool import MoverPool

MIB = 1 << 20
small, origin = sys.argv[1:]

def sparse(name, memory, size=16 * MIB):
    with open(f"{small}/{name}", "xb") as file:
        file.truncate(size)
        return FileRef(file.name, os.fstat(file.fileno()).st_ino, size, memory)

def same(ref):
    with open(ref.path, "rb") as file, open(f"{origin}/model", "rb") as model:
        return file.read() == model.read(ref.size_bytes)

async def main():
    pool = MoverPool(movers=1, threads=1, nice=0, idle_timeout_s=60.0, clock=SystemClock())
    spec = OriginSpec(f"file://{origin}")
    item = (await pool.run(ListObjects(spec))).items[0]
    found = os.stat(f"{origin}/{item.path}")
    source = FileRef(f"{origin}/{item.path}", found.st_ino, found.st_size, False)
    for job in [
        Fetch(spec, item, 0, 3 * MIB - 5, sparse("fetched", True, 3 * MIB - 5)),
        Copy(source, sparse("copied", True, 3 * MIB - 5), 0, 3 * MIB - 5),
    ]:
        await pool.run(job)
        print(same(job.target))
        os.unlink(job.target.path)
    memory, disk = sparse("memory", True), sparse("disk", False)
    for job in [
        Fetch(spec, item, 0, 16 * MIB, memory),
        Copy(source, memory, 0, 16 * MIB),
        Fetch(spec, item, 0, 16 * MIB, disk),
        Copy(source, disk, 0, 16 * MIB),
        Clear(memory, 0, 16 * MIB),
    ]:
        try:
            await pool.run(job)
        except NoRoomError as error:
            print(type(job).__name__, error.fields["level"], flush=True)
    print(pool.restarts)
    await pool.close(10.0)

asyncio.run(main())
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare(1)")
@pytest.mark.parametrize("options", ["size=8m", "size=8m,huge=advise"])
def test_a_shortage_of_pages_or_disk_is_an_error_and_kills_nobody(files: Files, tmp_path: Path, options: str) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", str(small)]
    if subprocess.run(["unshare", "-rm", *mount], check=False).returncode != 0:
        pytest.skip("no such mount in a user namespace here")
    files.object("model", content_of(CHUNK_BYTES))
    script = textwrap.dedent(SHORTAGE)
    command = f'{shlex.join(mount)} && exec "{sys.executable}" -c "$0" "{small}" "{files.origin}"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, script], check=False, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == [
        "True",
        "True",
        "Fetch l1",
        "Copy l1",
        "Fetch l2",
        "Copy l2",
        "Clear l1",
        "0",
        "",
    ]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["parent=1", "nice=five"], ["parent=1", "nice=5", "local=1"]])
def test_a_mover_that_is_started_by_hand_says_who_starts_it(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "cached.transfer.mover", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "movers are started by the daemon: cached serve\n"
