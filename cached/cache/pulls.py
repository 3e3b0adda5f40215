"""From a reference to a load: what the origin has, and for each blob how it comes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import replace

from cached.cache.background import cancel
from cached.cache.chooser import Chooser, chunks_of
from cached.cache.flight import BlobOrder
from cached.cache.hot_set import HotSet
from cached.cache.load import Chosen, Load, LoadFile, LoadPlan
from cached.cache.loader import Loader
from cached.cache.registry import Blob, Model, Presence
from cached.cache.resolver import Resolved, Resolver, check_revision, vouched_sha256
from cached.cache.services import Services
from cached.cache.stagger import Stagger
from cached.errors import CachedError, NotFoundError, ObjectChangedError, UnavailableError
from cached.index import PartFile, PartRecord, PendingPull
from cached.level import Level
from cached.manifest import BlobRecord, FileEntry, Manifest
from cached.origins.base import OriginObject
from cached.policy import Otherwise
from cached.refs import Ref
from cached.signals import Signal
from cached.tracing import Span
from cached.transfer.fill import OriginSource
from cached.transfer.lanes import name_of
from cached.types import ByteRange, CheckedBy, Selected, Selection, Tier

_RESTARTS = 3
"""Of a pull whose objects change under it, or of which a link of a chain sent what cannot be kept."""
_MAX_ASKED = 1000
"""Pulls that clients began and need not wait for: calls are bounded, these would not be."""


class PullRun:
    """A pull as its watchers see it. ``signal`` fires when it gets a load (again) and when it ends.

    ``unattended``: nobody waits for it. ``begun``: it has its turn. ``span``: that of whoever asks for nothing else.
    """

    def __init__(self, name: str, span: Span, *, unattended: bool) -> None:
        self.name = name
        self.span = span
        self.unattended = unattended
        self.begun = False
        self.load: Load | None = None
        self.error: CachedError | None = None
        self.finished = False
        self.signal = Signal()
        self.task: asyncio.Task[None] | None = None

    async def until_planned(self) -> Load:
        """The load, once the origin was resolved; raises the pull's error."""
        while self.load is None:
            if self.error is not None:
                raise self.error
            await self.signal.wait()
        return self.load


class Pulls:
    """Plans and begins loads."""

    def __init__(
        self,
        services: Services,
        loader: Loader,
        resolver: Resolver,
        stagger: Stagger,
    ) -> None:
        self._services = services
        self._loader = loader
        self._resolver = resolver
        self._stagger = stagger
        self._chooser = Chooser(services, loader)
        self._runs: dict[asyncio.Task[None], PullRun] = {}

    async def pull(
        self,
        ref: Ref,
        *,
        source: str,
        level: Level,
        tier: Tier | None = None,
        otherwise: Otherwise = Otherwise.EVICT,
        selection: Selection | None = None,
    ) -> Load:
        """The load that brings what the origin has now to ``level``. Raises if it cannot be resolved or planned.

        ``otherwise``: what becomes of it in L1 if it is not worth what would have to go for it. ``TRANSIENT`` is for
        workers: their asking counts as demand, before anything is decided. ``selection``: only that, or that first.
        """
        model = self._resolver.model_of(ref, source)
        try:
            with self._services.tracer.start("resolve"):
                resolved = await self._resolver.resolve(model, source or ref.uri)
            check_revision(ref, resolved)
        except CachedError as error:
            error.fields.setdefault("name", model.name)
            self._services.failed(model, error)
            self._services.registry.forget_if_unknown(model)
            raise
        plan = self._plan(model, resolved, level)
        chosen = await self._choose_new(model, plan, selection)
        alone = await self._links_alone(plan)
        await self._other_level(model.name, resolved.revision, level)
        # From here to the load's beginning nothing is waited for: another could begin to another level meanwhile.
        plan = replace(self._plan(model, resolved, level), otherwise=otherwise)
        if selection is not None and chosen is not None and not selection.rest_follows:
            return self._begin_part(model, plan, selection, chosen)
        plan = _unmixed(plan, alone)
        if chosen is not None:
            plan = plan.preferring(chosen)
        if tier is Tier.HOT:
            HotSet(self._services).check(model, plan.total_bytes)
        self._remember(model, plan, tier)
        return self._begin(plan, chosen)

    async def _links_alone(self, plan: LoadPlan) -> dict[str, OriginSource]:
        """Of a chain: what nothing will prove as a whole comes from one link alone; which, by path."""
        mixed = {file.path: origin for file in plan.files if (origin := _mixed(file)) is not None}
        links = await asyncio.gather(*map(self._services.chains.standing_in, mixed.values()))
        return dict(zip(mixed, links, strict=True))

    def _begin(self, plan: LoadPlan, first: Chosen | None = None) -> Load:
        if plan.otherwise is Otherwise.TRANSIENT:
            self._services.history.asked(plan.name, hit=False)
        load = self._loader.begin(plan)
        if first is not None:
            load.prefer(first.first)  # it may have been under way
        return load

    def _begin_part(self, model: Model, plan: LoadPlan, selection: Selection, chosen: Chosen) -> Load:
        self._remember_part(model, plan)
        self._services.history.asked(plan.name, hit=False)
        return self._begin(plan.only(chosen, _part_key(selection)))

    async def _choose_new(self, model: Model, plan: LoadPlan, selection: Selection | None) -> Chosen | None:
        """A pattern that matches nothing is the caller's mistake: it is not remembered of the model."""
        if selection is None:
            return None
        try:
            return await self._chooser.choose(model.name, plan.files, selection)
        except CachedError:
            self._services.registry.forget_if_unknown(model)
            raise

    async def _other_level(self, name: str, revision: str, level: Level) -> None:
        """Waits for a load of the same revision to another level: its bytes need not be fetched twice."""
        for load in self._loader.active(name, revision):
            if load.plan.level is not level:
                with suppress(CachedError):  # its own watchers hear of its error; we go on and try ourselves
                    await load.until(lambda load=load: load.finished)  # type: ignore[misc]

    def begin(
        self,
        ref: Ref,
        *,
        source: str = "",
        level: Level = Level.L1,
        tier: Tier | None = None,
        otherwise: Otherwise = Otherwise.EVICT,
        selection: Selection | None = None,
        unattended: bool = False,
        span: Span | None = None,
    ) -> PullRun:
        """Starts a pull that goes on whoever watches it, and is begun again when an object changes under way.

        ``unattended``: nobody waits for it, so it waits for its turn in the fleet. ``span`` ends with the pull.
        """
        return self._start(
            ref.name,
            lambda: self.pull(ref, source=source, level=level, tier=tier, otherwise=otherwise, selection=selection),
            unattended=unattended,
            span=span,
        )

    def bring(self, manifest: Manifest) -> None:
        """A known revision to L1, for nobody who waits: from a level of this host at once, else in its turn."""
        if self._services.registry.is_here(manifest):
            self.promote(manifest)
        elif not self.is_coming(manifest.name):
            self._start(manifest.name, lambda: self._promoted(manifest), unattended=True)

    async def _promoted(self, manifest: Manifest) -> Load:
        return self.promote(manifest)

    def why_waiting(self, name: str) -> str:
        """What an unattended pull of a model waits for before it begins, for people; empty: none waits."""
        return self._stagger.why_waiting(name)

    def links_of(self, model: Model) -> str:
        """The links in front of a model's source, for people, with why any of them is left alone now; empty: none."""
        if not model.source:
            return ""
        front, skipped = self._resolver.spec(model, "").front, self._services.chains.skipped()
        names = [name_of(link) for link in front]
        told = [f"{name} (left alone now: {skipped[name]})" if name in skipped else name for name in names]
        return f"asked for bytes before the source: {', '.join(told)}" if told else ""

    def is_coming(self, name: str) -> bool:
        """Whether an unattended pull of a model waits or is under way."""
        return any(run.name == name and run.unattended for run in self._runs.values())

    def is_under_way(self, name: str) -> bool:
        """Whether a pull of a model was begun and has not ended, be it attended or not."""
        return any(run.name == name and not run.finished for run in self._runs.values())

    @property
    def resolving(self) -> tuple[str, ...]:
        """Models whose pulls have begun and have no load yet: their origins are being asked."""
        return tuple(run.name for run in self._runs.values() if run.begun and run.load is None and not run.finished)

    def _start(
        self, name: str, pull: Callable[[], Awaitable[Load]], *, unattended: bool, span: Span | None = None
    ) -> PullRun:
        if not unattended and sum(not run.unattended for run in self._runs.values()) >= _MAX_ASKED:
            raise UnavailableError(
                f"{_MAX_ASKED} pulls that were asked for are under way", hint="wait until some have ended: cached top"
            )
        run = PullRun(name, span or Span(""), unattended=unattended)
        turn = self._stagger.turn(name) if unattended else nullcontext()
        run.task = asyncio.get_running_loop().create_task(self._run(run, pull, turn), name=f"pull {name}")
        self._runs[run.task] = run
        run.task.add_done_callback(self._runs.pop)
        return run

    async def _run(
        self, run: PullRun, pull: Callable[[], Awaitable[Load]], turn: AbstractAsyncContextManager[None]
    ) -> None:
        try:
            async with turn:
                run.begun = True
                await self._try(run, pull)
        except CachedError as error:
            run.error = error
            run.span.fail(error)
        except asyncio.CancelledError:
            run.error = UnavailableError("the pull was stopped", hint="it is resumed when the daemon starts again")
            raise
        except Exception as bug:  # noqa: BLE001 - told, and raised to whoever waits
            run.error = self._services.failures.bug("pull", bug, name=run.name)
            run.span.fail(run.error)
        finally:
            run.finished = True
            run.span.end()
            run.signal.notify()

    async def _try(self, run: PullRun, pull: Callable[[], Awaitable[Load]]) -> None:
        for restart in range(_RESTARTS + 1):
            load: Load | None = None
            try:
                run.load = load = await pull()
                run.span.set({"cached.revision": load.plan.revision, "cached.load.id": load.load_id})
                run.span.link(load.span)
                run.signal.notify()
                await load.until(lambda load=load: load.finished)  # type: ignore[misc]
            except CachedError as error:
                again = isinstance(error, ObjectChangedError) or (load is not None and load.next_link)
                if restart == _RESTARTS or not again:
                    raise
            else:
                return

    def promote(self, manifest: Manifest, *, otherwise: Otherwise = Otherwise.EVICT) -> Load:
        """The load that brings a known revision to L1 from wherever its blobs are; ``otherwise`` as of ``pull``."""
        return self._begin(replace(self._plan_known(manifest, Level.L1), otherwise=otherwise))

    def confirm(self, manifest: Manifest) -> Load:
        """The load that confirms what an earlier daemon left in L1 of a known revision, and brings nothing."""
        return self._begin(self._plan_known(manifest, Level.L1).confirming())

    async def promote_chosen(self, manifest: Manifest, selection: Selection) -> Load:
        """As ``promote``, for a selection. Raises what ``Chooser.choose`` does."""
        model = self._services.registry.models[manifest.name]
        chosen = await self.choose(manifest, selection)
        plan = replace(self._plan_known(manifest, Level.L1), otherwise=Otherwise.TRANSIENT)
        if not selection.rest_follows:
            return self._begin_part(model, plan, selection, chosen)
        return self._begin(plan.preferring(chosen), chosen)

    async def choose(self, manifest: Manifest, selection: Selection) -> Chosen:
        """What of a known revision a selection matches."""
        return await self._chooser.choose(manifest.name, self._plan_known(manifest, Level.L1).files, selection)

    async def choose_of(self, load: Load, selection: Selection) -> Chosen:
        """What of a revision that is on its way a selection matches."""
        return await self._chooser.choose(load.plan.name, load.plan.files, selection)

    def take_up(self, part: PartRecord, held: Sequence[ByteRange]) -> Load:
        """The load that confirms what an earlier daemon had of these ranges. NotFoundError if it is not all here."""
        wanted: dict[int, set[int]] = {}
        for item in held:
            numbers = chunks_of(item.offset_bytes, item.offset_bytes + item.length_bytes)
            wanted.setdefault(item.file_index, set()).update(numbers)
        for index, chunks in wanted.items():
            if index >= len(part.files) or not self._is_in_l1(part.files[index], chunks):
                raise NotFoundError(
                    f"not all that was mapped of {part.name} is here any more",
                    hint="attach again: what lacks is fetched",
                    ref=f"{part.name}@{part.revision}",
                )
        model = self._services.registry.known(part.name)
        files = tuple(self._part_file(model, part, file) for file in part.files)
        plan = LoadPlan(part.name, part.revision, Level.L1, files, source=part.source)
        frozen = {index: frozenset(chunks) for index, chunks in wanted.items()}
        chosen = Chosen(Selected(), frozen, frozen, sum(item.length_bytes for item in held))
        return self._begin(plan.only(chosen, hashlib.sha256(repr(sorted(frozen.items())).encode()).hexdigest()))

    def _is_in_l1(self, file: PartFile, chunks: AbstractSet[int]) -> bool:
        """Whether these chunks of it are there, in the blob or in the ingest that an earlier daemon left."""
        storage, blob = self._services.storage, self._blob_of(file)
        if blob is not None and blob.at(Level.L1):
            return True
        left = storage.kept_bytes(Level.L1, file.ingest_id) or storage.is_resumed(Level.L1, file.ingest_id)
        return not chunks or (bool(left) and chunks <= self._services.journalled(file.ingest_id, Level.L1))

    def _blob_of(self, file: PartFile) -> Blob | None:
        """What it is, or has become since it was recorded."""
        return self._services.registry.blobs.get(file.digest or self._services.journal_digest(file.ingest_id))

    def _part_file(self, model: Model, part: PartRecord, file: PartFile) -> LoadFile:
        blob = self._blob_of(file)
        source = self._resolver.spec(model, part.source, part.origin_options or None) if part.source else None
        item = OriginObject(path=file.path, size_bytes=file.size_bytes, version=file.version)
        origin = OriginSource(source, item) if source is not None else None
        if blob is not None:
            return self._known_file(part.name, file.path, blob, Level.L1, origin, None)
        order = BlobOrder(
            level=Level.L1, size_bytes=file.size_bytes, name=part.name, path=file.path, origin=origin,
            sha256=file.digest,
        )  # fmt: skip
        return LoadFile(file.path, file.size_bytes, file.digest, order, version=file.version)

    def check(self, ref: Ref, source: str) -> None:
        """Raises what ``pull`` would, as far as that shows without an origin; the model is known from then on."""
        self._resolver.model_of(ref, source)

    def _plan(self, model: Model, resolved: Resolved, level: Level) -> LoadPlan:
        known = model.manifests.get(resolved.revision)
        if known is not None and (known.source or self._services.registry.is_here(known)):
            return self._plan_known(known, level)
        files = tuple(self._new_file(model, resolved, item, level) for item in resolved.items)
        return LoadPlan(
            name=model.name,
            revision=resolved.revision,
            level=level,
            files=files,
            source=resolved.source,
            origin_options=self._resolver.own_options(resolved.spec),
            notes=resolved.notes,
        )

    def _new_file(self, model: Model, resolved: Resolved, item: OriginObject, level: Level) -> LoadFile:
        origin = OriginSource(resolved.spec, item)
        sha256 = resolved.sha256.get(item.path, "")
        order = BlobOrder(
            level=level, size_bytes=item.size_bytes, name=model.name, path=item.path, origin=origin, sha256=sha256,
            persist=level is Level.L1,
        )  # fmt: skip
        checked_by = CheckedBy.CATALOG_SHA256 if sha256 else None
        # What the origin vouches for would be checked against this digest once it was fetched: it is that blob or none.
        vouched = sha256 or vouched_sha256(item)
        digest = vouched or self._services.journal_digest(order.ingest_id)
        blob = self._services.registry.blobs.get(digest)
        if blob is None or blob.record.size_bytes != item.size_bytes:
            return LoadFile(item.path, item.size_bytes, sha256, order, checked_by, item.version)
        checked_by = checked_by or (CheckedBy.ORIGIN_CHECKSUM if vouched else None)
        return self._known_file(model.name, item.path, blob, level, origin, checked_by)

    def _plan_known(self, manifest: Manifest, level: Level) -> LoadPlan:
        files = []
        for entry in manifest.files:
            blob = self._services.registry.blobs[entry.digest]
            origin = self.origin_of(manifest, entry)
            files.append(self._known_file(manifest.name, entry.path, blob, level, origin, entry.checked_by))
        return LoadPlan(
            name=manifest.name, revision=manifest.revision, level=level, files=tuple(files), source=manifest.source,
            origin_options=dict(manifest.origin_options), notes=manifest.notes, manifest=manifest,
        )  # fmt: skip

    def origin_of(self, manifest: Manifest, entry: FileEntry) -> OriginSource | None:
        """Where a file of a known revision can be fetched again; None if that was never known."""
        if not manifest.source:
            return None
        model = self._services.registry.models[manifest.name]
        return OriginSource(self._resolver.spec(model, manifest.source, manifest.origin_options), _object(entry))

    def _known_file(
        self, name: str, path: str, blob: Blob, level: Level, origin: OriginSource | None, checked_by: CheckedBy | None
    ) -> LoadFile:
        record: BlobRecord = blob.record
        adopt = level is Level.L1 and blob.l1 is Presence.UNCONFIRMED
        order = BlobOrder(
            level=level, size_bytes=record.size_bytes, name=name, path=path, record=record, origin=origin, adopt=adopt,
            persist=level is Level.L1 and not self._services.on_disk(blob),
        )  # fmt: skip
        here = self._services.on_disk(blob) if level is Level.L2 else blob.l1 is Presence.CONFIRMED
        version = origin.item.version if origin else ""
        return LoadFile(path, record.size_bytes, record.digest, None if here else order, checked_by, version)

    def _remember(self, model: Model, plan: LoadPlan, tier: Tier | None) -> None:
        """What a restarted daemon needs to go on with this pull."""
        registry = self._services.registry
        if model.catalog is None:
            registry.update(model, source=plan.source, origin_options=plan.origin_options)
        if tier is not None:
            registry.update(model, operator_tier=tier)
        earlier = [pull for pull in registry.index.pending() if pull.name == plan.name]
        if plan.orders:
            ingests = dict.fromkeys([*plan.orders, *self._landed(plan, earlier)])
            pending = PendingPull(
                name=plan.name, revision=plan.revision, source=plan.source, level=plan.level, ingests=tuple(ingests),
                files=tuple(map(_part_file, plan.files)), origin_options=plan.origin_options,
            )  # fmt: skip
            registry.write(lambda: registry.index.put_pending(pending))
        self._supersede(plan, earlier)

    def _remember_part(self, model: Model, plan: LoadPlan) -> None:
        """What a restarted daemon needs to keep what comes of this revision, and to find it again."""
        registry = self._services.registry
        if model.catalog is None and plan.source:
            registry.update(model, source=plan.source, origin_options=plan.origin_options)
        self._drop_old_parts(plan)
        files = tuple(map(_part_file, plan.files))
        part = PartRecord(plan.name, plan.revision, plan.source, files, plan.origin_options)
        if part not in registry.index.parts(plan.name):
            registry.write(lambda: registry.index.put_part(part))

    def _landed(self, plan: LoadPlan, earlier: list[PendingPull]) -> list[str]:
        """Ingests of earlier tries that became blobs of this plan: they stay known until the revision is recorded."""
        wanted = {file.digest for file in plan.files if file.digest}
        return [
            ingest for pull in earlier for ingest in pull.ingests if self._services.journal_digest(ingest) in wanted
        ]

    def _supersede(self, plan: LoadPlan, earlier: list[PendingPull]) -> None:
        """A pull of what the origin had before, which failed, is not taken up again."""
        registry, loader = self._services.registry, self._loader
        for pull in earlier:
            if pull.revision != plan.revision and not loader.is_loading(pull.name, pull.revision):
                registry.write(lambda pull=pull: registry.index.delete_pending(pull.name, pull.revision))  # type: ignore[misc]
                loader.sweep()
        self._drop_old_parts(plan)

    def _drop_old_parts(self, plan: LoadPlan) -> None:
        """Of what the origin had before: nobody who asks now gets that."""
        old = [part for part in self._services.registry.index.parts(plan.name) if part.revision != plan.revision]
        for part in old:
            self._loader.drop_part(part)

    async def stop(self) -> None:
        """Ends every pull; what was verified stays resumable."""
        await cancel(self._services.failures, "pull", *self._runs)
        await self._resolver.close()


def _object(entry: FileEntry) -> OriginObject:
    return OriginObject(path=entry.path, size_bytes=entry.size_bytes, version=entry.version)


def _part_key(selection: Selection) -> str:
    """Attaches that ask for the same share one load."""
    return hashlib.sha256(repr((sorted(selection.tensors), sorted(selection.files))).encode()).hexdigest()


def _part_file(file: LoadFile) -> PartFile:
    order = file.order
    if order is None:  # it is here whole
        return PartFile(file.path, file.size_bytes, file.version, file.digest, file.digest[:32])
    return PartFile(file.path, file.size_bytes, file.version, order.digest, order.ingest_id)


def _mixed(file: LoadFile) -> OriginSource | None:
    """Where a file would come from several links of a chain at once, and nothing would prove it; else None."""
    order = file.order
    if order is None or order.is_proven or order.origin is None or not order.origin.spec.front:
        return None
    return order.origin


def _unmixed(plan: LoadPlan, alone: Mapping[str, OriginSource]) -> LoadPlan:
    """Each such file from its one link; from the authority where none was chosen."""
    files = []
    for file in plan.files:
        origin, order = _mixed(file), file.order
        if origin is not None and order is not None:
            files.append(replace(file, order=replace(order, origin=alone.get(file.path, origin.alone))))
        else:
            files.append(file)
    return replace(plan, files=tuple(files))
