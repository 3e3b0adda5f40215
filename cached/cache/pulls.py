"""From a reference to a load: resolve the origin, choose the files, and say for each blob how it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from cached.cache.artifact_key import Destination, choose, parse_archive
from cached.cache.flight import BlobOrder
from cached.cache.hot_set import HotSet
from cached.cache.load import Load, LoadFile, LoadPlan
from cached.cache.loader import Loader
from cached.cache.registry import Blob, Model, Presence
from cached.cache.services import Services
from cached.errors import (
    CachedError,
    InvalidRequestError,
    MoverError,
    NoSourceError,
    ObjectChangedError,
    UnavailableError,
)
from cached.index import PendingPull
from cached.manifest import BlobRecord, FileEntry, Manifest, revision_of
from cached.origins.base import OriginObject, OriginSpec
from cached.origins.registry import pinned_spec
from cached.origins.selection import select
from cached.policy import Otherwise
from cached.refs import Ref, artifact_digest
from cached.signals import Signal, run_all
from cached.singleflight import SingleFlight
from cached.transfer.fill import OriginSource
from cached.transfer.jobs import Listing, ListObjects, Prepare, ReadTexts, Result, StatObjects
from cached.types import CheckedBy, Level, Tier

_RESTARTS_ON_CHANGE = 3
_STATS_PER_JOB = 32


@dataclass(frozen=True, slots=True)
class Resolved:
    """What the origin has now, chosen and ordered."""

    spec: OriginSpec
    items: tuple[OriginObject, ...]
    notes: tuple[str, ...]
    sha256: Mapping[str, str]
    revision: str


class PullRun:
    """A pull as its watchers see it. ``signal`` fires when it gets a load (again) and when it ends."""

    def __init__(self, name: str) -> None:
        self.name = name
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
    """Plans and begins loads. ``defaults``: for each scheme, the options that the configuration has for it."""

    def __init__(
        self,
        services: Services,
        loader: Loader,
        defaults: Mapping[str, Mapping[str, str]],
        artifacts: Destination,
    ) -> None:
        self._services = services
        self._loader = loader
        self._artifacts = artifacts
        self._defaults = defaults
        self._resolving: SingleFlight[tuple[str, str], Resolved] = SingleFlight()
        self._runs: set[asyncio.Task[None]] = set()

    async def pull(
        self, ref: Ref, *, source: str, level: Level, tier: Tier | None = None, otherwise: Otherwise = Otherwise.EVICT
    ) -> Load:
        """The load that brings what the origin has now to ``level``. Raises if it cannot be resolved or planned.

        ``otherwise``: what becomes of it in L1 if it is not worth what would have to go for it. ``TRANSIENT`` is for
        workers: their asking counts as demand, before anything is decided.
        """
        model = self._model(ref, source)
        try:
            resolved = await self._resolve(model, source or ref.uri or self._artifacts.source_of(model.name))
            self._check_revision(ref, resolved)
        except CachedError as error:
            error.fields.setdefault("name", model.name)
            self._services.failed(model, error)
            self._services.registry.forget_if_unknown(model)
            raise
        await self._other_level(model.name, resolved.revision, level)
        plan = replace(self._plan(model, resolved, level), otherwise=otherwise)
        if tier is Tier.HOT:
            HotSet(self._services).check(model, plan.total_bytes)
        self._remember(model, plan, tier)
        return self._begin(plan)

    def _begin(self, plan: LoadPlan) -> Load:
        if plan.otherwise is Otherwise.TRANSIENT:
            self._services.history.asked(plan.name, hit=False)
        return self._loader.begin(plan)

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
    ) -> PullRun:
        """Starts a pull that goes on whoever watches it, and is begun again when an object changes under way."""
        run = PullRun(ref.name)
        run.task = asyncio.get_running_loop().create_task(
            self._run(run, lambda: self.pull(ref, source=source, level=level, tier=tier, otherwise=otherwise)),
            name=f"pull {ref.name}",
        )
        self._runs.add(run.task)
        run.task.add_done_callback(self._runs.discard)
        return run

    async def _run(self, run: PullRun, pull: Callable[[], Awaitable[Load]]) -> None:
        try:
            for restart in range(_RESTARTS_ON_CHANGE + 1):
                run.load = load = await pull()
                run.signal.notify()
                try:
                    await load.until(lambda load=load: load.finished)  # type: ignore[misc]
                    break
                except ObjectChangedError:
                    if restart == _RESTARTS_ON_CHANGE:
                        raise
        except CachedError as error:
            run.error = error
        except asyncio.CancelledError:
            run.error = UnavailableError("the pull was stopped", hint="it is resumed when the daemon starts again")
            raise
        finally:
            run.finished = True
            run.signal.notify()

    def promote(self, manifest: Manifest, *, otherwise: Otherwise = Otherwise.EVICT) -> Load:
        """The load that brings a known revision to L1 from wherever its blobs are; ``otherwise`` as of ``pull``."""
        return self._begin(replace(self._plan_known(manifest, Level.L1), otherwise=otherwise))

    def check(self, ref: Ref, source: str) -> None:
        """Raises what ``pull`` would, as far as that shows without an origin; the model is known from then on."""
        self._model(ref, source)

    def _model(self, ref: Ref, source: str) -> Model:
        model = self._services.registry.find(ref)
        if artifact_digest(ref.name):
            return self._artifact(ref, source or ref.uri, model)
        if not (source or ref.uri or (model and model.source)):
            raise NoSourceError(
                f"nothing says where to get {ref.name} from",
                hint=f"add it to the catalog, or: cached pull {ref.name} --source s3://BUCKET/PREFIX",
                ref=str(ref),
            )
        catalogued = model is not None and model.catalog is not None
        if catalogued and source and model is not None and source != model.source:
            raise InvalidRequestError(
                f"the catalog says that {ref.name} comes from {model.source}, not from {source}",
                hint="leave --source away, use another name, or change the catalog",
                value=source,
            )
        return self._services.registry.known(ref.name)

    def _artifact(self, ref: Ref, source: str, model: Model | None) -> Model:
        """A compile artifact is code that workers run: it comes from nowhere but the configured destination."""
        known = self._artifacts.source_of(ref.name) or (model.source if model else "")
        if source and source != known:
            raise InvalidRequestError(
                f"{ref.name} is the name of a compile artifact, which does not come from {source}",
                hint="call the model something else; artifacts come from artifacts.destination alone",
                value=source,
            )
        if not known:
            raise NoSourceError(
                f"the compile artifact {ref.name} is not on this host, and there is no destination to look at",
                hint="set artifacts.destination of the daemon, or save it here",
                ref=str(ref),
            )
        return self._services.registry.known(ref.name)

    def spec_of(self, uri: str) -> OriginSpec:
        """An origin that no model is from, with the options of the configuration."""
        return OriginSpec(uri, self._options(uri))

    def _spec(self, model: Model, source: str) -> OriginSpec:
        uri = source or model.source
        return OriginSpec(
            uri, self._options(uri) | dict(model.catalog.origin if model.catalog else model.record.origin_options)
        )

    def _options(self, uri: str) -> dict[str, str]:
        return dict(self._defaults.get(uri.partition("://")[0].lower(), {}))

    async def _resolve(self, model: Model, source: str) -> Resolved:
        spec = self._spec(model, source)
        return await self._resolving.do((model.name, spec.uri), lambda: self._look(model, spec))

    async def _look(self, model: Model, spec: OriginSpec) -> Resolved:
        catalog = model.catalog
        if not model.manifests:
            self._services.runner.prepare(Prepare(spec))
        listing = await self.listed(ListObjects(spec))
        if artifact_digest(model.name):
            return await self._chosen_artifact(model, spec, listing)
        chosen = select(
            listing,
            include=catalog.include if catalog else (),
            exclude=catalog.exclude if catalog else (),
            weights_format=(catalog.format if catalog else "") or "auto",
            source=spec.uri,
        )
        items = await self._stat(pinned_spec(spec, chosen.files), tuple(item.path for item in chosen.files))
        sha256 = dict(catalog.sha256) if catalog else {}
        missing = sorted(set(sha256) - {item.path for item in items})
        if missing:
            raise InvalidRequestError(
                f"the catalog has a sha256 for {missing[0]}, which {spec.uri} lacks or its patterns leave out",
                hint="correct the path in the catalog's sha256 table",
                value=missing[0],
            )
        return Resolved(
            spec=spec,
            items=items,
            notes=chosen.notes,
            sha256=sha256,
            revision=revision_of((item.path, item.size_bytes, _identity(item, sha256)) for item in items),
        )

    async def _chosen_artifact(self, model: Model, spec: OriginSpec, listing: tuple[OriginObject, ...]) -> Resolved:
        """Its objects are named by what they must hold, which counts as the catalog's word does."""
        key, archive = choose(model.name, listing, self._artifacts.max_bytes)
        parsed = parse_archive(archive.path)
        assert parsed is not None  # noqa: S101 - chosen by it
        sha256 = {key.path: artifact_digest(model.name), archive.path: parsed.sha256}
        items = await self._stat(spec, (key.path, archive.path))
        revision = revision_of((item.path, item.size_bytes, _identity(item, sha256)) for item in items)
        return Resolved(spec=spec, items=items, notes=(), sha256=sha256, revision=revision)

    async def _stat(self, spec: OriginSpec, paths: tuple[str, ...]) -> tuple[OriginObject, ...]:
        """Of a model of many files, by several movers beside each other."""
        found: dict[int, tuple[OriginObject, ...]] = {}

        async def some(at: int) -> None:
            found[at] = await self.listed(StatObjects(spec, paths[at : at + _STATS_PER_JOB]))

        await run_all(*(some(at) for at in range(0, len(paths), _STATS_PER_JOB)))
        return tuple(item for at in sorted(found) for item in found[at])

    async def listed(self, job: ListObjects | StatObjects) -> tuple[OriginObject, ...]:
        """Runs a listing job, with the retries that every request to an origin has."""
        answer = await self.retried(job)
        if not isinstance(answer, Listing):
            raise MoverError("a mover answered a listing with something else")
        return answer.items

    async def retried(self, job: ListObjects | StatObjects | ReadTexts) -> Result:
        """Runs a small job at an origin; what fails for a passing reason is tried again."""
        retry, clock = self._services.retry, self._services.clock
        for attempt in range(1, retry.max_attempts):
            try:
                return await self._services.runner.run(job)
            except CachedError as error:
                if not error.retryable:
                    raise
                self._services.metrics.retries.labels(reason=error.reason).inc()
                await clock.sleep(retry.delay_s(attempt, error))
        return await self._services.runner.run(job)

    def _check_revision(self, ref: Ref, resolved: Resolved) -> None:
        if ref.revision and not resolved.revision.startswith(ref.revision):
            raise NoSourceError(
                f"{ref} is not here, and its origin has revision {resolved.revision} now",
                hint=f"pull {ref.name} without a revision to get what the origin has",
                ref=str(ref),
            )

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
            source=resolved.spec.uri,
            origin_options=dict(model.catalog.origin if model.catalog else model.record.origin_options),
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
        vouched = sha256 or _vouched_sha256(item)
        digest = vouched or self._services.journal_digest(order.ingest_id)
        blob = self._services.registry.blobs.get(digest)
        if blob is None or blob.record.size_bytes != item.size_bytes:
            return LoadFile(item.path, item.size_bytes, sha256, order, checked_by)
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
        return OriginSource(self._spec(model, manifest.source), _object(entry))

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
        return LoadFile(path, record.size_bytes, record.digest, None if here else order, checked_by)

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
                name=plan.name, revision=plan.revision, source=plan.source, level=plan.level, ingests=tuple(ingests)
            )
            registry.write(lambda: registry.index.put_pending(pending))
        self._supersede(plan, earlier)

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

    async def stop(self) -> None:
        """Ends every pull; what was verified stays resumable."""
        for task in self._runs:
            task.cancel()
        await asyncio.gather(*self._runs, return_exceptions=True)
        await self._resolving.close()


def _identity(item: OriginObject, sha256: Mapping[str, str]) -> str:
    digest = sha256.get(item.path) or _vouched_sha256(item)
    return f"sha256:{digest}" if digest else f"version:{item.version}"


def _vouched_sha256(item: OriginObject) -> str:
    """The SHA-256 of the whole content, if the origin tells it."""
    whole = (check for check in item.checksums if check.algorithm == "sha256" and not check.part_sizes_bytes)
    return next((check.value_hex for check in whole), "")


def _object(entry: FileEntry) -> OriginObject:
    return OriginObject(path=entry.path, size_bytes=entry.size_bytes, version=entry.version)
