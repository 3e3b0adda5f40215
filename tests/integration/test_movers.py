"""Real mover processes, real shared memory, real files."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from cached.checksum import crc64nvme, part_digest
from cached.clock import SystemClock
from cached.errors import (
    IntegrityError,
    InvalidRequestError,
    LevelError,
    MoverError,
    NotFoundError,
    ObjectChangedError,
    OriginProtocolError,
    UnavailableError,
)
from cached.levels.base import FileRef
from cached.origins.base import OriginObject, OriginSpec
from cached.transfer import process as process_module
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
from cached.transfer.pool import MoverPool
from cached.transfer.worker import Worker
from cached.units import CHUNK_BYTES, MIB

SIZES = [1, 4095, 4096, 4097, 5 * MIB, CHUNK_BYTES, CHUNK_BYTES + 3]
DEADLINE_S = 60


class Files:
    """Files of a test at both levels and below an origin."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder = folder
        self.prefix = prefix
        self.origin = folder / "origin"
        self.origin.mkdir()
        self.spec = OriginSpec(self.origin.as_uri())

    def memory(self, size_bytes: int, content: bytes = b"") -> FileRef:
        return self._file(f"{self.prefix}{secrets.token_hex(4)}", size_bytes, content, memory=True)

    def disk(self, size_bytes: int, content: bytes = b"") -> FileRef:
        return self._file(str(self.folder / secrets.token_hex(4)), size_bytes, content, memory=False)

    def object(self, path: str, content: bytes) -> OriginObject:
        target = self.origin / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        with_version = Worker().perform(StatObjects(self.spec, (path,)))
        assert isinstance(with_version, Listing)
        return with_version.items[0]

    def _file(self, path: str, size_bytes: int, content: bytes, *, memory: bool) -> FileRef:
        with open(path, "xb") as file:
            file.write(content)
            file.truncate(size_bytes)
            found = os.fstat(file.fileno())
        return FileRef(path, found.st_ino, found.st_size, memory)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    prefix = f"/dev/shm/cached-test-{secrets.token_hex(6)}-"
    yield Files(tmp_path, prefix)
    for path in Path("/dev/shm").glob(f"{Path(prefix).name}*"):
        path.unlink()


class MovableClock(SystemClock):
    """The machine's clock, which a test can put forward."""

    ahead_s = 0.0

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.ahead_s


@asynccontextmanager
async def pool_of(movers: int = 1, threads: int = 2, **options) -> AsyncIterator[MoverPool]:
    options = {"nice": 5, "idle_timeout_s": 60.0, "clock": SystemClock()} | options
    pool = MoverPool(movers=movers, threads=threads, **options)
    try:
        yield pool
    finally:
        pids = pool.pids
        await pool.close(10.0)
        assert pool.in_flight == pool.active_movers == 0
        assert [pid for pid in pids if psutil.pid_exists(pid)] == []
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


def content_of(size_bytes: int) -> bytes:
    return random.Random(size_bytes).randbytes(size_bytes)


def read(ref: FileRef) -> bytes:
    return Path(ref.path).read_bytes()


def assert_moved(result, content: bytes) -> None:
    assert isinstance(result, Moved)
    assert (result.crc64, result.length_bytes) == (crc64nvme(content), len(content))
    assert result.busy_s > 0
    assert result.cpu_s >= 0


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


async def test_damage_is_found_and_never_written_to_disk(files: Files) -> None:
    content = content_of(3 * MIB)
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
        result = await pool.run(Clear(ref))
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
            Clear(gone),
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


async def test_work_of_a_killed_mover_is_done_by_another(files: Files) -> None:
    content = content_of(MIB)
    source = files.memory(MIB, content)
    heard: list[int] = []
    async with pool_of(movers=1, threads=4, on_restart=lambda: heard.append(1)) as pool:
        await pool.run(Checksum(source, 0, MIB))
        first = pool.pids[0]
        os.kill(first, signal.SIGSTOP)
        running = [asyncio.create_task(pool.run(Checksum(source, 0, MIB))) for _ in range(6)]
        await until(lambda: pool.in_flight == 4, "handed over")
        os.kill(first, signal.SIGKILL)
        for result in await asyncio.gather(*running):
            assert_moved(result, content)
        assert first not in pool.pids
        assert pool.restarts == len(heard) == 1


async def test_a_job_that_outlives_three_movers_is_given_up(files: Files) -> None:
    source = files.memory(MIB, content_of(MIB))
    async with pool_of(movers=1, threads=1) as pool:
        await pool.run(Checksum(source, 0, MIB))
        os.kill(pool.pids[0], signal.SIGSTOP)
        running = asyncio.create_task(pool.run(Checksum(source, 0, MIB)))
        for death in range(1, 4):
            await until(lambda: pool.in_flight == 1 and pool._movers[0].ready, "handed over")
            # The state in which the job finds its next mover: stopped before it reads its first job.
            os.kill(pool.pids[0], signal.SIGKILL)
            await until(lambda death=death: pool.restarts == death, "buried")
            if death < 3:
                await stop_next_mover(pool)
        with pytest.raises(MoverError, match="was lost"):
            await running
        assert_moved(await pool.run(Checksum(source, 0, MIB)), read(source))


async def stop_next_mover(pool: MoverPool) -> None:
    """Stops the next mover as soon as it exists, and lets it only say that it is ready."""
    await until(lambda: len(pool.pids) == 1, "started")
    os.kill(pool.pids[0], signal.SIGSTOP)
    pool._movers[0].ready = True


async def test_a_mover_that_hangs_is_replaced(files: Files) -> None:
    content = content_of(MIB)
    source = files.memory(MIB, content)
    clock = MovableClock()
    async with pool_of(movers=1, threads=1, clock=clock) as pool:
        await pool.run(Checksum(source, 0, MIB))
        hanging = pool.pids[0]
        os.kill(hanging, signal.SIGSTOP)
        running = asyncio.create_task(pool.run(Checksum(source, 0, MIB)))
        await until(lambda: pool.in_flight == 1, "handed over")
        clock.ahead_s = 400.0
        assert_moved(await running, content)
        assert hanging not in pool.pids
        assert pool.restarts == 1


async def test_movers_are_started_on_demand_and_ended_when_idle(files: Files) -> None:
    source = files.memory(CHUNK_BYTES, content_of(CHUNK_BYTES))
    clock = MovableClock()
    async with pool_of(movers=2, threads=1, idle_timeout_s=30.0, clock=clock) as pool:
        assert (pool.active_movers, pool.capacity) == (0, 2)
        await pool.run(Checksum(source, 0, CHUNK_BYTES))
        assert pool.active_movers == 1
        await asyncio.gather(*(pool.run(Checksum(source, 0, CHUNK_BYTES)) for _ in range(20)))
        assert pool.active_movers == 2
        clock.ahead_s = 31.0
        await until(lambda: pool.pids == (), "ended")
        assert pool.restarts == 0
        await pool.run(Checksum(source, 0, 1))
        assert pool.active_movers == 1


async def test_a_mover_with_a_hash_under_way_is_kept_longer(files: Files) -> None:
    source = files.memory(2 * MIB, content_of(2 * MIB))
    clock = MovableClock()
    async with pool_of(movers=1, threads=1, idle_timeout_s=1.0, clock=clock) as pool:
        await pool.run(Hash("a", source, 0, MIB, False), key="a")
        pids = pool.pids
        clock.ahead_s = 5.0
        await asyncio.sleep(0)
        await until_tended(pool)
        assert pool.pids == pids
        result = await pool.run(Hash("a", source, MIB, MIB, True), key="a")
        assert isinstance(result, Hashed)
        assert result.sha256 == hashlib.sha256(read(source)).hexdigest()


async def until_tended(pool: MoverPool) -> None:
    calls: list[float] = []
    real = pool._clock.monotonic_s
    pool._clock.monotonic_s = lambda: (calls.append(1.0), real())[1]
    await until(lambda: len(calls) >= 2, "tended twice")
    pool._clock.monotonic_s = real


async def test_what_is_urgent_goes_first(files: Files) -> None:
    source = files.memory(MIB, content_of(MIB))
    order: list[str] = []
    async with pool_of(movers=1, threads=1) as pool:

        async def one(name: str, priority: int) -> None:
            await pool.run(Checksum(source, 0, MIB), priority=priority)
            order.append(name)

        await asyncio.gather(one("a", 5), one("b", 5), one("c", 0), one("d", -1), one("e", 0))
    assert order == ["d", "c", "e", "a", "b"]


async def test_cancelled_jobs_leave_the_queue_and_their_late_answers_are_dropped(files: Files) -> None:
    content = content_of(MIB)
    source, target = files.memory(MIB, content), files.memory(MIB)
    async with pool_of(movers=1, threads=1) as pool:
        await pool.run(Checksum(source, 0, MIB))
        os.kill(pool.pids[0], signal.SIGSTOP)
        flying = asyncio.create_task(pool.run(Copy(source, target, 0, MIB)))
        queued = asyncio.create_task(pool.run(Copy(source, target, 0, MIB)))
        await until(lambda: pool.in_flight == 1 and len(pool._queue) == 1, "one in flight, one queued")
        for task in (queued, flying):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert (pool.in_flight, pool._queue) == (1, [])
        settled = asyncio.create_task(pool.settled(target.path))
        await pool.settled(source.path)
        await asyncio.sleep(0)
        assert not settled.done()
        os.kill(pool.pids[0], signal.SIGCONT)
        await settled
        assert pool.in_flight == 0
        assert read(target) == content
        assert_moved(await pool.run(Checksum(source, 0, MIB)), content)
        assert pool.restarts == 0


async def test_closing_refuses_what_waits_and_ends_what_hangs(files: Files) -> None:
    source = files.memory(MIB, content_of(MIB))
    async with pool_of(movers=1, threads=1) as pool:
        await pool.run(Checksum(source, 0, MIB))
        os.kill(pool.pids[0], signal.SIGSTOP)
        flying = asyncio.create_task(pool.run(Checksum(source, 0, MIB)))
        queued = asyncio.create_task(pool.run(Checksum(source, 0, MIB)))
        await until(lambda: pool.in_flight == 1 and len(pool._queue) == 1, "one in flight, one queued")
        await pool.close(0.1)
        with pytest.raises(UnavailableError):
            await queued
        with pytest.raises(MoverError):
            await flying
        with pytest.raises(UnavailableError):
            await pool.run(Checksum(source, 0, MIB))
        assert (pool.pids, pool.restarts) == ((), 0)


async def test_closing_lets_movers_finish(files: Files) -> None:
    content = content_of(CHUNK_BYTES)
    source = files.memory(CHUNK_BYTES, content)
    async with pool_of(movers=1, threads=2) as pool:
        await pool.run(Checksum(source, 0, 1))
        running = asyncio.create_task(pool.run(Checksum(source, 0, CHUNK_BYTES)))
        await asyncio.sleep(0)
        assert pool.in_flight == 1
        await pool.close(30.0)
        assert_moved(await running, content)


async def test_a_mover_that_talks_nonsense_is_replaced(files: Files, tmp_path, monkeypatch) -> None:
    content = content_of(MIB)
    source = files.memory(MIB, content)
    child = tmp_path / "child"
    real = tmp_path / "python"
    # Its first start talks nonsense, and leaves a program behind that holds its pipes open.
    real.write_text(
        f'#!/bin/sh\nif [ -e {child} ]; then exec {sys.executable} "$@"; fi\n'
        f"sleep 600 &\necho $! > {child}\necho hello\nwait\n"
    )
    real.chmod(0o755)
    monkeypatch.setattr(process_module.sys, "executable", str(real))
    async with pool_of(movers=1, threads=1) as pool:
        assert_moved(await pool.run(Checksum(source, 0, MIB)), content)
        assert pool.restarts == 1
        os.kill(int(child.read_text()), signal.SIGKILL)


async def test_movers_that_cannot_start_are_reported_with_their_last_words(files: Files, tmp_path, monkeypatch) -> None:
    source = files.memory(MIB, content_of(MIB))
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'no module named sense' >&2\nexit 3\n")
    fake.chmod(0o755)
    async with pool_of(movers=2, threads=1) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(process_module.sys, "executable", str(fake))
            with pytest.raises(MoverError, match=r"keep dying.*exit status 3.*no module named sense"):
                await pool.run(Checksum(source, 0, MIB))
            patch.setattr(process_module.sys, "executable", str(tmp_path / "missing"))
            with pytest.raises(MoverError, match=r"keep dying.*No such file"):
                await pool.run(Checksum(source, 0, MIB))
        assert_moved(await pool.run(Checksum(source, 0, MIB)), read(source))


async def test_signals_of_a_terminal_do_not_end_a_mover(files: Files) -> None:
    source = files.memory(MIB, content_of(MIB))
    async with pool_of(movers=1, threads=1) as pool:
        await pool.run(Checksum(source, 0, MIB))
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pool.pids[0], number)
        await pool.run(Checksum(source, 0, MIB))
        assert pool.restarts == 0
        assert os.getpriority(os.PRIO_PROCESS, pool.pids[0]) >= min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5)


OWNER = """
import asyncio, sys
from cached.clock import SystemClock
from cached.levels.base import FileRef
from cached.transfer.jobs import Checksum
from cached.transfer.pool import MoverPool

async def main():
    pool = MoverPool(movers=1, threads=1, nice=0, idle_timeout_s=60.0, clock=SystemClock())
    await pool.run(Checksum(FileRef(sys.argv[1], int(sys.argv[2]), 1, True), 0, 1))
    print(*pool.pids, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_a_mover_dies_with_a_killed_daemon(files: Files) -> None:
    ref = files.memory(1, b"x")
    with subprocess.Popen([sys.executable, "-c", OWNER, ref.path, str(ref.inode)], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        mover = psutil.Process(int(owner.stdout.readline()))
        # Stopped, it cannot notice the end of its standard input: only the kernel ends it.
        mover.suspend()
        owner.kill()
    assert psutil.wait_procs([mover], timeout=DEADLINE_S)[1] == [] or mover.status() == psutil.STATUS_ZOMBIE


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

def sparse(name, memory):
    with open(f"{small}/{name}", "xb") as file:
        file.truncate(16 * MIB)
        return FileRef(file.name, os.fstat(file.fileno()).st_ino, 16 * MIB, memory)

async def main():
    pool = MoverPool(movers=1, threads=1, nice=0, idle_timeout_s=60.0, clock=SystemClock())
    spec = OriginSpec(f"file://{origin}")
    item = (await pool.run(ListObjects(spec))).items[0]
    found = os.stat(f"{origin}/{item.path}")
    source = FileRef(f"{origin}/{item.path}", found.st_ino, found.st_size, False)
    memory, disk = sparse("memory", True), sparse("disk", False)
    for job in [
        Fetch(spec, item, 0, 16 * MIB, memory),
        Copy(source, memory, 0, 16 * MIB),
        Fetch(spec, item, 0, 16 * MIB, disk),
        Copy(source, disk, 0, 16 * MIB),
        Clear(memory),
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
def test_a_shortage_of_pages_or_disk_is_an_error_and_kills_nobody(files: Files, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", small], check=False).returncode != 0:
        pytest.skip("no mounts in a user namespace here")
    files.object("model", content_of(CHUNK_BYTES))
    script = textwrap.dedent(SHORTAGE)
    command = f'mount -t tmpfs -o size=8m none "{small}" && exec "{sys.executable}" -c "$0" "{small}" "{files.origin}"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, script], check=False, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["Fetch l1", "Copy l1", "Fetch l2", "Copy l2", "Clear l1", "0", ""]
