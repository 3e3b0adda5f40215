"""An engine in the test's own process, whose clock is the test's, with models in folders."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from cached.cache import ModelCache
from cached.catalog_file import parse_catalog
from cached.config import load_config
from cached.metrics import Metrics
from cached.types import ModelDetail, PullPhase
from tests.integration.harness import segments_of
from tests.integration.support import MB, safetensors

BERLIN = ZoneInfo("Europe/Berlin")
DEADLINE_S = 30.0
_ROUNDS = ("upkeep", "timed_pulls", "foresight", "pool_keeper")
"""The tasks that look at the host again and again."""
_made: list[Host] = []


def berlin(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN)


class MovedClock:
    """The machine's clock, put forward (``pass_by``, ``go_to``), or with another time of day (``jump_to``)."""

    def __init__(self, text: str) -> None:
        self._wall_s = berlin(text).timestamp() - time.monotonic()
        self._ahead_s = 0.0

    def monotonic_s(self) -> float:
        return time.monotonic() + self._ahead_s

    def wall_s(self) -> float:
        return time.monotonic() + self._wall_s

    async def sleep(self, delay_s: float) -> None:
        """Never long: what is looked at every second is looked at all the time."""
        await asyncio.sleep(min(delay_s, 0.02))

    def pass_by(self, seconds: float) -> None:
        self._ahead_s += seconds
        self._wall_s += seconds

    def go_to(self, text: str) -> None:
        self.pass_by(berlin(text).timestamp() - self.wall_s())

    def jump_to(self, text: str) -> None:
        self._wall_s += berlin(text).timestamp() - self.wall_s()


class Host:
    """Engines one after the other on the same state, with models in folders."""

    def __init__(self, folder: Path, clock: MovedClock, **settings: str) -> None:
        self.folder = folder
        self.clock = clock
        self.models: dict[str, Any] = {}
        self.tenants: dict[str, Any] = {}
        values = {
            "daemon.socket": str(folder / "run.sock"), "daemon.state_dir": str(folder / "state"),
            "daemon.models_dir": str(folder / "models"), "daemon.restart_grace_s": "0", "transfer.movers": "1",
            "l1.capacity": "64MiB", "l1.memory_reserve_bytes": "0B", "l1.free_ahead": "1%", "l2.capacity": "200MiB",
        }  # fmt: skip
        self.config = load_config(None, {}, values | {key.replace("__", "."): v for key, v in settings.items()}).config
        _made.append(self)

    def add(self, name: str, size_bytes: int = MB, **entry: Any) -> None:
        source = self.folder / f"origin-{name}"
        source.mkdir()
        (source / "model.safetensors").write_bytes(safetensors(size_bytes, len(self.models) + 1))
        self.models[name] = {"source": f"file://{source}"} | entry

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[ModelCache]:
        cache = ModelCache.build(self.config, Metrics(), self.clock)
        catalog = json.dumps({"models": self.models, "tenants": self.tenants})
        cache.set_catalog(parse_catalog(catalog, "json", "catalog"))
        await cache.start()
        try:
            yield cache
            await until(lambda: not cache.stats().active_load_count, "rest")
            cache.check_invariants()
        finally:
            await cache.close()


def remove_segments() -> None:
    """Of all hosts since the last time: engines leave them to the next one on the same state."""
    while _made:
        for segment in segments_of(_made.pop().config.daemon.state_dir):
            segment.unlink(missing_ok=True)


async def until(condition: Callable[[], bool], what: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.01)


async def ticks(cache: ModelCache, count: int = 3) -> None:
    """Until the engine has looked at everything some more times."""
    clock, seen = cache._parts.services.clock, Counter[str]()
    asked = clock.sleep

    async def counted(delay_s: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        seen[task.get_name()] += 1
        await asked(delay_s)

    clock.sleep = counted  # type: ignore[method-assign]
    try:
        # The first sleep that is seen ends a round that may have begun before.
        await until(lambda: all(seen[name] > count for name in _ROUNDS), "the engine's rounds")
    finally:
        del clock.sleep


def shown(cache: ModelCache, name: str) -> ModelDetail:
    return cache.describe(name)


def in_l1(cache: ModelCache, name: str) -> bool:
    summary = shown(cache, name).summary
    return 0 < summary.size_bytes == summary.l1_bytes


async def pull(cache: ModelCache, name: str, **options: Any) -> list[PullPhase]:
    return [progress.phase async for progress in cache.pull(name, **options)]


def kinds(cache: ModelCache) -> list[str]:
    return [event.kind for event in cache._parts.services.events._recent]
