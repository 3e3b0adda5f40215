"""What a revision is worth at a level: seconds of waiting that its being there saves within the horizon.

Worth = requests to expect x seconds to bring back what its going would free, from where the bytes would come *now*.
Who goes first is a matter of worth for each byte that is freed; who is admitted, of worth alone.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from cached.level import Level
from cached.policy.demand import HALF_LIVES_S, HORIZON_S, Demand
from cached.policy.snapshot import LevelFacts, RevisionFacts
from cached.types import Tier
from cached.units import format_duration

WARM_FACTOR = 4.0
"""A request for a warm model counts as this many."""
WARM_FLOOR = HORIZON_S / HALF_LIVES_S[-1]
"""Requests to expect of a warm model at least: to say *warm* is to say that it is asked for once a day."""
_FOR_EVER_S = 10 * 365 * 86_400.0
_MOST_PRIORITY = 200  # twice as much for each step; beyond this a float would not do, and nobody can tell


class Standing(IntEnum):
    """Comes before worth: whoever stands lower goes first, and never displaces one who stands higher."""

    STALE = 0  # not the model's current revision
    COLD = 1
    ORDINARY = 2  # warm and auto: worth decides
    KEPT = 3  # within the keep-alive of a lease, or the last copy of what no origin has
    HELD = 4  # hot or pinned: never a victim, always admitted


class Valued(NamedTuple):
    """A revision at a level with what it is worth there. ``own_bytes``: what it takes up, shared blobs divided."""

    facts: RevisionFacts
    standing: Standing
    worth_s: float
    own_bytes: float
    reload_s: float

    @property
    def order(self) -> tuple[int, float, int, float, str, str]:
        """Least worth keeping first; names break ties, so that a plan can be repeated."""
        facts = self.facts
        each_byte = self.worth_s / self.own_bytes if self.own_bytes else 0.0
        return (self.standing, each_byte, facts.priority, facts.last_used_s, facts.name, facts.revision)


class Valuer:
    """Values revisions at one level and one moment. ``at_l2``: the blobs that L2 has."""

    def __init__(self, level: LevelFacts, at_l2: Callable[[RevisionFacts], bool], now_s: float, time_s: float) -> None:
        self.level = level.level
        self._factors = level.mix.factors()
        self._at_l2 = at_l2
        self._now_s = now_s
        self._time_s = time_s

    def value(self, facts: RevisionFacts, own_bytes: float) -> Valued:
        """A revision that is at the level."""
        in_l1 = self.level is Level.L1
        return self._valued(facts, own_bytes, in_l2=in_l1 and self._at_l2(facts))

    def value_newcomer(self, facts: RevisionFacts, size_bytes: int) -> Valued:
        """One that wants to be there."""
        return self._valued(facts, float(size_bytes), in_l2=bool(facts.l2_blobs))

    def _valued(self, facts: RevisionFacts, own_bytes: float, *, in_l2: bool) -> Valued:
        reload_s = self._reload_s(facts, own_bytes, in_l2=in_l2)
        standing = self._standing(facts, in_l2=in_l2)
        return Valued(facts, standing, self._expected(facts) * reload_s, own_bytes, reload_s)

    def _reload_s(self, facts: RevisionFacts, size_bytes: float, *, in_l2: bool) -> float:
        if self.level is Level.L1:
            return (facts.from_l2 if in_l2 else facts.from_l3).seconds(size_bytes)
        # A copy in L2 spares the difference only: what is left is paid with it, too.
        return max(0.0, facts.from_l3.seconds(size_bytes) - facts.from_l2.seconds(size_bytes))

    def _expected(self, facts: RevisionFacts) -> float:
        """Requests to expect, by tier and priority."""
        demand: Demand = facts.requests if self.level is Level.L1 else facts.misses
        short, middle, long = demand.at(self._time_s)
        by_short, by_middle, by_long = self._factors
        expected = by_short * short + by_middle * middle + by_long * long
        if facts.tier is Tier.WARM:
            expected = max(expected, WARM_FLOOR) * WARM_FACTOR
        if facts.priority:
            expected *= 2.0 ** min(facts.priority, _MOST_PRIORITY)
        return expected

    def _standing(self, facts: RevisionFacts, *, in_l2: bool) -> Standing:
        if not facts.current:
            return Standing.STALE
        if facts.pinned or facts.tier is Tier.HOT:
            return Standing.HELD
        last_copy = not facts.has_origin and not (in_l2 and self.level is Level.L1)
        if last_copy or facts.keep_until_s > self._now_s:
            return Standing.KEPT
        return Standing.COLD if facts.tier is Tier.COLD else Standing.ORDINARY


def spell(seconds: float) -> str:
    """A duration for people, whatever its size: a model that was never used, or one of very high priority."""
    return format_duration(seconds) if seconds < _FOR_EVER_S else "years"
