"""The baseline of the literature: Greedy-Dual-Size-Frequency with the true costs, at both levels."""

from __future__ import annotations

from collections.abc import Container, Mapping

from cached.level import Level
from cached.simulate.setup import Setup
from cached.simulate.trace import Row


class GdsfKeeper:
    """Priority = the level's age + uses since it came x seconds to bring it back / bytes; the least goes.

    The age is the priority of the last that went. What was counted of a model is lost when it goes.
    """

    def __init__(self, setup: Setup, preloaded: frozenset[str], sizes: Mapping[str, int]) -> None:
        del sizes
        self._setup = setup
        self._preloaded = preloaded
        self._l1 = _Gdsf(setup.l1_bytes)
        self._l2 = None if setup.preloaded is not None else _Gdsf(setup.l2_bytes)
        self.prefetched_bytes = 0

    @property
    def evictions(self) -> int:
        """See Keeper."""
        return self._l1.evictions + (self._l2.evictions if self._l2 else 0)

    def has(self, level: Level, model: str) -> bool:
        """See Keeper."""
        kept = self._l1 if level is Level.L1 else self._l2
        return kept is not None and model in kept.priorities

    def forget(self, model: str) -> None:
        """See Keeper."""
        self._l1.remove(model)
        if self._l2:
            self._l2.remove(model)

    def hit(self, row: Row) -> None:
        """See Keeper."""
        self._l1.use(row, self._reload_s(row))

    def loaded(self, row: Row, source: Level, leased: Container[str]) -> bool:
        """See Keeper."""
        from_l3_s = self._setup.seconds(Level.L3, row.size_bytes)
        if self._l2 is not None:
            if source is Level.L2:
                self._l2.use(row, from_l3_s)
            else:
                self._l2.add(row, from_l3_s, ())
        return self._l1.add(row, self._reload_s(row), leased)

    def _reload_s(self, row: Row) -> float:
        in_l2 = self.has(Level.L2, row.model) or row.model in self._preloaded
        return self._setup.seconds(Level.L2 if in_l2 else Level.L3, row.size_bytes)


class _Gdsf:
    def __init__(self, capacity_bytes: int) -> None:
        self.priorities: dict[str, float] = {}
        self.evictions = 0
        self._sizes: dict[str, int] = {}
        self._uses: dict[str, int] = {}
        self._age = 0.0
        self._free_bytes = capacity_bytes

    def use(self, row: Row, reload_s: float) -> None:
        if row.model in self.priorities:
            self._uses[row.model] += 1
            self._prioritise(row, reload_s)

    def _prioritise(self, row: Row, reload_s: float) -> None:
        self.priorities[row.model] = self._age + self._uses[row.model] * reload_s / row.size_bytes

    def remove(self, model: str) -> None:
        if self.priorities.pop(model, None) is not None:
            self._free_bytes += self._sizes.pop(model)
            del self._uses[model]

    def add(self, row: Row, reload_s: float, leased: Container[str]) -> bool:
        evictable = sorted((model for model in self.priorities if model not in leased), key=self.priorities.__getitem__)
        if row.size_bytes > self._free_bytes + sum(self._sizes[model] for model in evictable):
            return False
        for model in evictable:
            if row.size_bytes <= self._free_bytes:
                break
            self._age = self.priorities[model]
            self.remove(model)
            self.evictions += 1
        self._sizes[row.model], self._uses[row.model] = row.size_bytes, 1
        self._free_bytes -= row.size_bytes
        self._prioritise(row, reload_s)
        return True
