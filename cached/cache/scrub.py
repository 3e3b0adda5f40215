"""Scrubbing: reads what lies at the levels again and again, slowly, beside everything else; mends what is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import structlog

from cached.cache.background import repeat
from cached.cache.inspector import Inspector, Place, places_of
from cached.cache.registry import Blob, Presence
from cached.cache.services import Services
from cached.clock import Clock
from cached.config import ScrubConfig
from cached.errors import CachedError
from cached.level import Level
from cached.manifest import FileEntry, Manifest
from cached.types import Damage, ScrubStats
from cached.units import MIB, format_duration, format_size, parse_size

_log = structlog.get_logger(__name__)

_TICK_S = 5.0
_LOADS_S = 0.5
"""How often it is looked whether the loads that it waits for are over."""

_EARLY = 0.1
"""What becomes due within this share of its period is looked at with what is due: movers are started seldom then."""

_LEAST_BYTES = MIB
"""What a look counts for at least: thousands of tiny files must not come in a burst."""

_PRIORITY = 1_500_000_000
"""After everything that anybody waits for, and after what only writes to L2."""

_FIRST_RETRY_S, _LAST_RETRY_S = 60.0, 3600.0
"""A blob in quarantine is tried again after so long (a period, if that is less), then after twice as long and so on."""


class Pacer:
    """Lets bytes through at a rate, without bursts: what was not used in time is lost."""

    def __init__(self, clock: Clock, bytes_per_s: float) -> None:
        """``bytes_per_s`` must be more than 0."""
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._free_s = float("-inf")

    async def take(self, size_bytes: int) -> None:
        """Returns when these may go."""
        now_s = self._clock.monotonic_s()
        begin_s = max(self._free_s, now_s)
        self._free_s = begin_s + size_bytes / self._bytes_per_s
        if begin_s > now_s:
            await self._clock.sleep(begin_s - now_s)


@dataclass(frozen=True, slots=True)
class _Task:
    """A blob to be looked at, at some levels; ``due_s`` in Unix time."""

    due_s: float
    manifest: Manifest
    entry: FileEntry
    levels: tuple[Level, ...]
    overdue: bool
    """By another period: it waits for no load any more."""

    @property
    def digest(self) -> str:
        """The blob."""
        return self.entry.digest


@dataclass(slots=True)
class _Stuck:
    """A blob that could not be mended, or not be read: when it is tried again, and how long after that.

    ``wrong``: the chunks that were damaged then.
    """

    retry_at_s: float
    wait_s: float
    wrong: frozenset[tuple[Level, int]] = frozenset()


class Scrubber:
    """One background task. ``loading`` says whether a load is under way, which gets the disk and the processor.

    A session takes everything that is due, the most overdue first, one chunk at a time. Between sessions nothing runs.
    """

    def __init__(
        self, services: Services, inspector: Inspector, config: ScrubConfig, loading: Callable[[], bool]
    ) -> None:
        self._services = services
        self._inspector = inspector
        self._loading = loading
        self._bytes_per_s = parse_size(config.bytes_per_s)
        self._periods_s = {Level.L1: config.l1_period_s, Level.L2: config.l2_period_s}
        self._tick_s = min(_TICK_S, *(period_s / 4 for period_s in self._periods_s.values()))
        self._first_retry_s = min(_FIRST_RETRY_S, *self._periods_s.values())
        self._pacer = Pacer(services.clock, max(1, self._bytes_per_s))
        self._since_s = services.clock.wall_s()
        self._stuck: dict[str, _Stuck] = {}
        """By digest."""
        self._seen = -1
        self._next_due_s = 0.0
        self._progress = ScrubStats(self._bytes_per_s)
        self._damaged = self._repaired = 0
        """Chunks of this session."""

    @property
    def stats(self) -> ScrubStats:
        """What it is at."""
        return self._progress

    async def run(self) -> None:
        """Until cancelled; at once where it is switched off."""
        if self._bytes_per_s:
            await repeat(self._services.clock, self._tick_s, self.step, what="scrub", failures=self._services.failures)

    async def step(self) -> None:
        """Looks at all that is due, if anything is."""
        registry, now_s = self._services.registry, self._services.clock.wall_s()
        if registry.changes == self._seen and now_s < self._next_due_s:
            return
        tasks = self._tasks(now_s)
        self._seen = registry.changes
        if tasks:
            try:
                await self._session(tasks)
            finally:
                self._progress = ScrubStats(self._bytes_per_s)

    # What is due.

    def _tasks(self, now_s: float) -> list[_Task]:
        """What is due, and if anything is, also what soon will be; notes when the next look for it pays."""
        registry = self._services.registry
        self._stuck = {digest: stuck for digest, stuck in self._stuck.items() if digest in registry.blobs}
        for digest in registry.quarantined:
            if digest not in self._stuck:
                self._later(digest)
        known = sorted(self._known(now_s), key=lambda task: task.due_s)
        self._next_due_s = known[0].due_s if known else float("inf")
        if self._next_due_s > now_s:
            return []
        return [task for task in known if task.due_s <= now_s + self._early_s(task)]

    def _early_s(self, task: _Task) -> float:
        return 0.0 if task.digest in self._stuck else _EARLY * min(self._periods_s[level] for level in task.levels)

    def _known(self, now_s: float) -> Iterator[_Task]:
        """When each blob of a revision is due. What is not confirmed in L1 is looked at by whoever confirms it."""
        registry = self._services.registry
        files: dict[str, tuple[Manifest, FileEntry]] = {}
        for manifest in registry.manifests():
            for entry in manifest.files:
                files.setdefault(entry.digest, (manifest, entry))
        for digest, file in files.items():
            blob, stuck = registry.blobs[digest], self._stuck.get(digest)
            if stuck is not None:
                levels = tuple(level for level in (Level.L1, Level.L2) if blob.at(level))
                if levels:
                    yield _Task(stuck.retry_at_s, *file, levels, overdue=False)
                continue
            for level in (Level.L1, Level.L2):
                if blob.l1 is Presence.CONFIRMED if level is Level.L1 else blob.l2:
                    verified_s, period_s = self._services.verified.of(digest, level), self._periods_s[level]
                    overdue = now_s > (verified_s or self._since_s) + 2 * period_s
                    yield _Task(verified_s + period_s, *file, (level,), overdue)

    # A session.

    async def _session(self, tasks: list[_Task]) -> None:
        services = self._services
        began_s, self._damaged, self._repaired = services.clock.monotonic_s(), 0, 0
        total_bytes = sum(len(task.levels) * task.entry.size_bytes for task in tasks)
        self._progress = ScrubStats(self._bytes_per_s, total_bytes)
        for task in tasks:
            try:
                await self._scrub(task)
            except CachedError as error:
                services.failures.background("scrub", error, digest=task.digest)
                self._later(task.digest)
        took_s, read_bytes = services.clock.monotonic_s() - began_s, self._progress.done_bytes
        services.events.emit(
            "scrub.finished",
            f"read {format_size(read_bytes)} again in {format_duration(took_s)}: {self._found()}",
            name="", size_bytes=read_bytes, damaged=self._damaged, repaired=self._repaired,
        )  # fmt: skip

    def _found(self) -> str:
        if not self._damaged:
            return "no damage"
        return f"{self._damaged} damaged chunk{'s' * (self._damaged > 1)}, {self._repaired} of them mended"

    async def _scrub(self, task: _Task) -> None:
        """Looks at one blob. One that was stuck is tried where it was, and no further than it can be mended."""
        blob, stuck = self._services.registry.blobs.get(task.digest), self._stuck.get(task.digest)
        if blob is None:
            return
        wrong, missed = set(stuck.wrong if stuck else ()), set[Level]()
        for place in self._places(task, blob, wrong):
            at = (place.level, place.index)
            if not self._is_there(place):
                missed.add(place.level)
                continue
            await self._turn(place, task)
            damage = await self._inspector.look(place, repair=True, priority=_PRIORITY, known=at in wrong)
            self._count(place, damage)
            if damage is None or damage.repaired:
                wrong.discard(at)
                continue
            wrong.add(at)
            if stuck is not None:
                break
        self._settle(task, blob, {at for at in wrong if blob.at(at[0])}, missed)

    def _places(self, task: _Task, blob: Blob, first: AbstractSet[tuple[Level, int]]) -> list[Place]:
        """Every chunk of it in order, but these before the others."""
        places = [place for level in task.levels for place in places_of(task.manifest, task.entry, blob, level)]
        return sorted(places, key=lambda place: (place.level, place.index) not in first)

    def _is_there(self, place: Place) -> bool:
        """False for what was evicted or forgotten meanwhile, and for what somebody has removed: that is noted."""
        services, digest = self._services, place.blob.record.digest
        model = services.registry.models.get(place.manifest.name)
        if model is None or place.manifest.revision not in model.manifests or not place.blob.at(place.level):
            return False
        there = services.on_disk(place.blob) if place.level is Level.L2 else services.in_memory(place.blob)
        if not there:
            services.publish_all(digest)
        return there

    async def _turn(self, place: Place, task: _Task) -> None:
        """Waits for loads, and for the rate to allow it."""
        while self._loading() and not task.overdue:
            self._progress = replace(self._progress, waiting=True)
            await self._services.clock.sleep(_LOADS_S)
        self._progress = replace(self._progress, waiting=False)
        await self._pacer.take(max(_LEAST_BYTES, place.length_bytes))

    def _count(self, place: Place, damage: Damage | None) -> None:
        self._services.metrics.scrubbed_bytes.labels(level=place.level.value).inc(place.length_bytes)
        self._progress = replace(self._progress, done_bytes=self._progress.done_bytes + place.length_bytes)
        if damage is not None:
            self._damaged += 1
            self._repaired += damage.repaired

    def _settle(
        self, task: _Task, blob: Blob, wrong: AbstractSet[tuple[Level, int]], missed: AbstractSet[Level]
    ) -> None:
        """What was found right is due a period later; what is still wrong is tried again before that."""
        services, digest = self._services, task.digest
        if services.registry.blobs.get(digest) is not blob:
            return
        if wrong:
            self._later(digest, wrong)
            return
        for level in task.levels:
            if blob.at(level) and level not in missed:
                services.verified.note(digest, level)
        if not any(blob.at(level) for level in missed):
            self._stuck.pop(digest, None)
            if blob.l1 is Presence.UNCONFIRMED and digest in services.registry.quarantined:
                services.landed(blob.record, Level.L1)
            services.mended(digest)

    def _later(self, digest: str, wrong: AbstractSet[tuple[Level, int]] | None = None) -> None:
        """``wrong`` None: nothing new is known of what is damaged."""
        stuck = self._stuck.get(digest)
        if wrong is None:
            wrong = stuck.wrong if stuck is not None else frozenset()
        wait_s = min(2 * stuck.wait_s, _LAST_RETRY_S) if stuck is not None else self._first_retry_s
        self._stuck[digest] = _Stuck(self._services.clock.wall_s() + wait_s, wait_s, frozenset(wrong))
