"""A worker's hold on a revision, from its opening to its end: what it is told, and what it may have."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from cached.cache.attach_watch import AttachWatch
from cached.cache.content import Content
from cached.cache.flight import Flight
from cached.cache.load import Load
from cached.cache.services import Services
from cached.errors import CachedError, InvalidRequestError, NotFoundError
from cached.leases import Lease
from cached.level import Level
from cached.manifest import Manifest
from cached.transfer.fill import Fill
from cached.types import (
    AttachedFile,
    AttachEvent,
    ByteRange,
    CheckedBy,
    Complete,
    Damage,
    Damaged,
    Opened,
    RangesReady,
)
from cached.units import CHUNK_BYTES

_COALESCE_S = 0.02
_MAX_COALESCE_S = 0.1
_COALESCE_SHARE = 0.1
"""Verified chunks are announced so often at most, less often the longer it takes (by this share of it): a worker's copy
loop wants long ranges, not many messages, and each costs both sides. The end is never waited for."""


class _Arriving:
    """A file of which not everything was announced yet."""

    def __init__(self, index: int, fill: Fill) -> None:
        self._index = index
        self._fill = fill
        self._announced = 0

    @property
    def finished(self) -> bool:
        """Everything was announced."""
        return self._announced == self._fill.chunk_count

    def take(self) -> list[ByteRange]:
        """What was verified since the last time, in the order of the file, neighbours joined."""
        chunks = sorted(self._fill.order[self._announced :])
        self._announced += len(chunks)
        found: list[ByteRange] = []
        for first, last in _runs(chunks):
            begin, end = first * CHUNK_BYTES, min((last + 1) * CHUNK_BYTES, self._fill.size_bytes)
            found.append(ByteRange(self._index, begin, end - begin))
        return found


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    ends = [at for at, number in enumerate(numbers) if at + 1 == len(numbers) or numbers[at + 1] != number + 1]
    for begin, end in zip([0, *(at + 1 for at in ends)], ends, strict=False):
        yield numbers[begin], numbers[end]


class Attachment:
    """An async context manager; leaving it, however that happens, ends the lease. Made by ``ModelCache.attach``."""

    def __init__(
        self,
        services: Services,
        lease: Lease,
        content: Content,
        on_close: Callable[[Attachment], None],
        watch: AttachWatch,
    ) -> None:
        self.lease = lease
        self._watch = watch
        self._services = services
        self._manifest = content.source if isinstance(content.source, Manifest) else None
        self._load = content.source if isinstance(content.source, Load) else None
        self._chosen = content.chosen
        self._on_close = on_close
        self._notices: deque[Damaged] = deque(maxlen=1000)
        self._closed = False
        self._wake = asyncio.Event()

    @property
    def lease_id(self) -> str:
        """The lease's public name."""
        return self.lease.lease_id

    @property
    def is_here(self) -> bool:
        """All of it was in L1 when the lease began."""
        return self._load is None

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
            self._watch.ended()

    def tell(self, damage: Damage) -> None:
        """Tells the holder about damage in L1, under every path by which it has the blob; nothing if it has it not."""
        model = self._services.registry.models.get(self.lease.name)
        manifest = model.manifests.get(self.lease.revision) if model is not None else None
        for index, entry in enumerate(manifest.files if manifest is not None else ()):
            if entry.digest == damage.sha256:
                self._notices.append(Damaged(index, damage.offset_bytes, damage.length_bytes))
                self._wake.set()

    async def events(self) -> AsyncGenerator[AttachEvent]:
        """Opened first; ranges as they are verified; Complete; then only notices, until the lease is closed.

        Raises the load's error when the revision cannot be brought.
        """
        if self._load is None:
            reused_bytes = self._total_bytes() if self._chosen is None else self._chosen.size_bytes
            partial = self._chosen is not None
            complete = Complete(Level.L1, 0, 0, reused_bytes, 0.0, self._checked_by(), partial=partial)
            self._watch.completed(self.lease, complete)
            yield self._opened(complete)
        else:
            await self._until_opened(self._load)
            yield self._opened(None)
            async for event in self._arrivals(self._load):
                yield event
        while not self._closed:
            self._wake.clear()
            while self._notices:
                yield self._notices.popleft()
            if not self._closed:
                await self._wake.wait()

    async def _until_opened(self, load: Load) -> None:
        try:
            await load.until(lambda: load.opened)
        except CachedError as error:
            self._watch.failed(error)
            raise

    async def _arrivals(self, load: Load) -> AsyncIterator[AttachEvent]:
        arriving = [
            _Arriving(index, flight.fill)
            for index, file in enumerate(load.plan.files)
            if (flight := load.flight_of(file)) is not None
        ]
        resident = [
            ByteRange(index, 0, file.size_bytes)
            for index, file in enumerate(load.plan.files)
            if load.flight_of(file) is None and file.size_bytes and not file.left_out
        ]
        if resident:
            yield RangesReady(tuple(resident))
        clock = self._services.clock
        began_s = 0.0
        while not self._closed:
            self._wake.clear()  # also set by notices, which wait until all of it is there
            ranges = tuple(item for file in arriving for item in file.take())
            arriving = [file for file in arriving if not file.finished]
            if ranges:
                self._watch.arrived()
                yield RangesReady(ranges)
            complete = self._completed(load)
            if complete is not None:
                self.lease.complete = True
                self._watch.completed(self.lease, complete)
                yield complete
                return
            if load.error is not None:
                self._watch.failed(load.error)
                raise load.error
            if not ranges:
                await _first_of(load.signal.next(), self._wake.wait())
            else:
                began_s = began_s or clock.monotonic_s()
                pause_s = max(_COALESCE_S, min(_MAX_COALESCE_S, _COALESCE_SHARE * (clock.monotonic_s() - began_s)))
                await _first_of(clock.sleep(pause_s), _end_of(load), self._wake.wait())

    def _completed(self, load: Load) -> Complete | None:
        """What was asked for is there. Of a load that brings more, no more than that is waited for."""
        if self._chosen is None or load.plan.is_part:
            return load.ready_as
        if not load.has_arrived(self._chosen.chunks):
            return None
        # The check of whole files is still to come.
        checked_by = CheckedBy.FIRST_SEEN if load.plan.manifest is None else load.checked_by
        return replace(load.completion(), partial=True, checked_by=checked_by)

    def _opened(self, complete: Complete | None) -> Opened:
        self.lease.complete = complete is not None
        return Opened(
            lease_id=self.lease.lease_id,
            token=self.lease.token,
            name=self.lease.name,
            revision=self.lease.revision,
            files=self._files(),
            complete=complete,
            selected=self._chosen.selected if self._chosen is not None else None,
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
        left_out = [index for index in indices if self._chosen is not None and index not in self._chosen.chunks]
        if left_out:
            raise NotFoundError(
                f"{files[left_out[0]].path} of {self.lease.name} was left out by the selection of this attach",
                hint="select it too, or attach without a selection",
                ref=self.lease.name,
                path=files[left_out[0]].path,
            )
        opened: list[int] = []
        try:
            opened.extend(self._open(index) for index in indices)
        except BaseException:
            _close_all(opened)
            raise
        return opened

    def _open(self, index: int) -> int:
        if self._load is not None:
            flight = self._load.flight_of(self._load.plan.files[index])
            if flight is not None and flight.error is not None:
                raise flight.error  # its bytes are gone already, and why is about to be told by the stream
            if flight is not None and flight.record is None and not flight.order.adopt:
                return self._open_arriving(flight)
            digest = flight.record.digest if flight and flight.record else self._load.plan.files[index].digest
            return self._open_blob(digest)
        return self._open_blob(self._known().files[index].digest)

    def _open_blob(self, digest: str) -> int:
        """Where somebody has removed the segment, the next attach brings it again."""
        services = self._services
        try:
            return services.storage.l1.open_blob(digest)
        except NotFoundError:
            if (blob := services.registry.blobs.get(digest)) is not None:
                services.in_memory(blob)
            raise

    def _open_arriving(self, flight: Flight) -> int:
        """What is no blob yet; of a part somebody else may have made it one since."""
        l1, ingest_id = self._services.storage.l1, flight.order.ingest_id
        try:
            return l1.open_ingest(ingest_id)
        except NotFoundError:
            if digest := self.lease.holds.get(ingest_id):
                return l1.open_blob(digest)
            raise


async def _end_of(load: Load) -> None:
    """Until the load is ready or failed: that is never announced later than it could be."""
    while load.ready_as is None and load.error is None:
        await load.signal.wait()


async def _first_of(*works: Awaitable[object]) -> None:
    waits = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
