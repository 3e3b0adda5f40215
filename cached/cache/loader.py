"""Drives loads: makes room, opens the ingests, flies the blobs, records the revision. One load a revision and level."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from cached.cache.background import cancel
from cached.cache.evictor import Evictor, Wanted
from cached.cache.flight import BlobOrder, Flight
from cached.cache.load import Load, LoadPlan
from cached.cache.services import Services
from cached.errors import CachedError, IntegrityError, NoRoomError, UnavailableError
from cached.index import PartRecord, PendingPull
from cached.level import Level
from cached.levels.base import FileRef
from cached.manifest import Manifest
from cached.policy import Otherwise
from cached.signals import run_all
from cached.tracing import Tracer
from cached.transfer.fill import HeadStart
from cached.types import Complete
from cached.units import chunk_length, format_size

_PRIORITIES_PER_LOAD = 100_000
"""More than a model has files: earlier loads go first, and within a load earlier files."""
_TRACED_FILES = 32
"""Of a load have spans of their own; some models have thousands."""
_WEIGHTS = (".safetensors", ".gguf")
"""A worker that streams waits for the head of the first of them."""


class Loader:
    """Owns every load and flight. Loop only."""

    def __init__(self, services: Services, evictor: Evictor, *, max_loads: int) -> None:
        self.loads: dict[tuple[str, str, Level, str], Load] = {}
        self._services = services
        self._evictor = evictor
        self._slots = asyncio.Semaphore(max_loads)
        self._flights: dict[tuple[Level, str], Flight] = {}
        self._saved: Counter[str] = Counter()
        self._sequence = 0

    def active(self, name: str, revision: str | None = None) -> list[Load]:
        """Loads in flight of a model, or of one of its revisions."""
        return [
            load for load in self.loads.values() if load.plan.name == name and revision in {None, load.plan.revision}
        ]

    def is_loading(self, name: str, revision: str) -> bool:
        """True while a revision is being brought to some level."""
        return bool(self.active(name, revision))

    def held_digests(self) -> frozenset[str]:
        """Blobs that loads in flight count on."""
        known = {file.digest for load in self.loads.values() for file in load.plan.files if file.digest}
        # Also while it is being committed: a blob of the same content must not leave under its feet.
        arriving = {flight.order.digest or flight.fill.sha256 for flight in self._flights.values()}
        return frozenset(known | arriving | self._saved.keys()) | self._evictor.leased_parts()

    @contextmanager
    def saving(self, digests: Collection[str]) -> Iterator[None]:
        """While inside, these blobs count as held: their revision is about to be recorded."""
        self._saved.update(digests)
        try:
            yield
        finally:
            self._saved.subtract(digests)
            self._saved = +self._saved

    def arriving(self) -> list[tuple[str, str]]:
        """The model and the ingest of each blob in flight, shared ones for whoever had them first."""
        return [(flight.order.name, ingest_id) for (_, ingest_id), flight in self._flights.items()]

    def verified_chunks(self, ingest_id: str) -> tuple[FileRef, frozenset[int]] | None:
        """Of a blob that is on its way to L1: where it is, and what of it is verified."""
        flight = self._flights.get((Level.L1, ingest_id))
        return (flight.target, frozenset(flight.fill.crc64)) if flight is not None else None

    def begin(self, plan: LoadPlan) -> Load:
        """The load of this revision to this level: the one in flight, or a new one."""
        load = Load(plan, self._services.clock)
        if plan.otherwise is Otherwise.EVICT and plan.level is Level.L1 and not plan.is_part:
            self._evictor.must_stay(plan.name, plan.revision)
        running = self.loads.get(load.key)
        if running is not None:
            return running
        self.loads[load.key] = load
        load.span = self._services.tracer.start(
            "load",
            {
                "cached.model": plan.name,
                "cached.revision": plan.revision,
                "cached.load.id": load.load_id,
                "cached.level": plan.level.value,
                "cached.files": len(plan.files),
                "cached.bytes": plan.total_bytes,
            },
        )
        load.task = asyncio.get_running_loop().create_task(self._run(load), name=f"load {plan.name}")
        return load

    async def stop(self) -> None:
        """Cancels everything; what was verified of pulls stays resumable."""
        loads = list(self.loads.values())
        for load in loads:
            if load.task is not None:
                load.task.cancel()
        await asyncio.gather(*(load.task for load in loads if load.task is not None), return_exceptions=True)

    async def _run(self, load: Load) -> None:
        with load.span:
            await self._carry_out(load)

    async def _carry_out(self, load: Load) -> None:
        error: CachedError | None = None
        try:
            async with self._slots:
                await self._open_at_its_turn(load)
                await (self._fly_part(load) if load.plan.is_part else self._fly(load))
        except CachedError as failure:
            error = failure
        except asyncio.CancelledError:
            load.error = UnavailableError("the load was stopped", hint="it is resumed by the next pull of the model")
            raise
        except Exception as bug:  # noqa: BLE001 - told, and raised to whoever waits
            error = self._services.failures.bug("load", bug, name=load.plan.name, load=load.load_id)
        finally:
            with self._services.failures.survived("load"):
                if load.shown:
                    self._services.unpublish(load.plan.name, load.plan.revision)
                if error is not None and load.ready_as is not None and load.plan.level is Level.L1:
                    self._evictor.hold(load.plan.name, load.plan.revision, load.ids())
            await self._release(load)
            del self.loads[load.key]
            if load.error is None:
                self._ended(load, error)
            load.signal.notify()

    def _ended(self, load: Load, error: CachedError | None) -> None:
        """Keeps the record of what is pending true: what failed for a passing reason is resumed after a restart.

        Only now do those who wait hear of the end: a new try finds nothing left of this one.
        """
        services, plan = self._services, load.plan
        if not plan.is_part and (error is None or isinstance(error, IntegrityError)):
            services.registry.write(lambda: services.registry.index.delete_pending(plan.name, plan.revision))
        if not plan.is_part and error is None and plan.level is Level.L1:
            services.registry.write(lambda: services.registry.index.delete_part(plan.name, plan.revision))
        with services.failures.survived("sweep"):
            self.sweep()
        if error is not None:
            load.error = error
            load.span.fail(error)
            services.failed(services.registry.known(plan.name), error, load=load.load_id)
            return
        load.finished = True
        if not plan.is_part:
            services.registry.well(plan.name)
        if load.bytes_from(Level.L3):
            services.metrics.pulled(services.clock.wall_s())
        ready = load.ready_as or load.completion()
        services.events.emit(
            "load.finished", f"{'part of ' if plan.is_part else ''}{plan.name} is in {plan.level}",
            name=plan.name, revision=plan.revision, level=plan.level.value, from_level=ready.from_level.value,
            origin_bytes=ready.origin_bytes, disk_bytes=ready.disk_bytes, reused_bytes=ready.reused_bytes,
            load_s=round(ready.load_s, 3), origins=_told(load), load=load.load_id,
        )  # fmt: skip
        load.span.set({"cached.from_level": ready.from_level.value, "cached.origin_bytes": ready.origin_bytes})
        services.metrics.loaded(ready.from_level, ready.load_s, trace_id=load.span.trace_id, load_id=load.load_id)

    async def _open_at_its_turn(self, load: Load) -> None:
        """Only one load at a time brings a part of a blob: whoever wants more of it goes on where that one ends.

        Nor are two written to L2 at a time: what is copied there from L1 is waited for.
        """
        storage = self._services.storage
        while True:
            while (other := self._in_the_way_of(load)) is not None:
                await other.signal.wait()
            while self._copied_to(load):
                await storage.closed.wait()
            async with nullcontext() if load.plan.needs_no_room else self._evictor.opening:
                if self._in_the_way_of(load) is None and not self._copied_to(load):
                    await self._open(load)
                    waited_s = self._services.clock.monotonic_s() - load.started_s
                    self._services.metrics.load_opened(waited_s, trace_id=load.span.trace_id, load_id=load.load_id)
                    return

    def _in_the_way_of(self, load: Load) -> Load | None:
        wanted = load.plan.orders.keys()
        for other in self.loads.values():
            parts = {key for key, flight in other.flights.items() if flight.order.is_part}
            if other is not load and not parts.isdisjoint(wanted):
                return other
        return None

    def _copied_to(self, load: Load) -> bool:
        """Whether L2 gets a blob of this load from L1 now, and so from no flight that could be joined."""
        level = load.plan.level
        return level is Level.L2 and any(
            self._services.storage.is_open(level, key) and (level, key) not in self._flights for key in load.plan.orders
        )

    async def _open(self, load: Load) -> None:
        """Reserves and creates everything at once, so that a load never starts what cannot be finished."""
        plan = load.plan
        new = {key: order for key, order in plan.orders.items() if not self._join(load, key)}
        opened: list[tuple[Level, BlobOrder]] = []
        try:
            sizes = {key: self._room_bytes(order) for key, order in new.items() if not order.adopt}
            lengths = {key: new[key].size_bytes for key in sizes if new[key].is_part}
            with self._services.tracer.start("reserve"):
                admitted = await self._evictor.open(
                    Wanted(plan.level, sizes, plan.name, plan.revision, plan.otherwise, plan.digests, lengths)
                )
            if not admitted:
                raise NoRoomError(
                    f"{plan.name} is not worth the place of what is in {plan.level}",
                    hint="pull it, and it gets its place nevertheless",
                    level=plan.level,
                    needed_bytes=sum(sizes.values()),
                    fits="later",
                )
            opened += [(plan.level, new[key]) for key in sizes]
            persisted = await self._open_behind(new, plan)
            opened += [(Level.L2, new[key]) for key in persisted]
            self._sequence += 1
            weights = (key for key, order in new.items() if order.path.endswith(_WEIGHTS))
            ahead = sum(len(order.first) for order in new.values())
            urgent = next(weights, "") if plan.level is Level.L1 and not ahead and not plan.is_part else ""
            head_start = HeadStart(ahead) if ahead else None
            for position, (key, order) in enumerate(new.items()):
                priority = self._sequence * _PRIORITIES_PER_LOAD + position
                flight = Flight(
                    self._services, replace(order, persist=key in persisted), priority=priority,
                    urgent=key == urgent, head_start=head_start,
                    tracer=self._services.tracer if position < _TRACED_FILES else Tracer(),
                    on_blob=self._evictor.became_blob,
                )  # fmt: skip
                self._take_off(load, flight)
        finally:
            for level, order in opened:
                if order.ingest_id not in load.flights:
                    self._give_back(level, order)
        load.opened = True
        load.signal.notify()

    def _room_bytes(self, order: BlobOrder) -> int:
        """What a blob takes of its level; of a part the chunks that are wanted and those that are there."""
        if order.chunks is None:
            return order.size_bytes
        kept_bytes = self._services.storage.kept_bytes(order.level, order.ingest_id)
        there = self._services.journalled(order.ingest_id, order.level) if kept_bytes else frozenset()
        new_bytes = _chunk_bytes(order, order.chunks - there)
        return min(order.size_bytes, max(kept_bytes + new_bytes, _chunk_bytes(order, order.chunks)))

    def _give_back(self, level: Level, order: BlobOrder) -> None:
        """An ingest whose flight does not take off; what an earlier one left verified in it stays kept."""
        if order.journalled and (self._services.journal_dir / order.ingest_id).exists():
            self._services.storage.suspend(level, order.ingest_id, sparse=order.is_part)
        else:
            self._services.storage.discard(level, order.ingest_id)

    def _join(self, load: Load, key: str) -> bool:
        """Shares the flight that brings this blob already. False if there is none."""
        flight = self._flights.get((load.plan.level, key))
        if flight is None:
            return False
        if flight.users == 0:
            raise UnavailableError(f"{load.plan.name} is being stopped", hint="try again in a moment")
        flight.users += 1
        load.flights[key] = flight
        return True

    async def _open_behind(self, new: Mapping[str, BlobOrder], plan: LoadPlan) -> frozenset[str]:
        """Room in L2 for what is written behind. Without it the load goes on in L1 alone."""
        storage = self._services.storage
        sizes = {
            key: order.size_bytes for key, order in new.items() if order.persist and not storage.is_open(Level.L2, key)
        }
        if not sizes or not storage.has(Level.L2):
            return frozenset()
        try:
            opened = await self._evictor.open(
                Wanted(Level.L2, sizes, plan.name, plan.revision, Otherwise.SKIP, plan.digests)
            )
        except CachedError as error:
            if not isinstance(error, NoRoomError):
                self._services.degraded.began("l2", error.message, error)
            self._services.failures.report(
                "l2.skipped", error, f"{plan.name} is kept in L1 only: {error.message}", name=plan.name
            )
            return frozenset()
        return frozenset(sizes) if opened else frozenset()

    def _take_off(self, load: Load, flight: Flight) -> None:
        order = flight.order
        flight.users = 1
        self._flights[order.level, order.ingest_id] = load.flights[order.ingest_id] = flight
        flight.start()

    async def _fly(self, load: Load) -> None:
        flights = list(load.flights.values())
        watch = asyncio.ensure_future(self._forward(load, flights))
        try:
            await run_all(*(flight.until_verified() for flight in flights))
            self._show(load)
            load.ready_as = load.completion()
            self._learn(load, load.ready_as)
            load.signal.notify()
            await run_all(*(_landed(flight) for flight in flights))
            await self._record(load)
            self._publish(load)
            await run_all(*(flight.until_finished() for flight in flights))
            for flight in flights:
                flight.forget()
        finally:
            await cancel(self._services.failures, "load", watch)

    async def _fly_part(self, load: Load) -> None:
        """Until what is wanted is verified. Flights that others take further go on for them."""
        flights = list(load.flights.values())
        wanted = load.plan.orders
        watch = asyncio.ensure_future(self._forward(load, flights))
        try:
            load.prefer(load.plan.chosen.chunks if load.plan.chosen else {})
            await run_all(
                *(flight.until_arrived(wanted[key].chunks or frozenset()) for key, flight in load.flights.items())
            )
            await run_all(*(flight.until_finished() for flight in flights if flight.order.is_part))
            await run_all(*(_landed(flight) for flight in flights if flight.order.adopt))
            await self._services.registry.durable()  # a lease on it is to be found again after a kill
            load.ready_as = load.completion()
            load.signal.notify()
        finally:
            await cancel(self._services.failures, "load", watch)

    def _learn(self, load: Load, ready: Complete) -> None:
        """What the policy is to know of the way that these bytes took."""
        plan = load.plan
        if plan.level is Level.L1:
            moved_bytes = ready.origin_bytes + ready.disk_bytes
            waited = self._evictor.is_leased(plan.name, plan.revision)
            self._services.history.loaded(
                plan.name, ready.from_level, moved_bytes, ready.load_s, somebody_waited=waited
            )

    async def _forward(self, load: Load, flights: list[Flight]) -> None:
        """A change of any flight is a change of the load."""

        async def forward(flight: Flight) -> None:
            while True:
                await flight.signal.wait()
                load.signal.notify()

        await run_all(*(forward(flight) for flight in flights))

    async def _record(self, load: Load) -> None:
        """The revision is known from now on, and durably so on return: until then a restart needs the journals."""
        plan = load.plan
        if plan.manifest is not None:
            return
        self._services.registry.add_manifest(
            Manifest(
                name=plan.name,
                revision=plan.revision,
                source=plan.source,
                origin_options=plan.origin_options,
                files=load.entries(),
                created_time_s=self._services.clock.wall_s(),
                notes=(*plan.notes, *([f"came from {_told(load)}"] if load.bytes_of and load.has_chain else [])),
            )
        )
        await self._services.registry.durable()

    def _show(self, load: Load) -> None:
        """Whoever is told that the content is ready finds its directory, though its blobs may have no names yet."""
        if load.plan.level is not Level.L1:
            return
        targets = {}
        for file in load.plan.files:
            flight = load.flight_of(file)
            ref = flight.target if flight is not None else self._services.storage.l1.blob(file.digest)
            targets[file.path] = ref.path
        self._services.show_arrived(load.plan.name, load.plan.revision, targets)
        load.shown = True

    def _publish(self, load: Load) -> None:
        load.shown = False
        manifest = self._services.registry.known(load.plan.name).manifests.get(load.plan.revision)
        if manifest is not None:
            self._services.publish(manifest)

    async def _release(self, load: Load) -> None:
        for flight in load.flights.values():
            flight.users -= 1
            if flight.users == 0:
                await flight.cancel()
                self._flights.pop((flight.order.level, flight.order.ingest_id), None)

    def forget_parts(self) -> None:
        """Drops the records of parts of which nothing is here any more, with the journals that were kept for them."""
        services, gone = self._services, set[str]()
        for part in services.registry.index.parts():
            if not self._is_held(part) and not services.part_bytes(part):
                gone |= part.ingests
                services.registry.write(lambda part=part: services.registry.index.delete_part(part.name, part.revision))  # type: ignore[misc]
        if gone:
            services.remove_journals(keep=self._wanted())

    def _is_held(self, part: PartRecord) -> bool:
        return self.is_loading(part.name, part.revision) or self._evictor.is_leased(part.name, part.revision)

    def drop_part(self, part: PartRecord) -> int:
        """Takes what is here of a part out of L1, unless somebody holds it; the bytes that left it."""
        services = self._services
        if self._is_held(part):
            return 0
        before_bytes = services.part_bytes(part)
        services.registry.write(lambda: services.registry.index.delete_part(part.name, part.revision))
        self.sweep()
        return before_bytes - services.part_bytes(part)

    def give_up(self, pulls: Collection[PendingPull], level: Level) -> int:
        """Takes out of a level what pulls that failed left there, and nobody else wants; the bytes that left it.

        Pulls to this level are forgotten; one to another goes on with what it has there. None may be under way.
        """
        services, freed_bytes, gone = self._services, 0, set[str]()
        for pull in pulls:
            if pull.level is level:
                services.registry.write(
                    lambda gone=pull: services.registry.index.delete_pending(gone.name, gone.revision)  # type: ignore[misc]
                )
        kept = services.storage.kept_ingests(level) if services.storage.has(level) else []
        left = {ingest_id for pull in pulls for ingest_id in pull.ingests}
        for ingest_id in left.intersection(kept) - self._wanted(but=pulls):
            freed_bytes += services.storage.kept_bytes(level, ingest_id)
            services.storage.discard(level, ingest_id)
            kept_bytes = sum(services.storage.kept_bytes(other, ingest_id) for other in services.storage.levels)
            if not kept_bytes and not services.journal_digest(ingest_id):
                gone.add(ingest_id)
        self.sweep()
        services.remove_journals(keep=self._wanted() - gone)
        return freed_bytes

    def sweep(self) -> None:
        """Drops ingests and journals that no pending pull would take up again."""
        services = self._services
        self.forget_parts()
        wanted = self._wanted()
        for level in services.storage.levels:
            for ingest_id in set(services.storage.kept_ingests(level)) - wanted:
                services.storage.discard(level, ingest_id)
        services.remove_journals(keep=wanted)

    def _wanted(self, *, but: Collection[PendingPull] = ()) -> set[str]:
        """The ingests that somebody would take up again, or maps; ``but``: not counting these pulls."""
        services = self._services
        pulls = (pull for pull in services.registry.index.pending() if pull not in but)
        wanted = {ingest for pull in pulls for ingest in pull.ingests}
        wanted |= {ingest_id for _, ingest_id in self._flights}
        return wanted | self._evictor.leased_parts() | services.part_ingests()


def _told(load: Load) -> str:
    """Which origins the bytes are from, and how many are from each."""
    return ", ".join(f"{origin} ({format_size(count)})" for origin, count in load.bytes_of.most_common())


async def _landed(flight: Flight) -> None:
    await flight.until_landed()


def _chunk_bytes(order: BlobOrder, chunks: AbstractSet[int]) -> int:
    return sum(chunk_length(order.size_bytes, index) for index in chunks)
