"""L2 where the disk hangs: who waits is told, what is not carried out yet counts, and in the end nothing is left."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from cached.cache import disk_work
from cached.cache.disk_work import DiskWork
from cached.errors import LevelError
from cached.ledger import Ledger
from cached.level import Level
from cached.levels import disk
from cached.levels.disk import DiskLevel
from cached.signals import Signal, Threads

CONTENT = b"weights" * 100
DIGEST = hashlib.sha256(CONTENT).hexdigest()
INGEST = DIGEST[:32]
OTHER = "b" * 32


class Hanging(DiskLevel):
    """A disk that answers nothing until ``answer``, from the moment on that it is told to hang."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.answer = threading.Event()
        self.answer.set()

    def create(self, ingest_id, size_bytes):
        self.answer.wait(30)
        return super().create(ingest_id, size_bytes)

    def commit(self, ingest_id, digest):
        self.answer.wait(30)
        return super().commit(ingest_id, digest)

    def discard(self, ingest_id, *, later=lambda work: work()):
        assert self.answer.is_set() or threading.current_thread() is not threading.main_thread(), "the loop would hang"
        self.answer.wait(30)
        super().discard(ingest_id, later=later)

    def remove(self, digest, *, later=lambda work: work()):
        if self.answer.is_set():
            super().remove(digest, later=later)
        elif threading.current_thread() is threading.main_thread():
            later(lambda: self.answer.wait(30))
        else:
            self.answer.wait(30)
            super().remove(digest, later=later)


class Scene:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.disk = Hanging(folder / "l2")
        self.disk.scan()
        self.ledger = Ledger(Level.L2, 1_000_000)
        self.work = DiskWork(self.disk, self.ledger, Signal())
        self.heard: list[LevelError | None] = []
        self.work.on_hang = self.heard.append

    async def arrived(self, ingest_id: str = INGEST) -> None:
        """An open ingest with all of its bytes."""
        self.ledger.reserve(ingest_id, len(CONTENT))
        await self.work.create({ingest_id: len(CONTENT)})
        Path(self.disk.ingest(ingest_id).path).write_bytes(CONTENT)

    async def landed(self) -> None:
        """A blob whose bytes the ledger still holds for its ingest."""
        await self.arrived()
        await self.work.commit(INGEST, DIGEST, len(CONTENT), lambda: False)

    def hang(self) -> None:
        """From now on nothing is answered, and calls are given up soon. Only now: a disk that answers may be slow."""
        self._monkeypatch.setattr(disk_work, "ANSWER_S", 0.1)
        self.disk.answer.clear()

    def answer(self) -> None:
        self._monkeypatch.setattr(disk_work, "ANSWER_S", 30.0)
        self.disk.answer.set()

    async def answered(self) -> None:
        self.answer()
        async with asyncio.timeout(10):
            while self.work.hangs:
                await asyncio.sleep(0.01)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    made = Scene(tmp_path, monkeypatch)
    yield made
    made.answer()


async def test_a_commit_that_hangs_is_told_counts_until_it_ends_and_leaves_nothing(scene: Scene) -> None:
    await scene.arrived()
    scene.hang()
    with pytest.raises(LevelError, match=r"l2: the disk has not answered for 0 s \(commit\)") as caught:
        await scene.work.commit(INGEST, DIGEST, len(CONTENT), lambda: False)
    assert caught.value.fields["level"] == "l2"
    assert scene.heard == [caught.value]
    assert (scene.ledger.used_bytes, scene.ledger.reserved_bytes) == (len(CONTENT), 0), "the bytes are still there"
    with pytest.raises(LevelError, match="has not answered an earlier call yet"):
        await scene.work.create({OTHER: 1})
    with pytest.raises(LevelError, match="has not answered an earlier call yet"):
        await scene.work.freed()
    await scene.answered()
    assert scene.heard == [caught.value, None]
    assert scene.ledger.used_bytes == 0
    found = scene.disk.scan()
    assert (found.blobs, found.ingests) == ({}, {}), "nobody was told of it"
    await scene.arrived()
    assert (await scene.work.commit(INGEST, DIGEST, len(CONTENT), lambda: False)).size_bytes == len(CONTENT)


async def test_a_late_commit_of_what_is_there_already_leaves_that_there(scene: Scene) -> None:
    await scene.landed()
    scene.ledger.release(INGEST)
    await scene.arrived(OTHER)
    scene.hang()
    with pytest.raises(LevelError):
        await scene.work.commit(OTHER, DIGEST, len(CONTENT), lambda: True)
    await scene.answered()
    found = scene.disk.scan()
    assert (set(found.blobs), found.ingests) == ({DIGEST}, {})


async def test_blocks_that_are_not_given_in_time_are_given_back(scene: Scene) -> None:
    scene.hang()
    for ingest_id in (INGEST, OTHER):
        scene.ledger.reserve(ingest_id, 4096)
    with pytest.raises(LevelError, match="allocate"):
        await scene.work.create({INGEST: 4096, OTHER: 4096})
    assert scene.ledger.used_bytes == 8192
    await scene.answered()
    assert scene.ledger.used_bytes == 0
    assert scene.disk.scan().ingests == {}


async def test_while_it_hangs_the_loop_drops_nothing_itself(scene: Scene) -> None:
    await scene.landed()
    scene.ledger.commit(INGEST, f"blob:{DIGEST}")
    await scene.arrived(OTHER)
    scene.ledger.reserve("c" * 32, 4096)
    scene.hang()
    with pytest.raises(LevelError):
        await scene.work.create({"c" * 32: 4096})
    scene.work.discard(OTHER, scene.ledger.release(OTHER))
    scene.work.remove(DIGEST, scene.ledger.remove(f"blob:{DIGEST}"))
    assert scene.ledger.used_bytes == 2 * len(CONTENT) + 4096
    await scene.answered()
    assert scene.ledger.used_bytes == 0
    found = scene.disk.scan()
    assert (found.blobs, found.ingests) == ({}, {})


async def test_who_is_cancelled_waits_for_a_disk_that_hangs_no_longer_than_others(scene: Scene) -> None:
    await scene.arrived()
    scene.hang()
    task = asyncio.create_task(scene.work.commit(INGEST, DIGEST, len(CONTENT), lambda: False))
    await asyncio.sleep(0.01)
    task.cancel()
    async with asyncio.timeout(10):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert scene.work.hangs
    await scene.answered()
    assert scene.ledger.used_bytes == 0
    assert scene.disk.scan().blobs == {}


async def test_bytes_that_the_disk_does_not_give_back_are_not_waited_for_without_end(scene: Scene) -> None:
    await scene.landed()
    scene.hang()
    scene.work.remove(DIGEST, len(CONTENT))
    with pytest.raises(LevelError, match=r"\(free\)"):
        await scene.work.freed()
    await scene.answered()
    await scene.work.freed()


async def test_a_mover_that_cannot_be_ended_means_a_disk_that_hangs(scene: Scene) -> None:
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    await scene.arrived()
    scene.work.hang_until(gone)
    assert scene.heard[0] is not None
    with pytest.raises(LevelError):
        await scene.work.commit(INGEST, DIGEST, len(CONTENT), lambda: False)
    scene.work.discard(INGEST, scene.ledger.release(INGEST))
    gone.set_result(None)
    await scene.answered()
    assert scene.heard[1:] == [None]
    assert (scene.ledger.used_bytes, scene.disk.scan().ingests) == (0, {})


async def test_an_ingest_that_the_disk_keeps_fails_nobody_and_is_in_nobodys_way(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scene.arrived()
    with monkeypatch.context() as read_only:
        read_only.setattr(disk, "_remove_ingest", Mock(side_effect=OSError(errno.EROFS, os.strerror(errno.EROFS))))
        scene.work.discard(INGEST, scene.ledger.release(INGEST))
        with pytest.raises(LevelError, match="Read-only file system"):
            await scene.work.create({INGEST: len(CONTENT)})
    assert scene.disk.ingest(INGEST)
    await scene.arrived()
    await scene.work.commit(INGEST, DIGEST, len(CONTENT), lambda: False)


async def test_a_blob_that_came_another_way_stays_though_a_commit_of_it_is_cancelled(scene: Scene) -> None:
    await scene.arrived()
    await scene.arrived(OTHER)
    landed: list[str] = []
    scene.disk.answer.clear()  # held back for a moment, and given up by nobody
    tasks = [
        asyncio.create_task(scene.work.commit(ingest_id, DIGEST, len(CONTENT), lambda: bool(landed)))
        for ingest_id in (INGEST, OTHER)
    ]
    await asyncio.sleep(0)
    tasks[1].cancel()
    scene.disk.answer.set()
    landed.append((await tasks[0]).path)
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    assert set(scene.disk.scan().blobs) == {DIGEST}


async def test_an_end_does_not_wait_for_what_hangs(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_work, "_END_S", 0.05)
    await scene.landed()
    scene.hang()
    scene.work.remove(DIGEST, len(CONTENT))
    async with asyncio.timeout(10):
        await scene.work.close()


async def test_threads_are_begun_as_they_are_needed_kept_and_ended() -> None:
    threads, loop = Threads(2, "test"), asyncio.get_running_loop()
    names = {await loop.run_in_executor(threads, lambda: threading.current_thread().name) for _ in range(5)}
    assert names <= {"test_1", "test_2"}
    hold = threading.Event()
    held = [loop.run_in_executor(threads, hold.wait, 10) for _ in range(3)]
    await asyncio.sleep(0.01)
    running = [thread for thread in threading.enumerate() if thread.name in {"test_1", "test_2"}]
    assert len(running) == 2
    assert all(thread.daemon for thread in running)
    hold.set()
    assert await asyncio.gather(*held) == [True] * 3
    with pytest.raises(ZeroDivisionError):
        await loop.run_in_executor(threads, lambda: 1 / 0)
    threads.shutdown()
    for thread in running:
        thread.join(10)
    with pytest.raises(RuntimeError, match="have ended"):
        threads.submit(print)
