"""How workers' starts went, as they told: the last ones of each model, kept across restarts, and counted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from heapq import nlargest

from cached.cache.events import EventBus
from cached.cache.registry import Registry
from cached.clock import Clock
from cached.index.records import ColdStartsRecord
from cached.metrics import Metrics
from cached.refs import Ref, parse_ref
from cached.types import COLD_START_PHASES, ColdStart, ColdStartPhase

KEPT = 50
"""Starts of each model. One takes 1 to 6 KB."""

MODELS = 1000
"""With starts that are kept; beyond them the one that was silent for longest is forgotten."""


class ColdStarts:
    """Loop only. Lives in memory, and is written to the index now and then: a crash costs the last half minute."""

    def __init__(self, registry: Registry, metrics: Metrics, events: EventBus, clock: Clock) -> None:
        self._registry = registry
        self._metrics = metrics
        self._events = events
        self._clock = clock
        self._starts: dict[str, deque[ColdStart]] = {}
        """By model; the one that told last is the last."""
        self._changed: set[str] = set()

    def load(self) -> None:
        """Takes up what earlier daemons wrote."""
        records = [record for record in self._registry.index.cold_starts() if record.starts]
        for record in sorted(records, key=lambda record: record.starts[-1].reported_time_s):
            self._starts[record.name] = deque(record.starts, maxlen=KEPT)
            self._show(record)

    def _show(self, record: ColdStartsRecord) -> None:
        """Its series begin at 0, so that a rate over them has a first point."""
        phases = {phase for start in record.starts for phase in phase_seconds(start.phases)}
        self._metrics.show_coldstarts(record.name, phases)

    def write(self) -> None:
        """Makes it durable, if anything changed."""
        if self._changed:
            names, self._changed = self._changed, set()
            self._registry.write(lambda: self._put(names))

    def _put(self, names: Iterable[str]) -> None:
        index = self._registry.index
        with index.transact():
            for name in sorted(names):
                if name in self._starts:
                    index.put_cold_starts(ColdStartsRecord(name, tuple(self._starts[name])))
                else:
                    index.delete_cold_starts(name)

    def report(self, start: ColdStart) -> None:
        """Keeps and counts a start. Raises NotFoundError for a model that this host does not know."""
        self._registry.require(Ref(start.name))
        told = replace(start, reported_time_s=self._clock.wall_s())
        starts = self._starts.pop(told.name, deque(maxlen=KEPT))
        starts.append(told)
        self._starts[told.name] = starts
        self._changed.add(told.name)
        while len(self._starts) > MODELS:
            self.forget(next(iter(self._starts)))
        longest = ""
        self._metrics.coldstarted(told.name, told.total_s, phase_seconds(told.phases))
        if told.phases:
            longest = max(told.phases, key=lambda item: item.end_s - item.start_s).name
        self._events.emit(
            "coldstart.reported", f"{told.client_name or 'a worker'} started with {told.name} in {told.total_s:.2f} s",
            name=told.name, revision=told.revision, total_s=f"{told.total_s:.3f}", longest_phase=longest,
            from_level=told.labels.get("from_level", ""),
        )  # fmt: skip

    def of(self, ref: str, limit: int) -> tuple[ColdStart, ...]:
        """The last ``limit`` starts with a model (0: all that are kept), the oldest first. Raises NotFoundError."""
        name = self._registry.require(parse_ref(ref)).name
        return tuple(self._starts.get(name, ()))[-limit:]

    def latest(self, limit: int, sees: Callable[[str], bool] | None = None) -> tuple[ColdStart, ...]:
        """The last starts of all models, or of those that ``sees`` lets through, the latest first."""
        told = [name for name in self._starts if sees is None or sees(name)]
        names = told[-limit:] if limit else []
        found = [start for name in names for start in self._starts[name]]
        return tuple(nlargest(limit, found, key=lambda start: start.reported_time_s))

    def forget(self, name: str) -> None:
        """A model is not known any more: neither are its starts, nor its series in the metrics."""
        if self._starts.pop(name, None) is not None:
            self._changed.add(name)
            self.write()
        self._metrics.forget_model(name)


def phase_seconds(phases: Iterable[ColdStartPhase]) -> dict[str, float]:
    """For how long each phase ran, overlaps counted once; names that are not standard ones together as ``other``.

    Of those only what is not within another phase: their parts are in them.
    """
    intervals: dict[str, list[tuple[float, float]]] = {}
    for phase in phases:
        if phase.name in COLD_START_PHASES:
            intervals.setdefault(phase.name, []).append((phase.start_s, phase.end_s))
        elif phase.parent is None:
            intervals.setdefault("other", []).append((phase.start_s, phase.end_s))
    return {name: _covered_s(found) for name, found in intervals.items()}


def _covered_s(intervals: list[tuple[float, float]]) -> float:
    covered_s, until_s = 0.0, 0.0
    for start_s, end_s in sorted(intervals):
        covered_s += max(0.0, end_s - max(start_s, until_s))
        until_s = max(until_s, end_s)
    return covered_s
