"""Prediction from habit: a model that is used every weekday at nine is expected at nine. Pure bookkeeping.

Predictions are made and judged whether they are acted on or not, so that it is known when they pay and when they do
not: ``Predictor.pays`` turns them off by themselves, and on again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from cached.policy.demand import MODELS, put_last

SLOT_S = 1800.0
"""A habit is a time of day, this exact."""
DAYS_KEPT = 28
_LEAST_DAYS = 3  # the same thing on fewer days is no habit
_LEAST_SHARE = 0.7
_SLOTS = round(86_400 / SLOT_S)
_WEEKEND = 5
_MEMORY = 0.98  # what a judged prediction still counts when the next one is judged
_LEAST_JUDGED = 5.0
_LEAST_PRECISION = 0.6


@dataclass(frozen=True, slots=True)
class Prediction:
    """A model will be used within SLOT_S from ``start_s`` (Unix time). ``share``: on so many of like days it was."""

    name: str
    start_s: float
    share: float


@dataclass(slots=True)
class Predictor:
    """The habits of all models, in the time of ``zone``, and how often what they foretold came true.

    Call ``used`` for each attach, and ``due`` regularly: it makes predictions, and judges those whose time is over.
    """

    zone: str = "UTC"
    right: float = 0.0
    wrong: float = 0.0
    judged: list[bool] = field(default_factory=list)
    """Whether those came true that the last call of ``due`` judged."""
    _first: dict[str, int] = field(default_factory=dict)
    _uses: dict[str, dict[int, set[int]]] = field(default_factory=dict)
    """At most MODELS; the one that was used last is the last."""
    _open: dict[tuple[str, float], bool] = field(default_factory=dict)

    @property
    def precision(self) -> float | None:
        """The share of predictions that came true, recent ones counting more; None before the first was judged."""
        judged = self.right + self.wrong
        return self.right / judged if judged else None

    @property
    def pays(self) -> bool:
        """Whether to act on predictions: enough were judged, and enough of them were right."""
        judged = self.right + self.wrong
        return judged >= _LEAST_JUDGED and self.right >= _LEAST_PRECISION * judged

    def used(self, name: str, now_s: float) -> None:
        """An attach."""
        day, slot, _ = self._place(now_s)
        self._first.setdefault(name, day)
        slots = self._uses.get(name, {})
        days = slots.setdefault(slot, set())
        days.add(day)
        days.difference_update({old for old in days if old <= day - DAYS_KEPT})
        for old in put_last(self._uses, name, slots, MODELS):
            self.forget(old)
        for (other, start_s), came in self._open.items():
            if other == name and not came and start_s <= now_s < start_s + SLOT_S:
                self._open[other, start_s] = True

    def forget(self, name: str) -> None:
        """It was removed: nothing is expected of it any more, and nothing that was is judged."""
        self._uses.pop(name, None)
        self._first.pop(name, None)
        for key in [key for key in self._open if key[0] == name]:
            del self._open[key]

    def due(self, now_s: float, lead_s: Mapping[str, float] | None = None) -> tuple[Prediction, ...]:
        """Models expected from now on, or after a load that takes ``lead_s`` and has to begin now; likeliest first.

        Whether to act on them, ``pays`` says.
        """
        self._judge(now_s)
        found = [
            prediction
            for name in self._uses
            if (prediction := self._expected(name, now_s + (lead_s or {}).get(name, 0.0))) is not None
        ]
        for prediction in found:
            day, slot, _ = self._place(prediction.start_s)
            came = day in self._uses[prediction.name].get(slot, set())
            self._open.setdefault((prediction.name, prediction.start_s), came)
        return tuple(sorted(found, key=lambda item: (-item.share, item.name)))

    def _expected(self, name: str, at_s: float) -> Prediction | None:
        today, slot, start_s = self._place(at_s)
        used = self._uses[name].get(slot, set())
        first = max(self._first[name], today - DAYS_KEPT)
        share = max(_share(used, _like(today, first, today)), _share(used, range(today - 7, first - 1, -7)))
        return Prediction(name, start_s, share) if share >= _LEAST_SHARE else None

    def _judge(self, now_s: float) -> None:
        self.judged = []
        for (name, start_s), came in list(self._open.items()):
            if start_s + SLOT_S <= now_s:
                del self._open[name, start_s]
                self.judged.append(came)
                self.right = self.right * _MEMORY + came
                self.wrong = self.wrong * _MEMORY + (not came)

    def _place(self, now_s: float) -> tuple[int, int, float]:
        """The day, the slot of it, and when that began."""
        local = datetime.fromtimestamp(now_s, UTC if self.zone == "UTC" else ZoneInfo(self.zone))
        seconds = local.hour * 3600 + local.minute * 60 + local.second + local.microsecond / 1e6
        slot = min(_SLOTS - 1, int(seconds / SLOT_S))
        return local.toordinal(), slot, (local - timedelta(seconds=seconds - slot * SLOT_S)).timestamp()

    def to_records(self) -> dict[str, Any]:
        """Plain data for the index; predictions that are not judged yet are not in it."""
        return {
            "right": self.right,
            "wrong": self.wrong,
            "models": {
                name: {"first": self._first[name], "slots": {str(slot): sorted(days) for slot, days in slots.items()}}
                for name, slots in self._uses.items()
            },
        }

    @staticmethod
    def from_records(records: Mapping[str, Any], zone: str = "UTC") -> Predictor:
        """The inverse of ``to_records``. Raises KeyError, TypeError or ValueError for anything else."""
        models = dict(list(records["models"].items())[-MODELS:])
        return Predictor(
            zone,
            float(records["right"]),
            float(records["wrong"]),
            [],
            {name: int(kept["first"]) for name, kept in models.items()},
            {
                name: {int(slot): set(map(int, days)) for slot, days in kept["slots"].items()}
                for name, kept in models.items()
            },
        )


def _like(day: int, first: int, before: int) -> list[int]:
    """Days from ``first`` on that are of a kind with a day: working days, or weekends."""
    kind = date.fromordinal(day).weekday() >= _WEEKEND
    return [other for other in range(first, before) if (date.fromordinal(other).weekday() >= _WEEKEND) == kind]


def _share(used: set[int], days: range | list[int]) -> float:
    """On what share of these days it was used; 0 when they are too few to tell."""
    return sum(day in used for day in days) / len(days) if len(days) >= _LEAST_DAYS else 0.0
