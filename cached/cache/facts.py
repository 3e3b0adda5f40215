"""What the policy is told: one moment of the host, gathered from the parts that know it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from cached.cache.registry import Model
from cached.cache.services import Services
from cached.config import resolve_capacity
from cached.index import PartRecord
from cached.leases import LeaseTable
from cached.level import Level
from cached.manifest import Manifest
from cached.policy import LevelFacts, Need, Quota, RevisionFacts, Snapshot

_LEVELS = (Level.L1, Level.L2)
_NOTHING: Mapping[str, int] = {}


class Loads(Protocol):
    """What evictions must know of loads in flight."""

    def held_digests(self) -> frozenset[str]:
        """Blobs that loads count on."""
        ...

    def is_loading(self, name: str, revision: str) -> bool:
        """True while a revision is being brought."""
        ...

    def arriving(self) -> Iterable[tuple[str, str]]:
        """The model and the ingest of each blob that is being brought."""
        ...

    def forget_parts(self) -> None:
        """Drops the records of parts of which nothing is here any more."""
        ...

    def drop_part(self, part: PartRecord) -> int:
        """Takes what is here of a part out of L1, unless somebody holds it; the bytes that left it."""
        ...


class Facts:
    """Loop only; nothing here changes anything. ``is_busy`` says who may not be evicted now for another reason."""

    def __init__(
        self,
        services: Services,
        leases: LeaseTable,
        loads: Loads,
        *,
        is_busy: Callable[[Manifest], bool],
    ) -> None:
        self._services = services
        self._leases = leases
        self._is_busy = is_busy
        self._loads = loads

    def snapshot(self, *needs: Need) -> Snapshot:
        """Every revision that holds blobs at a local level, and the accounts of the levels."""
        holds = {level: self._holdings(level) for level in _LEVELS}
        revisions = tuple(
            self._revision(manifest, holds)
            for manifest in self._services.registry.manifests()
            if any((manifest.name, manifest.revision) in holds[level] for level in _LEVELS)
        )
        levels = {level: self._level(level) for level in self._services.storage.levels}
        return Snapshot(revisions, levels, needs, tuple(self._quotas()), self._services.clock.wall_s())

    def newcomer(self, name: str, revision: str, *, in_l2: bool) -> RevisionFacts:
        """A revision that wants to a level, as it will be there. ``in_l2``: L2 has it, or is going to."""
        model = self._services.registry.known(name)
        return self._of(
            model, revision, current=True, leased=self._leases.count(name) > 0, busy=True, l1_blobs=_NOTHING,
            l2_blobs={name: 1} if in_l2 else _NOTHING, has_origin=bool(model.source),
        )  # fmt: skip

    def _level(self, level: Level) -> LevelFacts:
        storage = self._services.storage
        ledger = storage.ledger(level)
        return LevelFacts(
            level=level, capacity_bytes=ledger.capacity_bytes, used_bytes=ledger.used_bytes,
            reserved_bytes=ledger.reserved_bytes, withdrawn_bytes=storage.withdrawn_bytes(level),
            pool_bytes=storage.pool_bytes(level), transient_room_bytes=storage.transient_room_bytes(level),
            free_ahead_bytes=storage.free_ahead_bytes(level), mix=self._services.history.mix(level),
        )  # fmt: skip

    def _quotas(self) -> Iterator[Quota]:
        for tenant, shares in self._services.registry.tenants.items():
            for level, share in shares.items():
                if self._services.storage.has(level):
                    limit_bytes = resolve_capacity(share, self._services.storage.budget_bytes(level))
                    yield Quota(tenant, level, limit_bytes, self._arriving_bytes(tenant, level))

    def _arriving_bytes(self, tenant: str, level: Level) -> int:
        """What loads of a tenant's models have reserved at a level."""
        models = self._services.registry.models
        reserved = self._services.storage.ledger(level).reservations
        return sum(
            reserved.get(ingest_id, 0)
            for name, ingest_id in self._loads.arriving()
            if name in models and models[name].tenant == tenant
        )

    def _holdings(self, level: Level) -> dict[tuple[str, str], dict[str, int]]:
        """Revision → its blobs at a level. A revision that is not whole there holds only what nobody else does."""
        registry = self._services.registry
        held: dict[tuple[str, str], dict[str, int]] = {}
        covered: set[str] = set()
        partial = []
        for manifest in registry.manifests():
            if registry.resident(manifest, level):
                held[manifest.name, manifest.revision] = dict(manifest.blobs)
                covered |= manifest.blobs.keys()
            else:
                partial.append(manifest)
        for manifest in partial:
            loading = self._loads.is_loading(manifest.name, manifest.revision)
            own = {
                digest: size
                for digest, size in manifest.blobs.items()
                if registry.blobs[digest].at(level) and (loading or digest not in covered)
            }
            if own:
                held[manifest.name, manifest.revision] = own
        return held

    def _revision(
        self, manifest: Manifest, holds: Mapping[Level, Mapping[tuple[str, str], Mapping[str, int]]]
    ) -> RevisionFacts:
        key = (manifest.name, manifest.revision)
        model = self._services.registry.models[manifest.name]
        return self._of(
            model,
            manifest.revision,
            current=manifest.revision == model.record.current_revision,
            leased=self._leases.count(*key) > 0,
            busy=self._is_busy(manifest) or self._loads.is_loading(*key),
            l1_blobs=holds[Level.L1].get(key, _NOTHING),
            l2_blobs=holds[Level.L2].get(key, _NOTHING),
            has_origin=bool(manifest.source),
        )

    def _of(
        self,
        model: Model,
        revision: str,
        *,
        current: bool,
        leased: bool,
        busy: bool,
        l1_blobs: Mapping[str, int],
        l2_blobs: Mapping[str, int],
        has_origin: bool,
    ) -> RevisionFacts:
        history = self._services.history
        asked = history.of(model.name)
        return RevisionFacts(
            name=model.name,
            revision=revision,
            tier=model.tier[0],
            pinned=model.pinned,
            leased=leased,
            busy=busy,
            current=current,
            priority=model.priority,
            last_used_s=model.last_used_s,
            l1_blobs=l1_blobs,
            l2_blobs=l2_blobs,
            has_origin=has_origin,
            requests=asked.requests,
            misses=asked.misses,
            waited_l1_s=asked.waited_l1_s,
            waited_l2_s=asked.waited_l2_s,
            from_l2=history.hop(Level.L2, model.name),
            from_l3=history.hop(Level.L3, model.name),
            keep_until_s=model.keep_until_s,
            tenant=model.tenant,
        )
