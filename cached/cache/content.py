"""What an attach is answered with: a revision in L1, the load that brings one, or the part that was asked for."""

from __future__ import annotations

from dataclasses import dataclass

from cached.cache.absent import not_in_l1
from cached.cache.load import Chosen, Load
from cached.cache.loader import Loader
from cached.cache.pulls import Pulls
from cached.cache.services import Services
from cached.errors import CachedError
from cached.index import PartRecord
from cached.level import Level
from cached.manifest import Manifest
from cached.policy import Otherwise
from cached.refs import Ref
from cached.types import ByteRange, Selection


@dataclass(frozen=True, slots=True)
class Content:
    """``chosen``: only that of it is attached."""

    source: Manifest | Load
    chosen: Chosen | None = None

    @property
    def name(self) -> str:
        """Of the model."""
        return self.source.plan.name if isinstance(self.source, Load) else self.source.name

    @property
    def revision(self) -> str:
        """That the lease is on."""
        return self.source.plan.revision if isinstance(self.source, Load) else self.source.revision

    @property
    def size_bytes(self) -> int:
        """What is attached."""
        if self.chosen is not None:
            return self.chosen.size_bytes
        return self.source.plan.total_bytes if isinstance(self.source, Load) else self.source.total_bytes

    @property
    def load_id(self) -> str:
        """Of the load that brings it; empty where nothing has to be brought."""
        return self.source.load_id if isinstance(self.source, Load) else ""

    @property
    def is_over(self) -> bool:
        """A load that ended before anybody could hold what it brought."""
        return isinstance(self.source, Load) and self.source.finished and bool(self.source.plan.orders)

    @property
    def holds(self) -> dict[str, str]:
        """Ingests and blobs that are mapped of a part; of a whole revision its lease says enough."""
        if not isinstance(self.source, Load) or self.chosen is None:
            return {}
        return self.source.ids(self.chosen.chunks)


class Contents:
    """Loop only."""

    def __init__(self, services: Services, loader: Loader, pulls: Pulls) -> None:
        self._services = services
        self._loader = loader
        self._pulls = pulls

    async def find(self, ref: Ref, source: str, *, may_load: bool, selection: Selection | None = None) -> Content:
        """What there is by the time this returns. Raises what resolving, choosing and planning do.

        ``may_load``: else NotFoundError for what is not in L1. Then ``selection`` is what the worker had.
        """
        services, pulls, registry = self._services, self._pulls, self._services.registry
        model = registry.find(ref)
        manifest = registry.manifest_of(model, ref) if model else None
        if manifest is not None and registry.whole_at(manifest, Level.L1):
            registry.check_usable(manifest)
            services.metrics.hits.labels(level="l1").inc()
            if may_load:  # one that takes its lease up again asks for nothing new
                services.history.asked(manifest.name, hit=True)
            return await self._resident(manifest, selection)
        services.metrics.misses.labels(level="l1").inc()
        if manifest is not None and registry.resident(manifest, Level.L1):
            return await self._part_of(pulls.promote(manifest), selection)  # only its checksums have to be confirmed
        load = self._under_way(ref)
        if not may_load:
            if load is not None and load.ready_as is not None:
                return await self._part_of(load, selection)  # all of it is there, but it is not recorded yet
            return self._taken_up(ref, selection)
        if load is not None:
            services.history.asked(ref.name, hit=False)
            return await self._part_of(load, selection)
        return await self._brought(ref, source, manifest, selection)

    def _under_way(self, ref: Ref) -> Load | None:
        """The load that brings all of it to L1 now."""
        for load in self._loader.active(ref.name):
            plan = load.plan
            if plan.level is Level.L1 and not plan.is_part and plan.revision.startswith(ref.revision):
                return load
        return None

    async def _brought(self, ref: Ref, source: str, manifest: Manifest | None, selection: Selection | None) -> Content:
        """A new load, from L2 or from the origin."""
        services, pulls, registry = self._services, self._pulls, self._services.registry
        if manifest is not None and all(blob.l2 or blob.at(Level.L1) for blob in registry.blobs_of(manifest)):
            services.metrics.hits.labels(level="l2").inc()
            if selection is not None:
                return _of(await pulls.promote_chosen(manifest, selection))
            return Content(pulls.promote(manifest, otherwise=Otherwise.TRANSIENT))
        services.metrics.misses.labels(level="l2").inc()
        run = pulls.begin(ref, source=source, level=Level.L1, otherwise=Otherwise.TRANSIENT, selection=selection)
        load = await run.until_planned()
        services.metrics.hits.labels(level="l3").inc()
        return _of(load)

    async def _resident(self, manifest: Manifest, selection: Selection | None) -> Content:
        if selection is None or selection.held:
            return Content(manifest)
        try:
            chosen = await self._pulls.choose(manifest, selection)
        except CachedError:
            if self._is_resident(manifest):
                raise
            chosen = None
        if chosen is None or not self._is_resident(manifest):  # it left, or was removed, while its heads were read
            ref = Ref(manifest.name, manifest.revision)
            return await self.find(ref, "", may_load=True, selection=selection)
        return Content(manifest, None if selection.rest_follows else chosen)

    def _is_resident(self, manifest: Manifest) -> bool:
        registry, ref = self._services.registry, Ref(manifest.name, manifest.revision)
        model = registry.find(ref)
        known = registry.manifest_of(model, ref) if model else None
        return known is not None and registry.whole_at(known, Level.L1)

    async def _part_of(self, load: Load, selection: Selection | None) -> Content:
        """The load that is under way, of which only, or first, a part is asked for."""
        if selection is None or selection.held:
            return Content(load)
        chosen = await self._pulls.choose_of(load, selection)
        load.prefer(chosen.first if selection.rest_follows else chosen.chunks)
        return Content(load, None if selection.rest_follows else chosen)

    def _taken_up(self, ref: Ref, selection: Selection | None) -> Content:
        """What an earlier daemon had of a part, or of a pull that it did not come to record, for who still maps it."""
        index = self._services.registry.index
        parts = [*index.parts(ref.name), *(pull.part for pull in index.pending() if pull.name == ref.name)]
        for part in parts:
            if part.files and part.revision.startswith(ref.revision) and (selection is None or selection.held):
                return _of(self._pulls.take_up(part, selection.held if selection is not None else _all_of(part)))
        raise not_in_l1(ref)


def _of(load: Load) -> Content:
    return Content(load, load.plan.chosen)


def _all_of(part: PartRecord) -> list[ByteRange]:
    return [ByteRange(index, 0, file.size_bytes) for index, file in enumerate(part.files)]
