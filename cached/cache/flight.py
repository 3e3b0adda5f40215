"""One blob on its way to a level of this host, shared by every load that wants it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import structlog

from cached.cache import checks
from cached.cache.flight_journal import FlightJournal
from cached.cache.pace import Pace, Written
from cached.cache.persist import Persist
from cached.cache.registry import Presence
from cached.cache.seeds import SeedFile
from cached.cache.services import Services
from cached.errors import (
    CachedError,
    IntegrityError,
    LevelError,
    MoverError,
    NotFoundError,
    ObjectChangedError,
    OriginError,
    QuarantinedError,
    UnavailableError,
)
from cached.level import Level
from cached.levels.base import FileRef
from cached.levels.journal import JournalChunk
from cached.manifest import BlobRecord
from cached.signals import Signal, run_all
from cached.tracing import Attributes, Tracer
from cached.transfer.fill import Fill, HeadStart, Observer, OriginSource, Sources
from cached.transfer.jobs import Copy, Moved
from cached.transfer.lanes import name_of
from cached.types import CheckedBy
from cached.units import CHUNK_BYTES, chunk_length

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class BlobOrder:
    """Which blob to bring where. At least one of ``record`` and ``origin`` is known.

    ``record``: the content is known: every chunk must match it. ``sha256``: what the catalog says it must be.
    ``adopt``: it is at ``level`` already, sealed by an earlier daemon, and only has to be confirmed. ``chunks``: only
    these are wanted: it stays an ingest. ``first``: those of it that go before everything else of the load.
    """

    level: Level
    size_bytes: int
    name: str
    path: str
    record: BlobRecord | None = None
    origin: OriginSource | None = None
    sha256: str = ""
    adopt: bool = False
    persist: bool = False
    chunks: frozenset[int] | None = None
    first: frozenset[int] = frozenset()

    @property
    def is_part(self) -> bool:
        """Not all of the blob is to be brought."""
        return self.chunks is not None

    @property
    def digest(self) -> str:
        """The blob's SHA-256 if it is known beforehand, else empty."""
        return self.record.digest if self.record else self.sha256

    @property
    def ingest_id(self) -> str:
        """The same for the same content, or, while that is unknown, for the same version of the same object."""
        if self.digest:
            return self.digest[:32]
        return hashlib.sha256(self.source_key.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    @property
    def source_key(self) -> str:
        """The object and version that the bytes are from; empty when they are not from an origin."""
        if self.origin is None:
            return ""
        item, key = self.origin.item, self.origin.spec.uri
        if self.origin.chain is not None:
            key = f"{key}\0{name_of(self.origin.spec)}"  # what comes from elsewhere must not be put to it
        return "\0".join((key, item.path, item.version, str(item.size_bytes)))

    @property
    def is_proven(self) -> bool:
        """All of its bytes will have been compared with something when it counts as verified."""
        return self.record is not None or bool(self.sha256) or self.vouched

    @property
    def vouched(self) -> bool:
        """The origin has a checksum of the whole, and the catalog nothing stronger."""
        return not self.sha256 and self.origin is not None and checks.strongest(self.origin.item.checksums) is not None

    @property
    def journalled(self) -> bool:
        """Bytes from an origin are dear: what was verified of them is kept across restarts; and parts."""
        return (self.origin is not None or self.is_part) and not self.adopt


class Flight:
    """Passes milestones; ``signal`` fires at each.

    Of a part of a blob: chunks arrive (``fill``), ``finished``. Of a whole one, in order: chunks arrive, ``verified``
    (the strongest check has passed, the bytes may be used as ready), ``record`` (the name is known, the blob is
    committed at its level), ``finished`` (also in L2, where asked for).
    Constructing it opens the journal; bytes must have been reserved and the ingests created. Then ``start()``.
    """

    def __init__(
        self,
        services: Services,
        order: BlobOrder,
        *,
        priority: int,
        urgent: bool = False,
        head_start: HeadStart | None = None,
        tracer: Tracer,
        on_blob: Callable[[str, str], None],
    ) -> None:
        """``on_blob`` hears of the ingest and its digest when it gets its blob's name in L1."""
        self._tracer = tracer
        self._on_blob = on_blob
        self.order = order
        self.signal = Signal()
        self.verified = False
        self.record: BlobRecord | None = None
        self.checked_by: CheckedBy | None = None
        self.finished = False
        self.error: CachedError | None = None
        self.next_link = False
        """It failed by the fault of one link of a chain: another try gets its bytes from others."""
        self.users = 0
        self._services = services
        self._journal = FlightJournal(services.degraded)
        self._damaged: dict[int, Level] = {}
        self._seed: SeedFile | None = None
        level = services.storage.level(order.level)
        self.target: FileRef = level.blob(order.digest) if order.adopt else level.ingest(order.ingest_id)
        self._persist = self._make_persist() if order.persist else None
        self.pace = Pace(services.clock.monotonic_s())
        sources = self._sources()
        self.fill = Fill(
            key=order.ingest_id,
            runner=services.runner,
            clock=services.clock,
            target=self.target,
            sources=sources,
            retry=services.retry,
            width=services.width,
            priority=priority,
            with_sha256=order.record is None and not order.is_part,
            sha256_behind=order.vouched,
            urgent=urgent,
            chunks=order.chunks,
            first=order.first,
            head_start=head_start,
            observer=Observer(self._on_chunk, self._on_moved, self._on_damage, self._on_retry),
        )
        self._task: asyncio.Task[None] | None = None
        self._begun = False
        """A task that is cancelled before its first step never runs, not even its ``finally``."""

    @property
    def written(self) -> Written | None:
        """How far the write to L2 behind it is; None where there is none, or it failed."""
        return self._persist.written if self._persist is not None and self._persist.error is None else None

    def start(self) -> None:
        """Takes off. Its outcome is in ``error`` and the milestones, never in an exception of the task."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"flight {self.order.path}")

    async def cancel(self) -> None:
        """Stops; verified chunks of a pull are kept for its resume. Returns when nothing of it runs any more."""
        if self._task is not None and not self._task.done():
            if self.error is None:  # one that is ending already must come to its end
                self._task.cancel()
            await asyncio.wait([self._task])
        if not self._begun:
            self._fail(UnavailableError("the load was stopped", hint="pull the model again"))
            self._settle()

    async def until_arrived(self, chunks: AbstractSet[int]) -> None:
        """Until these are verified; raises the flight's error."""
        await self._until(lambda: chunks <= self.fill.crc64.keys())

    async def until_verified(self) -> None:
        """Raises the flight's error."""
        await self._until(lambda: self.verified)

    async def until_landed(self) -> BlobRecord:
        """The committed blob's record; raises the flight's error. Its SHA-256 may not be begun before somebody asks."""
        self.fill.want_sha256()
        await self._until(lambda: self.record is not None)
        assert self.record is not None  # noqa: S101 - the line above
        return self.record

    async def until_finished(self) -> None:
        """Also through with L2; raises the flight's error."""
        await self._until(lambda: self.finished)

    async def _until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            if self.error is not None:
                raise self.error
            await self.signal.wait()

    def _check_length(self) -> None:
        if self.target.size_bytes != self.order.size_bytes:
            raise LevelError(f"{self.target.path} is {self.target.size_bytes} bytes long", path=self.target.path)

    async def _run(self) -> None:
        self._begun = True
        attributes: Attributes = {"cached.file.path": self.order.path, "cached.file.size": self.order.size_bytes}
        with self._tracer.start("file", attributes) as span:
            await self._carry_out()
            if self.error is not None:
                span.fail(self.error)

    async def _carry_out(self) -> None:
        persisting = asyncio.ensure_future(self._write_behind(self._persist)) if self._persist else None
        try:
            self._check_length()
            if self.order.is_part:
                await self._fetch()
                if self.order.record is not None:
                    await self._mend_disk(self.order.record)
                self.finished = True
                return
            await run_all(self._fetch(), self._check_early())
            record = await self._named()
            with self._tracer.start("commit"):
                await self._land(record)
            await self._mend_disk(record)
            if self._persist is not None and persisting is not None:
                await persisting
                with self._tracer.start("commit l2"):
                    await self._persist.finish(record)
            self.finished = True
        except CachedError as error:
            self._fail(error)
        except asyncio.CancelledError:
            self._fail(UnavailableError("the load was stopped", hint="it is resumed by the next pull of the model"))
            raise
        except Exception as error:  # noqa: BLE001 - logged, and told to whoever waits
            self._fail(self._services.failures.bug("flight", error, name=self.order.name, path=self.order.path))
        finally:
            if persisting is not None:
                persisting.cancel()
                await asyncio.gather(persisting, return_exceptions=True)
            with self._services.failures.survived("flight"):
                self._settle(is_quiet=self.error is None or await self._quiet())
            self.signal.notify()

    async def _fetch(self) -> None:
        with self._tracer.start("fetch") as span:
            await self.fill.run()
            span.set({f"cached.bytes.{level.value}": count for level, count in self.fill.bytes_from.items()})

    async def _write_behind(self, persist: Persist) -> None:
        with self._tracer.start("write l2") as span:
            await persist.behind(self.fill)
            if persist.error is not None:
                span.fail(persist.error)

    async def _quiet(self) -> bool:
        """Until no mover writes any more to what is to be kept, resumed or used for something else; False: one may."""
        paths = [self.target.path, *([self._persist.target.path] if self._persist is not None else [])]
        return all([await self._services.runner.settled(path) for path in paths])

    async def _check_early(self) -> None:
        """Where the origin vouches for the whole content, the bytes are ready before their SHA-256 is known."""
        while not self.fill.chunks_done:
            await self.fill.signal.wait()
            self.signal.notify()
        if self.order.record is not None:
            self._pass(None)
        elif self.order.vouched:
            with self._tracer.start("verify"):
                await checks.confirm_origin_checksum(self._services.runner, self.order, self.fill)
            self._pass(CheckedBy.ORIGIN_CHECKSUM)

    async def _named(self) -> BlobRecord:
        if self.order.record is not None:
            return self.order.record
        fill = self.fill
        if self.order.sha256:
            checks.confirm_sha256(self.order, fill.sha256)
            self._pass(CheckedBy.CATALOG_SHA256)
        elif not self.verified:
            self._pass(CheckedBy.FIRST_SEEN)
        crc64 = tuple(fill.crc64[index] for index in range(fill.chunk_count))
        return BlobRecord(digest=fill.sha256, size_bytes=fill.size_bytes, crc64=crc64)

    def _pass(self, checked_by: CheckedBy | None) -> None:
        self.verified = True
        self.checked_by = checked_by
        self.signal.notify()

    async def _land(self, record: BlobRecord) -> None:
        storage, level = self._services.storage, self.order.level
        if self.order.adopt:
            self._services.metrics.adopted_bytes.inc(record.size_bytes)
        else:
            await checks.confirm_there(self._services, level, record, self.target)
            self.target = await storage.commit(level, self.order.ingest_id, record, self._services.moved_segment)
            if level is Level.L1:
                self._on_blob(self.order.ingest_id, record.digest)
        self._services.landed(record, level)
        if level is Level.L1 and self.fill.bytes_from[Level.L2] == record.size_bytes > 0:
            self._services.verified.note(record.digest, Level.L2)
        self._journal.landed(record.digest)
        if level is Level.L2:
            checks.name_in_memory(self._services, self.order.ingest_id, record, self._on_blob)
        self.record = record
        self.signal.notify()

    async def _mend_disk(self, record: BlobRecord) -> None:
        """Writes the chunks again that were found damaged in the L2 blob; what came instead of them was verified."""
        services = self._services
        damaged = [index for index, level in sorted(self._damaged.items()) if level is Level.L2]
        disk = services.storage.disk_copy(record.digest, record.size_bytes) if damaged else None
        if disk is None or self.order.record is None:
            return
        for index in damaged:
            offset, length = index * CHUNK_BYTES, chunk_length(record.size_bytes, index)
            try:
                await services.runner.run(Copy(self.target, disk, offset, length, record.crc64[index]))
            except CachedError as error:
                services.degraded.began("l2", f"a damaged chunk could not be written again: {error.message}", error)
                _log.warning("flight.not_mended", path=self.order.path, chunk=index, chain=error.chain)
                services.give_up_disk_copy(record.digest)
                return
            services.metrics.repaired_chunks.labels(level="l2").inc()
            services.events.emit(
                "damage.repaired", f"chunk {index} of {self.order.path} was written again in l2",
                name=self.order.name, path=self.order.path, level="l2", chunk=index,
            )  # fmt: skip

    def _fail(self, error: CachedError) -> None:
        beyond_repair = isinstance(error, OriginError | NotFoundError | IntegrityError)
        if beyond_repair and self.order.record is not None and self._damaged:
            error = self._quarantined(min(self._damaged), error)
        if isinstance(error, IntegrityError | ObjectChangedError) and self._seed is not None:
            self._services.seeds.refuse(self._seed, self.order.name)
        if isinstance(error, IntegrityError) and self.order.record is None:
            self._services.metrics.checksum_failures.labels(level="l3").inc()
        if self.order.origin is not None and self.order.record is None:
            self.next_link = self._services.chains.blame(self.order.origin, error)
        error.fields.setdefault("name", self.order.name)
        error.fields.setdefault("path", self.order.path)
        self.error = error

    def _quarantined(self, index: int, error: CachedError) -> QuarantinedError:
        """What is damaged here cannot be had again now: nobody gets it, until a later try brings it whole."""
        order, offset_bytes = self.order, index * CHUNK_BYTES
        length_bytes = chunk_length(order.size_bytes, index)
        where = f"bytes {offset_bytes} to {offset_bytes + length_bytes - 1} of {order.path}"
        for level in set(self._damaged.values()):
            self._services.verified.doubt(order.digest, level)
        self._services.quarantine(order.digest, f"{where} are damaged: {error.message}")
        return QuarantinedError(
            f"{where} are damaged here, and cannot be fetched again: {error.message}",
            hint="it is tried again with the next attach or pull, and by `cached verify --repair`",
            ref=order.name,
            path=order.path,
            chunk=index,
            offset_bytes=offset_bytes,
            length_bytes=length_bytes,
            cause=error.reason,
        )

    def _settle(self, *, is_quiet: bool = True) -> None:
        """Leaves every level either with a committed blob, a resumable ingest, or nothing."""
        storage, order = self._services.storage, self.order
        worthless = isinstance(self.error, IntegrityError | ObjectChangedError) or not (order.journalled and is_quiet)
        if self.record is None:
            if order.adopt:
                self._leave_unconfirmed()
            elif worthless:
                storage.discard(order.level, order.ingest_id)
            else:
                storage.suspend(order.level, order.ingest_id, sparse=order.is_part)
        if self._persist is not None and not self.finished:
            if worthless or self.record is not None:
                storage.discard(Level.L2, order.ingest_id)
            else:
                storage.suspend(Level.L2, order.ingest_id)
        self._journal.close()
        if worthless and self.error is not None:
            self.forget()

    def _leave_unconfirmed(self) -> None:
        """What could not be confirmed leaves L1; but it stays, for another try, if nothing was learned of its bytes.

        That is so where the load was stopped, or no mover would start. A range that movers die of is another thing.
        """
        error = self.error
        if isinstance(error, UnavailableError) or (isinstance(error, MoverError) and "attempts" not in error.fields):
            return
        if self._services.registry.blobs[self.order.digest].l1 is not Presence.UNCONFIRMED:
            return  # a load of another model that has it, too, has confirmed it meanwhile
        self._services.registry.lost(self.order.digest, Level.L1)
        self._services.storage.withdraw(self.order.digest)

    def forget(self) -> None:
        """Removes the journal: the load that this flight was for is recorded, or its bytes are worthless."""
        self._journal.delete()

    def _make_persist(self) -> Persist:
        storage, ingest_id = self._services.storage, self.order.ingest_id
        return Persist(
            self._services,
            ingest_id=ingest_id,
            target=storage.level(Level.L2).ingest(ingest_id),
            source=lambda: self.target,
            on_chunk=lambda index: self._note(index, self.fill.crc64[index], Level.L2),
        )

    def _sources(self) -> Sources:
        """The ladder: known checksums from the record or from the journal of an earlier try."""
        order, storage = self.order, self._services.storage
        expected = dict(enumerate(order.record.crc64)) if order.record else {}
        in_place = frozenset(expected) if order.adopt else frozenset[int]()
        readable = order.level is Level.L1 and not (storage.disk is not None and storage.disk.hangs)
        disk, on_disk = storage.disk_copy(order.digest, order.size_bytes) if readable else None, None
        if order.journalled:
            path, key = self._services.journal_dir / order.ingest_id, order.digest or order.source_key
            kept = self._journal.open(path, key, order.size_bytes)
            expected = {index: chunk.crc64 for index, chunk in kept.items()} | expected
            in_place = self._kept_at(order.level, kept)
            if disk is None and not order.is_part:
                self._seed = self._services.seeds.find(order.digest, order.origin)
            if order.level is Level.L1 and disk is None and order.persist and self._seed is None:
                disk = storage.level(Level.L2).ingest(order.ingest_id)
                on_disk = self._kept_at(Level.L2, kept)
        if self._seed is not None:
            disk, crc64 = self._seed.ref, dict(enumerate(self._seed.record.crc64))
            return Sources(in_place=in_place, disk=disk, origin=order.origin, expected=expected, disk_crc64=crc64)
        return Sources(in_place=in_place, disk=disk, on_disk=on_disk, origin=order.origin, expected=expected)

    def _kept_at(self, level: Level, kept: Mapping[int, JournalChunk]) -> frozenset[int]:
        """Chunks that an earlier try left at a level; none where its ingest went since (a reboot, a lack of room)."""
        if not self._services.storage.is_resumed(level, self.order.ingest_id):
            return frozenset()
        return frozenset(index for index, chunk in kept.items() if level in chunk.levels)

    def _on_chunk(self, index: int, crc64: int, level: Level) -> None:
        self._note(index, crc64, self.order.level)
        if level is not Level.L1 or self.order.adopt:  # what was found in place took no time
            self.pace.add(self._services.clock.monotonic_s(), chunk_length(self.order.size_bytes, index))
        if level is Level.L2 and self._persist is not None and self._seed is None:
            self._persist.already(index)
        self.signal.notify()

    def _note(self, index: int, crc64: int, level: Level) -> None:
        self._journal.chunk(index, crc64, level)

    def _on_moved(self, level: Level, moved: Moved) -> None:
        hop = f"{level.value}_{self.order.level.value}"
        if level is not self.order.level:
            self._services.moved(hop, moved.length_bytes, moved.busy_s, moved.cpu_s)

    def _on_damage(self, level: Level, index: int, why: str) -> None:
        if level is Level.L2 and self._seed is not None:
            self._services.events.emit(
                "seed.damaged", f"chunk {index} of {self._seed.ref.path} is damaged: {why}",
                name=self.order.name, path=self.order.path, chunk=index,
            )  # fmt: skip
            return
        self._services.metrics.checksum_failures.labels(level=level.value).inc()
        damage = f"chunk {index} of {self.order.path} is damaged in {level.value}: {why}"
        self._services.failures.report(
            "damage.found", IntegrityError(damage, path=self.order.path, check="crc64", level=level.value, chunk=index),
            name=self.order.name,
        )  # fmt: skip
        self._damaged[index] = level

    def _on_retry(self, error: CachedError) -> None:
        self._services.metrics.retries.labels(reason=error.reason).inc()
