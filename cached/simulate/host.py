"""What every simulated policy shares: leases, transient segments, and where a model's bytes come from."""

from __future__ import annotations

from collections.abc import Container
from typing import Protocol

from cached.level import Level
from cached.simulate.setup import Setup
from cached.simulate.trace import Row


class Keeper(Protocol):
    """A policy's own state of both levels. Called by Host in order of time."""

    prefetched_bytes: int

    @property
    def evictions(self) -> int:
        """Models that went from either level to make room."""
        ...

    def has(self, level: Level, model: str) -> bool:
        """True when all of the model is there."""
        ...

    def forget(self, model: str) -> None:
        """Its content is another now: what is here of it is of no use."""
        ...

    def hit(self, row: Row) -> None:
        """An attach found it in L1."""
        ...

    def loaded(self, row: Row, source: Level, leased: Container[str]) -> bool:
        """It was brought from L2 or L3: keeps it where it likes, and says whether L1 is among it.

        ``leased``: the models that may not be evicted from L1 now.
        """
        ...


class Host:
    """Plays a trace. A model that is not admitted to L1 is there, beside the capacity, until its last lease ends."""

    def __init__(self, setup: Setup, keeper: Keeper, preloaded: Container[str]) -> None:
        self._setup = setup
        self._keeper = keeper
        self._preloaded = preloaded
        self._sizes: dict[str, int] = {}
        self._leased: dict[str, float] = {}
        self._transient: set[str] = set()

    def attach(self, row: Row) -> Level:
        """Serves a row; from which level."""
        self._end_leases(row.time_s)
        keeper, model = self._keeper, row.model
        if self._sizes.setdefault(model, row.size_bytes) != row.size_bytes:
            self._sizes[model] = row.size_bytes
            keeper.forget(model)
            self._transient.discard(model)
        source = self._source(model)
        if source is Level.L1:
            keeper.hit(row)
        elif not keeper.loaded(row, source, self._leased.keys()) and row.lease_s > 0:
            self._transient.add(model)
        if row.lease_s > 0:
            self._leased[model] = max(self._leased.get(model, 0.0), row.time_s + row.lease_s)
        return source

    def _source(self, model: str) -> Level:
        if model in self._transient or self._keeper.has(Level.L1, model):
            return Level.L1
        in_l2 = model in self._preloaded if self._setup.preloaded is not None else self._keeper.has(Level.L2, model)
        return Level.L2 if in_l2 else Level.L3

    def _end_leases(self, now_s: float) -> None:
        for model in [model for model, end_s in self._leased.items() if end_s <= now_s]:
            del self._leased[model]
            self._transient.discard(model)
