"""ModelCache: the cache's verbs, each a few lines over the parts that do the work. One asyncio loop owns all of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Self

from cached import __version__
from cached.artifact_types import Artifact, ArtifactFound, ArtifactOffer, PutOutcome
from cached.cache.attach_watch import AttachWatch
from cached.cache.attachment import Attachment
from cached.cache.background import Background, run_each
from cached.cache.build import Parts, build_parts
from cached.cache.failures import Failures
from cached.cache.hot_set import HotSet
from cached.cache.registry import Model
from cached.cache.visibility import Visibility
from cached.cache.what_if import what_if
from cached.catalog_file import Catalog
from cached.clock import Clock, SystemClock
from cached.config import Config
from cached.errors import CachedError, InUseError, NotFoundError, UnavailableError
from cached.index import PartRecord, PendingPull
from cached.leases import check_keep_alive
from cached.level import Level
from cached.manifest import Manifest
from cached.metrics import Gauges, Metrics
from cached.overview import Limits, Overview
from cached.processes import children_usage
from cached.refs import Ref, artifact_digest, check_source, parse_ref
from cached.tracing import Tracer
from cached.types import (
    Attached,
    Client,
    ColdStart,
    Damage,
    Event,
    Freed,
    LeaseInfo,
    ModelDetail,
    ModelSummary,
    Peer,
    PullPhase,
    PullProgress,
    Selection,
    Stats,
    Tier,
    TierChange,
    VerifyProgress,
)

_PROGRESS_S = 0.1


class ModelCache:
    """Build, ``start``, serve, ``drain``, ``close``. All methods belong to the loop; errors are CachedError's kinds."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._attachments: dict[str, Attachment] = {}
        self._background = Background(parts.services.failures)
        self._draining = False
        self.ready = False
        parts.inspector.on_damage = self._tell_holders
        parts.services.metrics.bind(self.gauges, lambda: self.ready)

    @classmethod
    def build(cls, config: Config, metrics: Metrics, clock: Clock | None = None, tracer: Tracer | None = None) -> Self:
        """Makes every part from the configuration. Touches the state folder; moves no bytes yet."""
        return cls(build_parts(config, metrics, clock or SystemClock(), tracer or Tracer(), version=__version__))

    @property
    def visibility(self) -> Visibility:
        """Who may know of which model: for the edges to ask."""
        return self._parts.visibility

    async def start(self) -> None:
        """Finds what an earlier daemon left, and begins to confirm and resume it in the background."""
        await self._parts.recovery.recover()
        self._parts.timed_pulls.load()
        self._parts.cold_starts.load()
        self._parts.foresight.load()
        self._parts.visibility.refresh()
        self._parts.services.registry.write_behind()
        self.ready = True
        self._background.start("recovery", self._parts.recovery.resume())
        self._background.start("upkeep", self._parts.upkeep.run())
        self._background.start("timed_pulls", self._parts.timed_pulls.run())
        self._background.start("foresight", self._parts.foresight.run())
        self._background.start("pool_keeper", self._parts.pool_keeper.run())
        self._background.start("scrub", self._parts.scrubber.run())
        self._background.start("trace", self._parts.trace.run(self._parts.services.failures))
        self._background.start("artifacts", self._parts.artifacts.run())
        if self._parts.node_labels is not None:
            self._background.start("node_labels", self._parts.node_labels.run())

    async def drain(self, timeout_s: float) -> None:
        """Refuses new work and gives loads under way a moment to finish; what is left stays resumable."""
        self._draining = True
        loads = [load.task for load in self._parts.loader.loads.values() if load.task is not None]
        if loads and timeout_s > 0:
            await asyncio.wait(loads, timeout=timeout_s)

    async def close(self) -> None:
        """Stops everything in order; segments and blobs stay for the next daemon."""
        self._draining = True
        for attachment in list(self._attachments.values()):
            attachment.close()
        await self._background.stop()
        await run_each(self._parts.services.failures, self._parts.endings())
        self._parts.services.history.write()
        self._parts.cold_starts.write()
        await self._parts.services.registry.close()

    def set_catalog(self, catalog: Catalog) -> None:
        """Replaces the catalog; the upkeep brings hot models that are not in L1."""
        self._parts.visibility.check(catalog)
        self._parts.services.registry.set_catalog(catalog)
        self._parts.visibility.refresh()

    def set_budgets(self, config: Config) -> None:
        """Takes the budgets of the levels from these settings; what is over them then goes in the background."""
        changed = self._parts.services.storage.set_budgets(config)
        if changed:
            self._parts.services.registry.changes += 1  # who is hot within the budget, say, has to be looked at again
            self.tell("budgets.changed", f"now {', '.join(changed)}")

    @property
    def failures(self) -> Failures:
        """Where what went wrong is counted and told, and what is degraded; parts outside of the engine add theirs."""
        return self._parts.services.failures

    def tell(self, kind: str, message: str, **fields: object) -> None:
        """Logs an event that began outside of the engine, and hands it to everyone who watches."""
        self._parts.services.events.emit(kind, message, name="", revision="", **fields)

    async def pull(
        self,
        ref: str,
        *,
        source: str = "",
        tier: Tier | None = None,
        level: Level = Level.L1,
        wait: bool = True,
        at_time_s: float = 0.0,
    ) -> AsyncIterator[PullProgress]:
        """Brings what the origin has now to ``level``. Progress until it is finished; without ``wait``, until accepted.

        The pull goes on when the caller stops iterating. ``at_time_s``: it begins by itself at that Unix time, also in
        a later daemon, and this is answered at once; infinity takes back those that were asked for.
        """
        self.require_running()
        parsed = parse_ref(ref)
        if at_time_s:
            self._parts.timed_pulls.add(parsed, ref, at_time_s, source=source, level=level, tier=tier)
            await self._parts.services.registry.durable()
            yield PullProgress(PullPhase.SCHEDULED, parsed.name)
            return
        span = self._parts.services.tracer.start("pull", {"cached.model": parsed.name}, server=True)
        with span.active():
            run = self._parts.pulls.begin(parsed, source=source, level=level, tier=tier, span=span)
        yield PullProgress(PullPhase.RESOLVING, parsed.name)
        load = await run.until_planned()
        if level is Level.L1:
            self._parts.services.history.asked(load.plan.name, hit=False)
        if not wait:
            await self._parts.services.registry.durable()
            yield PullProgress(PullPhase.ACCEPTED, load.plan.name, load.plan.revision, load.plan.total_bytes)
            return
        while not run.finished:
            load = run.load or load
            if not load.finished:
                yield load.progress()
            await run.signal.wait(_PROGRESS_S)
        if run.error is not None:
            raise run.error
        yield (run.load or load).progress()

    async def attach(
        self,
        ref: str,
        *,
        source: str = "",
        client: Client | None = None,
        resume: bool = False,
        only_if_resident: bool = False,
        keep_alive_s: float = 0.0,
        selection: Selection | None = None,
    ) -> Attachment:
        """A lease on a revision. Brings it to L1 first if need be: the attachment tells how that goes.

        ``resume`` (a worker that mapped it before this daemon started) and ``only_if_resident`` never bring anything.
        ``keep_alive_s``: when the lease ends, however it does, the model stays in L1 before others for so long.
        ``selection``: only that of it is attached, and brought; or that is brought first.
        """
        self.require_running()
        parsed, keep_alive_s = parse_ref(ref), check_keep_alive(keep_alive_s)
        check_source(parsed, source)
        watch = AttachWatch(self._parts.services, parsed.name, counts=not resume)
        may_load = not (resume or only_if_resident)
        with watch.finding():
            content = await self._parts.contents.find(parsed, source, may_load=may_load, selection=selection)
            while content.is_over:  # what nobody holds may be gone already
                content = await self._parts.contents.find(parsed, source, may_load=may_load, selection=selection)
        name, revision = content.name, content.revision
        clock, model = self._parts.services.clock, self._parts.services.registry.known(name)
        lease = self._parts.leases.open(
            name, revision, client or Client(), now_s=clock.monotonic_s(), wall_s=clock.wall_s()
        )
        lease.size_bytes, lease.holds = content.size_bytes, content.holds
        lease.keep_alive_s = keep_alive_s
        watch.opened(lease, content)
        attachment = Attachment(self._parts.services, lease, content, self._released, watch)
        self._attachments[lease.lease_id] = attachment
        model.lease_count += 1
        if not resume:
            if content.chosen is None:  # what a part costs says nothing of the model
                self._parts.trace.opened(lease)
            self._parts.foresight.attached(model)
        self._used(model, attaches=1)
        self._parts.services.events.emit(
            "lease.opened", f"{lease.holder} holds {name}", name=name, revision=revision, lease=lease.lease_id,
            load=content.load_id,
        )  # fmt: skip
        return attachment

    def detach(self, lease_id: str, token: str) -> None:
        """Ends a lease early; the token proves that it is the caller's own."""
        lease = self._parts.leases.authorised(lease_id, token)
        self._attachments[lease.lease_id].close()

    def open_descriptors(self, token: str, file_indices: Sequence[int], peer: Peer) -> list[int]:
        """New read-only descriptors of files of a lease, in order; the caller closes them."""
        lease = self._parts.leases.by_token(token)
        lease.peer = peer
        return self._attachments[lease.lease_id].open_descriptors(file_indices)

    def leased_name(self, token: str) -> str:
        """The model of the lease whose token this is. Raises PermissionDeniedError."""
        return self._parts.leases.by_token(token).name

    def list_models(self) -> tuple[ModelSummary, ...]:
        """Every known model, by name."""
        return self._parts.describer.summaries()

    def describe(self, ref: str) -> ModelDetail:
        """One model: its files, leases and where everything is."""
        parsed = parse_ref(ref)
        model = self._parts.services.registry.require(parsed)
        manifest = self._parts.services.registry.manifest_of(model, parsed)
        if manifest is None:
            for load in self._parts.loader.active(parsed.name):
                if load.shown and load.plan.revision.startswith(parsed.revision):
                    return self._parts.describer.arrived(model, load)
            if parsed.revision:
                self._revisions(model, parsed)  # raises
        return self._parts.describer.detail(model, manifest)

    def list_leases(self) -> tuple[LeaseInfo, ...]:
        """The leases that are held now."""
        return self._parts.leases.infos()

    async def set_tier(self, ref: str, tier: Tier) -> ModelSummary:
        """The operator's word on how soon a model is wanted; it outlives restarts.

        Raises NoRoomError where hot models would take more than they may.
        """
        if tier is Tier.HOT:
            HotSet(self._parts.services).check(self._parts.services.registry.require(parse_ref(ref)))
        return await self._changed(ref, f"tier set to {tier}", operator_tier=tier)

    def what_if(self, ref: str, tier: Tier) -> TierChange:
        """What another tier would lead to; nothing is changed."""
        parts = self._parts
        model = parts.services.registry.require(parse_ref(ref))
        return what_if(parts.services, parts.evictor, parts.describer, model, tier)

    async def pin(self, ref: str) -> ModelSummary:
        """Never a victim from now on."""
        return await self._changed(ref, "pinned", pinned=True)

    async def unpin(self, ref: str) -> ModelSummary:
        """A victim like any other from now on (unless the catalog pins it)."""
        return await self._changed(ref, "unpinned", pinned=False)

    async def _changed(self, ref: str, what: str, **changes: Any) -> ModelSummary:
        registry = self._parts.services.registry
        model = registry.require(parse_ref(ref))
        registry.update(model, **changes)
        await registry.durable()
        self._parts.services.events.emit("model.changed", f"{model.name}: {what}", name=model.name)
        return self._parts.describer.summary(model)

    async def evict(self, ref: str, level: Level | None) -> Freed:
        """Takes a model's revisions (or the one named) out of a level, or of all. Refused while leased or loading."""
        parsed = parse_ref(ref)
        await self._written_behind(parsed)
        freed = self._evict(parsed, level)
        await self._parts.services.storage.collect()
        return freed

    async def remove(self, ref: str) -> Freed:
        """Evicts from every level and forgets the model (its catalog entry, if any, stays)."""
        name = Ref(parse_ref(ref).name)
        await self._written_behind(name)
        freed = self._evict(name, None)
        self._parts.timed_pulls.forget(name.name)
        self._parts.cold_starts.forget(name.name)
        self._parts.services.history.forget(name.name)
        self._parts.foresight.forget(name.name)
        self._parts.evictor.forget(self._parts.services.registry.require(name))
        self._parts.visibility.refresh()
        await self._parts.services.registry.durable()
        await self._parts.services.storage.collect()
        return freed

    async def _written_behind(self, ref: Ref) -> None:
        """Waits for loads that are ready and only write to L2 any more: nobody has to know of them to evict."""
        for load in self._parts.loader.active(ref.name):
            if load.ready_as is not None:
                with suppress(CachedError):  # it tells those who wait for it
                    await load.until(lambda load=load: load.finished)  # type: ignore[misc]

    def _evict(self, ref: Ref, level: Level | None) -> Freed:
        """Without a pause between the look at who holds it and its going."""
        freed, manifests = Freed(), self._unused(ref, level)
        levels = (Level.L1, Level.L2) if level is None else (level,)
        for each in levels:
            freed = freed.plus(each, self._parts.evictor.evict(manifests, each, "operator"))
        if level is not Level.L2:
            for part in self._parts_of(ref):
                freed = freed.plus(Level.L1, self._parts.loader.drop_part(part))
        for each in levels:  # parts go first: what they share with a pull that failed is that pull's as long as it is
            freed = freed.plus(each, self._parts.loader.give_up(self._pending_of(ref), each))
        return freed

    def _known_of(self, model: Model, ref: Ref) -> list[Manifest]:
        return [manifest for revision, manifest in model.manifests.items() if revision.startswith(ref.revision)]

    def _parts_of(self, ref: Ref) -> list[PartRecord]:
        """What is remembered of revisions, those that a reference means, of which parts are in L1."""
        parts = self._parts.services.registry.index.parts(ref.name)
        return [part for part in parts if part.revision.startswith(ref.revision)]

    def _pending_of(self, ref: Ref) -> list[PendingPull]:
        """The pulls of a model, or of the revision that is named, that failed and would go on after a restart."""
        pulls = self._parts.services.registry.index.pending()
        return [pull for pull in pulls if pull.name == ref.name and pull.revision.startswith(ref.revision)]

    def _unused(self, ref: Ref, level: Level | None) -> list[Manifest]:
        """The revisions that a reference means, if nobody holds them."""
        registry = self._parts.services.registry
        model = registry.require(ref)
        unfinished: list[PartRecord | PendingPull] = [*self._parts_of(ref), *self._pending_of(ref)]
        manifests = self._known_of(model, ref) if unfinished else self._revisions(model, ref)
        if model.pinned:
            raise InUseError(f"{ref} is pinned", hint=f"first: cached unpin {model.name}", ref=str(ref), holders="pin")
        if model.tier[0] is Tier.HOT and level is not Level.L2:
            raise InUseError(
                f"{ref} is hot, by word of the {model.tier[1]}: it would be brought back at once",
                hint=f"first: cached tier {model.name} warm (and change its tier in the catalog, if it is hot there)",
                ref=str(ref),
                holders="tier hot",
            )
        held = dict.fromkeys(
            [(item.name, item.revision) for item in manifests] + [(item.name, item.revision) for item in unfinished]
        )
        holders = [holder for name, revision in held for holder in self._parts.leases.holders(name, revision)]
        holders += [f"a load to {load.plan.level}" for load in self._parts.loader.active(model.name)]
        holders += ["the copy to l2" for item in manifests if self._parts.evictor.is_busy(item)]
        if holders:
            raise InUseError(
                f"{ref} is in use by {', '.join(holders)}",
                hint="`cached ps` shows the leases, `cached ls` the loads; stop the workers, or wait",
                ref=str(ref),
                holders=", ".join(holders),
            )
        return manifests

    def _revisions(self, model: Model, ref: Ref) -> list[Manifest]:
        """The revision that a reference names, or all of the model's."""
        if not ref.revision:
            return list(model.manifests.values())
        manifest = self._parts.services.registry.manifest_of(model, ref)
        if manifest is None:
            raise NotFoundError(f"{ref} is not here", hint=f"`cached show {model.name}` lists revisions", ref=str(ref))
        return [manifest]

    async def verify(self, ref: str | None, *, repair: bool) -> AsyncIterator[VerifyProgress]:
        """Reads every byte of one or all models again; see Verifier."""
        registry = self._parts.services.registry
        manifests = list(registry.manifests())
        if ref is not None:
            parsed = parse_ref(ref)
            manifests = self._revisions(registry.require(parsed), parsed)
        async for progress in self._parts.verifier.verify(manifests, repair=repair):
            yield progress

    async def find_artifact(
        self, key: Mapping[str, str], *, local_only: bool, sees: Callable[[str], bool] = lambda _name: True
    ) -> ArtifactFound:
        """The compile artifact of exactly this key, or those nearest to it; see Artifacts."""
        self.require_running()
        return await self._parts.artifacts.find(key, local_only=local_only, sees=sees)

    async def put_artifact(
        self, offer: ArtifactOffer, data: AsyncIterator[bytes]
    ) -> tuple[PutOutcome, Artifact | None]:
        """Saves a compile artifact; what became of that, and what is current now."""
        self.require_running()
        return await self._parts.artifacts.put(offer, data)

    async def list_artifacts(self, *, remote: bool) -> tuple[Artifact, ...]:
        """The compile artifacts of this host, and with ``remote`` of the destination."""
        return await self._parts.artifacts.known(remote=remote)

    def artifact_ticket(self, peer: Peer) -> str:
        """What lets this peer save one compile artifact."""
        return self._parts.artifacts.ticket(peer)

    def stats(self) -> Stats:
        """The daemon at a glance."""
        stats = self._parts.describer.stats(self._parts.pool.active_movers, self._parts.lanes.stats())
        return replace(stats, prediction_precision=self._parts.foresight.precision, scrub=self._parts.scrubber.stats)

    def gauges(self) -> Gauges:
        """The same for the metrics."""
        parts, movers = self._parts, children_usage(self._parts.pool.pids)
        lanes, precision = parts.lanes.stats(), parts.foresight.precision
        return parts.describer.gauges(movers, parts.pool.active_movers, lanes, precision)

    def loads(self) -> tuple[PullProgress, ...]:
        """What is being brought to a level now, or made durable there."""
        return tuple(load.progress() for load in self._parts.loader.loads.values())

    def overview(self, limits: Limits, sees: Callable[[str], bool] | None = None) -> Overview:
        """What is where, what moves and who holds what, in one look; ``sees``: of these models alone."""
        return self._parts.overviews.now(self.stats(), limits, sees)

    def trace(self) -> Iterator[Attached]:
        """The attaches that this host remembers, oldest first."""
        return self._parts.trace.rows()

    def report_cold_start(self, start: ColdStart) -> None:
        """A worker tells how its start went."""
        self._parts.cold_starts.report(start)

    def cold_starts(self, ref: str, limit: int) -> tuple[ColdStart, ...]:
        """The last starts with a model, the oldest first; ``limit`` 0: all that are kept."""
        return self._parts.cold_starts.of(ref, limit)

    def watch(self, *, replay: bool) -> AsyncIterator[Event]:
        """Events from now on."""
        return self._parts.services.events.watch(replay=replay)

    def check_invariants(self) -> None:
        """Raises AssertionError or AccountingError if the accounts do not agree with the levels. For tests."""
        self._parts.services.storage.check()

    def _released(self, attachment: Attachment) -> None:
        lease = attachment.lease
        self._attachments.pop(lease.lease_id, None)
        self._parts.leases.close(lease.lease_id)
        model = self._parts.services.registry.models.get(lease.name)
        if model is not None:
            model.lease_count -= 1  # before anything that could fail: what is counted for ever is never evicted
        self._parts.trace.closed(lease)
        if model is not None:
            self._used(model, attaches=0)
            if artifact_digest(lease.name) and (manifest := model.manifests.get(lease.revision)) is not None:
                self._parts.artifacts.released(manifest)
            model.kept_until_s = max(model.kept_until_s, model.last_used_s + lease.keep_alive_s)
        self._parts.services.events.emit(
            "lease.closed", f"{lease.holder} released {lease.name}", name=lease.name, revision=lease.revision,
            lease=lease.lease_id,
        )  # fmt: skip

    def _used(self, model: Model, *, attaches: int) -> None:
        clock = self._parts.services.clock
        model.last_used_s = clock.monotonic_s()
        self._parts.services.registry.used(model, clock.wall_s(), attaches=attaches)

    def _tell_holders(self, damage: Damage) -> None:
        for attachment in self._attachments.values():
            attachment.tell(damage)

    def require_running(self) -> None:
        """Raises UnavailableError while it starts or stops."""
        if self._draining:
            raise UnavailableError("the daemon is stopping", hint="try again when it is back")
        if not self.ready:
            raise UnavailableError("the daemon is starting", hint="try again in a moment")
