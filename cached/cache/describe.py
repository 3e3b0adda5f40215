"""The engine's state as people and programs see it: read only, made on request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from cached.cache.explainer import Explainer, Worths
from cached.cache.hot_set import HotSet
from cached.cache.links import DirectoryView
from cached.cache.load import Load
from cached.cache.loader import Loader
from cached.cache.pulls import Pulls
from cached.cache.registry import Model
from cached.cache.services import Services
from cached.index import ModelRecord, PartRecord
from cached.leases import LeaseTable
from cached.level import Level
from cached.manifest import Manifest
from cached.metrics import Gauges, ModelGauges
from cached.processes import Usage
from cached.types import (
    FileDetail,
    LevelStats,
    ModelDetail,
    ModelSummary,
    OriginStats,
    RevisionState,
    Stats,
)
from cached.units import chunk_count


class _Row(NamedTuple):
    """A model as it was listed, and all that the listing was made of: its record, its leases, and what else is told."""

    of: tuple[ModelRecord, int, tuple[object, ...]]
    summary: ModelSummary


class Describer:
    """Loop only; nothing here changes anything."""

    def __init__(
        self,
        services: Services,
        loader: Loader,
        leases: LeaseTable,
        view: DirectoryView,
        explainer: Explainer,
        pulls: Pulls,
        *,
        version: str,
        instance: str,
    ) -> None:
        self._services = services
        self._loader = loader
        self._leases = leases
        self._view = view
        self._explainer = explainer
        self._pulls = pulls
        self._hot_set = HotSet(services)
        self._rows: dict[str, _Row] = {}
        self._rows_at = -1
        self._rows_worths: Worths = {}
        self._version = version
        self._instance = instance
        self._started_s = services.clock.monotonic_s()

    def summaries(self) -> tuple[ModelSummary, ...]:
        """Every known model, by name. The summary of one that did not change is the same object as the last time."""
        worths = self._explainer.worths()
        summaries = self._listed(worths)
        # A model without a value had all counted again: the rows of one list tell values of one count.
        return summaries if self._explainer.worths() is worths else self.summaries()

    def _listed(self, worths: Worths) -> tuple[ModelSummary, ...]:
        registry = self._services.registry
        unchanged = self._rows_at == registry.changes and self._rows_worths is worths
        before, self._rows = self._rows, {}
        self._rows_at, self._rows_worths = registry.changes, worths
        moving = self._moving()
        summaries = []
        for name, model in sorted(registry.models.items()):
            if name in moving:
                summaries.append(self.summary(model))
                continue
            row = before.get(name)
            told = row.of[-1] if row is not None and unchanged else self._told_of(model)
            of = (model.record, self._leases.count(name), told)
            if row is None or row.of != of:
                row = _Row(of, self.summary(model))
            self._rows[name] = row
            summaries.append(row.summary)
        return tuple(summaries)

    def _told_of(self, model: Model) -> tuple[object, ...]:
        """All that a summary tells of a model of which nothing is moving, but its record and leases: cheap to get."""
        registry, manifest = self._services.registry, model.current
        settings = (model.catalog, model.tier, model.tenant, manifest)
        if manifest is None:
            return settings
        present, is_quarantined = registry.present(manifest), registry.is_quarantined(manifest)
        return (*settings, present, is_quarantined, self._explainer.worth_s(manifest))

    def _moving(self) -> set[str]:
        """The models of which something changes unseen by the registry: they are looked at each time."""
        loading = {load.plan.name for load in self._loader.loads.values()}
        partial = {part.name for part in self._services.registry.index.parts()}
        return loading | partial | {name for name, _ in self._services.storage.beside}

    def summary(self, model: Model, manifest: Manifest | None = None) -> ModelSummary:
        """A model with its current revision, or with the given one."""
        registry = self._services.registry
        manifest = manifest or model.current
        loads = self._loader.active(model.name)
        part = self._part(model, manifest)
        part_bytes = self._services.part_bytes(part) if part else 0
        state = self._state(manifest, loads, part_bytes)
        here = part_bytes / part.total_bytes if part and state is RevisionState.PARTIAL else 0.0
        tier, tier_from = model.tier
        return ModelSummary(
            name=model.name,
            revision=_revision(manifest, loads, part),
            state=state,
            tier=tier,
            tier_from=tier_from,
            pinned=model.pinned,
            size_bytes=_size_bytes(model, manifest, loads, part),
            l1_bytes=(registry.bytes_at(manifest, Level.L1) if manifest else 0) + part_bytes,
            l2_bytes=registry.bytes_at(manifest, Level.L2) if manifest else 0,
            file_count=len(manifest.files) if manifest else 0,
            lease_count=self._leases.count(model.name),
            source=manifest.source if manifest and manifest.source else model.source,
            last_used_time_s=model.record.last_used_wall_s,
            checked_by=manifest.checked_by if manifest else None,
            progress=_progress(loads) or here,
            priority=model.priority,
            worth_s=self._explainer.worth_s(manifest) if manifest else 0.0,
            transient=manifest is not None and self._explainer.is_transient(manifest),
            tenant=model.tenant,
            base=model.base,
        )

    def _part(self, model: Model, manifest: Manifest | None) -> PartRecord | None:
        """What is remembered of a revision of which a part is here."""
        parts = self._services.registry.index.parts(model.name)
        meant = [part for part in parts if manifest is None or part.revision == manifest.revision]
        return max(meant, key=self._services.part_bytes, default=None)

    def _state(self, manifest: Manifest | None, loads: list[Load], part_bytes: int) -> RevisionState:
        registry = self._services.registry
        if manifest is not None and registry.is_quarantined(manifest):
            return RevisionState.QUARANTINED
        if manifest is not None and (registry.whole_at(manifest, Level.L1) or registry.whole_at(manifest, Level.L2)):
            return RevisionState.READY
        if loads:
            return RevisionState.PULLING
        return RevisionState.PARTIAL if part_bytes else RevisionState.ABSENT

    def detail(self, model: Model, manifest: Manifest | None) -> ModelDetail:
        """All of one model."""
        revisions = sorted(model.manifests, key=lambda revision: revision != model.record.current_revision)
        return ModelDetail(
            summary=self.summary(model, manifest),
            files=self._files(manifest) if manifest else (),
            revisions=tuple(revisions),
            path=self._view.path(model.name, manifest.revision) if manifest else "",
            leases=tuple(lease.info() for lease in self._leases.of(model.name)),
            notes=(*self._notes(manifest), *self._moment(model)),
            last_error=model.record.last_error,
            places=self._explainer.places(model, manifest) if manifest else (),
            schedule=model.catalog.hot if model.catalog else (),
            pull_times_s=self._services.registry.pull_times_s(model.name),
            schedule_change_time_s=model.schedule.next_change(self._services.clock.wall_s()) or 0.0,
            access=str(self._services.registry.access().get(model.name, "")),
        )

    def _notes(self, manifest: Manifest | None) -> Iterator[str]:
        """Of its content."""
        if manifest is not None:
            yield from manifest.notes
            quarantined = self._services.registry.quarantined
            yield from (f"quarantined: {quarantined[digest]}" for digest in manifest.blobs if digest in quarantined)

    def _moment(self, model: Model) -> Iterator[str]:
        """What is to be said of where it comes from, and when, as things are now."""
        yield from filter(None, (self._pulls.links_of(model), self._pulls.why_waiting(model.name)))

    def arrived(self, model: Model, load: Load) -> ModelDetail:
        """A revision that may be used but is not recorded yet; blobs that are not known yet have no SHA-256."""
        plan, detail = load.plan, self.detail(model, None)
        files = tuple(
            FileDetail(
                path=file.path,
                size_bytes=file.size_bytes,
                sha256=load.digest_of(file),
                in_l1=True,
                in_l2=False,
                shared_with=(),
                chunk_count=chunk_count(file.size_bytes),
                checked_by=load.check_of(file),
            )
            for file in plan.files
        )
        summary = replace(
            detail.summary, revision=plan.revision, state=RevisionState.PULLING, size_bytes=plan.total_bytes,
            l1_bytes=plan.total_bytes, l2_bytes=0, file_count=len(files), source=plan.source,
            checked_by=load.checked_by,
        )  # fmt: skip
        path = self._view.path(plan.name, plan.revision)
        return replace(detail, summary=summary, files=files, path=path, notes=plan.notes)

    def _files(self, manifest: Manifest) -> tuple[FileDetail, ...]:
        registry = self._services.registry
        return tuple(
            FileDetail(
                path=entry.path,
                size_bytes=entry.size_bytes,
                sha256=entry.digest,
                in_l1=registry.blobs[entry.digest].at(Level.L1),
                in_l2=registry.blobs[entry.digest].l2,
                shared_with=registry.sharers(entry.digest, but=manifest.name),
                chunk_count=chunk_count(entry.size_bytes),
                checked_by=entry.checked_by,
            )
            for entry in manifest.files
        )

    def stats(self, mover_count: int, origins: tuple[OriginStats, ...]) -> Stats:
        """The daemon at a glance."""
        services = self._services
        return Stats(
            levels=tuple(self._level(level) for level in services.storage.levels),
            counters=services.metrics.counters(),
            lease_count=len(self._leases),
            model_count=len(services.registry.models),
            active_load_count=len(self._loader.loads),
            mover_count=mover_count,
            uptime_s=services.clock.monotonic_s() - self._started_s,
            version=self._version,
            degraded=tuple(services.degraded.values()),
            instance=self._instance,
            origins=origins,
        )

    def gauges(
        self, movers: Usage, mover_count: int, origins: tuple[OriginStats, ...], precision: float | None
    ) -> Gauges:
        """What the metrics show of this moment."""
        services = self._services
        registry, pressure = services.registry, services.storage.pressure
        hot = [model.current for model in self._hot_set.models()]
        return Gauges(
            levels=tuple(self._level(level) for level in services.storage.levels),
            origins=origins,
            models=tuple(self._model_gauges()),
            model_count=len(registry.models),
            hot_model_count=len(hot),
            hot_ready_count=sum(item is not None and registry.whole_at(item, Level.L1) for item in hot),
            quarantined_blob_count=len(registry.quarantined),
            lease_count=len(self._leases),
            active_load_count=len(self._loader.loads),
            mover_count=mover_count,
            movers=movers,
            degraded=frozenset(services.degraded),
            memory_stall_ratio=pressure.stalled_percent / 100 if pressure.is_known else None,
            prediction_precision=precision,
        )

    def _model_gauges(self) -> Iterator[ModelGauges]:
        for model in self._services.registry.models.values():
            present = self._services.registry.present(model.current) if model.current is not None else None
            l1_bytes, l2_bytes = (present.l1_bytes, present.l2_bytes) if present else (0, 0)
            if l1_bytes or l2_bytes or model.lease_count:
                yield ModelGauges(model.name, l1_bytes, l2_bytes, model.lease_count)

    def _level(self, level: Level) -> LevelStats:
        storage = self._services.storage
        ledger, in_l1 = storage.ledger(level), level is Level.L1
        return LevelStats(
            level=level,
            capacity_bytes=ledger.capacity_bytes,
            used_bytes=ledger.used_bytes,
            reserved_bytes=ledger.reserved_bytes,
            withdrawn_bytes=storage.withdrawn_bytes(level),
            pool_bytes=storage.pool_bytes(level),
            blob_count=self._services.registry.blob_count(level),
            limited_by=storage.limits[level].because,
            transient_bytes=storage.transient_bytes if in_l1 else 0,
            hot_bytes=self._hot_set.used_bytes if in_l1 else 0,
            hot_capacity_bytes=self._hot_set.capacity_bytes if in_l1 else 0,
            longest_unverified_s=self._services.verified.longest_unverified_s(level),
        )


def _revision(manifest: Manifest | None, loads: list[Load], part: PartRecord | None) -> str:
    if manifest is not None:
        return manifest.revision
    if loads:
        return loads[0].plan.revision
    return part.revision if part is not None else ""


def _size_bytes(model: Model, manifest: Manifest | None, loads: list[Load], part: PartRecord | None) -> int:
    if manifest is not None:
        return manifest.total_bytes
    if loads:
        return loads[0].plan.total_bytes
    return part.total_bytes if part is not None else model.size_bytes


def _progress(loads: list[Load]) -> float:
    if not loads:
        return 0.0
    progress = loads[0].progress()
    return progress.done_bytes / progress.total_bytes if progress.total_bytes else 1.0
