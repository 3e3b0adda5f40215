"""How fast an origin's bytes come into shared memory: the daemon's own planner, lanes and movers, bounded in bytes."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from cached.cache.build import new_lanes, new_movers
from cached.cli.measure.cpu import tree_cpu_s
from cached.cli.measure.scratch import Span, scratch_segment
from cached.clock import SystemClock
from cached.config import Config
from cached.errors import NotFoundError
from cached.levels.base import FileRef
from cached.origins.base import OriginObject, OriginSpec
from cached.transfer.fill import Fill, OriginSource, RetryPolicy, Runner, Sources
from cached.transfer.jobs import Clear, Listing, ListObjects, Prepare, StatObjects
from cached.transfer.pool import MoverPool
from cached.units import CHUNK_BYTES, chunk_count, chunk_length

_WARM_UP_CHUNKS = 4
_END_S = 2.0


@dataclass(frozen=True, slots=True)
class Fetched:
    """Chunks of one object, into memory that had its pages. ``list_s``: how long the listing took."""

    item: OriginObject
    list_s: float
    span: Span


async def fetch(config: Config, spec: OriginSpec, size_bytes: int) -> Fetched:
    """Brings the first ``size_bytes`` of the origin's largest object, in whole chunks; every chunk is checksummed.

    Movers are started and connected before the clock runs, by the chunks before those that are measured. When it is
    cancelled, movers and segment are gone. Raises the origin's errors, NoRoomError, NotFoundError.
    """
    clock = SystemClock()
    movers = new_movers(config, clock)
    lanes = new_lanes(config, clock, movers)
    try:
        await movers.run(Prepare(spec))
        began_s = time.perf_counter()
        listing = await movers.run(ListObjects(spec))
        list_s = time.perf_counter() - began_s
        item = await _largest(movers, spec, listing)
        with scratch_segment(item.size_bytes, config.l1.path, sparse=True) as target:
            return Fetched(item, list_s, await _chunks(config, lanes, movers, spec, item, target, size_bytes))
    finally:
        await movers.close(_END_S)


async def _largest(movers: MoverPool, spec: OriginSpec, listing: object) -> OriginObject:
    assert isinstance(listing, Listing)  # noqa: S101 - what ListObjects answers
    largest = max(listing.items, key=lambda item: item.size_bytes, default=None)
    if largest is None or not largest.size_bytes:
        raise NotFoundError(f"{spec.uri} has no object with bytes in it", uri=spec.uri, path="")
    described = await movers.run(StatObjects(spec, (largest.path,)))
    assert isinstance(described, Listing)  # noqa: S101 - what StatObjects answers
    return described.items[0]


async def _chunks(
    config: Config,
    lanes: Runner,
    movers: MoverPool,
    spec: OriginSpec,
    item: OriginObject,
    target: FileRef,
    size_bytes: int,
) -> Span:
    count = min(chunk_count(item.size_bytes), max(1, size_bytes // CHUNK_BYTES))
    warm_up = min(_WARM_UP_CHUNKS, count - 1)
    for index in range(count):
        await movers.run(Clear(target, index * CHUNK_BYTES, chunk_length(item.size_bytes, index)))
    source = Sources(origin=OriginSource(spec, item))

    async def bring(chunks: range) -> None:
        await Fill(
            key="measure",
            runner=lanes,
            clock=SystemClock(),
            target=target,
            sources=source,
            retry=RetryPolicy(max_attempts=config.transfer.max_attempts, budget_s=config.transfer.retry_budget_s),
            width=config.transfer.max_ranges,
            chunks=frozenset(chunks),
        ).run()

    await bring(range(warm_up))
    measured = range(warm_up, count)
    cpu_s, began_s = tree_cpu_s(os.getpid()), time.perf_counter()
    await bring(measured)
    seconds = time.perf_counter() - began_s
    moved_bytes = sum(chunk_length(item.size_bytes, index) for index in measured)
    return Span(moved_bytes, seconds, tree_cpu_s(os.getpid()) - cpu_s)
