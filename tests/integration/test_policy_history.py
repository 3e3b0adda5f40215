"""Two hours of a host in some seconds: a real engine with real bytes, against a plain model of what must hold.

The clock is put forward between the steps, about a thousand times as fast as real time; loads take the time they take.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from cached.cache import ModelCache
from cached.errors import CachedError, InUseError, NoRoomError
from cached.level import Level
from cached.types import Complete, Tier
from tests.integration.hosts import Host, MovedClock, pull, ticks, until
from tests.integration.support import MB

HOURS_S = 2 * 3600.0
STEPS = 120
MODELS = {f"m{number}": size for number, size in enumerate((1, 1, 2, 2, 3, 4, 6, 8))}
"""Name → size in MB; L1 has room for about half of them."""
DEEDS = {"attach": 10, "release": 8, "pull": 2, "pin": 1, "unpin": 2, "hot": 1, "auto": 2, "evict": 1}
TENANT = ("m2", "m3", "m4")
TENANT_BYTES = 5 * MB + 500_000
CAPACITY_BYTES = 14 * MB


class Reference:
    """What is held, pinned and hot, and how often each model was asked for: kept beside the engine, by plain means."""

    def __init__(self) -> None:
        self.held: Counter[str] = Counter()
        self.pinned: set[str] = set()
        self.hot: set[str] = set()
        self.attaches = 0

    def must_stay(self, name: str) -> bool:
        return bool(self.held[name]) or name in self.pinned

    def check(self, cache: ModelCache) -> None:
        """After every step, with nothing in flight."""
        shown = {summary.name: summary for summary in cache.list_models()}
        for name, count in self.held.items():
            assert shown[name].lease_count == count
            assert not count or shown[name].l1_bytes == shown[name].size_bytes, f"{name} is leased"
        for name in self.hot:
            assert shown[name].l1_bytes == shown[name].size_bytes, f"{name} is hot"
        counted = {name: item.l1_bytes for name, item in shown.items() if not item.transient}
        protected_bytes = sum(size for name, size in counted.items() if self.must_stay(name) or name in self.hot)
        assert sum(counted.values()) <= max(CAPACITY_BYTES, protected_bytes), counted
        of_tenant = sum(counted.get(name, 0) for name in TENANT)
        of_tenant_protected = sum(counted.get(name, 0) for name in TENANT if self.must_stay(name) or name in self.hot)
        assert of_tenant <= max(TENANT_BYTES, of_tenant_protected), counted
        assert all(item.lease_count or not item.transient for item in shown.values()), "transients go with their leases"
        cache.check_invariants()


@pytest.mark.parametrize("seed", range(2))
async def test_a_history_keeps_every_promise(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    host = Host(
        tmp_path, MovedClock("2026-11-20T07:00"), l1__capacity=f"{CAPACITY_BYTES}B", l1__pool_bytes="0B",
        l1__transient_capacity="10MB", transfer__idle_timeout_s="86400", l1__hot_capacity="8MB", l2__capacity="40MB",
    )  # fmt: skip
    host.tenants = {"small": {"l1": f"{TENANT_BYTES}B"}}
    for name, size in MODELS.items():
        host.add(name, size * MB, **({"tenant": "small"} if name in TENANT else {}))
    reference = Reference()
    for _ in range(3):  # lives of the daemon, one after the other on the same state
        async with host.run() as cache, AsyncExitStack() as leases:
            reference.held.clear()
            held: dict[str, list[AsyncExitStack]] = {name: [] for name in MODELS}
            for _ in range(STEPS // 3):
                host.clock.pass_by(dice.expovariate(STEPS / HOURS_S))
                await step(cache, reference, dice, held)
                await until(lambda: not cache.stats().active_load_count, "rest")
                await ticks(cache, 1)
                reference.check(cache)
            for name, stacks in held.items():
                for stack in stacks:
                    leases.push_async_callback(stack.aclose)
                reference.held[name] = 0
    assert reference.attaches > STEPS // 6


async def step(
    cache: ModelCache, reference: Reference, dice: random.Random, held: dict[str, list[AsyncExitStack]]
) -> None:
    """One thing that a worker or an operator does; what is refused changes nothing."""
    name = dice.choices(list(MODELS), weights=[8, 6, 5, 4, 3, 2, 2, 1])[0]
    deed = dice.choices(list(DEEDS), weights=list(DEEDS.values()))[0]
    try:
        match deed:
            case "attach":
                await attach(cache, name, held)
                reference.held[name] += 1
                reference.attaches += 1
            case "release" if held[name]:
                await held[name].pop(dice.randrange(len(held[name]))).aclose()
                reference.held[name] -= 1
            case "pull":
                await pull(cache, name)
            case "pin" | "unpin":
                await (cache.pin(name) if deed == "pin" else cache.unpin(name))
                (reference.pinned.add if deed == "pin" else reference.pinned.discard)(name)
            case "hot" | "auto":
                await set_tier(cache, name, Tier(deed), reference)
            case "evict":
                await cache.evict(name, Level.L1)
                assert not reference.must_stay(name)
                assert name not in reference.hot
    except InUseError:
        assert deed == "evict"
        assert reference.must_stay(name) or name in reference.hot
    except NoRoomError:
        assert deed in {"attach", "pull", "hot"}


async def attach(cache: ModelCache, name: str, held: dict[str, list[AsyncExitStack]]) -> None:
    """Takes a lease, and keeps it once all of the model is there."""
    stack = AsyncExitStack()
    attachment = await stack.enter_async_context(await cache.attach(name))
    try:
        async for event in attachment.events():
            if isinstance(event, Complete) or getattr(event, "complete", None):
                break
    except CachedError:
        await stack.aclose()
        raise
    held[name].append(stack)


async def set_tier(cache: ModelCache, name: str, tier: Tier, reference: Reference) -> None:
    """Hot models are brought by the engine itself."""
    await cache.set_tier(name, tier)
    if tier is not Tier.HOT:
        reference.hot.discard(name)
        return

    def is_there() -> bool:
        summary = cache.describe(name).summary
        return 0 < summary.size_bytes == summary.l1_bytes

    try:
        async with asyncio.timeout(2.0):
            await until(is_there, "the hot model")
        reference.hot.add(name)
    except TimeoutError:
        await cache.set_tier(name, Tier.AUTO)
