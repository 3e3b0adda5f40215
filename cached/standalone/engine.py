"""What a standalone pull is made of: the daemon's movers, planner and resolver, without levels and index."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog

from cached import __version__
from cached.cache.artifacts import destination_of
from cached.cache.build import auto_movers, new_lanes
from cached.cache.model import Model
from cached.cache.resolver import Resolver
from cached.catalog_file import CatalogModel
from cached.clock import Clock, SystemClock
from cached.config import Config, origin_defaults
from cached.errors import CachedError, InvalidRequestError
from cached.index import ModelRecord
from cached.manifest import Manifest
from cached.metrics import Metrics
from cached.refs import Ref
from cached.transfer.chain import Chains
from cached.transfer.fill import RetryPolicy, Runner
from cached.transfer.pool import HEDGES_PER_MOVER, MoverPool
from cached.units import CHUNK_BYTES, MIB, format_size

_log = structlog.get_logger(__name__)

_CLOSE_S = 5.0
_LOCAL_THREADS = 2
_PROCESS_BYTES = 96 * MIB
"""What a process takes beside its buffers: this one, and each mover."""
MIN_MEMORY_BYTES = 2 * _PROCESS_BYTES + (_LOCAL_THREADS + HEDGES_PER_MOVER + 2) * CHUNK_BYTES


class KnownModels:
    """What is said of models: the catalog, and names that were asked for. There is no index."""

    def __init__(self, catalog: Mapping[str, CatalogModel]) -> None:
        self._models = {name: Model(ModelRecord(name), entry) for name, entry in catalog.items()}

    def find(self, ref: Ref) -> Model | None:
        """See Models."""
        return self._models.get(ref.name)

    def known(self, name: str) -> Model:
        """See Models."""
        return self._models.setdefault(name, Model(ModelRecord(name)))

    def is_here(self, _manifest: Manifest) -> bool:
        """See Models. There is no level, so nothing is."""
        return False


@dataclass(frozen=True, slots=True)
class Tools:
    """One of each."""

    runner: Runner
    clock: Clock
    retry: RetryPolicy
    metrics: Metrics
    registry: KnownModels
    resolver: Resolver
    width: int
    """Chunks of one file in flight at the same time."""


@dataclass(frozen=True, slots=True)
class _Asking:
    """What the resolver needs."""

    runner: Runner
    clock: Clock
    retry: RetryPolicy
    metrics: Metrics
    registry: KnownModels


class _Told:
    """Events of a chain of origins, in the log: nobody watches a standalone pull but who started it."""

    def emit(self, kind: str, message: str, *, name: str = "", revision: str = "", **fields: object) -> None:
        """See chain.Events."""
        _log.warning(kind, message=message, model=name, revision=revision, **fields)


def _report(kind: str, error: CachedError, message: str, /, **fields: object) -> None:
    """Likewise. See chain.Report."""
    _log.warning(kind, message=message, reason=error.reason, chain=error.chain, **fields)


@asynccontextmanager
async def open_tools(
    config: Config, catalog: Mapping[str, CatalogModel], *, max_memory_bytes: int
) -> AsyncIterator[Tools]:
    """Movers are started on demand, and have ended when the context is left. Loop only.

    All processes together stay below ``max_memory_bytes``: every thread of a mover has one buffer of 16 MiB, so that
    is what bounds their number. Raises InvalidRequestError if it is less than MIN_MEMORY_BYTES.
    """
    metrics, clock = Metrics(__version__), SystemClock()
    movers, ranges = sized(config, max_memory_bytes)
    pool = MoverPool(
        movers=movers,
        threads=_LOCAL_THREADS,
        ranges=ranges,
        nice=config.transfer.nice,
        idle_timeout_s=config.transfer.idle_timeout_s,
        clock=clock,
        on_death=lambda error: _log.error("mover.died", error=error.message, **error.fields),
    )
    runner = Chains(new_lanes(config, clock, pool, max_ranges=ranges), clock, events=_Told(), report=_report)
    retry = RetryPolicy(max_attempts=config.transfer.max_attempts, budget_s=config.transfer.retry_budget_s)
    registry = KnownModels(catalog)
    asking = _Asking(runner, clock, retry, metrics, registry)
    resolver = Resolver(asking, origin_defaults(config), destination_of(config.artifacts))
    try:
        yield Tools(runner, clock, retry, metrics, registry, resolver, width=ranges + _LOCAL_THREADS)
    finally:
        await resolver.close()
        await runner.close()
        await pool.close(_CLOSE_S)


def sized(config: Config, max_memory_bytes: int) -> tuple[int, int]:
    """How many movers, and how many ranges in flight from an origin, fit into this much memory."""
    if max_memory_bytes < MIN_MEMORY_BYTES:
        raise InvalidRequestError(
            f"a pull needs {format_size(MIN_MEMORY_BYTES)} of memory at least, not {format_size(max_memory_bytes)}",
            hint="give it more with --max-memory",
            value=max_memory_bytes,
        )
    wanted = config.transfer.movers or auto_movers()
    for movers in range(wanted, 0, -1):
        buffers = (max_memory_bytes - (1 + movers) * _PROCESS_BYTES) // CHUNK_BYTES
        ranges = buffers // movers - _LOCAL_THREADS - HEDGES_PER_MOVER
        if ranges >= _LOCAL_THREADS:
            return movers, min(movers * ranges, config.transfer.max_ranges)
    raise AssertionError(max_memory_bytes)
