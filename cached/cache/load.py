"""One revision on its way to a level, shared by everyone who waits for it."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from cached.cache.flight import BlobOrder, Flight
from cached.clock import Clock
from cached.errors import CachedError
from cached.level import Level
from cached.manifest import FileEntry, Manifest
from cached.policy import Otherwise
from cached.signals import Signal
from cached.tracing import Span
from cached.types import CheckedBy, Complete, PullPhase, PullProgress, Selected
from cached.units import chunk_count

_CHECK_STRENGTH = (CheckedBy.FIRST_SEEN, CheckedBy.ORIGIN_CHECKSUM, CheckedBy.CATALOG_SHA256)


@dataclass(frozen=True, slots=True)
class LoadFile:
    """A file of a load: ``order`` says how it comes; None: its blob ``digest`` is at the level already."""

    path: str
    size_bytes: int
    digest: str
    order: BlobOrder | None
    checked_by: CheckedBy | None = None
    """What it was checked against when it first came, if that is known beforehand."""
    version: str = ""
    """The origin's marker of it, to fetch it again by once it is at the level no more; empty without an origin."""
    chunks: frozenset[int] | None = None
    """Of a part of a model those of this file, perhaps none; else None."""

    @property
    def left_out(self) -> bool:
        """Nothing of it is to be there."""
        return self.chunks is not None and not self.chunks


@dataclass(frozen=True, slots=True)
class Chosen:
    """What of a model's files was asked for. ``chunks``: file index → those that hold it, for each file it concerns.

    ``first``: the same with what a worker needs beside it to find its way: heads of weight files, and their index.
    """

    selected: Selected
    chunks: Mapping[int, frozenset[int]]
    first: Mapping[int, frozenset[int]]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What to bring where. ``manifest`` is known when the revision was here before, else it is made at the end.

    ``chosen``: only a part is wanted, and ``part`` tells it from others. It never makes a manifest.
    """

    name: str
    revision: str
    level: Level
    files: tuple[LoadFile, ...]
    source: str = ""
    origin_options: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    manifest: Manifest | None = None
    otherwise: Otherwise = Otherwise.EVICT
    """What becomes of it in L1 if it is not worth what would have to go for it."""
    chosen: Chosen | None = None
    part: str = ""

    def only(self, chosen: Chosen, part: str) -> LoadPlan:
        """The plan for nothing but what was chosen."""
        wanted = self._by_ingest(chosen.chunks)
        files = tuple(
            _only(file, wanted.get(file.order.ingest_id, frozenset()) if file.order else frozenset())
            if index in chosen.chunks
            else replace(file, order=None, chunks=frozenset())
            for index, file in enumerate(self.files)
        )
        return replace(self, files=files, chosen=chosen, part=part, otherwise=Otherwise.EVICT)

    def confirming(self) -> LoadPlan:
        """The plan for nothing but to confirm what is at its level already. For that nothing is written to L2."""
        there = {index: file for index, file in enumerate(self.files) if file.order is not None and file.order.adopt}
        chunks = {index: frozenset(range(chunk_count(file.size_bytes))) for index, file in there.items()}
        chosen = Chosen(Selected(), chunks, chunks, sum(file.size_bytes for file in there.values()))
        files = tuple(
            replace(file, order=replace(file.order, persist=False)) if file.order else file for file in self.files
        )
        return replace(self, files=files).only(chosen, "left there")

    def preferring(self, chosen: Chosen) -> LoadPlan:
        """The same plan, with what was chosen before everything else."""
        first = self._by_ingest(chosen.first)
        files = tuple(
            replace(file, order=replace(file.order, first=first.get(file.order.ingest_id, frozenset())))
            if file.order
            else file
            for file in self.files
        )
        return replace(self, files=files)

    def _by_ingest(self, chunks: Mapping[int, frozenset[int]]) -> dict[str, frozenset[int]]:
        """Of files with the same content, all that is wanted of any."""
        found: dict[str, frozenset[int]] = {}
        for index, wanted in chunks.items():
            order = self.files[index].order
            if order is not None:
                found[order.ingest_id] = found.get(order.ingest_id, frozenset()) | wanted
        return found

    @property
    def is_part(self) -> bool:
        """Only some of the model is wanted."""
        return self.chosen is not None

    @property
    def orders(self) -> dict[str, BlobOrder]:
        """Ingest id → order, each blob once."""
        return {file.order.ingest_id: file.order for file in self.files if file.order is not None}

    @property
    def digests(self) -> set[str]:
        """The blobs whose digests are known before anything is fetched."""
        return {file.digest for file in self.files if file.digest}

    @property
    def needs_no_room(self) -> bool:
        """Everything is where it should be, and at most has to be confirmed."""
        return all(order.adopt and not order.persist for order in self.orders.values())

    @property
    def total_bytes(self) -> int:
        """Sum over the files."""
        return sum(file.size_bytes for file in self.files)


class Load:
    """The state of a load; the loader drives it. ``signal`` fires whenever anything of it changes.

    ``opened``: bytes are reserved and every file's destination exists. ``ready_as``: all checks have passed.
    ``shown``: the directory view shows it, but it is not recorded yet. ``finished``: everything is recorded, L2
    included. ``error``: it ended before that. ``load_id`` names it in the log, in events and in exemplars; ``span`` is
    that of its work.
    """

    def __init__(self, plan: LoadPlan, clock: Clock) -> None:
        self.plan = plan
        self.flights: dict[str, Flight] = {}
        self.signal = Signal()
        self.opened = False
        self.ready_as: Complete | None = None
        self.shown = False
        self.finished = False
        self.error: CachedError | None = None
        self.started_s = clock.monotonic_s()
        self.load_id = secrets.token_hex(4)
        self.span = Span("")
        self.task: asyncio.Task[None] | None = None
        self._clock = clock

    @property
    def key(self) -> tuple[str, str, Level, str]:
        """Loads with the same key are one."""
        return (self.plan.name, self.plan.revision, self.plan.level, self.plan.part)

    def flight_of(self, file: LoadFile) -> Flight | None:
        """The flight that brings a file, or None if it was here already. The load must be ``opened``."""
        return self.flights[file.order.ingest_id] if file.order is not None else None

    async def until(self, reached: Callable[[], bool]) -> None:
        """Waits for a state; raises the load's error if it fails before."""
        while not reached():
            if self.error is not None:
                raise self.error
            await self.signal.wait()

    async def until_ready(self) -> Complete:
        """Waits until the revision may be used."""
        await self.until(lambda: self.ready_as is not None)
        assert self.ready_as is not None  # noqa: S101 - the line above
        return self.ready_as

    def bytes_from(self, level: Level) -> int:
        """Verified bytes that came from a level; L1: found in place."""
        return sum(flight.fill.bytes_from[level] for flight in self.flights.values())

    @property
    def bytes_of(self) -> Counter[str]:
        """Bytes that came from origins, by their names."""
        return sum((flight.fill.bytes_of for flight in self.flights.values()), Counter[str]())

    @property
    def has_chain(self) -> bool:
        """Of its bytes some could have come from several origins."""
        origins = [order.origin for order in self.plan.orders.values() if order.origin is not None]
        return any(origin.spec.front or origin.chain for origin in origins)

    @property
    def next_link(self) -> bool:
        """It failed, and another try goes to other links of its chain."""
        return any(flight.next_link for flight in self.flights.values())

    @property
    def resident_bytes(self) -> int:
        """Bytes of files that were at the level already."""
        return sum(file.size_bytes for file in self.plan.files if file.order is None and not file.left_out)

    def has_arrived(self, chunks: Mapping[int, frozenset[int]]) -> bool:
        """Whether these chunks, by file index, are verified."""
        flights = [(self.flight_of(self.plan.files[index]), wanted) for index, wanted in chunks.items()]
        return all(flight is None or wanted <= flight.fill.crc64.keys() for flight, wanted in flights)

    def prefer(self, chunks: Mapping[int, frozenset[int]]) -> None:
        """Somebody waits for these more than for the rest."""
        for index, wanted in chunks.items():
            flight = self.flights.get(order.ingest_id) if (order := self.plan.files[index].order) else None
            if flight is not None:
                flight.fill.prefer(wanted)

    @property
    def checked_by(self) -> CheckedBy:
        """The weakest check among the files."""
        found = [self.check_of(file) for file in self.plan.files if not file.left_out]
        return min(found, key=_CHECK_STRENGTH.index, default=CheckedBy.FIRST_SEEN)

    def digest_of(self, file: LoadFile) -> str:
        """The blob's SHA-256, or nothing while that is unknown. Also before the load is ``opened``."""
        flight = self.flights.get(file.order.ingest_id) if file.order is not None else None
        return flight.record.digest if flight is not None and flight.record is not None else file.digest

    def ids(self, indices: Iterable[int] | None = None) -> dict[str, str]:
        """The ingest, or else the blob, of each of these files, or of all → the blob's digest, if that is known."""
        files = self.plan.files if indices is None else [self.plan.files[index] for index in indices]
        return {file.order.ingest_id if file.order else file.digest: self.digest_of(file) for file in files}

    def check_of(self, file: LoadFile) -> CheckedBy:
        """What a file was checked against."""
        flight = self.flight_of(file)
        return file.checked_by or (flight.checked_by if flight else None) or CheckedBy.FIRST_SEEN

    def completion(self) -> Complete:
        """What an attach is told when this load is ready."""
        origin, disk = self.bytes_from(Level.L3), self.bytes_from(Level.L2)
        reused = self.bytes_from(Level.L1) + self.resident_bytes
        most = max((origin, Level.L3), (disk, Level.L2), (reused, Level.L1), key=lambda item: item[0])
        return Complete(
            from_level=most[1] if most[0] else Level.L1,
            origin_bytes=origin,
            disk_bytes=disk,
            reused_bytes=reused,
            load_s=self._clock.monotonic_s() - self.started_s,
            checked_by=self.checked_by,
            partial=self.plan.is_part,
        )

    def entries(self) -> tuple[FileEntry, ...]:
        """The manifest's files, when every blob has its name."""
        return tuple(
            FileEntry(file.path, file.size_bytes, self.digest_of(file), self.check_of(file), file.version)
            for file in self.plan.files
        )

    def progress(self) -> PullProgress:
        """A snapshot for people."""
        origin, disk = self.bytes_from(Level.L3), self.bytes_from(Level.L2)
        reused = self.bytes_from(Level.L1) + self.resident_bytes
        done = origin + disk + reused
        phase = PullPhase.VERIFYING if done >= self.plan.total_bytes else PullPhase.TRANSFERRING
        return PullProgress(
            phase=PullPhase.READY if self.finished else phase,
            name=self.plan.name,
            revision=self.plan.revision,
            total_bytes=self.plan.total_bytes,
            done_bytes=done,
            origin_bytes=origin,
            disk_bytes=disk,
            reused_bytes=reused,
            elapsed_s=self._clock.monotonic_s() - self.started_s,
            notes=self.plan.notes,
            from_level=self.ready_as.from_level if self.ready_as else None,
            checked_by=self.ready_as.checked_by if self.ready_as else None,
        )


def _only(file: LoadFile, chunks: frozenset[int]) -> LoadFile:
    """A file of which only these chunks are wanted. What is there whole, or will be, stays as it is."""
    order = file.order
    if order is None or order.adopt:
        return replace(file, chunks=frozenset(range(chunk_count(file.size_bytes))))
    # The check of the whole does not come; a known blob's chunks have passed theirs.
    known = order.record is not None
    checked_by = file.checked_by if known else CheckedBy.FIRST_SEEN
    # … nor may anybody but the authority of a chain be asked for what is not going to be checked.
    origin = order.origin if known or order.origin is None else order.origin.alone
    part = replace(order, chunks=chunks, persist=False, origin=origin)
    return replace(file, order=part, checked_by=checked_by, chunks=chunks)
