"""Writes a blob of L1 to L2, behind its arrival. A disk that fails never fails the load: the cache is degraded then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from cached.cache.pace import Pace, Written
from cached.cache.services import Services
from cached.errors import CachedError, IntegrityError, LevelError, MoverError, NotFoundError, UnavailableError
from cached.level import Level
from cached.levels.base import FileRef
from cached.manifest import BlobRecord
from cached.signals import run_all
from cached.transfer.fill import Fill
from cached.transfer.jobs import Copy, Moved
from cached.units import CHUNK_BYTES, chunk_count, chunk_length

_WIDTH = 2
"""Chunks of one blob written at a time: enough to keep a drive busy, few enough to leave the movers to the pull."""

_PRIORITY_BEHIND = 1_000_000_000
"""Arriving bytes go first; lower is sooner."""

_log = structlog.get_logger(__name__)


class Persist:
    """One blob's way from L1 to an L2 ingest that is open. ``behind`` or ``whole``, then ``finish`` or ``abandon``."""

    def __init__(
        self,
        services: Services,
        *,
        ingest_id: str,
        target: FileRef,
        source: Callable[[], FileRef],
        on_chunk: Callable[[int], None] = lambda _index: None,
        digest: str = "",
    ) -> None:
        self._services = services
        self._ingest_id = ingest_id
        self.target = target
        self._source = source
        self._on_chunk = on_chunk
        self._taken: set[int] = set()
        self.written = Written(digest, target.size_bytes, Pace(services.clock.monotonic_s()))
        self.error: CachedError | None = None

    def already(self, index: int) -> None:
        """This chunk is in the L2 ingest, verified: it need not be written."""
        self._taken.add(index)
        self._count(index)

    def _count(self, index: int) -> None:
        length = chunk_length(self.target.size_bytes, index)
        self.written.add(index, length, self._services.clock.monotonic_s())

    async def behind(self, fill: Fill) -> None:
        """Copies every chunk of ``fill`` after it was verified. Keeps an error in ``error`` instead of raising it."""
        position = 0

        async def follow() -> None:
            nonlocal position
            while True:
                while position == len(fill.order):
                    if fill.chunks_done:
                        return
                    await fill.signal.wait()
                index = fill.order[position]
                position += 1
                await self._copy(index, fill.crc64[index])

        await self._guarded(*(follow() for _ in range(_WIDTH)))

    async def whole(self, record: BlobRecord) -> None:
        """Copies a blob that is in L1 already."""
        pending = iter(range(chunk_count(record.size_bytes)))

        async def work() -> None:
            for index in pending:
                await self._copy(index, record.crc64[index])

        await self._guarded(*(work() for _ in range(_WIDTH)))

    async def finish(self, record: BlobRecord) -> bool:
        """Commits the copy as the blob. False when the daemon ends, or anything failed: the level is degraded then."""
        if self.error is None:
            try:
                await self._services.storage.commit(Level.L2, self._ingest_id, record)
            except CachedError as error:
                self.error = error
        if self.error is None:
            self._services.landed(record, Level.L2)
            self._services.l2_written(record.digest)
            return True
        self.abandon()
        if isinstance(self.error, UnavailableError):  # the daemon ends: the next one writes it
            _log.info("l2.write_put_off", digest=record.digest, why=str(self.error))
            return False
        self._services.unwritten.add(record.digest)
        self._services.failures.report(
            "l2.write_failed",
            self.error,
            f"L2 could not be written, the blob stays in L1: {self.error.message}",
            digest=record.digest,
        )
        self._services.degraded.began("l2", f"L2 could not be written: {self.error.message}", self.error)
        return False

    def abandon(self) -> None:
        """Drops what was copied."""
        self._services.storage.discard(Level.L2, self._ingest_id)

    async def _guarded(self, *works: Coroutine[Any, Any, None]) -> None:
        try:
            await run_all(*works)
        except CachedError as error:
            self.error = error

    async def _copy(self, index: int, crc64: int) -> None:
        if index in self._taken:
            return
        self._taken.add(index)
        offset, length = index * CHUNK_BYTES, chunk_length(self.target.size_bytes, index)
        while True:
            source = self._source()
            try:
                async with self._services.write_slots:
                    answer = await self._services.runner.run(
                        Copy(source, self.target, offset, length, crc64), priority=_PRIORITY_BEHIND
                    )
                break
            except (LevelError, NotFoundError):
                # The segment gets its final name while we copy: look where it is now.
                if self._source() == source:
                    raise
        if not isinstance(answer, Moved):
            raise MoverError("a mover answered a copy with something else")
        self._services.moved("l1_l2", answer.length_bytes, answer.busy_s, answer.cpu_s)
        self._count(index)
        self._on_chunk(index)


async def persist_resident(services: Services, record: BlobRecord, source: Callable[[], FileRef]) -> bool:
    """Writes a blob that is in L1, confirmed, to L2; its L2 bytes must be reserved under ``record.digest[:32]``."""
    ingest_id = record.digest[:32]
    persist = Persist(
        services, ingest_id=ingest_id, target=services.storage.level(Level.L2).ingest(ingest_id), source=source,
        digest=record.digest,
    )  # fmt: skip
    services.writes[ingest_id] = persist.written
    try:
        await persist.whole(record)
    except asyncio.CancelledError:
        persist.abandon()
        raise
    finally:
        del services.writes[ingest_id]
    if isinstance(persist.error, IntegrityError):
        services.metrics.checksum_failures.labels(level="l1").inc()
    return await persist.finish(record)
