"""Why models are where they are, for people who wonder: what the policy says, with what was decided lately."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from cached.cache.evictor import Evictor
from cached.cache.registry import Model
from cached.cache.services import Services
from cached.level import Level
from cached.manifest import Manifest
from cached.policy import Snapshot
from cached.policy.explain import explain, worths
from cached.types import Event, PlaceDetail
from cached.units import format_duration

_DECISIONS = frozenset({"admitted", "kept_out", "evicted"})
_LEVELS = (Level.L1, Level.L2)
_FRESH_S = 1.0
"""What models are worth changes slowly, and a list of a thousand is asked for by more than one."""
_LONG_S, _REST = 0.03, 50
"""Where it takes this much of the processor, it is not done again before so many times that: 2 % of the loop."""

Worths = Mapping[Level, Mapping[tuple[str, str], float]]
"""Level → name and revision → seconds."""


class Explainer:
    """Loop only; nothing here changes anything."""

    def __init__(self, services: Services, evictor: Evictor) -> None:
        self._services = services
        self._evictor = evictor
        self._worths: Worths = {}
        self._worths_of = (-1, float("-inf"))
        self._rest_until_s = float("-inf")

    def worth_s(self, manifest: Manifest) -> float:
        """What a revision is worth in L1 if any of it is there, else in L2; 0 where it is at neither."""
        registry = self._services.registry
        level = next((level for level in _LEVELS if registry.bytes_at(manifest, level)), None)
        if level is None:
            return 0.0
        key = (manifest.name, manifest.revision)
        worth_s = self.worths().get(level, {}).get(key)
        return worth_s if worth_s is not None else self.worths(at_once=True).get(level, {}).get(key, 0.0)

    def worths(self, *, at_once: bool = False) -> Worths:
        """What all revisions are worth, at most a second ago: the same object until it is counted again, in one go.

        ``at_once``: if anything changed, it is counted now, unless that was costly a moment ago.
        """
        changes, now_s = self._services.registry.changes, self._services.clock.monotonic_s()
        counted, counted_s = self._worths_of
        is_due = now_s - counted_s >= _FRESH_S or (at_once and counted != changes)
        if is_due and now_s >= self._rest_until_s:
            began_s = time.thread_time()
            snapshot = self._evictor.snapshot()
            self._worths = {level: worths(snapshot, level, now_s) for level in snapshot.levels}
            self._worths_of = (changes, now_s)
            took_s = time.thread_time() - began_s
            self._rest_until_s = now_s + _REST * took_s if took_s >= _LONG_S else now_s
        return self._worths

    def is_transient(self, manifest: Manifest) -> bool:
        """In L1 beside the budget, until its last lease ends."""
        return self._evictor.is_transient(manifest.name, manifest.revision)

    def places(self, model: Model, manifest: Manifest) -> tuple[PlaceDetail, ...]:
        """A revision at each level of this host, where it is and where it is not."""
        snapshot = self._with(manifest)
        explained = explain(snapshot, model.name, self._services.clock.monotonic_s(), size_bytes=manifest.total_bytes)
        return tuple(
            PlaceDetail(
                level=place.level,
                held_bytes=place.held_bytes,
                worth_s=place.worth_s,
                requests=place.requests,
                reload_s=place.reload_s,
                why="; ".join((place.why, *self._also(manifest, place.level))),
                evicted_before=place.before or (),
                verified_time_s=self._services.verified.oldest(self._services.registry.blobs_of(manifest), place.level),
            )
            for revision, place in explained.places
            if revision == manifest.revision
        )

    def _with(self, manifest: Manifest) -> Snapshot:
        """The snapshot, and in it this revision, though nothing of it may be here."""
        snapshot, key = self._evictor.snapshot(), (manifest.name, manifest.revision)
        if any((facts.name, facts.revision) == key for facts in snapshot.revisions):
            return snapshot
        absent = self._evictor.newcomer(manifest.name, manifest.revision)
        return replace(snapshot, revisions=(*snapshot.revisions, absent))

    def _also(self, manifest: Manifest, level: Level) -> list[str]:
        """What the policy's facts do not hold."""
        told = []
        if level is Level.L1 and self.is_transient(manifest):
            told.append("it is held beside the budget, and goes with its last lease")
        decided = self._last_decision(manifest, level)
        if decided is not None:
            ago_s = max(0.0, self._services.clock.wall_s() - decided.time_s)
            told.append(f"{format_duration(ago_s)} ago: {decided.message}")
        return told

    def _last_decision(self, manifest: Manifest, level: Level) -> Event | None:
        """The latest that is remembered of this revision and level."""
        for event in reversed(self._services.events.recent):
            if (
                event.kind in _DECISIONS
                and (event.name, event.revision) == (manifest.name, manifest.revision)
                and event.fields.get("level") == level.value
            ):
                return event
        return None
