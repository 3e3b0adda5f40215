"""The host that is simulated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from zlib import crc32

from cached.level import Level
from cached.policy import Hop
from cached.types import Tier


@dataclass(frozen=True, slots=True)
class Standing:
    """What an operator said of a model."""

    tier: Tier = Tier.AUTO
    priority: int = 0
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Setup:
    """Capacities in bytes, and the ways from L2 and L3 to L1.

    ``preloaded``: with a fraction, that share of the models is in L2 for good, nothing else ever is, and ``l2_bytes``
    does not matter. ``standings``: tiers and priorities, which only the daemon's own policy heeds.
    """

    l1_bytes: int
    l2_bytes: int
    from_l2: Hop
    from_l3: Hop
    preloaded: float | None = None
    standings: Mapping[str, Standing] = field(default_factory=dict)

    def seconds(self, source: Level, size_bytes: int) -> float:
        """What an attach waits for a model that comes from there."""
        if source is Level.L1:
            return 0.0
        return (self.from_l2 if source is Level.L2 else self.from_l3).seconds(size_bytes)

    def preloaded_of(self, models: Iterable[str]) -> frozenset[str]:
        """The models that are in L2 for good: by the CRC-32 of their name, so always the same ones."""
        if self.preloaded is None:
            return frozenset()
        return frozenset(model for model in models if crc32(model.encode()) % 100 < round(self.preloaded * 100))
