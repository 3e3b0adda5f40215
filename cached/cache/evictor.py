"""Makes room by policy, and carries evictions out: whole revisions, never one that somebody holds."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from cached.cache.facts import Facts, Loads
from cached.cache.registry import Blob, Model
from cached.cache.services import Services
from cached.cache.storage import Storage
from cached.errors import CachedError, LevelError, NoRoomError
from cached.leases import LeaseTable
from cached.level import Level
from cached.manifest import Manifest
from cached.policy import (
    Decision,
    Evict,
    Need,
    Otherwise,
    Plan,
    RevisionFacts,
    Snapshot,
    Verdict,
    plan,
    plan_ahead,
    plan_idle,
)
from cached.policy.plan import TRANSIENT
from cached.types import Tier
from cached.units import format_size

_UNMAP_WAIT_S = 5.0
_UNMAP_POLL_S = 0.05
_COLD_GRACE_S = 5.0
_AHEAD_S = 5.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """Ingests (id → bytes) of one revision that are to be opened at a level; ``otherwise``, if it is not worth that.

    ``digests``: the revision's blobs, as far as they are known; what is at the level already is shared. ``lengths``: of
    ingests that stay holes for the most, see ``Storage.open``.
    """

    level: Level
    sizes: Mapping[str, int]
    name: str
    revision: str
    otherwise: Otherwise
    digests: Collection[str]
    lengths: Mapping[str, int] = field(default_factory=dict)


class Evictor:
    """Loop only. Call ``join`` once the loader exists; each needs the other."""

    loads: Loads
    _facts: Facts

    def __init__(self, services: Services, leases: LeaseTable, *, grace_s: float) -> None:
        self._services = services
        self._leases = leases
        self._grace_until_s = services.clock.monotonic_s() + grace_s
        self._busy: Counter[tuple[str, str]] = Counter()
        self._lingering: frozenset[str] = frozenset()
        """Withdrawn segments that were still mapped at the end of a wait."""
        self._tidied: tuple[int, frozenset[str]] = (-1, frozenset())
        self._cold: list[Model] = []
        self._ahead_s = float("-inf")
        self._ahead_of: tuple[int, frozenset[tuple[str, str]]] = (-1, frozenset())
        self.opening = asyncio.Lock()
        """Held while room is made and taken: those who want the same blob, or the same room, take turns."""

    def join(self, loads: Loads) -> None:
        """Whose blobs and revisions may not go."""
        self.loads = loads
        self._facts = Facts(self._services, self._leases, loads, is_busy=self.is_busy)

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

    async def open(self, wanted: Wanted) -> bool:
        """Reserves and creates these ingests, evicting what the policy says. The caller holds ``opening``.

        False, with nothing open, where the policy says that the revision does without a place (``Otherwise.SKIP``).
        Raises NoRoomError; nothing is open then.
        """
        level, sizes = wanted.level, wanted.sizes
        if not sizes:
            return True
        storage = self._services.storage
        if storage.missing_bytes(level, sizes) > 0:
            if not self._grace_left_s(level):
                self._drop_leftovers(level, keep=sizes)
            await self._until_free(level, sizes)
        decision = None
        if storage.missing_bytes(level, sizes) > 0 or self._is_bounded(wanted.name, level):
            decision = await self._decide(wanted)
            if decision.verdict is Verdict.SKIPPED:
                return False
            await self._until_free(level, sizes)
        if storage.missing_bytes(level, sizes) > 0:
            self._refuse(level, sizes, wanted.name)
        if level is Level.L1:
            await storage.fit_pool({key: size for key, size in sizes.items() if key not in wanted.lengths})
        await storage.open(level, sizes, wanted.lengths)
        if level is Level.L1:
            await storage.collect()
        if decision is None or decision.admitted:
            self._services.history.kept(wanted.name, level)
        return True

    def _is_bounded(self, name: str, level: Level) -> bool:
        """Its tenant may have less than the level has room for."""
        registry = self._services.registry
        return level in registry.tenants.get(registry.known(name).tenant, {})

    async def _until_free(self, level: Level, sizes: Mapping[str, int], *, all_of_it: bool = True) -> None:
        """Waits a moment for movers and workers to let go of what was evicted, and for the disk.

        Nobody waits where that cannot be enough (``all_of_it``), nor for what somebody maps for longer than a moment:
        others have waited for that, and while they do no load begins.
        """
        if level is Level.L2:
            await self._services.storage.freed()
        storage, clock = self._services.storage, self._services.clock
        deadline_s = clock.monotonic_s() + _UNMAP_WAIT_S
        while level is Level.L1 and (missing_bytes := storage.missing_bytes(level, sizes)) > 0:
            await storage.collect()
            leaving = storage.l1.leaving_sizes
            hoped_bytes = sum(size for segment, size in leaving.items() if segment not in self._lingering)
            if not hoped_bytes or (all_of_it and hoped_bytes < missing_bytes):
                return
            if clock.monotonic_s() > deadline_s:
                self._lingering = frozenset(leaving)
                return
            await clock.sleep(_UNMAP_POLL_S)

    async def _decide(self, wanted: Wanted) -> Decision:
        """Carries out the policy's plan for these sizes, or raises its shortfall having evicted nothing."""
        clock, level = self._services.clock, wanted.level
        planned = self._plan(wanted)
        if level is Level.L1 and planned.shortfall is not None and planned.shortfall.withdrawn_would_do:
            await self._until_free(level, wanted.sizes, all_of_it=False)
            planned = self._plan(wanted)
        in_the_way = _victims(planned) or (planned.shortfall and self._left_ingests(level, keep=wanted.sizes))
        if in_the_way and (left_s := self._grace_left_s(level)):
            await clock.sleep(left_s)
            self._drop_leftovers(level, keep=wanted.sizes)
            planned = self._plan(wanted)
        self._check(planned, level)
        decision = planned.decision(level)
        assert decision is not None  # noqa: S101 - there was a need
        self._evict_planned(planned)
        if decision.verdict is Verdict.TRANSIENT:
            storage, needed_bytes = self._services.storage, self._needed(level, wanted.sizes)
            # What the allowance has no room for takes what the budget has free.
            beside_bytes = min(needed_bytes, storage.transient_room_bytes(level))
            storage.hold_beside(wanted.name, wanted.revision, beside_bytes)
        self._tell(decision, wanted.name, wanted.revision)
        return decision

    def _grace_left_s(self, level: Level) -> float:
        """So long workers of an earlier daemon may be about to take up their leases again."""
        return max(0.0, self._grace_until_s - self._services.clock.monotonic_s()) if level is Level.L1 else 0.0

    def _plan(self, wanted: Wanted) -> Plan:
        facts, now_s = self._facts, self._services.clock.monotonic_s()
        level, name, revision = wanted.level, wanted.name, wanted.revision
        newcomer = facts.newcomer(name, revision, in_l2=level is Level.L1 and self._will_be_in_l2(name, revision))
        shared = self._services.registry.at_level(wanted.digests, level)
        need = Need(level, self._needed(level, wanted.sizes), name, newcomer, wanted.otherwise, shared)
        return plan(facts.snapshot(need), now_s)

    def _check(self, planned: Plan, level: Level) -> None:
        if planned.shortfall is not None:
            error = planned.shortfall.error()
            error.fields["limited_by"] = self._services.storage.limits[level].because
            raise error

    def _will_be_in_l2(self, name: str, revision: str) -> bool:
        """Where it would come from the next time: L2 has all of it, or has had no reason yet to refuse it."""
        manifest = self._services.registry.known(name).manifests.get(revision)
        if manifest is not None:
            return self._services.registry.whole_at(manifest, Level.L2)
        return self._services.storage.has(Level.L2)

    def _tell(self, decision: Decision, name: str, revision: str) -> None:
        services, level = self._services, decision.level
        services.metrics.admissions.labels(level=level.value, verdict=decision.verdict.value).inc()
        what = f"{name} has a place in {level}" if decision.admitted else f"{name} gets no place in {level}"
        services.events.emit(
            "admitted" if decision.admitted else "kept_out", f"{what}: {decision.why}",
            name=name, revision=revision, level=level.value, verdict=decision.verdict.value,
            worth_s=round(decision.worth_s, 3), against_s=round(decision.against_s, 3),
        )  # fmt: skip

    def _needed(self, level: Level, sizes: Mapping[str, int]) -> int:
        used = self._services.storage.ledger(level).used
        return sum(sizes.values()) - sum(used.get(f"ingest:{ingest_id}", 0) for ingest_id in sizes)

    def _refuse(self, level: Level, sizes: Mapping[str, int], for_name: str) -> None:
        ledger = self._services.storage.ledger(level)
        withdrawn = self._services.storage.withdrawn_bytes(level)
        why = f"{format_size(withdrawn)} are evicted but still mapped by workers"
        hint = "retry when they have ended; `cached stats` shows the withdrawn bytes"
        if not withdrawn:
            why, hint = "what was to make room for it could not be removed", "`cached health` says why"
        raise NoRoomError(
            f"{level} has no room for {for_name} yet: {why}",
            hint=hint,
            level=level,
            needed_bytes=sum(sizes.values()),
            available_bytes=ledger.available_bytes,
            capacity_bytes=ledger.capacity_bytes,
            withdrawn_bytes=withdrawn,
        )

    def _evict_planned(self, planned: Plan) -> None:
        gone: dict[Level, list[Manifest]] = {level: [] for level in Level}
        for victim in _victims(planned):
            manifest = self._services.registry.models[victim.name].manifests[victim.revision]
            with suppress(LevelError, NoRoomError):  # told: the level is degraded
                self._leave(manifest, victim.level, victim.reason, victim.why, gone=gone[victim.level])
                gone[victim.level].append(manifest)

    def evict(self, manifests: Sequence[Manifest], level: Level, reason: str) -> int:
        """Takes revisions out of a level; the bytes that left it. The caller has made sure that nobody holds them.

        Raises LevelError or NoRoomError where the disk does not let one go.
        """
        services = self._services
        # A stale revision is forgotten as soon as it is at no level.
        known = [item for item in manifests if item.revision in services.registry.known(item.name).manifests]
        if not services.storage.has(level):
            return 0
        return sum(self._leave(item, level, reason, gone=known[:at]) for at, item in enumerate(known))

    def _leave(
        self, manifest: Manifest, level: Level, reason: str, why: str = "", *, gone: Sequence[Manifest] = ()
    ) -> int:
        """``gone``: revisions that left just before; the blobs that this one shares with them go with it."""
        services, held = self._services, self.loads.held_digests()
        leaving = services.registry.only_of(manifest, level, held, gone)
        for blob in leaving:
            services.registry.lost(blob.record.digest, level)
        self._show_elsewhere(manifest, {blob.record.digest for blob in leaving})
        refused = [error for blob in leaving if (error := self._drop(blob, level)) is not None]
        if level is Level.L1:
            services.storage.left_beside(manifest.name, manifest.revision)
        left = [blob for blob in leaving if not blob.at(level)]
        freed = sum(blob.record.size_bytes for blob in left)
        if left:
            services.metrics.evictions.labels(level=level.value, reason=reason).inc()
            services.metrics.evicted_bytes.labels(level=level.value).inc(freed)
            services.events.emit(
                "evicted", f"{manifest.name} left {level}: {why or reason}", name=manifest.name,
                revision=manifest.revision, level=level.value, reason=reason, size_bytes=freed,
            )  # fmt: skip
        for each in (manifest, *gone):
            self._forget_stale(each)
        if refused:
            services.publish(manifest)
            raise refused[0]
        if left and level is Level.L2:
            services.l2_recovers()
        return freed

    def _drop(self, blob: Blob, level: Level) -> CachedError | None:
        """An error, and it is there as before, where the disk does not let it go (it is read-only, say)."""
        services, digest = self._services, blob.record.digest
        try:
            services.storage.drop(level, digest)
        except (LevelError, NoRoomError) as error:
            services.registry.found(digest, level)
            services.degraded.began(level.value, f"{level} cannot be freed: {error.message}", error)
            return error
        blob.left_l2 |= level is Level.L2
        return None

    def _show_elsewhere(self, manifest: Manifest, digests: AbstractSet[str]) -> None:
        """Before bytes leave: those of other revisions that are shown there, though they hold them elsewhere, too."""
        self._services.publish(manifest)
        for other in list(self._services.registry.manifests()):
            if other is not manifest and not digests.isdisjoint(other.blobs):
                self._services.publish(other)

    def _forget_stale(self, manifest: Manifest) -> None:
        registry = self._services.registry
        model = registry.models[manifest.name]
        if manifest.revision == model.record.current_revision or manifest.revision not in model.manifests:
            return
        if not registry.is_here(manifest):
            registry.forget_revision(manifest)
            self._services.hide(manifest.name, manifest.revision)

    def forget(self, model: Model) -> None:
        """Drops a model that was evicted from every level."""
        services = self._services
        revisions = list(model.manifests)
        services.registry.forget_model(model)
        for revision in revisions:  # what others have, too, is still here
            services.hide(model.name, revision)

    async def tidy(self) -> None:
        """What needs no room to be made: cold models that nobody uses leave L1, and so do blobs that nobody has.

        Called every second, so it does nothing for thousands of blobs that are as they were.
        """
        registry, storage = self._services.registry, self._services.storage
        now_s = self._services.clock.monotonic_s()
        known = registry.changes, self.loads.held_digests()
        if known != self._tidied:
            for level in storage.levels:
                self._drop_unowned(level, self.pending_digests())
            self._cold = [model for model in registry.models.values() if self._is_cold_in_l1(model)]
            self._tidied = known
        if any(self._is_idle(model, now_s) for model in self._cold):
            self._evict_planned(plan_idle(self.snapshot(), now_s, cold_grace_s=_COLD_GRACE_S))
        self._end_transients(now_s)
        for level in storage.levels:
            self._trim(level)
        if now_s - self._ahead_s >= _AHEAD_S:
            self._ahead_s = now_s
            self._free_ahead(now_s)

    def _is_cold_in_l1(self, model: Model) -> bool:
        registry = self._services.registry
        return model.tier[0] is Tier.COLD and any(
            registry.bytes_at(manifest, Level.L1) for manifest in model.manifests.values()
        )

    def _is_idle(self, model: Model, now_s: float) -> bool:
        # Workers of an earlier daemon may be about to take up their leases again.
        idle_from_s = max(model.last_used_s + _COLD_GRACE_S, model.keep_until_s, self._grace_until_s)
        return not self._leases.count(model.name) and now_s >= idle_from_s

    def snapshot(self) -> Snapshot:
        """What the policy knows now."""
        return self._facts.snapshot()

    def newcomer(self, name: str, revision: str) -> RevisionFacts:
        """A revision that is not in L1, as it would come there."""
        return self._facts.newcomer(name, revision, in_l2=self._will_be_in_l2(name, revision))

    def leased_parts(self) -> frozenset[str]:
        """Ingests and blobs that workers map of parts of models, and of what failed after they had all of it."""
        return self._leases.holds()

    def hold(self, name: str, revision: str, ids: Mapping[str, str]) -> None:
        """A load failed after workers were told that its content is there: they keep what they map."""
        self._leases.hold(name, revision, ids)

    def became_blob(self, ingest_id: str, digest: str) -> None:
        """An ingest got its blob's name; workers may map a part of it, even of another revision."""
        self._leases.became(ingest_id, digest)

    def is_leased(self, name: str, revision: str) -> bool:
        """A worker holds it."""
        return self._leases.count(name, revision) > 0

    def is_transient(self, name: str, revision: str) -> bool:
        """In L1 beside the budget, until its last lease ends."""
        return (name, revision) in self._services.storage.beside

    def must_stay(self, name: str, revision: str) -> None:
        """Somebody asked for it to be in L1: what was let in beside the budget counts from now on."""
        if self.is_transient(name, revision):
            self._services.storage.count_again(name, revision)

    def _end_transients(self, now_s: float) -> None:
        """What was held beside the budget goes with its last lease, unless there is room for it by now."""
        services = self._services
        for name, revision in services.storage.beside:
            model = services.registry.models.get(name)
            manifest = model.manifests.get(revision) if model else None
            held = self._leases.count(name, revision) or self.loads.is_loading(name, revision)
            if held or (manifest is not None and self.is_busy(manifest)):
                continue
            if manifest is None or model is None:
                services.storage.left_beside(name, revision)
            elif services.storage.could_stay(name, revision) or model.pinned or model.tier[0] is Tier.HOT:
                services.storage.count_again(name, revision)
            elif model.keep_until_s <= now_s:
                self._leave(manifest, Level.L1, TRANSIENT, "its last lease ended, and it had no place of its own")

    def _trim(self, level: Level) -> None:
        """A level may hold less than it did: the host got short, or a budget was lowered. What is held stays."""
        clock, disk = self._services.clock, self._services.storage.disk
        if self._excess_bytes(level) <= 0 or clock.monotonic_s() < self._grace_until_s:
            return
        if level is Level.L2 and disk is not None and disk.hangs:
            return  # what is taken away counts until the disk answers: more would go each time
        if level is Level.L1:
            for part in self._services.registry.index.parts():
                self.loads.drop_part(part)
            if self._excess_bytes(level) <= 0:
                return
        self._evict_planned(plan(self._facts.snapshot(Need(level, 0, "a smaller capacity")), clock.monotonic_s()))

    def _excess_bytes(self, level: Level) -> int:
        storage = self._services.storage
        return storage.ledger(level).excess_bytes - storage.withdrawn_bytes(level)

    def _free_ahead(self, now_s: float) -> None:
        """Keeps some room free, and tenants within their quotas, so that a load does not wait for evictions."""
        storage = self._services.storage
        if now_s < self._grace_until_s or self.opening.locked() or not self._is_short(storage):
            return
        self._evict_planned(plan_ahead(self.snapshot(), now_s))

    def _is_short(self, storage: Storage) -> bool:
        registry = self._services.registry
        seen = registry.changes, self._leases.leased()
        if registry.tenants and seen != self._ahead_of:
            self._ahead_of = seen
            return True
        free_bytes = storage.ledger(Level.L1).available_bytes + storage.pool_bytes(Level.L1)
        return free_bytes + storage.withdrawn_bytes(Level.L1) < storage.free_ahead_bytes(Level.L1)

    def _drop_leftovers(self, level: Level, *, keep: Mapping[str, int]) -> None:
        """Ingests that wait to be resumed, and blobs of unfinished pulls, go before any model does.

        What workers map stays. Those of an earlier daemon must have had time to come back.
        """
        self._drop_unowned(level, frozenset())
        for ingest_id in self._left_ingests(level, keep=keep):
            self._services.storage.discard(level, ingest_id)
        self.loads.forget_parts()

    def _left_ingests(self, level: Level, *, keep: Mapping[str, int]) -> set[str]:
        """Those that wait to be resumed, and that no worker maps."""
        return set(self._services.storage.kept_ingests(level)) - keep.keys() - self._leases.holds()

    def _drop_unowned(self, level: Level, wanted: frozenset[str]) -> None:
        registry = self._services.registry
        owned = {entry.digest for manifest in registry.manifests() for entry in manifest.files}
        owned |= self.loads.held_digests() | wanted
        gone = [digest for digest, blob in registry.blobs.items() if blob.at(level) and digest not in owned]
        for digest in gone:
            registry.lost(digest, level)
            if self._drop(registry.blobs[digest], level) is None:
                registry.forget_blob(digest)

    def pending_digests(self) -> frozenset[str]:
        """Blobs of pulls that were interrupted and are to go on."""
        services = self._services
        ingests = [ingest for pull in services.registry.index.pending() for ingest in pull.ingests]
        return frozenset(services.journal_digest(ingest) for ingest in ingests)


def _victims(planned: Plan) -> list[Evict]:
    """The pool's part needs no action: whoever opens ingests takes from it."""
    return [action for action in planned.actions if isinstance(action, Evict)]
