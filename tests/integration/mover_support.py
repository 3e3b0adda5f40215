"""What the tests of movers share: files at both levels, a pool that is closed and looked after."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import psutil

from cached.checksum import crc64nvme
from cached.clock import SystemClock
from cached.levels.base import FileRef
from cached.origins.base import OriginObject, OriginSpec
from cached.transfer.jobs import (
    Listing,
    Moved,
    StatObjects,
)
from cached.transfer.pool import MoverPool
from cached.transfer.worker import Worker

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


@contextmanager
def temporary_files(folder: Path) -> Iterator[Files]:
    """Files below ``folder`` and, until the end, in shared memory."""
    prefix = f"/dev/shm/cached-test-{secrets.token_hex(6)}-"
    try:
        yield Files(folder, prefix)
    finally:
        for path in Path("/dev/shm").glob(f"{Path(prefix).name}*"):
            path.unlink()


class MovableClock(SystemClock):
    """The machine's clock, which a test can put forward."""

    ahead_s = 0.0
    readings = 0

    def monotonic_s(self) -> float:
        self.readings += 1
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
