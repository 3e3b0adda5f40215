"""What has to be looked after all the time: evicted segments, the pool, capacities, hot and idle models, L2."""

from __future__ import annotations

import structlog

from cached.cache.evictor import Evictor
from cached.cache.loader import Loader
from cached.cache.persist import persist_resident
from cached.cache.pulls import Pulls
from cached.cache.registry import Blob, Model
from cached.cache.services import Services
from cached.errors import CachedError
from cached.manifest import Manifest
from cached.refs import Ref
from cached.types import Level, Tier

_log = structlog.get_logger(__name__)

_TICK_S = 1.0
_RETRY_S = 60.0


class Upkeep:
    """One background task. Each step is small, and a failing one is logged and tried again later."""

    def __init__(self, services: Services, loader: Loader, pulls: Pulls, evictor: Evictor) -> None:
        self._services = services
        self._loader = loader
        self._pulls = pulls
        self._evictor = evictor
        self._not_before: dict[str, float] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._services.clock.sleep(_TICK_S)
            try:
                await self._tick()
            except CachedError as error:
                _log.warning("upkeep.failed", reason=error.reason, cause=error.message)
            except Exception:  # noqa: BLE001 - logged
                _log.exception("upkeep.bug")  # the next tick is worth a try: without upkeep nothing is ever freed

    async def _tick(self) -> None:
        storage = self._services.storage
        await storage.collect()
        storage.refresh_capacities()
        await storage.clear_pool(self._services.runner)
        await self._evictor.tidy()
        self._bring_hot()
        await self._copy_to_l2()

    def _bring_hot(self) -> None:
        """A hot model is always in L1: brought when it is not, and tried again now and then when that failed."""
        registry = self._services.registry
        for model in list(registry.models.values()):
            if model.tier[0] is not Tier.HOT or self._loader.active(model.name) or not self._due(f"hot {model.name}"):
                continue
            manifest = model.current
            if manifest is not None and (registry.is_quarantined(manifest) or registry.whole_at(manifest, Level.L1)):
                continue
            self._later(f"hot {model.name}")
            self._bring(model, manifest)

    def _bring(self, model: Model, manifest: Manifest | None) -> None:
        registry = self._services.registry
        if manifest is not None and all(blob.at(Level.L1) or blob.l2 for blob in registry.blobs_of(manifest)):
            self._pulls.promote(manifest)
        elif model.source:
            self._pulls.begin(Ref(model.name), level=Level.L1)

    async def _copy_to_l2(self) -> None:
        """Blobs that are only in L1, because L2 failed or was full when they came."""
        services = self._services
        if not services.storage.has(Level.L2) or self._loader.loads:
            return
        for manifest in list(services.registry.manifests()):
            if not services.registry.whole_at(manifest, Level.L1) or not self._due(f"l2 {manifest.name}"):
                continue
            missing = [blob for blob in services.registry.blobs_of(manifest) if not blob.l2 and not blob.left_l2]
            if missing:
                self._later(f"l2 {manifest.name}")
                await self._copy(manifest, missing)

    async def _copy(self, manifest: Manifest, missing: list[Blob]) -> None:
        services = self._services
        sizes = {blob.record.digest[:32]: blob.record.size_bytes for blob in missing}
        with self._evictor.busy(manifest):
            async with self._evictor.opening:
                if any(services.storage.is_open(Level.L2, ingest_id) for ingest_id in sizes):
                    return  # a load that began meanwhile writes it
                await self._evictor.open(Level.L2, sizes, for_name=manifest.name)
            for blob in missing:
                record = blob.record
                ref = services.storage.level(Level.L1).blob(record.digest)
                if not await persist_resident(services, record, lambda ref=ref: ref):  # type: ignore[misc]
                    break
            for ingest_id in sizes:
                if services.storage.is_open(Level.L2, ingest_id):
                    services.storage.discard(Level.L2, ingest_id)
        services.publish(manifest)

    def _due(self, what: str) -> bool:
        return self._services.clock.monotonic_s() >= self._not_before.get(what, 0.0)

    def _later(self, what: str) -> None:
        self._not_before[what] = self._services.clock.monotonic_s() + _RETRY_S
