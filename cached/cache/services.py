"""What the parts of the engine share."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cached.cache.events import EventBus
from cached.cache.failures import Degraded, Failures
from cached.cache.history import UseHistory
from cached.cache.links import DirectoryView
from cached.cache.pace import Written
from cached.cache.registry import Blob, Model, Presence, Registry
from cached.cache.seeds import Seeds
from cached.cache.storage import Storage
from cached.cache.verified import VerifiedTimes
from cached.clock import Clock
from cached.errors import CachedError, LevelError, NoRoomError, NotFoundError
from cached.index import PartRecord
from cached.level import Level
from cached.levels.journal import landed_record, read_journal
from cached.logs import redact_text
from cached.manifest import BlobRecord, Manifest
from cached.metrics import Metrics
from cached.tracing import Tracer
from cached.transfer.chain import Chains
from cached.transfer.fill import RetryPolicy, Runner


@dataclass(frozen=True, slots=True)
class Services:
    """One of each; built once."""

    clock: Clock
    runner: Runner
    chains: Chains
    """The same, for who cares about chains of origins."""
    storage: Storage
    registry: Registry
    verified: VerifiedTimes
    history: UseHistory
    metrics: Metrics
    tracer: Tracer
    events: EventBus
    view: DirectoryView
    seeds: Seeds
    retry: RetryPolicy
    width: int
    """Chunks of one blob in flight at the same time."""
    write_slots: asyncio.Semaphore
    """Chunks written to L2 at the same time, of all blobs: a slow disk must not take the movers from the pulls."""
    journal_dir: Path
    failures: Failures
    unwritten: set[str] = field(default_factory=set)
    """Digests of blobs that L2 failed to take; it is degraded until each of them is there after all, or left L1."""
    writes: dict[str, Written] = field(default_factory=dict)
    """Ingest id → how far it is, of what is copied from L1 to L2 without a load."""

    def failed(self, model: Model, error: CachedError, *, load: str = "") -> None:
        """Remembers why a model could not be brought, for `cached show`, the events and the metrics.

        ``load``: the load's id, if it had come so far.
        """
        self.registry.update(model, last_error=redact_text(error.message))
        self.metrics.pulls.labels(outcome=error.reason).inc()
        self.failures.report("load.failed", error, f"{model.name}: {error.message}", name=model.name, load=load or None)

    @property
    def degraded(self) -> Degraded:
        """What does not work as it should."""
        return self.failures.degraded

    def l2_written(self, digest: str) -> None:
        """L2 took a blob."""
        self.unwritten.discard(digest)
        for other in list(self.unwritten):
            blob = self.registry.blobs.get(other)
            if blob is None or blob.l2 or not blob.at(Level.L1):
                self.unwritten.discard(other)
        self.l2_recovers()

    def l2_hangs(self, error: LevelError | None) -> None:
        """L2's disk does not answer (None: it does again)."""
        if error is not None:
            self.degraded.began("l2", f"L2 does not answer: {error.message}", error)
        else:
            self.l2_recovers()

    def l2_recovers(self) -> None:
        """L2 is well again once it is there, answers, and nothing that it failed to take is in L1 alone."""
        limit, disk = self.storage.limits.get(Level.L2), self.storage.disk
        is_there = limit is None or not limit.is_gone
        if is_there and not self.unwritten and (disk is None or not disk.hangs):
            self.degraded.ended("l2")

    def journal_digest(self, ingest_id: str) -> str:
        """The blob that an interrupted pull's ingest became before its revision could be recorded, or empty."""
        state = read_journal(self.journal_dir / ingest_id)
        return state.landed_digest if state else ""

    def journal_record(self, ingest_id: str) -> BlobRecord | None:
        """What the index has to know of that blob, if the journal knows all of it: the index is written behind."""
        return landed_record(self.journal_dir / ingest_id)

    def journalled(self, ingest_id: str, level: Level) -> frozenset[int]:
        """The chunks of an ingest that were verified at a level, as far as its journal says."""
        state = read_journal(self.journal_dir / ingest_id)
        chunks = state.chunks.items() if state else ()
        return frozenset(index for index, chunk in chunks if level in chunk.levels)

    def part_ingests(self) -> frozenset[str]:
        """The ingests of revisions of which only a part was asked for."""
        return frozenset().union(*(part.ingests for part in self.registry.index.parts()))

    def part_bytes(self, part: PartRecord) -> int:
        """How much of a revision waits in L1 in parts of files."""
        return sum(self.storage.kept_bytes(Level.L1, ingest_id) for ingest_id in part.ingests)

    def remove_journals(self, *, keep: AbstractSet[str]) -> None:
        """Removes the journals of all other ingests. One that cannot be removed costs nothing but its place."""
        with suppress(OSError):
            for path in list(self.journal_dir.iterdir()):
                if path.name not in keep:
                    with suppress(OSError):
                        path.unlink()

    def moved(self, hop: str, length_bytes: int, busy_s: float, cpu_s: float) -> None:
        """Counts verified bytes over a hop."""
        self.metrics.transfer_bytes.labels(hop=hop).inc(length_bytes)
        self.metrics.transfer_seconds.labels(hop=hop).inc(busy_s)
        self.metrics.transfer_cpu_seconds.labels(hop=hop).inc(cpu_s)

    def landed(self, record: BlobRecord, level: Level) -> None:
        """A blob was committed or confirmed at a level: every byte of it was verified on the way."""
        digest = record.digest
        was_quarantined, known = digest in self.registry.quarantined, self.registry.blobs.get(digest)
        was_here = known is not None and (known.at(Level.L1) or known.l2)
        self.registry.landed(record, level)
        self.verified.note(digest, level)
        if was_quarantined:
            self.publish_all(digest)
        elif not was_here:  # another model, of which this was all that was missing, is whole again
            for manifest in self.registry.manifests():
                if digest in manifest.blobs and self.registry.is_here(manifest):
                    self.publish(manifest)

    def quarantine(self, digest: str, why: str) -> None:
        """A blob is damaged beyond repair for now: no new lease on it, and no directory shows it."""
        self.registry.quarantine(digest, why)
        self.publish_all(digest)

    def mended(self, digest: str) -> None:
        """Every byte of a blob was found right, or put right, wherever it is."""
        if digest in self.registry.quarantined:
            self.registry.mended(digest)
            self.publish_all(digest)
            for manifest in self.registry.manifests():
                if digest in manifest.blobs and not self.registry.is_quarantined(manifest):
                    self.registry.well(manifest.name)

    def publish_all(self, digest: str) -> None:
        """Brings the directory view of every revision that has this blob up to date."""
        for manifest in self.registry.manifests():
            if digest in manifest.blobs:
                self.publish(manifest)

    def on_disk(self, blob: Blob) -> bool:
        """Whether L2 has this blob. One whose file is gone, with its drive perhaps, does not count from now on."""
        digest, size_bytes = blob.record.digest, blob.record.size_bytes
        if blob.l2 and self.storage.disk_copy(digest, size_bytes) is None:
            self.lost_from_disk(blob)
            with self.failures.survived("l2"):
                self.storage.remove_from_disk(digest)
        return blob.l2

    def in_memory(self, blob: Blob) -> bool:
        """Whether L1 has this blob. One whose segment somebody has removed does not count from now on."""
        digest = blob.record.digest
        if blob.at(Level.L1):
            try:
                self.storage.level(Level.L1).blob(digest)
            except NotFoundError:
                self.registry.lost(digest, Level.L1)
                with suppress(NotFoundError):
                    self.storage.withdraw(digest)
                self.events.emit("l1.lost", f"L1 no longer has {digest}", digest=digest)
        return blob.at(Level.L1)

    def lost_from_disk(self, blob: Blob) -> None:
        """L2 has no copy of this blob any more, though nobody evicted it: the upkeep writes it there again."""
        digest = blob.record.digest
        self.registry.lost(digest, Level.L2)
        self.events.emit("l2.lost", f"L2 no longer has {digest}", digest=digest, size_bytes=blob.record.size_bytes)

    def give_up_disk_copy(self, digest: str) -> bool:
        """What L2 has damaged and would not have mended is read and shown no more, if L1 has all of it; else False.

        The upkeep writes the blob to L2 again, elsewhere on the disk.
        """
        blob = self.registry.blobs[digest]
        if blob.l1 is not Presence.CONFIRMED or not blob.l2:
            return False
        self.lost_from_disk(blob)
        try:
            self.storage.remove_from_disk(digest)
        except (LevelError, NoRoomError) as error:
            self.storage.forget_on_disk(digest)
            self.degraded.began("l2", f"a damaged blob can be neither mended nor removed: {error.message}", error)
        self.publish_all(digest)
        return True

    def publish(self, manifest: Manifest) -> None:
        """Brings the directory view of a revision up to date with where its blobs are."""
        with self._viewing():
            blobs, quarantined = self.registry.blobs_of(manifest), self.registry.is_quarantined(manifest)
            if not quarantined and all(blob.l1 is Presence.CONFIRMED or self.on_disk(blob) for blob in blobs):
                targets = {entry.path: self._target(entry.digest) for entry in manifest.files}
                current = self.registry.models[manifest.name].record.current_revision == manifest.revision
                self.view.show(manifest.name, manifest.revision, targets, current=current)
            else:
                self.view.hide(manifest.name, manifest.revision)

    def show_arrived(self, name: str, revision: str, targets: Mapping[str, str]) -> None:
        """Shows a revision that may be used, but is not recorded yet. Path in the model → where its bytes are now."""
        with self._viewing():
            current = self.registry.known(name).record.current_revision == revision
            self.view.show(name, revision, targets, current=current, arriving=True)

    def moved_segment(self, source: str, target: str) -> None:
        """A segment of a revision of ``show_arrived`` got its blob's name."""
        with self._viewing():
            self.view.moved(source, target)

    def unpublish(self, name: str, revision: str) -> None:
        """What ``show_arrived`` showed was not recorded: the view shows what is recorded, or nothing."""
        manifest = self.registry.known(name).manifests.get(revision)
        if manifest is not None:
            self.publish(manifest)
            return
        self.hide(name, revision)

    def hide(self, name: str, revision: str) -> None:
        """Takes a revision that is forgotten out of the directory view."""
        with self._viewing():
            self.view.hide(name, revision)

    @contextmanager
    def _viewing(self) -> Iterator[None]:
        """A view that cannot be written is a convenience less, and told by health."""
        try:
            yield
            self.degraded.ended("view")
        except LevelError as error:
            self.degraded.began("view", error.message, error)

    def _target(self, digest: str) -> str:
        in_l1 = self.registry.blobs[digest].l1 is Presence.CONFIRMED
        return self.storage.level(Level.L1 if in_l1 else Level.L2).blob(digest).path
