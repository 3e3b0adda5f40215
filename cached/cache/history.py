"""What the policy remembers of this host's models: requests, waiting, and how long each hop takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog

from cached.cache.registry import Model, Registry
from cached.clock import Clock
from cached.level import Level
from cached.policy import History, HopTimes, Mix, ModelHistory
from cached.policy.reload import Hop

_log = structlog.get_logger(__name__)

_UNKNOWN_BYTES = 16 * 10**9
"""What a model is taken for whose size nothing says."""

_REQUESTS, _HOPS = "requests", "hops"
"""Names of its records in the index."""


class UseHistory:
    """Loop only. Lives in memory, and is written to the index now and then: a crash costs the last half minute.

    Demand is counted in Unix time, since it outlives restarts; a clock that is set back makes it stand still.
    """

    def __init__(self, registry: Registry, clock: Clock) -> None:
        self._registry = registry
        self._clock = clock
        self._requests = History()
        self._hops = HopTimes()
        self._changed = False

    def load(self) -> None:
        """Takes up what earlier daemons wrote; what cannot be read is begun anew, and logged."""
        for name, read in ((_REQUESTS, self._read_requests), (_HOPS, self._read_hops)):
            record = self._registry.index.policy(name)
            if record is None:
                continue
            try:
                read(record)
            except (KeyError, TypeError, ValueError) as error:
                _log.warning("history.unreadable", record=name, cause=repr(error))

    def write(self) -> None:
        """Makes it durable, if anything changed."""
        if self._changed:
            self._changed = False
            self._registry.write(self._put)

    def _put(self) -> None:
        index = self._registry.index
        with index.transact():
            index.put_policy(_REQUESTS, self._requests.to_records())
            index.put_policy(_HOPS, self._hops.to_records())

    def asked(self, name: str, *, hit: bool) -> None:
        """An attach; ``hit`` when all of the model was in L1."""
        self._requests.asked(name, self._clock.wall_s(), hit=hit)
        self._changed = True

    def loaded(self, name: str, source: Level, size_bytes: int, seconds: float, *, somebody_waited: bool) -> None:
        """A load to L1 took this long, most of it from ``source``."""
        if source is not Level.L1:
            self._hops.observe(source, name, size_bytes, seconds)
            if somebody_waited:
                self._requests.waited(name, source, seconds)
            self._changed = True

    def kept(self, name: str, level: Level) -> None:
        """It was given a place at a level."""
        self._requests.kept(name, level)
        self._changed = True

    def forget(self, name: str) -> None:
        """A model was removed."""
        self._requests.forget(name)
        self._hops.forget(name)
        self._changed = True

    def of(self, name: str) -> ModelHistory:
        """What is known of a model; nothing yet of one that was never asked for."""
        return self._requests.of(name)

    def mix(self, level: Level) -> Mix:
        """What was learned of how requests at a level follow one another."""
        return self._requests.mixes[level]

    def hop(self, source: Level, name: str) -> Hop:
        """How long the way from L2 or L3 is for a model."""
        return self._hops.hop(source, name)

    def load_s(self, model: Model) -> float:
        """What bringing all of a model to L1 is expected to take, from where its bytes are now."""
        here = model.current is not None and self._registry.is_here(model.current)
        return self.hop(Level.L2 if here else Level.L3, model.name).seconds(model.size_bytes or _UNKNOWN_BYTES)

    def _read_requests(self, record: Mapping[str, Any]) -> None:
        self._requests = History.from_records(record)

    def _read_hops(self, record: Mapping[str, Any]) -> None:
        self._hops = HopTimes.from_records(record)
