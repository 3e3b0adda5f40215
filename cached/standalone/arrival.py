"""One file on its way into the folder: fetched, verified, checked as a whole, durable; not yet with its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cached.cache.checks import confirm_origin_checksum, confirm_sha256
from cached.cache.flight import BlobOrder
from cached.errors import CachedError, IntegrityError, ObjectChangedError
from cached.level import Level
from cached.levels.base import FileRef
from cached.levels.journal import IngestJournal
from cached.manifest import BlobRecord
from cached.signals import in_thread
from cached.standalone.engine import Tools
from cached.standalone.folder import SeedFolder, in_plain_words
from cached.transfer.fill import Fill, Observer, Sources


@dataclass(frozen=True, slots=True)
class Kept:
    """Content that is whole in the folder under another name."""

    ref: FileRef
    record: BlobRecord


@dataclass(slots=True)
class Arrival:
    """The ingest of ``order`` must exist; ``resumed``: with what an earlier pull left in it. Then ``run`` once."""

    tools: Tools
    folder: SeedFolder
    order: BlobOrder
    priority: int
    resumed: bool = False
    kept: Kept | None = None
    on_retry: Callable[[CachedError], None] = lambda _error: None
    record: BlobRecord | None = None
    _fill: Fill | None = field(default=None, init=False)
    _journal: IngestJournal | None = field(default=None, init=False)

    @property
    def done_bytes(self) -> int:
        """Verified so far."""
        return self._fill.done_bytes if self._fill else 0

    @property
    def bytes_from(self) -> Mapping[Level, int]:
        """The same by where they came from; L1: in place."""
        return self._fill.bytes_from if self._fill else dict.fromkeys(Level, 0)

    async def run(self) -> BlobRecord:
        """Until it is a blob of ``folder.incoming``. What was verified is kept unless it turned out to be worthless."""
        level, order = self.folder.incoming, self.order
        fill = self._fill = self._make()
        try:
            await fill.run()
            record = self.record = await self._checked(fill)
            await in_thread(level.commit, order.ingest_id, record.digest)
        except CachedError as error:
            await self.tools.runner.settled(fill.target.path)
            if isinstance(error, IntegrityError | ObjectChangedError):
                level.discard(order.ingest_id)
                self._forget()
            error.fields.setdefault("name", order.name)
            error.fields.setdefault("path", order.path)
            raise in_plain_words(error, self.folder.root) from error
        finally:
            await self.tools.runner.settled(fill.target.path)
            if self._journal is not None:
                if self.record is not None:
                    self._journal.landed(self.record.digest)
                self._journal.close()
        return record

    def _make(self) -> Fill:
        order, kept = self.order, self.kept
        record = order.record or (kept.record if kept else None)
        self._journal = journal_of(self.folder, order)
        noted = {index: chunk.crc64 for index, chunk in self._journal.chunks.items()}
        return Fill(
            key=order.ingest_id,
            runner=self.tools.runner,
            clock=self.tools.clock,
            target=self.folder.incoming.ingest(order.ingest_id),
            sources=Sources(
                in_place=frozenset(noted) if self.resumed else frozenset(),
                disk=kept.ref if kept else None,
                origin=order.origin,
                expected=noted | (dict(enumerate(record.crc64)) if record else {}),
            ),
            retry=self.tools.retry,
            width=self.tools.width,
            priority=self.priority,
            with_sha256=record is None,
            observer=Observer(on_chunk=self._note, on_retry=self._retried),
        )

    async def _checked(self, fill: Fill) -> BlobRecord:
        if self.order.record is not None:
            return self.order.record
        if self.kept is not None:
            return self.kept.record
        if self.order.sha256:
            confirm_sha256(self.order, fill.sha256)
        else:
            await confirm_origin_checksum(self.tools.runner, self.order, fill)
        crc64 = tuple(fill.crc64[index] for index in range(fill.chunk_count))
        return BlobRecord(digest=fill.sha256, size_bytes=fill.size_bytes, crc64=crc64)

    def _note(self, index: int, crc64: int, _from: Level) -> None:
        if self._journal is not None:
            self._journal.chunk(index, crc64, Level.L2)

    def _retried(self, error: CachedError) -> None:
        self.tools.metrics.retries.labels(reason=error.reason).inc()
        self.on_retry(error)

    def _forget(self) -> None:
        if self._journal is not None:
            self._journal.delete()
            self._journal = None


def journal_of(folder: SeedFolder, order: BlobOrder) -> IngestJournal:
    """The journal of an order, to go on with. Close it."""
    return IngestJournal.open(
        folder.journals / order.ingest_id, source_key=order.digest or order.source_key, size_bytes=order.size_bytes
    )
