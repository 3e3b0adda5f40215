"""Random histories of everything that can be asked of the engine at once, with real movers, segments and files.

Whatever the order: every byte that an attach gives is what the origin had, nothing fails for a reason of ours, and at
rest the accounts are what is there. A failure names its seed.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from cached.cache import ModelCache
from cached.cache.build import instance_of
from cached.config import load_config
from cached.errors import CachedError, InUseError
from cached.level import Level
from cached.metrics import Metrics
from cached.types import Client, Complete, Opened, Peer, RevisionState, Tier

MODELS = 5
OPERATIONS = 120
WORKERS = 6
DEADLINE_S = 60.0
EXPECTED = {"NO_ROOM", "IN_USE", "NOT_FOUND", "NO_SOURCE", "UNAVAILABLE", "OBJECT_CHANGED"}
"""What may be answered in such a history; anything else is a fault of ours."""


class History:
    """One random history against one engine; models share a file, and some are replaced at their origin under way."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.folder = folder
        self.shared = self.random.randbytes(3 << 20)
        self.digests: set[str] = set()
        self.answers: Counter[str] = Counter()
        for number in range(MODELS):
            self.write(number)
        settings = {
            "daemon.socket": str(folder / "run.sock"), "daemon.state_dir": str(folder / "state"),
            "daemon.models_dir": str(folder / "models"), "daemon.restart_grace_s": "0", "transfer.movers": "1",
            "l1.capacity": "40MiB", "l1.memory_reserve_bytes": "0B", "l2.capacity": "60MiB",
        }  # fmt: skip
        self.config = load_config(None, {}, settings).config

    def write(self, number: int) -> None:
        """A new version at the origin, complete at once for whoever looks."""
        source = self.folder / f"m{number}"
        source.mkdir(exist_ok=True)
        contents = {
            "config.json": str(self.random.random()).encode(),
            "shared.safetensors": self.shared,
            "model.safetensors": self.random.randbytes(self.random.randrange(1, 9 << 20)),
        }
        for name, content in contents.items():
            self.digests.add(hashlib.sha256(content).hexdigest())
            fresh = self.folder / "fresh"
            fresh.write_bytes(content)
            fresh.replace(source / name)

    async def run(self, cache: ModelCache) -> None:
        """Several callers at once, each doing one thing after the other."""
        await asyncio.gather(*(self.caller(cache) for _ in range(WORKERS)))

    async def caller(self, cache: ModelCache) -> None:
        for _ in range(OPERATIONS // WORKERS):
            try:
                async with asyncio.timeout(DEADLINE_S):
                    await self.operation(cache)
                self.answers["ok"] += 1
            except CachedError as error:
                if error.reason not in EXPECTED:
                    raise
                self.answers[error.reason] += 1
            self.check_list(cache)

    def check_list(self, cache: ModelCache) -> None:
        """What a list keeps from the one before is what it would say afresh; values may be a second old."""
        for summary in cache.list_models():
            afresh = cache.describe(summary.name).summary
            if afresh.state is RevisionState.PULLING:
                continue  # a list says what is there, a description what may be used
            assert replace(summary, worth_s=0.0) == replace(afresh, worth_s=0.0)

    async def operation(self, cache: ModelCache) -> None:
        number = self.random.randrange(MODELS)
        name, source = f"m{number}", f"file://{self.folder}/m{number}"
        match self.random.choices(range(7), (25, 40, 12, 4, 8, 5, 6))[0]:
            case 0:
                level, wait = self.random.choice([Level.L1, Level.L2]), self.random.random() < 0.8
                async for _ in cache.pull(name, source=source, level=level, wait=wait):
                    pass
            case 1:
                await self.attach(cache, name, source)
            case 2:
                await cache.evict(name, self.random.choice([Level.L1, Level.L2, None]))
            case 3:
                await cache.remove(name)
            case 4:
                await cache.set_tier(name, self.random.choice(list(Tier)))
            case 5:
                async for progress in cache.verify(None, repair=True):
                    assert progress.damage is None, progress.damage
            case 6:
                self.write(number)

    async def attach(self, cache: ModelCache, name: str, source: str) -> None:
        """Takes a lease, waits until it is complete, and proves every byte."""
        async with await cache.attach(name, source=source, client=Client("history", 1)) as attachment:
            opened = None
            async for event in attachment.events():
                if isinstance(event, Opened):
                    opened = event
                if isinstance(event, Complete) or (isinstance(event, Opened) and event.complete):
                    break
            assert opened is not None
            indices = [file.index for file in opened.files]
            descriptors = cache.open_descriptors(opened.token, indices, Peer(1, 0, 0))
            try:
                for file, descriptor in zip(opened.files, descriptors, strict=True):
                    content = os.pread(descriptor, file.size_bytes + 1, 0)
                    assert hashlib.sha256(content).hexdigest() in self.digests, f"{name}: {file}"
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    async def rest(self, cache: ModelCache) -> None:
        """Until nothing moves; then the accounts must agree."""
        async with asyncio.timeout(DEADLINE_S):
            for summary in cache.list_models():
                await cache.set_tier(summary.name, Tier.AUTO)
            while cache.stats().active_load_count or any(level.reserved_bytes for level in cache.stats().levels):
                await asyncio.sleep(0.05)
        cache.check_invariants()

    async def remove_all(self, cache: ModelCache) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while models := cache.list_models():
                for summary in models:
                    try:
                        await cache.remove(summary.name)
                    except InUseError:
                        continue  # a copy to L2 is under way
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("seed", [1, 2])
async def test_random_histories_serve_only_true_bytes_and_leave_nothing(tmp_path, seed):
    history = History(tmp_path, seed)
    for _ in range(2):
        cache = ModelCache.build(history.config, Metrics())
        await cache.start()
        try:
            await history.run(cache)
            await history.rest(cache)
        finally:
            await cache.close()
    cache = ModelCache.build(history.config, Metrics())
    await cache.start()
    try:
        await history.remove_all(cache)
        assert [level.used_bytes - level.pool_bytes - level.withdrawn_bytes for level in cache.stats().levels] == [0, 0]
    finally:
        await cache.close()
    assert history.answers["ok"] > OPERATIONS
    assert [name for name in os.listdir("/dev/shm") if instance_of(str(tmp_path / "state")) in name] == []
    assert [path.name for path in (tmp_path / "state" / "l2").rglob("*") if path.is_file()] == ["FORMAT"]
    assert list((tmp_path / "state" / "journals").iterdir()) == []
