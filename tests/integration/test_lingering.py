"""Memory that was evicted and that somebody still maps, and what is asked while loads wait for room."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

from cached.cache.evictor import _UNMAP_POLL_S, _UNMAP_WAIT_S
from cached.cache.load import Chosen, Load
from cached.errors import LevelError
from cached.level import Level
from cached.manifest import Manifest
from cached.overview import Limits, MovePhase
from cached.refs import Ref
from cached.types import Selection
from tests.integration.hosts import Host, MovedClock, in_l1, pull, until
from tests.integration.support import MB


class PollingClock(MovedClock):
    """Counts looks at memory that is not free yet; each takes its time at once."""

    def __init__(self) -> None:
        super().__init__("2026-11-21 12:00")
        self.looks = 0

    async def sleep(self, delay_s: float) -> None:
        if delay_s == _UNMAP_POLL_S:
            self.looks += 1
            self.pass_by(delay_s)
        await super().sleep(delay_s)


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[None]:
    """As a worker that reads on from what it has given back."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    with mapping:
        yield


async def test_loads_wait_once_for_memory_that_stays_mapped_and_not_where_it_is_not_enough(tmp_path: Path) -> None:
    clock = PollingClock()
    host = Host(tmp_path, clock, l1__capacity="64MB", l1__pool_bytes="0B", l1__free_ahead="0B")
    host.add("held", 4 * MB)
    for name in "abcde":
        host.add(name, 29 * MB)
    for name in ("small", "smaller"):
        host.add(name, 3 * MB)  # of the 2 MB that are free, and the 4 that are mapped
    async with host.run() as cache:
        await pull(cache, "held")
        storage = cache._parts.services.storage
        (digest,) = (file.sha256 for file in cache.describe("held").files)
        with mapped(Path(storage.l1.blob(digest).path)):
            await cache.evict("held", Level.L1)
            await pull(cache, "a")
            await pull(cache, "b")
            assert storage.withdrawn_bytes(Level.L1) >= 4 * MB
            assert not clock.looks
            await pull(cache, "c")
            assert not clock.looks, "4 MB do not make room for 29"
            await pull(cache, "small")
            looked = clock.looks
            assert 0 < looked <= 2 * _UNMAP_WAIT_S / _UNMAP_POLL_S
            assert in_l1(cache, "small")
            for name in ("smaller", "d", "e"):
                await pull(cache, name)
                assert in_l1(cache, name)
            assert clock.looks == looked, "what was waited for in vain is not waited for again"
            assert storage.withdrawn_bytes(Level.L1) >= 4 * MB


async def test_an_overview_is_given_while_a_load_waits_for_its_turn(tmp_path: Path) -> None:
    host = Host(tmp_path, MovedClock("2026-11-21 12:00"))
    host.add("m")
    async with host.run() as cache:
        await pull(cache, "m")
        await cache.evict("m", None)
        parts = cache._parts
        async with parts.evictor.opening:
            waiting = asyncio.create_task(pull(cache, "m"))
            await until(lambda: bool(parts.loader.loads), "the load to begin")
            (move,) = cache.overview(Limits()).moves
            assert (move.name, move.phase) == ("m", MovePhase.WAITING)
        await waiting
        assert in_l1(cache, "m")


@pytest.mark.parametrize("is_read", [True, False])
async def test_a_model_that_is_removed_while_a_part_of_it_is_chosen_is_brought_again(
    tmp_path: Path, is_read: bool
) -> None:
    """Whether its heads were read just before, or not any more."""
    host = Host(tmp_path, MovedClock("2026-11-21 12:00"))
    host.add("m")
    async with host.run() as cache:
        await pull(cache, "m")
        pulls, contents = cache._parts.pulls, cache._parts.contents
        choose = pulls.choose

        async def removed_meanwhile(manifest: Manifest, selection: Selection) -> Chosen:
            chosen = await choose(manifest, selection)
            await cache.remove("m")
            if not is_read:
                raise LevelError("l1: a blob does not exist", level=Level.L1, path="blob", cause="gone")
            return chosen

        pulls.choose = removed_meanwhile  # type: ignore[method-assign]
        found = await contents.find(Ref("m"), "", may_load=True, selection=Selection(("t0*",)))
        assert isinstance(found.source, Load)
        await found.source.until_ready()
