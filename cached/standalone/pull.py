"""The pull itself: what the origin has, what the folder has of it, what is missing, and then the names together."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import structlog

from cached.cache.checks import strongest
from cached.cache.flight import BlobOrder
from cached.cache.resolver import Resolved, check_revision, vouched_sha256
from cached.errors import (
    AlreadyRunningError,
    CachedError,
    IntegrityError,
    InvalidRequestError,
    NotFoundError,
    ObjectChangedError,
)
from cached.level import Level
from cached.levels.journal import landed_record
from cached.manifest import BlobRecord, FileEntry, Manifest, check_paths
from cached.origins.base import OriginObject
from cached.refs import artifact_digest
from cached.seed import SeedRecord, Thoroughness
from cached.signals import in_thread, run_all
from cached.standalone.arrival import Arrival, Kept, journal_of
from cached.standalone.confirm import confirm
from cached.standalone.engine import Tools
from cached.standalone.folder import SeedFolder, in_plain_words
from cached.standalone.values import Plan, Progress, Pulled, Wanted
from cached.transfer.fill import Fill, OriginSource, Sources
from cached.transfer.jobs import Prepare
from cached.types import CheckedBy
from cached.units import chunk_count

_log = structlog.get_logger(__name__)

_RESTARTS_ON_CHANGE = 3
_LOCK_POLL_S = 0.2
_PULL_AGAIN = "pull it again without --offline: only what is missing or damaged is fetched"
_STRENGTH = tuple(CheckedBy)


class SeedPull:
    """One pull into one folder. Construct, then ``await run()`` once; loop only.

    Cancelling it leaves what was verified beside the files, in ``.cached/``, from where the next pull goes on. Files
    get their names only once all are whole. ``on_delay`` hears why it takes longer, in words.
    """

    def __init__(
        self, tools: Tools, folder: SeedFolder, wanted: Wanted, on_delay: Callable[[str], None] = lambda _why: None
    ) -> None:
        self.progress = Progress(name=wanted.ref.name)
        self._tools = tools
        self._folder = folder
        self._wanted = wanted
        self._on_delay = on_delay
        self._blobs: dict[str, BlobRecord] = {}
        """Of everything that is whole now, by digest."""
        self._started_s = tools.clock.monotonic_s()

    async def run(self) -> Pulled:
        """Until every file is whole and has its name. Raises what origins, movers and the folder do."""
        if self._wanted.offline:
            return await self._confirm_only()
        await self._lock()
        try:
            for restart in range(_RESTARTS_ON_CHANGE + 1):
                try:
                    return await self._attempt()
                except ObjectChangedError:
                    if restart == _RESTARTS_ON_CHANGE:
                        raise
                    _log.info("standalone.object_changed", name=self.progress.name)
        finally:
            self._folder.release()
        raise AssertionError(_RESTARTS_ON_CHANGE)

    async def _lock(self) -> None:
        told = False
        while True:
            try:
                self._folder.lock()
            except AlreadyRunningError as error:
                if not told:
                    self._on_delay(error.message)
                told = True
                await self._tools.clock.sleep(_LOCK_POLL_S)
            else:
                return

    async def _confirm_only(self) -> Pulled:
        record = await in_thread(self._folder.record)
        if record is None:
            raise NotFoundError(
                f"{self._folder.root} holds no model that a standalone pull laid",
                hint="leave --offline away to pull it",
                ref=str(self._wanted.ref),
            )
        self._check_name(record, force=False)
        if not record.manifest.revision.startswith(self._wanted.ref.revision):
            raise NotFoundError(
                f"{self._folder.root} holds revision {record.manifest.revision}", hint=_PULL_AGAIN,
                ref=str(self._wanted.ref),
            )  # fmt: skip
        self._begin("verifying", record.manifest.total_bytes)
        for entry in record.manifest.files:
            bad = await self._look_at(record, entry)
            if bad is None or bad:
                raise self._not_whole(record, entry, bad)
        return self._result(record.manifest, (), ())

    def _not_whole(self, record: SeedRecord, entry: FileEntry, bad: frozenset[int] | None) -> CachedError:
        length_bytes, _ = self._folder.stamp(entry.path)
        if length_bytes < 0:
            return NotFoundError(f"{entry.path} is missing in {self._folder.root}", hint=_PULL_AGAIN, ref=entry.path)
        how = f"in {len(bad)} of its {len(record.blobs[entry.digest].crc64)} chunks" if bad else "in its length"
        return IntegrityError(
            f"{entry.path} in {self._folder.root} is damaged {how}",
            hint=_PULL_AGAIN,
            name=record.manifest.name,
            path=entry.path,
            check="seed-record",
        )

    async def _attempt(self) -> Pulled:
        wanted, tools = self._wanted, self._tools
        record = self._earlier()
        self._begin("resolving", 0)
        model = tools.resolver.model_of(wanted.ref, wanted.source)
        if artifact_digest(model.name):
            raise InvalidRequestError(
                f"{model.name} is a compile artifact", hint="see: cached artifact", value=model.name
            )
        resolved = await tools.resolver.resolve(model, wanted.source or wanted.ref.uri)
        check_revision(wanted.ref, resolved)
        check_paths(item.path for item in resolved.items)
        laid = [entry.path for entry in record.manifest.files] if record else []
        self._folder.check_paths((item.path for item in resolved.items), laid, force=wanted.force)
        blobs, ingests = await in_thread(self._folder.prepare)
        self._begin("verifying", sum(item.size_bytes for item in resolved.items))
        plan = await self._plan(resolved, record, blobs)
        entries = await self._bring(plan, resolved, blobs, ingests)
        manifest = self._manifest(resolved, {**plan.kept, **entries})
        self.progress.phase = "committing"
        gone = tuple(sorted(set(laid) - {entry.path for entry in manifest.files}))
        await self._lay(manifest, plan, gone)
        return self._result(manifest, tuple(sorted(plan.damaged)), gone)

    def _begin(self, phase: str, total_bytes: int) -> None:
        progress = self.progress
        progress.phase, progress.total_bytes, progress.kept_bytes, progress.arrivals = phase, total_bytes, 0, []

    def _earlier(self) -> SeedRecord | None:
        try:
            record = self._folder.record()
        except IntegrityError:
            if not self._wanted.force:
                raise
            return None
        if record is not None:
            self._check_name(record, force=self._wanted.force)
        return record

    def _check_name(self, record: SeedRecord, *, force: bool) -> None:
        there = record.manifest.name
        if there != self._wanted.ref.name and not force:
            raise InvalidRequestError(
                f"{self._folder.root} holds {there}, not {self._wanted.ref.name}",
                hint="give each model a folder of its own, or --force to replace what is there",
                value=self._folder.root,
            )

    # What there is, and what has to come.

    async def _plan(self, resolved: Resolved, record: SeedRecord | None, blobs: Mapping[str, int]) -> Plan:
        """Looks at everything that the folder has of the revision."""
        self._tools.runner.prepare(Prepare(resolved.spec))
        plan = Plan()
        for item in resolved.items:
            entry = _recorded(record, resolved, item)
            blob = record.blobs[entry.digest] if record and entry else None
            bad = await self._look_at(record, entry) if record and entry else None
            if entry is not None and blob is not None and bad is not None and not bad:
                plan.kept[item.path], self._blobs[entry.digest] = entry, blob
                continue
            if bad is not None and len(bad) == chunk_count(item.size_bytes):
                blob = None  # nothing fits the record: it may be the record that is wrong
            order = self._order(resolved, item, blob)
            found = self._journalled(order, blobs)
            if found is not None:
                order = replace(order, record=found)
            plan.orders.setdefault(order.ingest_id, order)
            plan.paths[item.path] = order.ingest_id
            if bad:
                plan.damaged[item.path] = bad
        return plan

    def _order(self, resolved: Resolved, item: OriginObject, record: BlobRecord | None) -> BlobOrder:
        return BlobOrder(
            level=Level.L2, size_bytes=item.size_bytes, name=self.progress.name, path=item.path, record=record,
            origin=OriginSource(resolved.spec, item), sha256=resolved.sha256.get(item.path, ""),
        )  # fmt: skip

    async def _look_at(self, record: SeedRecord, entry: FileEntry) -> frozenset[int] | None:
        """The damaged chunks of a file at its place; None where it is missing or of another length."""
        blob, thoroughness = record.blobs[entry.digest], self._wanted.verify
        stamp = self._folder.stamp(entry.path)
        if thoroughness is Thoroughness.SIZE and stamp == (entry.size_bytes, record.stamps.get(entry.path)):
            self.progress.kept_bytes += entry.size_bytes
            return frozenset()
        if stamp[0] != entry.size_bytes:
            return None
        try:
            ref = self._folder.file(entry.path)
        except CachedError as error:
            if self._wanted.force:
                return None
            raise in_plain_words(error, self._folder.root) from error
        before_bytes = self.progress.kept_bytes

        def count(length_bytes: int) -> None:
            self.progress.kept_bytes += length_bytes

        bad = await confirm(self._tools, ref, blob, count, with_sha256=thoroughness is Thoroughness.FULL)
        if bad:
            _log.warning("standalone.damaged", path=entry.path, chunks=sorted(bad)[:10])
            self.progress.kept_bytes = before_bytes
        return bad

    def _journalled(self, order: BlobOrder, blobs: Mapping[str, int]) -> BlobRecord | None:
        """What a file became that arrived whole with an interrupted pull, and has not its name yet."""
        record = order.record or landed_record(self._folder.journals / order.ingest_id)
        found = record is not None and blobs.get(record.digest) == record.size_bytes == order.size_bytes
        return record if found else None

    # Bringing it.

    async def _bring(
        self, plan: Plan, resolved: Resolved, blobs: Mapping[str, int], ingests: Mapping[str, int]
    ) -> dict[str, FileEntry]:
        """Everything that lacks, as blobs of ``incoming``; what to record of each file."""
        folder, orders = self._folder, plan.orders
        arrived = await self._arrived(orders, blobs)
        missing = {key: order for key, order in orders.items() if key not in arrived}
        resumed = await in_thread(self._take_in, plan, missing, ingests)
        copies = {_copy_id(path): orders[key].size_bytes for path, key in plan.copied.items()}
        sizes = {key: order.size_bytes for key, order in missing.items() if key not in resumed} | copies
        await in_thread(folder.reserve, sizes)
        kept = {entry.digest: path for path, entry in plan.kept.items()}
        arrivals = [
            Arrival(
                self._tools, folder, order, priority=position, resumed=key in resumed,
                kept=self._kept(kept, order), on_retry=self._on_retry,
            )
            for position, (key, order) in enumerate(missing.items())
        ]  # fmt: skip
        self.progress.phase, self.progress.arrivals = "pulling", arrivals
        await run_all(*(self._land(arrival) for arrival in arrivals))
        records = arrived | {arrival.order.ingest_id: arrival.record for arrival in arrivals if arrival.record}
        items = {item.path: item for item in resolved.items}
        return {path: _entry(items[path], resolved, records[key].digest) for path, key in plan.paths.items()}

    async def _land(self, arrival: Arrival) -> None:
        record = await arrival.run()
        self._blobs[record.digest] = record

    async def _arrived(self, orders: Mapping[str, BlobOrder], blobs: Mapping[str, int]) -> dict[str, BlobRecord]:
        """Files that wait for their names; read again, since nothing counts that was not verified."""
        found: dict[str, BlobRecord] = {}
        level = self._folder.incoming
        for key, order in orders.items():
            record = order.record
            if record is None or blobs.get(record.digest) != record.size_bytes:
                continue
            progress, before_bytes = self.progress, self.progress.kept_bytes

            def count(length_bytes: int, progress: Progress = progress) -> None:
                progress.kept_bytes += length_bytes

            if await confirm(self._tools, level.blob(record.digest), record, count):
                progress.kept_bytes = before_bytes
                level.remove(record.digest)
                continue
            found[key] = self._blobs[record.digest] = record
        for digest in blobs.keys() - {record.digest for record in found.values()}:
            level.remove(digest)
        return found

    def _kept(self, kept: Mapping[str, str], order: BlobOrder) -> Kept | None:
        """The same content under another name."""
        path = kept.get(order.digest)
        return Kept(self._folder.file(path), self._blobs[order.digest]) if path else None

    def _take_in(self, plan: Plan, missing: Mapping[str, BlobOrder], ingests: Mapping[str, int]) -> set[str]:
        """Which ingests hold something already: of an interrupted pull, or a damaged file's good chunks. Others go.

        No damaged file is to be seen from here on.
        """
        folder, level = self._folder, self._folder.incoming
        resumed = {key for key, order in missing.items() if ingests.get(key) == order.size_bytes}
        for key in ingests.keys() - resumed:
            level.discard(key)
        for journal_file in folder.journals.iterdir():
            if journal_file.name not in resumed:
                journal_file.unlink()
        for path, bad in plan.damaged.items():
            key = plan.paths[path]
            order = missing.get(key)
            if order is None or order.record is None or key in resumed:
                folder.remove([path])
                continue
            level.take_in(str(folder.root / path), key)
            journal = journal_of(folder, order)
            for index, crc64 in enumerate(order.record.crc64):
                if index not in bad:
                    journal.chunk(index, crc64, Level.L2)
            journal.close()
            resumed.add(key)
        return resumed

    def _on_retry(self, error: CachedError) -> None:
        self._on_delay(f"trying again: {error.message}")

    # The names.

    def _manifest(self, resolved: Resolved, entries: Mapping[str, FileEntry]) -> Manifest:
        model = self._tools.registry.known(self.progress.name)
        return Manifest(
            name=self.progress.name,
            revision=resolved.revision,
            source=resolved.spec.uri,
            origin_options=dict(model.catalog.origin) if model.catalog else {},
            files=tuple(_marked(entries[item.path], item, resolved) for item in resolved.items),
            created_time_s=self._tools.clock.wall_s(),
            notes=resolved.notes,
        )

    async def _lay(self, manifest: Manifest, plan: Plan, gone: tuple[str, ...]) -> None:
        """First the record, then the names: whoever goes on after a kill in between finds what belongs where.

        Before both, what the model no longer has: of that only the old record knows.
        """
        folder, level = self._folder, self._folder.incoming
        digests = {entry.path: entry.digest for entry in manifest.files}
        last = {digests[path]: path for path in plan.paths}
        sources: dict[str, str] = {}
        for path in plan.paths:
            if last[digests[path]] == path:
                sources[path] = level.blob(digests[path]).path
            else:
                sources[path] = await self._copy(self._blobs[digests[path]], path)
        await in_thread(partial(self._name, manifest, sources, gone))
        folder.finish()

    def _name(self, manifest: Manifest, sources: Mapping[str, str], gone: tuple[str, ...]) -> None:
        folder = self._folder
        places = {entry.path: sources.get(entry.path) or str(folder.root / entry.path) for entry in manifest.files}
        stamps = {path: os.stat(place).st_mtime_ns for path, place in places.items()}
        blobs = {entry.digest: self._blobs[entry.digest] for entry in manifest.files}
        folder.remove(gone)
        folder.write(SeedRecord(manifest, blobs, stamps))
        for path, source in sources.items():
            folder.place(source, path)

    async def _copy(self, record: BlobRecord, path: str) -> str:
        """Content that the model has under several names, once more, verified on its way; where it is."""
        folder, ingest_id = self._folder, _copy_id(path)
        try:
            target = folder.incoming.ingest(ingest_id)
        except NotFoundError:  # that two files are the same was not known before they were here
            await in_thread(folder.reserve, {ingest_id: record.size_bytes})
            target = folder.incoming.ingest(ingest_id)
        fill = Fill(
            key=ingest_id,
            runner=self._tools.runner,
            clock=self._tools.clock,
            target=target,
            sources=Sources(disk=folder.incoming.blob(record.digest), expected=dict(enumerate(record.crc64))),
            retry=self._tools.retry,
            width=self._tools.width,
        )
        await fill.run()
        await in_thread(folder.sync, target.path)
        return target.path

    def _result(self, manifest: Manifest, damaged: tuple[str, ...], gone: tuple[str, ...]) -> Pulled:
        progress = self.progress
        return Pulled(
            manifest=manifest,
            origin_bytes=progress.bytes_from(Level.L3),
            kept_bytes=progress.kept_bytes,
            resumed_bytes=progress.bytes_from(Level.L1),
            copied_bytes=progress.bytes_from(Level.L2),
            damaged_files=damaged,
            removed_files=gone,
            seconds=self._tools.clock.monotonic_s() - self._started_s,
        )


def _recorded(record: SeedRecord | None, resolved: Resolved, item: OriginObject) -> FileEntry | None:
    """What is recorded of a file, if that is what the origin has now."""
    entry = record.entry(item.path) if record else None
    if record is None or entry is None or entry.size_bytes != item.size_bytes:
        return None
    digest = resolved.sha256.get(item.path) or vouched_sha256(item)
    if digest:
        return entry if entry.digest == digest else None
    same = (entry.version, record.manifest.source) == (item.version, resolved.spec.uri)
    return entry if same else None


def _entry(item: OriginObject, resolved: Resolved, digest: str) -> FileEntry:
    """What is recorded of a file that arrived: the strongest check that there was has passed."""
    if resolved.sha256.get(item.path) == digest:
        checked_by = CheckedBy.CATALOG_SHA256
    else:
        checked_by = CheckedBy.ORIGIN_CHECKSUM if strongest(item.checksums) else CheckedBy.FIRST_SEEN
    return FileEntry(item.path, item.size_bytes, digest, checked_by, item.version)


def _marked(entry: FileEntry, item: OriginObject, resolved: Resolved) -> FileEntry:
    """With the strongest check that it ever passed."""
    now = _entry(item, resolved, entry.digest)
    return replace(now, checked_by=min(now.checked_by, entry.checked_by, key=_STRENGTH.index))


def _copy_id(path: str) -> str:
    return hashlib.sha256(f"copy {path}".encode()).hexdigest()[:32]
