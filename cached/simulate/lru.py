"""The baseline that most caches are: the least recently used goes, at both levels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Mapping

from cached.level import Level
from cached.simulate.setup import Setup
from cached.simulate.trace import Row


class LruKeeper:
    """Everything is admitted that fits when all else is gone. A hit in L1 is not a use of L2's copy."""

    def __init__(self, setup: Setup, preloaded: frozenset[str], sizes: Mapping[str, int]) -> None:
        del preloaded, sizes
        levels = {Level.L1: setup.l1_bytes} | ({Level.L2: setup.l2_bytes} if setup.preloaded is None else {})
        self._levels = {level: _Lru(capacity_bytes) for level, capacity_bytes in levels.items()}
        self.prefetched_bytes = 0

    @property
    def evictions(self) -> int:
        """See Keeper."""
        return sum(level.evictions for level in self._levels.values())

    def has(self, level: Level, model: str) -> bool:
        """See Keeper."""
        return level in self._levels and model in self._levels[level].sizes

    def forget(self, model: str) -> None:
        """See Keeper."""
        for level in self._levels.values():
            level.remove(model)

    def hit(self, row: Row) -> None:
        """See Keeper."""
        self._levels[Level.L1].touch(row.model)

    def loaded(self, row: Row, source: Level, leased: Container[str]) -> bool:
        """See Keeper."""
        if Level.L2 in self._levels:
            if source is Level.L2:
                self._levels[Level.L2].touch(row.model)
            else:
                self._levels[Level.L2].add(row, ())
        return self._levels[Level.L1].add(row, leased)


class _Lru:
    def __init__(self, capacity_bytes: int) -> None:
        self.sizes: OrderedDict[str, int] = OrderedDict()
        self.evictions = 0
        self._free_bytes = capacity_bytes

    def touch(self, model: str) -> None:
        if model in self.sizes:
            self.sizes.move_to_end(model)

    def remove(self, model: str) -> None:
        self._free_bytes += self.sizes.pop(model, 0)

    def add(self, row: Row, leased: Container[str]) -> bool:
        evictable = [model for model in self.sizes if model not in leased]
        if row.size_bytes > self._free_bytes + sum(self.sizes[model] for model in evictable):
            return False
        for model in evictable:
            if row.size_bytes <= self._free_bytes:
                break
            self.remove(model)
            self.evictions += 1
        self.sizes[row.model] = row.size_bytes
        self._free_bytes -= row.size_bytes
        return True
