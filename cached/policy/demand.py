"""How often a model is asked for: decayed counts that outlive evictions, and what they let one expect.

A request leaves a trace that fades with several half-lives at once. Which of them tells most about the next request
differs from host to host (bursts of restarts, office hours, steady load), so it is learned from the requests
themselves: each request that comes is credited to the traces that predicted it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from math import exp, isfinite, log
from typing import Any, TypeVar

from cached.level import Level

HALF_LIVES_S = (900.0, 7200.0, 86_400.0)
"""A burst, some hours, a day and longer."""
HORIZON_S = 21_600.0
"""How far ahead a model's requests count: about as long as what is admitted stays before it is weighed again."""

MODELS = 10_000
"""Of which anything is learned, since callers make up names: beyond them the one used least recently is forgotten."""

_K = TypeVar("_K")
_V = TypeVar("_V")
_DECAYS = tuple(log(2) / half_life_s for half_life_s in HALF_LIVES_S)
_D0, _D1, _D2 = _DECAYS
_WITHIN_HORIZON = tuple(1.0 - exp(-decay * HORIZON_S) for decay in _DECAYS)
_PRIOR = (0.1, 0.45, 0.45)
_LEARNING = 0.01  # a few hundred requests change the mix, a single burst does not


def put_last(table: dict[_K, _V], key: _K, value: _V, most: int) -> list[_K]:
    """Puts it at the end of a table that keeps the ``most`` that were put last; which ones went for it."""
    table.pop(key, None)
    table[key] = value
    gone = list(islice(table, max(0, len(table) - most)))
    for old in gone:
        del table[old]
    return gone


@dataclass(frozen=True, slots=True)
class Demand:
    """Requests of one model at one level: counts at ``time_s``, one for each of HALF_LIVES_S. ``time_s`` is Unix time.

    A clock that goes back is taken to stand still: nothing grows by it.
    """

    time_s: float
    counts: tuple[float, float, float]

    def at(self, now_s: float) -> tuple[float, float, float]:
        """What is left of the counts."""
        elapsed_s = now_s - self.time_s
        short, middle, long = self.counts
        if elapsed_s <= 0:
            return self.counts
        return short * exp(-elapsed_s * _D0), middle * exp(-elapsed_s * _D1), long * exp(-elapsed_s * _D2)

    def asked(self, now_s: float) -> Demand:
        """With one more request."""
        short, middle, long = self.at(now_s)
        return Demand(max(now_s, self.time_s), (short + 1.0, middle + 1.0, long + 1.0))


NEVER = Demand(0.0, (0.0, 0.0, 0.0))
"""Nobody asked yet."""


@dataclass(frozen=True, slots=True)
class Mix:
    """How much of the requests each half-life explains; the weights sum to 1."""

    weights: tuple[float, float, float] = _PRIOR

    def expected(self, demand: Demand, now_s: float) -> float:
        """Requests to expect within HORIZON_S."""
        short, middle, long = demand.at(now_s)
        by_short, by_middle, by_long = self.factors()
        return by_short * short + by_middle * middle + by_long * long

    def factors(self) -> tuple[float, float, float]:
        """What one decayed count of each half-life adds to ``expected``."""
        short, middle, long = self.weights
        return short * _WITHIN_HORIZON[0], middle * _WITHIN_HORIZON[1], long * _WITHIN_HORIZON[2]

    def learned(self, before: Demand, now_s: float) -> Mix:
        """After a request: each half-life is credited by how strongly it said that this model would be asked for now.

        One step of the expectation-maximisation for a sum of exponentially fading kernels. A model's first request
        teaches nothing.
        """
        rates = [
            weight * decay * count for weight, decay, count in zip(self.weights, _DECAYS, before.at(now_s), strict=True)
        ]
        total = sum(rates)
        if total <= 0:
            return self
        short, middle, long = (
            weight + _LEARNING * (rate / total - weight) for weight, rate in zip(self.weights, rates, strict=True)
        )
        return Mix((short, middle, long))


@dataclass(frozen=True, slots=True)
class ModelHistory:
    """What is kept of a model as long as it is known: some numbers, whatever was evicted or restarted since.

    ``requests`` counts attaches, which is what L1 is for; ``misses`` those that L1 did not have, which is what L2 is
    for. ``waited_l1_s``: what its users waited for loads since it was last kept in L1; ``waited_l2_s``: the same
    for L2 and loads from the origin.
    """

    requests: Demand = NEVER
    misses: Demand = NEVER
    waited_l1_s: float = 0.0
    waited_l2_s: float = 0.0

    def demand(self, level: Level) -> Demand:
        """What counts at L1 or L2."""
        return self.requests if level is Level.L1 else self.misses

    def waited_s(self, level: Level) -> float:
        """What was waited for want of a place at L1 or L2."""
        return self.waited_l1_s if level is Level.L1 else self.waited_l2_s

    def to_record(self) -> list[float]:
        """Ten plain numbers for the index."""
        return [
            self.requests.time_s, *self.requests.counts,
            self.misses.time_s, *self.misses.counts,
            self.waited_l1_s, self.waited_l2_s,
        ]  # fmt: skip

    @staticmethod
    def from_record(record: list[float]) -> ModelHistory:
        """The inverse of ``to_record``. Raises ValueError when that did not write it."""
        numbers = [float(number) for number in record]
        if len(numbers) != 10:
            raise ValueError(f"a model's history has ten numbers, not {len(numbers)}")
        if not all(isfinite(number) for number in numbers):
            raise ValueError("a model's history has a number that is not finite")
        asked, missed = numbers[:4], numbers[4:8]
        return ModelHistory(
            Demand(asked[0], (asked[1], asked[2], asked[3])), Demand(missed[0], (missed[1], missed[2], missed[3])),
            numbers[8], numbers[9],
        )  # fmt: skip


def _prior_mixes() -> dict[Level, Mix]:
    return {Level.L1: Mix(), Level.L2: Mix()}


@dataclass(slots=True)
class History:
    """The histories of a host's models, and the mixes learned from them. Bookkeeping: no clock, no I/O."""

    models: dict[str, ModelHistory] = field(default_factory=dict)
    """At most MODELS; the one that was asked for last is the last."""
    mixes: dict[Level, Mix] = field(default_factory=_prior_mixes)

    def asked(self, name: str, now_s: float, *, hit: bool) -> ModelHistory:
        """An attach: ``hit`` when all of the model was in L1."""
        known = self.models.get(name, ModelHistory())
        self.mixes[Level.L1] = self.mixes[Level.L1].learned(known.requests, now_s)
        after = replace(known, requests=known.requests.asked(now_s))
        if not hit:
            self.mixes[Level.L2] = self.mixes[Level.L2].learned(known.misses, now_s)
            after = replace(after, misses=known.misses.asked(now_s))
        put_last(self.models, name, after, MODELS)
        return after

    def waited(self, name: str, source: Level, seconds: float) -> None:
        """A load from L2 or L3 took this long: a place in L1 would have spared it, one in L2 only what is from L3."""
        known, seconds = self.of(name), max(0.0, seconds)
        waited_l2_s = known.waited_l2_s + (seconds if source is Level.L3 else 0.0)
        after = replace(known, waited_l1_s=known.waited_l1_s + seconds, waited_l2_s=waited_l2_s)
        put_last(self.models, name, after, MODELS)

    def kept(self, name: str, level: Level) -> None:
        """It was admitted to L1 or L2, so nobody waits for that any more."""
        known = self.of(name)
        if known.waited_s(level):
            self.models[name] = (
                replace(known, waited_l1_s=0.0) if level is Level.L1 else replace(known, waited_l2_s=0.0)
            )

    def of(self, name: str) -> ModelHistory:
        """A model's history; an empty one for a model that was never asked for."""
        return self.models.get(name, ModelHistory())

    def forget(self, name: str) -> None:
        """It was removed. What it taught of the mixes stays."""
        self.models.pop(name, None)

    def to_records(self) -> dict[str, Any]:
        """Plain data: ``{"mixes": {level: weights}, "models": {name: numbers}}``."""
        return {
            "mixes": {level.value: list(mix.weights) for level, mix in self.mixes.items()},
            "models": {name: history.to_record() for name, history in self.models.items()},
        }

    @staticmethod
    def from_records(records: Mapping[str, Any]) -> History:
        """The inverse of ``to_records``. Raises KeyError, TypeError or ValueError for anything else."""
        mixes = _prior_mixes()
        for level, weights in records["mixes"].items():
            short, middle, long = map(float, weights)
            mixes[Level(level)] = Mix((short, middle, long))
        models = {name: ModelHistory.from_record(record) for name, record in records["models"].items()}
        latest = sorted(models, key=lambda name: models[name].requests.time_s)[-MODELS:]
        return History({name: models[name] for name in latest}, mixes)
