"""Makes room by policy, and carries evictions out: whole revisions, never one that somebody holds."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from cached.cache.registry import Model
from cached.cache.services import Services
from cached.errors import NoRoomError
from cached.leases import LeaseTable
from cached.manifest import Manifest
from cached.policy.plan import Evict, plan, plan_idle
from cached.policy.snapshot import LevelFacts, Need, RevisionFacts, Snapshot
from cached.types import Level, Tier
from cached.units import format_size

_UNMAP_WAIT_S = 5.0
_UNMAP_POLL_S = 0.05
_COLD_GRACE_S = 5.0
_LEVELS = (Level.L1, Level.L2)


class Loads(Protocol):
    """What evictions must know of loads in flight."""

    def held_digests(self) -> frozenset[str]:
        """Blobs that loads count on."""
        ...

    def is_loading(self, name: str, revision: str) -> bool:
        """True while a revision is being brought."""
        ...


class Evictor:
    """Loop only. ``loads`` is set once the loader exists; each needs the other."""

    loads: Loads

    def __init__(self, services: Services, leases: LeaseTable, *, grace_s: float) -> None:
        self._services = services
        self._leases = leases
        self._grace_until_s = services.clock.monotonic_s() + grace_s
        self._busy: Counter[tuple[str, str]] = Counter()
        self._tidied: tuple[int, frozenset[str]] = (-1, frozenset())
        self._cold: list[Model] = []
        self.opening = asyncio.Lock()
        """Held while room is made and taken: those who want the same blob, or the same room, take turns."""

    @contextmanager
    def busy(self, manifest: Manifest) -> Iterator[None]:
        """While inside, this revision is not evicted."""
        key = (manifest.name, manifest.revision)
        self._busy[key] += 1
        try:
            yield
        finally:
            self._busy[key] -= 1

    def is_busy(self, manifest: Manifest) -> bool:
        """True inside ``busy``."""
        return self._busy[manifest.name, manifest.revision] > 0

    async def open(self, level: Level, sizes: Mapping[str, int], *, for_name: str) -> None:
        """Reserves and creates these ingests, evicting what the policy says. The caller holds ``opening``.

        Raises NoRoomError; nothing is open then.
        """
        if not sizes:
            return
        storage = self._services.storage
        if storage.missing_bytes(level, sizes) > 0:
            self._drop_leftovers(level, keep=sizes)
            await self._until_free(level, sizes)
        if storage.missing_bytes(level, sizes) > 0:
            await self._evict_for(level, sizes, for_name)
            await self._until_free(level, sizes)
        if storage.missing_bytes(level, sizes) > 0:
            self._refuse(level, sizes, for_name)
        if level is Level.L1:
            await storage.fit_pool(sizes)
        storage.open(level, sizes)
        if level is Level.L1:
            await storage.collect()

    async def _until_free(self, level: Level, sizes: Mapping[str, int]) -> None:
        """Waits a moment for movers and workers to let go of what was evicted."""
        storage, clock = self._services.storage, self._services.clock
        deadline_s = clock.monotonic_s() + _UNMAP_WAIT_S
        while level is Level.L1 and storage.missing_bytes(level, sizes) > 0:
            await storage.collect()
            if not storage.withdrawn_bytes(level) or clock.monotonic_s() > deadline_s:
                return
            await clock.sleep(_UNMAP_POLL_S)

    async def _evict_for(self, level: Level, sizes: Mapping[str, int], for_name: str) -> None:
        """Carries out the policy's plan for these sizes, or raises its shortfall having evicted nothing."""
        clock = self._services.clock
        planned = self._plan(level, sizes, for_name)
        left_s = self._grace_until_s - clock.monotonic_s()
        if level is Level.L1 and planned and left_s > 0:
            # Workers of an earlier daemon may be about to take up their leases again.
            await clock.sleep(left_s)
            planned = self._plan(level, sizes, for_name)
        for victim in planned:
            self._evict_planned(victim)

    def _plan(self, level: Level, sizes: Mapping[str, int], for_name: str) -> list[Evict]:
        need = Need(level, self._needed(level, sizes), for_name)
        planned = plan(self._snapshot(need), self._services.clock.monotonic_s())
        if planned.shortfall is not None:
            error = planned.shortfall.error()
            error.fields["limited_by"] = self._services.storage.limited_by(level)
            raise error
        return [action for action in planned.actions if isinstance(action, Evict)]

    def _needed(self, level: Level, sizes: Mapping[str, int]) -> int:
        used = self._services.storage.ledger(level).used
        return sum(sizes.values()) - sum(used.get(f"ingest:{ingest_id}", 0) for ingest_id in sizes)

    def _refuse(self, level: Level, sizes: Mapping[str, int], for_name: str) -> None:
        ledger = self._services.storage.ledger(level)
        withdrawn = self._services.storage.withdrawn_bytes(level)
        raise NoRoomError(
            f"{level} has no room for {for_name} yet: {format_size(withdrawn)} are evicted but still mapped by workers",
            hint="retry when they have ended; `cached stats` shows the withdrawn bytes",
            level=level,
            needed_bytes=sum(sizes.values()),
            available_bytes=ledger.available_bytes,
            capacity_bytes=ledger.capacity_bytes,
            withdrawn_bytes=withdrawn,
        )

    def _evict_planned(self, victim: Evict) -> None:
        manifest = self._services.registry.models[victim.name].manifests[victim.revision]
        self._leave(manifest, victim.level, victim.reason)

    def evict(self, manifest: Manifest, level: Level, reason: str) -> int:
        """Takes a revision out of a level; the bytes that left it. The caller has made sure that nobody holds it."""
        known = manifest.revision in self._services.registry.known(manifest.name).manifests
        if not known or not self._services.storage.has(level):
            return 0  # a stale revision is forgotten as soon as it is at no level
        return self._leave(manifest, level, reason)

    def _leave(self, manifest: Manifest, level: Level, reason: str) -> int:
        services, held = self._services, self.loads.held_digests()
        leaving = services.registry.only_of(manifest, level, held)
        for blob in leaving:
            services.registry.lost(blob.record.digest, level)
        services.publish(manifest)
        for blob in leaving:
            if level is Level.L1:
                services.storage.withdraw(blob.record.digest)
            else:
                blob.left_l2 = True
                services.storage.remove_from_disk(blob.record.digest)
        freed = sum(blob.record.size_bytes for blob in leaving)
        if leaving:
            services.metrics.evictions.labels(level=level.value, reason=reason).inc()
            services.metrics.evicted_bytes.labels(level=level.value).inc(freed)
            services.events.emit(
                "evicted", f"{manifest.name} left {level}: {reason}", name=manifest.name, revision=manifest.revision,
                level=level.value, reason=reason, size_bytes=freed,
            )  # fmt: skip
        self._forget_stale(manifest)
        return freed

    def _forget_stale(self, manifest: Manifest) -> None:
        registry = self._services.registry
        model = registry.models[manifest.name]
        if manifest.revision == model.record.current_revision:
            return
        if not registry.is_here(manifest):
            registry.forget_revision(manifest)

    def forget(self, model: Model) -> None:
        """Drops a model that was evicted from every level, with what is left of its unfinished pulls."""
        services = self._services
        for pull in services.registry.index.pending():
            if pull.name == model.name:
                for ingest_id in pull.ingests:
                    for level in services.storage.levels:
                        services.storage.discard(level, ingest_id)
                    (services.journal_dir / ingest_id).unlink(missing_ok=True)
                services.registry.write(
                    lambda gone=pull: services.registry.index.delete_pending(gone.name, gone.revision)  # type: ignore[misc]
                )
        services.registry.forget_model(model)

    async def tidy(self) -> None:
        """What needs no room to be made: cold models that nobody uses leave L1, and so do blobs that nobody has.

        Called every second, so it does nothing for thousands of blobs that are as they were.
        """
        registry, storage = self._services.registry, self._services.storage
        now_s = self._services.clock.monotonic_s()
        if (registry.changes, self.loads.held_digests()) != self._tidied:
            for level in storage.levels:
                self._drop_unowned(level, self._pending_digests())
            self._cold = [model for model in registry.models.values() if self._is_cold_in_l1(model)]
            self._tidied = (registry.changes, self.loads.held_digests())
        if any(self._is_idle(model, now_s) for model in self._cold):
            for action in plan_idle(self._snapshot(), now_s, cold_grace_s=_COLD_GRACE_S).actions:
                if isinstance(action, Evict):
                    self._evict_planned(action)
        for level in storage.levels:
            self._trim(level)

    def _is_cold_in_l1(self, model: Model) -> bool:
        registry = self._services.registry
        return model.tier[0] is Tier.COLD and any(
            registry.bytes_at(manifest, Level.L1) for manifest in model.manifests.values()
        )

    def _is_idle(self, model: Model, now_s: float) -> bool:
        return not self._leases.count(model.name) and now_s - model.last_used_s >= _COLD_GRACE_S

    def _trim(self, level: Level) -> None:
        """A level may hold less than it did: the host got short, or a budget was lowered. What is held stays."""
        clock = self._services.clock
        if not self._services.storage.ledger(level).excess_bytes or clock.monotonic_s() < self._grace_until_s:
            return
        planned = plan(self._snapshot(Need(level, 0, "a smaller capacity")), clock.monotonic_s())
        for action in planned.actions:
            if isinstance(action, Evict):
                self._evict_planned(action)

    def _drop_leftovers(self, level: Level, *, keep: Mapping[str, int]) -> bool:
        """Ingests that wait to be resumed, and blobs of unfinished pulls, go before any model does."""
        storage = self._services.storage
        dropped = self._drop_unowned(level, frozenset())
        for ingest_id in storage.kept_ingests(level):
            if ingest_id not in keep:
                storage.discard(level, ingest_id)
                dropped = True
        return dropped

    def _drop_unowned(self, level: Level, wanted: frozenset[str]) -> bool:
        registry, storage = self._services.registry, self._services.storage
        owned = {entry.digest for manifest in registry.manifests() for entry in manifest.files}
        owned |= self.loads.held_digests() | wanted
        gone = [digest for digest, blob in registry.blobs.items() if blob.at(level) and digest not in owned]
        for digest in gone:
            registry.lost(digest, level)
            if level is Level.L1:
                storage.withdraw(digest)
            else:
                storage.remove_from_disk(digest)
            registry.forget_blob(digest)
        return bool(gone)

    def _pending_digests(self) -> frozenset[str]:
        services = self._services
        ingests = [ingest for pull in services.registry.index.pending() for ingest in pull.ingests]
        return frozenset(services.journal_digest(ingest) for ingest in ingests)

    def snapshot(self) -> Snapshot:
        """What the policy may know now, to explain it; nothing is asked for."""
        return self._snapshot()

    def is_transient(self, name: str, revision: str) -> bool:
        """True for a revision that is in L1 beside the budget, until its last lease ends."""
        return False

    def _snapshot(self, *needs: Need) -> Snapshot:
        registry, storage = self._services.registry, self._services.storage
        holds = {level: self._holdings(level) for level in _LEVELS}
        facts = tuple(
            self._facts(manifest, holds)
            for manifest in registry.manifests()
            if any((manifest.name, manifest.revision) in holds[level] for level in _LEVELS)
        )
        levels = {}
        for level in storage.levels:
            ledger = storage.ledger(level)
            levels[level] = LevelFacts(
                level=level, capacity_bytes=ledger.capacity_bytes, used_bytes=ledger.used_bytes,
                reserved_bytes=ledger.reserved_bytes, withdrawn_bytes=storage.withdrawn_bytes(level),
                pool_bytes=storage.pool_bytes(level),
            )  # fmt: skip
        return Snapshot(revisions=facts, levels=levels, needs=needs)

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
            loading = self.loads.is_loading(manifest.name, manifest.revision)
            own = {
                digest: size
                for digest, size in manifest.blobs.items()
                if registry.blobs[digest].at(level) and (loading or digest not in covered)
            }
            if own:
                held[manifest.name, manifest.revision] = own
        return held

    def _facts(
        self, manifest: Manifest, holds: Mapping[Level, Mapping[tuple[str, str], Mapping[str, int]]]
    ) -> RevisionFacts:
        key = (manifest.name, manifest.revision)
        model = self._services.registry.models[manifest.name]
        return RevisionFacts(
            name=manifest.name,
            revision=manifest.revision,
            tier=model.tier[0],
            pinned=model.pinned,
            leased=self._leases.count(*key) > 0,
            busy=self.is_busy(manifest) or self.loads.is_loading(*key),
            current=manifest.revision == model.record.current_revision,
            priority=model.priority,
            last_used_s=model.last_used_s,
            l1_blobs=holds[Level.L1].get(key, {}),
            l2_blobs=holds[Level.L2].get(key, {}),
            has_origin=bool(manifest.source),
        )
