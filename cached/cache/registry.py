"""What this host knows: models, their revisions, and which blob is where. Owned by the loop, kept in the index."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import structlog

from cached.access import AccessList
from cached.cache.absent import not_known
from cached.cache.index_writer import IndexWriter
from cached.cache.model import Blob, Model, Presence, Present
from cached.catalog_file import Catalog, CatalogModel
from cached.errors import CachedError, LevelError, NotFoundError, QuarantinedError
from cached.index import AccessRecord, Index, ModelRecord
from cached.level import Level
from cached.manifest import BlobRecord, Manifest
from cached.refs import Ref
from cached.schedule import Schedule, parse_schedule

_log = structlog.get_logger(__name__)

__all__ = ["Blob", "Model", "Presence", "Present", "Registry"]


_TOLD = 3
"""Damaged blobs that are named one by one."""


class Registry:
    """All of it. Writes go through to the index; where that fails, memory goes on.

    ``on_fault`` hears what is wrong with the index, and None when a write succeeds. ``time_zone``: that of hot
    windows which name none.
    """

    def __init__(self, index: Index, on_fault: Callable[[Exception | None], None], *, time_zone: str = "UTC") -> None:
        self._index = index
        self._on_fault = on_fault
        self._writer = IndexWriter(index, self._wrote)
        self.models: dict[str, Model] = {}
        self.blobs: dict[str, Blob] = {}
        self.changes = 0
        """Grows whenever a model, a revision or a blob, or where one is, changes, and when uses are written down."""
        self._moves = 0
        """Grows whenever a blob comes to a level, is confirmed, doubted or lost there, and a revision comes or goes."""
        self.tenants: Mapping[str, Mapping[Level, str]] = {}
        """Name → what each level gives to the models of a tenant together: a size, or a share of the level."""
        self._time_zone = time_zone
        self._adapters: dict[str, set[str]] = {}
        """Base → the models that are adapters of it, whether it is known or not."""
        self.on_quarantine: Callable[[str], None] = lambda _why: None
        """Hears what is in quarantine whenever that changes; an empty text when nothing is."""
        self._quarantined: dict[str, str] = {}
        """Digest → what of the blob is damaged and could not be mended."""
        self._used: set[str] = set()
        self._present: dict[tuple[str, str], Present] = {}
        self._present_at = -1
        self._counts: dict[Level, int] = {}
        self._counted_at = -1

    def load(self) -> None:
        """Reads the index. No blob is at any level until recovery says so. What the catalog said before stays said."""
        self.changes += 1
        for record in self._index.models():
            self._model(record.name).record = record
        for blob in self._index.blobs():
            self.blobs[blob.digest] = Blob(blob)
        for manifest in self._index.manifests():
            if manifest.blobs.keys() <= self.blobs.keys():
                self._model(manifest.name).manifests[manifest.revision] = manifest
            else:
                # The index lost a damaged row: without its checksums nothing of the revision can be proven.
                _log.warning("index.revision_forgotten", model=manifest.name, revision=manifest.revision)
                self._write(lambda gone=manifest: self._index.delete_manifest(gone.name, gone.revision))  # type: ignore[misc]

        for name in self._unfinished():
            self._model(name)
        for name in self._index.access().keys() - self.models.keys():
            self._write(lambda name=name: self._index.delete_access(name))  # type: ignore[misc]

    def write_behind(self) -> None:
        """From now on nothing waits for the disk: who promises that something outlives us asks ``durable``."""
        self._writer.start()

    async def durable(self) -> None:
        """Until everything that was written before is durable. Where it fails or hangs ``on_fault`` has heard of it."""
        await self._writer.durable()

    async def close(self) -> None:
        """Writes what there is, and closes the index, unless its disk hangs."""
        self.write_uses()
        if await self._writer.stop():
            self._index.close()

    @property
    def index(self) -> Index:
        """For pending pulls, which only pulls and recovery care about."""
        return self._index

    def set_catalog(self, catalog: Catalog) -> None:
        """Replaces every model's catalog settings; models of the catalog become known, others stay known."""
        self.changes += 1
        self.tenants = catalog.tenants
        self._adapters.clear()
        for name, entry in catalog.models.items():
            self._model(name)
            if entry.base:
                self._adapters.setdefault(entry.base, set()).add(name)
        for model in self.models.values():
            self._apply(model, catalog.models.get(model.name))
        self._set_access(catalog)

    def _apply(self, model: Model, entry: CatalogModel | None) -> None:
        """What the catalog says of a model, and how that relates it to others."""
        model.catalog = entry
        model.schedule = parse_schedule(entry.hot, self._time_zone) if entry else Schedule()
        model.base_model = self.models.get(model.base)

    def _set_access(self, catalog: Catalog) -> None:
        """Who may know of the catalog's models: its own list, else its tenant's, else its base's.

        One that leaves the catalog, or that a catalog which cannot be read named, keeps the list that it had.
        """
        before = self._index.access()
        for name in {*before, *catalog.models}:
            found = _access_of(self.models[name], catalog) if name in catalog.models else before[name]
            if found != before.get(name):
                self._write(lambda name=name, found=found: self._put_access(name, found))  # type: ignore[misc]

    def _put_access(self, name: str, access: AccessList | None) -> None:
        if access is None:
            self._index.delete_access(name)
        else:
            self._index.put_access(AccessRecord(name, access))

    def access(self) -> dict[str, AccessList]:
        """Who may know of which model, of those that have a list."""
        return self._index.access()

    def set_in_window(self, model: Model, in_window: bool) -> None:  # noqa: FBT001 what it is set to
        """A hot window of a model began or ended."""
        self.changes += 1
        model.in_window = in_window

    def pull_times_s(self, name: str) -> tuple[float, ...]:
        """When pulls of a model begin by themselves, in Unix time, the next one first."""
        return tuple(pull.at_time_s for pull in self._index.timed(name))

    def find(self, ref: Ref) -> Model | None:
        """The model of a reference, or None."""
        return self.models.get(ref.name)

    def require(self, ref: Ref) -> Model:
        """The model of a reference, or NotFoundError."""
        model = self.models.get(ref.name)
        if model is None:
            raise not_known(ref)
        return model

    def manifest_of(self, model: Model, ref: Ref) -> Manifest | None:
        """The manifest that a reference means: the current one, or the one whose revision begins as given."""
        if not ref.revision:
            return model.current
        found = [item for revision, item in model.manifests.items() if revision.startswith(ref.revision)]
        if len(found) > 1:
            raise NotFoundError(
                f"{ref} means more than one revision", hint="give more digits of the revision", ref=str(ref)
            )
        return found[0] if found else None

    def check_usable(self, manifest: Manifest) -> None:
        """Raises QuarantinedError if this revision is known to be damaged."""
        why = "; ".join(
            self._quarantined[entry.digest] for entry in manifest.files if entry.digest in self._quarantined
        )
        if why:
            raise QuarantinedError(
                f"{manifest.name}@{manifest.revision} is quarantined: {why}",
                hint="`cached verify --repair` tries again to mend it; `cached rm` and a new pull replace it",
                ref=f"{manifest.name}@{manifest.revision}",
            )

    def known(self, name: str) -> Model:
        """The model of this name, made known if it is new."""
        return self._model(name)

    def forget_if_unknown(self, model: Model) -> None:
        """Drops a name that a failed pull made known, and of which nothing else is known."""
        record = model.record
        known = (model.catalog, model.manifests, record.source, record.operator_tier, record.pinned)
        if not any(known) and model.name not in self._unfinished() and not self._index.timed(model.name):
            self._write(lambda: self._index.delete_model(model.name))
            self.models.pop(model.name, None)
            self._rejoin(model.name)

    def _unfinished(self) -> set[str]:
        """Models of which bytes may be here that are of no recorded revision."""
        return {part.name for part in self._index.parts()} | {pull.name for pull in self._index.pending()}

    def update(self, model: Model, **changes: Any) -> None:
        """Changes fields of the model's record, in memory and in the index."""
        model.record = replace(model.record, **changes)
        self._write(lambda: self._index.put_model(model.record))

    def well(self, name: str) -> None:
        """The model was brought, or mended: what went wrong before is over."""
        model = self.models.get(name)
        if model is not None and model.record.last_error:
            self.update(model, last_error="")

    def used(self, model: Model, wall_s: float, *, attaches: int) -> None:
        """Notes a use of a model. In memory: attaching must not wait for a disk. `write_uses` makes it durable."""
        count = model.record.attach_count + attaches
        model.record = replace(model.record, last_used_wall_s=wall_s, attach_count=count)
        self._used.add(model.name)

    def write_uses(self) -> None:
        """Writes the uses noted since the last time, in one transaction."""
        names, self._used = self._used & self.models.keys(), set()
        if names:
            self._write(lambda: self._put_models(names))

    def _put_models(self, names: set[str]) -> None:
        with self._index.transact():
            for name in sorted(names):
                self._index.put_model(self.models[name].record)

    def add_manifest(self, manifest: Manifest) -> None:
        """Records a revision whose blobs are all known, and makes it the current one."""
        model = self._model(manifest.name)
        model.manifests[manifest.revision] = manifest
        self._moved()
        self._write(lambda: self._index.put_manifest(manifest))
        self.update(model, current_revision=manifest.revision, last_error="")

    def replace_manifest(self, manifest: Manifest) -> None:
        """Records what changed of a known revision: where it can be had from. Its content is the same."""
        self.models[manifest.name].manifests[manifest.revision] = manifest
        self._write(lambda: self._index.put_manifest(manifest))

    def forget_revision(self, manifest: Manifest) -> None:
        """Drops a revision that is at no level any more, and the blobs that only it had."""
        model = self.models[manifest.name]
        model.manifests.pop(manifest.revision, None)
        self._moved()
        self._write(lambda: self._index.delete_manifest(manifest.name, manifest.revision))
        kept = {entry.digest for other in self.manifests() for entry in other.files}
        for digest in {entry.digest for entry in manifest.files} - kept:
            self.forget_blob(digest)

    def forget_blob(self, digest: str) -> None:
        """Drops the record of a blob that is at no level."""
        blob = self.blobs.get(digest)
        if blob is not None and not blob.at(Level.L1) and not blob.l2:
            del self.blobs[digest]
            self._take_out(digest)
            self._write(lambda: self._delete_blob(digest))

    def _delete_blob(self, digest: str) -> None:
        with self._index.transact():
            self._index.delete_blob(digest)
            self._index.delete_verified(digest)

    def forget_model(self, model: Model) -> None:
        """Drops a model; its blobs must have left every level. What the catalog says stays known."""
        for manifest in list(model.manifests.values()):
            self.forget_revision(manifest)
        self._write(lambda: self._index.delete_model(model.name))
        del self.models[model.name]
        if model.catalog is not None:
            self._apply(self._model(model.name), model.catalog)
        else:
            self._write(lambda: self._index.delete_access(model.name))
        self._rejoin(model.name)

    def found(self, digest: str, level: Level) -> None:
        """A known blob was found at a level, where an earlier daemon left it; in L1 it is yet to be confirmed."""
        self._moved()
        if level is Level.L1:
            self.blobs[digest].l1 = Presence.UNCONFIRMED
        else:
            self.blobs[digest].l2 = True

    def landed(self, record: BlobRecord, level: Level) -> None:
        """A blob was committed or confirmed at a level."""
        self._moved()
        blob = self.learn(record)
        if level is Level.L1:
            blob.l1 = Presence.CONFIRMED
        else:
            blob.l2, blob.left_l2 = True, False
        if level is Level.L1 or blob.l1 is Presence.ABSENT:
            self.mended(record.digest)

    def learn(self, record: BlobRecord) -> Blob:
        """The blob with these checksums, made known if it is new. That says nothing of where it is."""
        blob = self.blobs.get(record.digest)
        if blob is None:
            blob = self.blobs[record.digest] = Blob(record)
            self._write(lambda: self._index.put_blob(record))
        return blob

    def doubt(self, digest: str) -> None:
        """A blob in L1 is known to be damaged: whoever attaches next has it confirmed again, and so mended."""
        self._moved()
        if self.blobs[digest].l1 is Presence.CONFIRMED:
            self.blobs[digest].l1 = Presence.UNCONFIRMED

    def lost(self, digest: str, level: Level) -> None:
        """A blob left a level."""
        self._moved()
        blob = self.blobs[digest]
        if level is Level.L1:
            blob.l1 = Presence.ABSENT
        else:
            blob.l2 = False

    def _moved(self) -> None:
        self.changes += 1
        self._moves += 1

    def manifests(self) -> Iterator[Manifest]:
        """Every known revision of every model."""
        for model in self.models.values():
            yield from model.manifests.values()

    def blobs_of(self, manifest: Manifest) -> list[Blob]:
        """Each blob of a revision once."""
        return [self.blobs[digest] for digest in dict.fromkeys(entry.digest for entry in manifest.files)]

    def present(self, manifest: Manifest) -> Present:
        """Where a revision's bytes are; counted once, until a blob moves."""
        if self._present_at != self._moves:
            self._present.clear()
            self._present_at = self._moves
        key = (manifest.name, manifest.revision)
        if key not in self._present:
            self._present[key] = Present.of(self.blobs_of(manifest))
        return self._present[key]

    def blob_count(self, level: Level) -> int:
        """How many blobs are at a level; counted once, until one moves."""
        if self._counted_at != self._moves:
            in_l1 = sum(blob.l1 is not Presence.ABSENT for blob in self.blobs.values())
            self._counts = {Level.L1: in_l1, Level.L2: sum(blob.l2 for blob in self.blobs.values())}
            self._counted_at = self._moves
        return self._counts[level]

    def bytes_at(self, manifest: Manifest, level: Level) -> int:
        """Bytes of a revision that are at a level, shared ones included."""
        present = self.present(manifest)
        return present.l1_bytes if level is Level.L1 else present.l2_bytes

    def whole_at(self, manifest: Manifest, level: Level) -> bool:
        """True if every blob of a revision is at a level; in L1 they must be confirmed."""
        present = self.present(manifest)
        return present.confirmed_in_l1 if level is Level.L1 else present.whole_in_l2

    def is_here(self, manifest: Manifest) -> bool:
        """True if every blob of a revision is at some local level, so that it needs no origin."""
        return all(blob.at(Level.L1) or blob.l2 for blob in self.blobs_of(manifest))

    def resident(self, manifest: Manifest, level: Level) -> bool:
        """True if every blob of a revision is at a level, confirmed or not."""
        return all(blob.at(level) for blob in self.blobs_of(manifest))

    def at_level(self, digests: Iterable[str], level: Level) -> dict[str, int]:
        """Those of these blobs that are known and at a level, and their sizes."""
        known = {digest: blob for digest in digests if (blob := self.blobs.get(digest)) is not None}
        return {digest: blob.record.size_bytes for digest, blob in known.items() if blob.at(level)}

    def only_of(
        self, manifest: Manifest, level: Level, held: frozenset[str] = frozenset(), gone: Collection[Manifest] = ()
    ) -> list[Blob]:
        """The blobs that leave a level with this revision: no other revision that is resident there has them.

        ``held``: digests that loads in flight count on; they stay. ``gone``: revisions that left just before, but whose
        blobs this one had, too; they hold nothing any more.
        """
        kept, leaving = set(held), {(each.name, each.revision) for each in (manifest, *gone)}
        for other in self.manifests():
            if (other.name, other.revision) not in leaving and self.resident(other, level):
                kept.update(entry.digest for entry in other.files)
        return [blob for blob in self.blobs_of(manifest) if blob.at(level) and blob.record.digest not in kept]

    def sharers(self, digest: str, but: str) -> tuple[str, ...]:
        """Names of the other models that have this blob in a revision."""
        names = {item.name for item in self.manifests() for entry in item.files if entry.digest == digest}
        return tuple(sorted(names - {but}))

    def quarantine(self, digest: str, why: str) -> None:
        """Marks a blob as damaged beyond repair for now: no new lease on the revisions that have it."""
        self.changes += 1
        self._quarantined[digest] = why
        self.on_quarantine(self._quarantine_text())

    def mended(self, digest: str) -> None:
        """Every byte of a blob was found right, or put right: it is out of quarantine."""
        self.changes += 1
        self._take_out(digest)

    def _take_out(self, digest: str) -> None:
        if self._quarantined.pop(digest, None) is not None:
            self.on_quarantine(self._quarantine_text())

    def _quarantine_text(self) -> str:
        told = []
        for digest, why in list(self._quarantined.items())[:_TOLD]:
            names = {manifest.name for manifest in self.manifests() if digest in manifest.blobs}
            told.append(f"{', '.join(sorted(names))}: {why}")
        more = f"; and {len(self._quarantined) - _TOLD} more" if len(self._quarantined) > _TOLD else ""
        return "; ".join(told) + more

    @property
    def quarantined(self) -> Mapping[str, str]:
        """Digest → what of the blob is damaged and could not be mended."""
        return self._quarantined

    def is_quarantined(self, manifest: Manifest) -> bool:
        """True if a blob of this revision is damaged and could not be mended."""
        return bool(self._quarantined) and any(entry.digest in self._quarantined for entry in manifest.files)

    def write(self, change: Callable[[], None]) -> None:
        """For other records of the index: a failing write is reported, not raised."""
        self._write(change)

    def _model(self, name: str) -> Model:
        if name not in self.models:
            self.changes += 1
            self.models[name] = Model(ModelRecord(name=name))
            self._rejoin(name)
        return self.models[name]

    def _rejoin(self, base: str) -> None:
        """A model came or went: its adapters have to know."""
        for name in self._adapters.get(base, ()):
            if name in self.models:
                self.models[name].base_model = self.models.get(base)

    def _write(self, change: Callable[[], None]) -> None:
        self.changes += 1
        try:
            change()
        except LevelError as error:
            self._wrote(error)
        else:
            if not self._writer.running:
                self._wrote(None)

    def _wrote(self, failure: Exception | None) -> None:
        """The index was written, or why it was not."""
        if isinstance(failure, CachedError):
            _log.error("index.write_failed", chain=failure.chain)
        self._on_fault(failure)


def _access_of(model: Model, catalog: Catalog) -> AccessList | None:
    own = model.catalog.access if model.catalog else None
    if own is not None:
        return own
    base = model.base_model
    return catalog.access.get(model.tenant) or (_access_of(base, catalog) if base is not None else None)
