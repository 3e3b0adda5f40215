"""Hot windows, as time goes on: a model is hot while it is within one, and is to be brought before one begins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

from cached.cache.model import Model
from cached.cache.services import Services
from cached.schedule import Schedule, lead_s

_LONGEST_LEAD_S = 2 * 3600.0
"""Nothing is brought earlier than this before its window, however long it takes."""


@dataclass(slots=True)
class _Entry:
    """What was found at ``from_s`` holds until ``until_s`` (Unix times), when a window ends or the next one begins."""

    model: Model
    schedule: Schedule
    from_s: float = inf
    until_s: float = -inf


class Timetable:
    """Loop only. Looked at every second: with hundreds of windows it compares numbers, and computes when one changes.

    It goes by the time of day. A clock that jumps, either way, moves into or out of a window at once; nothing else.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._entries: dict[str, _Entry] = {}
        self._seen = -1

    def look(self) -> list[Model]:
        """Makes models hot whose windows began, and no longer hot whose ended. The models to bring ahead of theirs."""
        registry = self._services.registry
        if registry.changes != self._seen:
            self._entries = {entry.model.name: entry for entry in self._collect()}
        now_s = self._services.clock.wall_s()
        for entry in self._entries.values():
            if not entry.from_s <= now_s < entry.until_s:
                self._decide(entry, now_s)
        self._seen = registry.changes
        return [entry.model for entry in self._entries.values() if self._is_due(entry, now_s)]

    def _collect(self) -> Iterator[_Entry]:
        """Models that have windows, or had one until just now; what is known of them stays known."""
        for model in self._services.registry.models.values():
            if model.schedule.windows or model.in_window:
                before = self._entries.get(model.name)
                same = before is not None and before.model is model and before.schedule == model.schedule
                yield before if before is not None and same else _Entry(model, model.schedule)

    def _decide(self, entry: _Entry, now_s: float) -> None:
        model, schedule = entry.model, entry.schedule
        change_s = schedule.next_change(now_s)
        entry.from_s, entry.until_s = now_s, inf if change_s is None else change_s
        if schedule.is_hot(now_s) == model.in_window:
            return
        self._services.registry.set_in_window(model, not model.in_window)
        if model.in_window:
            self._services.events.emit(
                "schedule.began", f"{model.name} is hot, by its schedule", name=model.name, until_time_s=entry.until_s
            )
        else:
            self._services.events.emit(
                "schedule.ended", f"{model.name} is {model.tier[0]} again: its hot window ended", name=model.name
            )

    def _is_due(self, entry: _Entry, now_s: float) -> bool:
        """Before a window, so late that a load has to begin. From then on it is kept, whatever its tier."""
        model, left_s = entry.model, entry.until_s - now_s
        if model.in_window or not 0 < left_s <= _LONGEST_LEAD_S:
            return False
        if left_s > lead_s(self._services.history.load_s(model)):
            return False
        model.kept_until_s = max(model.kept_until_s, self._services.clock.monotonic_s() + left_s + 1.0)
        return True
