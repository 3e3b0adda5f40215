"""What has to be looked after all the time: evicted segments, the pool, capacities, hot and idle models, L2."""

from __future__ import annotations

import structlog

from cached.cache.background import repeat
from cached.cache.cold_starts import ColdStarts
from cached.cache.evictor import Evictor, Wanted
from cached.cache.hot_set import HotSet
from cached.cache.loader import Loader
from cached.cache.persist import persist_resident
from cached.cache.pulls import Pulls
from cached.cache.registry import Blob, Model
from cached.cache.services import Services
from cached.cache.timetable import Timetable
from cached.level import Level
from cached.manifest import Manifest
from cached.policy import Otherwise
from cached.refs import Ref

_log = structlog.get_logger(__name__)

_TICK_S = 1.0
_RETRY_S = 60.0
_CAPACITIES_S = 5.0
"""Whoever makes room looks for himself; this is for a host that gets short of memory meanwhile."""

_USES_S = 30.0


class Upkeep:
    """One background task. Each step is small, and a failing one is logged and tried again later."""

    def __init__(
        self, services: Services, loader: Loader, pulls: Pulls, evictor: Evictor, cold_starts: ColdStarts
    ) -> None:
        self._services = services
        self._loader = loader
        self._pulls = pulls
        self._evictor = evictor
        self._cold_starts = cold_starts
        self._timetable = Timetable(services)
        self._not_before: dict[str, float] = {}
        self._seen = -1
        self._l2_was_gone = False
        self._hot_set = HotSet(services)
        self._hot: list[Model] = []
        self._only_in_l1: list[Manifest] = []

    async def run(self) -> None:
        """Until cancelled."""
        await repeat(self._services.clock, _TICK_S, self._tick, what="upkeep", failures=self._services.failures)

    async def _tick(self) -> None:
        storage = self._services.storage
        await storage.collect()
        if self._is_time("capacities", _CAPACITIES_S):
            storage.pressure.look()
            storage.refresh_capacities()
            self._tell_of_l2()
        await self._evictor.tidy()
        expected = self._timetable.look()
        self._look()
        self._bring_hot([model for model in expected if self._hot_set.has_room(model)])
        await self._copy_to_l2()
        if self._is_time("uses", _USES_S):
            self._services.registry.write_uses()
            self._services.history.write()
            self._cold_starts.write()

    def _tell_of_l2(self) -> None:
        """A disk that is gone takes nothing, so no write of it would fail and say so."""
        services, limit = self._services, self._services.storage.limits.get(Level.L2)
        is_gone = limit is not None and limit.is_gone
        if limit is not None and limit.is_gone:
            services.degraded.began("l2", f"L2 is gone: {limit.because}")
        elif self._l2_was_gone:
            services.l2_recovers()
        self._l2_was_gone = is_gone

    def _look(self) -> None:
        """Notes what there is to do, if anything changed: a daemon that idles with many models must cost nothing."""
        registry = self._services.registry
        if registry.changes == self._seen:
            return
        self._seen = registry.changes
        self._hot = list(self._hot_set.admitted())
        has_l2 = self._services.storage.has(Level.L2)
        self._only_in_l1 = [item for item in registry.manifests() if has_l2 and self._not_on_disk(item)]

    def _not_on_disk(self, manifest: Manifest) -> bool:
        registry = self._services.registry
        if not registry.whole_at(manifest, Level.L1) or registry.whole_at(manifest, Level.L2):
            return False
        return any(not blob.l2 and not blob.left_l2 for blob in registry.blobs_of(manifest))

    def _bring_hot(self, expected: list[Model]) -> None:
        """A hot model is always in L1: brought when it is not, and tried again now and then when that failed.

        So are those that are expected: that are to be hot soon.
        """
        registry = self._services.registry
        for model in (*self._hot, *expected):
            busy = self._loader.active(model.name) or self._pulls.is_coming(model.name)
            if busy or not self._due(f"hot {model.name}"):
                continue
            manifest = model.current
            if manifest is not None and (registry.is_quarantined(manifest) or registry.whole_at(manifest, Level.L1)):
                continue
            self._later(f"hot {model.name}")
            self._bring(model, manifest)

    def _bring(self, model: Model, manifest: Manifest | None) -> None:
        registry = self._services.registry
        if manifest is not None and registry.is_here(manifest):
            self._pulls.promote(manifest)
        elif model.source:
            self._pulls.begin(Ref(model.name), level=Level.L1, unattended=True)

    async def _copy_to_l2(self) -> None:
        """Blobs that are only in L1, because L2 failed or was full when they came."""
        disk = self._services.storage.disk
        if self._loader.loads or (disk is not None and disk.hangs):
            return
        for manifest in self._only_in_l1:
            if self._due(f"l2 {manifest.name}") and self._is_known(manifest) and self._not_on_disk(manifest):
                self._later(f"l2 {manifest.name}")
                blobs = self._services.registry.blobs_of(manifest)
                await self._copy(manifest, [blob for blob in blobs if not blob.l2 and not blob.left_l2])

    def _is_known(self, manifest: Manifest) -> bool:
        """While one was copied, another may have been forgotten."""
        model = self._services.registry.models.get(manifest.name)
        return model is not None and manifest.revision in model.manifests

    async def _copy(self, manifest: Manifest, missing: list[Blob]) -> None:
        services = self._services
        sizes = {blob.record.digest[:32]: blob.record.size_bytes for blob in missing}
        with self._evictor.busy(manifest):
            async with self._evictor.opening:
                if any(services.storage.is_open(Level.L2, ingest_id) for ingest_id in sizes):
                    return  # a load that began meanwhile writes it
                if not await self._evictor.open(
                    Wanted(Level.L2, sizes, manifest.name, manifest.revision, Otherwise.SKIP, manifest.blobs)
                ):
                    return
            try:
                for blob in missing:
                    record = blob.record
                    ref = services.storage.level(Level.L1).blob(record.digest)
                    if not await persist_resident(services, record, lambda ref=ref: ref):  # type: ignore[misc]
                        break
            finally:
                for ingest_id in sizes:
                    if services.storage.is_open(Level.L2, ingest_id):
                        services.storage.discard(Level.L2, ingest_id)
        services.publish(manifest)

    def _due(self, what: str) -> bool:
        return self._services.clock.monotonic_s() >= self._not_before.get(what, 0.0)

    def _later(self, what: str, delay_s: float = _RETRY_S) -> None:
        self._not_before[what] = self._services.clock.monotonic_s() + delay_s

    def _is_time(self, what: str, every_s: float) -> bool:
        if not self._due(what):
            return False
        self._later(what, every_s)
        return True
