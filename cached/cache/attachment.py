"""A worker's hold on a revision, from its opening to its end: what it is told, and what it may have."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Self

from cached.cache.load import Load
from cached.cache.services import Services
from cached.errors import InvalidRequestError, NotFoundError
from cached.leases import Lease
from cached.manifest import Manifest
from cached.types import (
    AttachedFile,
    AttachEvent,
    ByteRange,
    CheckedBy,
    Complete,
    Damaged,
    Level,
    Opened,
    RangesReady,
)
from cached.units import CHUNK_BYTES

_COALESCE_S = 0.02
"""Verified chunks are announced at most this often: a worker's copy loop wants long ranges, not many messages."""


class Attachment:
    """An async context manager; leaving it, however that happens, ends the lease. Made by ``ModelCache.attach``."""

    def __init__(
        self, services: Services, lease: Lease, content: Manifest | Load, on_close: Callable[[Attachment], None]
    ) -> None:
        self.lease = lease
        self._services = services
        self._manifest = content if isinstance(content, Manifest) else None
        self._load = content if isinstance(content, Load) else None
        self._on_close = on_close
        self._notices: deque[Damaged] = deque(maxlen=1000)
        self._closed = False
        self._wake = asyncio.Event()

    @property
    def lease_id(self) -> str:
        """The lease's public name."""
        return self.lease.lease_id

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the lease; ``events`` finishes. Idempotent."""
        if not self._closed:
            self._closed = True
            self._wake.set()
            self._on_close(self)

    def notice(self, damaged: Damaged) -> None:
        """Tells the holder about damage in what it maps."""
        self._notices.append(damaged)
        self._wake.set()

    async def events(self) -> AsyncIterator[AttachEvent]:
        """Opened first; ranges as they are verified; Complete; then only notices, until the lease is closed.

        Raises the load's error when the revision cannot be brought.
        """
        if self._load is None:
            yield self._opened(Complete(Level.L1, 0, 0, self._total_bytes(), 0.0, self._checked_by()))
        else:
            await self._load.until(lambda: self._load is not None and self._load.opened)
            yield self._opened(None)
            async for event in self._arrivals(self._load):
                yield event
        while not self._closed:
            self._wake.clear()
            while self._notices:
                yield self._notices.popleft()
            if not self._closed:
                await self._wake.wait()

    async def _arrivals(self, load: Load) -> AsyncIterator[AttachEvent]:
        cursor = [0] * len(load.plan.files)
        resident = [
            ByteRange(index, 0, file.size_bytes)
            for index, file in enumerate(load.plan.files)
            if load.flight_of(file) is None and file.size_bytes
        ]
        if resident:
            yield RangesReady(tuple(resident))
        while not self._closed:
            ranges = _new_ranges(load, cursor)
            if ranges:
                yield RangesReady(ranges)
            if load.ready_as is not None:
                self.lease.complete = True
                yield load.ready_as
                return
            if load.error is not None:
                raise load.error
            if not ranges:
                await self._next_change(load)
            else:
                await self._services.clock.sleep(_COALESCE_S)

    async def _next_change(self, load: Load) -> None:
        """Until the load changes or the lease is closed."""
        waits = [asyncio.ensure_future(load.signal.wait()), asyncio.ensure_future(self._wake.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    def _opened(self, complete: Complete | None) -> Opened:
        self.lease.complete = complete is not None
        return Opened(
            lease_id=self.lease.lease_id,
            token=self.lease.token,
            name=self.lease.name,
            revision=self.lease.revision,
            files=self._files(),
            complete=complete,
        )

    def _files(self) -> tuple[AttachedFile, ...]:
        if self._load is not None:
            files = self._load.plan.files
            return tuple(AttachedFile(i, file.path, file.size_bytes, file.digest) for i, file in enumerate(files))
        entries = self._known().files
        return tuple(AttachedFile(i, entry.path, entry.size_bytes, entry.digest) for i, entry in enumerate(entries))

    def _known(self) -> Manifest:
        if self._manifest is None:
            raise NotFoundError("the revision is not recorded yet", ref=self.lease.name)
        return self._manifest

    def _total_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self._known().files)

    def _checked_by(self) -> CheckedBy:
        return self._known().checked_by

    def open_descriptors(self, indices: Sequence[int]) -> list[int]:
        """New read-only descriptors of these files' segments, in order; the caller closes them."""
        files = self._files()
        wrong = [index for index in indices if not 0 <= index < len(files)]
        if wrong:
            raise InvalidRequestError(
                f"{self.lease.name} has no file {wrong[0]}",
                hint="use the indices of the Opened message",
                value=wrong[0],
            )
        opened: list[int] = []
        try:
            opened.extend(self._open(index) for index in indices)
        except BaseException:
            _close_all(opened)
            raise
        return opened

    def _open(self, index: int) -> int:
        storage = self._services.storage
        if self._load is not None:
            flight = self._load.flight_of(self._load.plan.files[index])
            if flight is not None and flight.record is None and not flight.order.adopt:
                return storage.l1.open_ingest(flight.order.ingest_id)
            digest = flight.record.digest if flight and flight.record else self._load.plan.files[index].digest
            return storage.l1.open_blob(digest)
        return storage.l1.open_blob(self._known().files[index].digest)


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _new_ranges(load: Load, cursor: list[int]) -> tuple[ByteRange, ...]:
    """What was verified since ``cursor``, neighbours joined; moves the cursor."""
    found: list[ByteRange] = []
    for index, file in enumerate(load.plan.files):
        flight = load.flight_of(file)
        if flight is None or cursor[index] == len(flight.fill.order):
            continue
        chunks = sorted(flight.fill.order[cursor[index] :])
        cursor[index] = len(flight.fill.order)
        start = previous = chunks[0]
        for chunk in [*chunks[1:], -1]:
            if chunk == previous + 1:
                previous = chunk
                continue
            end = min((previous + 1) * CHUNK_BYTES, file.size_bytes)
            found.append(ByteRange(index, start * CHUNK_BYTES, end - start * CHUNK_BYTES))
            start = previous = chunk
    return tuple(found)
