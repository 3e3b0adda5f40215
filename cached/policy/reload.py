"""How long it takes to bring a model back: learned for each hop and each model, with a prior until then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp, log
from typing import Any

from cached.level import Level
from cached.policy.demand import MODELS, put_last


@dataclass(frozen=True, slots=True)
class Hop:
    """The way from a level (L2 or L3) to L1."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, size_bytes: float) -> float:
        """For this many bytes."""
        return self.latency_s + size_bytes / self.bytes_per_s

    def times(self, factor: float) -> Hop:
        """One that takes ``factor`` as long."""
        return Hop(self.latency_s * factor, self.bytes_per_s / factor)


DEFAULT_HOPS: Mapping[Level, Hop] = {Level.L2: Hop(0.2, 2.5e9), Level.L3: Hop(1.0, 1.0e9)}
"""Before anything was measured: a local NVMe drive, and object storage over 10 Gbit/s."""

_HOP_LEARNING = 0.1
_MODEL_LEARNING = 0.3
_MODEL_TRUST = 2.0  # loads of a model after which its own figure counts as much as the hop's
_LIMIT = log(1000.0)  # one absurd measurement (a suspended machine) must not outweigh all others for ever


@dataclass(slots=True)
class HopTimes:
    """Learns from finished loads. A factor is measured over prior seconds, averaged in logarithms: 2 and 1/2 cancel.

    Bookkeeping: no clock, no I/O.
    """

    priors: Mapping[Level, Hop] = field(default_factory=lambda: DEFAULT_HOPS)
    _hops: dict[Level, float] = field(default_factory=dict)
    _models: dict[tuple[Level, str], tuple[float, float]] = field(default_factory=dict)
    """MODELS for each hop at most; the one that was measured last is the last."""

    def observe(self, source: Level, name: str, size_bytes: int, seconds: float) -> None:
        """A load of ``size_bytes`` of a model from L2 or L3 took this long. Loads of nothing teach nothing."""
        if size_bytes <= 0 or seconds <= 0:
            return
        measured = log(seconds / self.priors[source].seconds(size_bytes))
        measured = min(_LIMIT, max(-_LIMIT, measured))
        hop = self._hops.get(source)
        self._hops[source] = measured if hop is None else hop + _HOP_LEARNING * (measured - hop)
        known, count = self._models.get((source, name), (measured, 0.0))
        learned = (known + _MODEL_LEARNING * (measured - known), count + 1.0)
        put_last(self._models, (source, name), learned, MODELS * len(self.priors))

    def forget(self, name: str) -> None:
        """It was removed. What it taught of the hops stays."""
        for source in self.priors:
            self._models.pop((source, name), None)

    def hop(self, source: Level, name: str) -> Hop:
        """The hop as this model meets it: its own measurements, the more of them the more they count."""
        prior, overall = self.priors[source], self._hops.get(source)
        if overall is None:
            return prior
        own, count = self._models.get((source, name), (overall, 0.0))
        trust = count / (count + _MODEL_TRUST)
        return prior.times(exp(overall + trust * (own - overall)))

    def to_records(self) -> dict[str, Any]:
        """Plain data for the index; the priors are not in it."""
        return {
            "hops": {level.value: factor for level, factor in self._hops.items()},
            "models": [[level.value, name, own, count] for (level, name), (own, count) in self._models.items()],
        }

    @staticmethod
    def from_records(records: Mapping[str, Any], priors: Mapping[Level, Hop] = DEFAULT_HOPS) -> HopTimes:
        """The inverse of ``to_records``. Raises KeyError, TypeError or ValueError for anything else."""
        return HopTimes(
            priors,
            {Level(level): float(factor) for level, factor in records["hops"].items()},
            {
                (Level(level), name): (float(own), float(count))
                for level, name, own, count in records["models"][-MODELS * len(priors) :]
            },
        )
