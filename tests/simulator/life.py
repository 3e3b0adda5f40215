"""One life of a daemon within a history: what is asked of it, and what must hold meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from cached.cache import ModelCache
from cached.cache.attachment import Attachment
from cached.cache.build import Outside, build_parts
from cached.catalog_file import Catalog, parse_catalog
from cached.config import Config
from cached.errors import CachedError
from cached.metrics import Metrics
from cached.tracing import Tracer
from cached.types import Client, Complete, Level, Opened, Peer, RangesReady, Selection, Tier
from tests.simulator.loop import SimClock, SimLoop
from tests.simulator.movers import SimMovers
from tests.simulator.origin import BUCKET
from tests.simulator.store import SimStore
from tests.simulator.world import NAMES, Holder, Violation, World

ALWAYS = frozenset({"NO_ROOM", "IN_USE", "NOT_FOUND", "NO_SOURCE", "OBJECT_CHANGED", "UNAVAILABLE"})
FAULTY = frozenset({"ORIGIN_UNAVAILABLE", "ORIGIN_PROTOCOL", "LEVEL_FAILED", "MOVER_FAILED"})
DAMAGED = frozenset({"INTEGRITY", "QUARANTINED"})
"""What may be answered: always, once something failed, and once content was damaged here."""

_ANSWER_S = 4 * 3600.0
_SETTLE_S = 3600.0
_PAUSES_S = (0.0, 0.0, 0.01, 0.1, 0.3, 3.0, 20.0)


class Life:
    """``live`` once, in the loop that was made for it."""

    def __init__(
        self, world: World, config: Config, loop: SimLoop, metrics: Metrics, log: Callable[[str], None], *, last: bool
    ) -> None:
        self._world = world
        self._config = config
        self._clock = SimClock(loop)
        self._log = log
        self._last = last
        self._rng = random.Random(world.rng.random())
        self._held: list[tuple[Attachment, Holder]] = []
        movers = SimMovers(world.bucket, world.faults, random.Random(self._rng.random()))
        outside = Outside(movers, lambda path: SimStore(path, world.durable, world.faults))  # type: ignore[arg-type,return-value]
        self._parts = build_parts(config, metrics, self._clock, Tracer(), version="simulated", outside=outside)
        self.cache = ModelCache(self._parts)
        self._budget_bytes = self._parts.services.storage

    async def live(self) -> None:
        """From its start to an orderly end, if nobody kills it."""
        committed = self._world.committed()
        await self.cache.start()
        lost = committed - self._world.blobs(self._world.l2).keys()
        if lost and not self._world.faults.hit.keys() & {"fsync_eio", "fsync_lies"}:
            raise Violation(f"the start lost committed blobs: {sorted(lost)}")
        for holder in list(self._world.holders):
            await self._take_up(holder)
        async with asyncio.TaskGroup() as callers:
            for number in range(self._rng.randint(1, 4)):
                callers.create_task(self._call(number, self._rng.randint(2, 8)))
        if self._last:
            await self._end()
        await self.cache.close()

    async def _call(self, number: int, count: int) -> None:
        for _ in range(count):
            await self._clock.sleep(self._rng.choice(_PAUSES_S) * self._rng.random())
            await self._answered(f"caller {number}", self._choose())
            self.inspect()

    def _choose(self) -> Callable[[], Awaitable[str]]:
        name = self._rng.choice(NAMES)
        level = self._rng.choice((Level.L1, Level.L1, Level.L2))
        works: list[tuple[int, Callable[[], Awaitable[str]]]] = [
            (8, lambda: self._pull(name, level, wait=self._rng.random() < 0.7)),
            (14, lambda: self._attach(name)),
            (5, lambda: self._attach(name, partial=True)),
            (6, self._release),
            (6, lambda: self._evict(name)),
            (3, lambda: self._remove(name)),
            (3, lambda: self._tier(name)),
            (2, lambda: self._pin(name)),
            (2, self._verify),
            (2, self._catalog),
            (2, self._budgets),
            (4, lambda: self._replace(name)),
            (1, self._flip),
        ]
        return self._rng.choices([work for _, work in works], [weight for weight, _ in works])[0]

    async def _answered(self, who: str, work: Callable[[], Awaitable[str]]) -> None:
        """Every call is answered, and with nothing that is a fault of ours."""
        began_s = self._clock.monotonic_s()
        try:
            async with asyncio.timeout(_ANSWER_S):
                what = await work()
        except TimeoutError:
            raise Violation(f"{who}: not answered within {_ANSWER_S / 3600:.0f} virtual hours") from None
        except CachedError as error:
            what = f"{error.reason}: {error.message}"
            if not self._may_answer(error):
                raise Violation(f"{who}: {what}") from error
        self._log(f"{began_s:10.3f}-{self._clock.monotonic_s():<10.3f} {who}: {what}")

    def _may_answer(self, error: CachedError) -> bool:
        world = self._world
        allowed = ALWAYS | (FAULTY if world.faults.hit else frozenset()) | (DAMAGED if world.damaged else frozenset())
        return error.reason in allowed and not error.message.startswith("internal error")

    # What can be asked

    async def _pull(self, name: str, level: Level, *, wait: bool) -> str:
        self._log(f"pull {name} to {level} begins")
        async for _ in self.cache.pull(name, source=f"{BUCKET}/{name}", level=level, wait=wait):
            pass
        return f"pull {name} to {level}, wait={wait}"

    async def _attach(self, name: str, *, partial: bool = False) -> str:
        chosen = Selection(files=(self._rng.choice(("a.*", "b.*", "c*")),), rest_follows=self._rng.random() < 0.3)
        self._log(f"attach {name} begins, partial={partial}")
        attachment = await self.cache.attach(
            name, source=f"{BUCKET}/{name}", client=Client("simulated", 1), selection=chosen if partial else None
        )
        holder = await self._follow(name, attachment)
        if self._rng.random() < 0.5:
            self._let_go(attachment, holder)
        return f"attach {name}@{holder.revision[:8]}, partial={partial}"

    async def _follow(self, name: str, attachment: Attachment) -> Holder:
        """Until all of it is there; each range is read as soon as it is announced."""
        holder: Holder | None = None
        whole: list[int] = []
        try:
            async with aclosing(attachment.events()) as events:  # type: ignore[type-var]
                async for event in events:
                    match event:
                        case Opened():
                            holder = self._opened(name, event)
                            whole = list(event.selected.files) if event.selected is not None else sorted(holder.fds)
                            if event.complete is not None:
                                holder.completed(whole)
                                break
                        case RangesReady() if holder is not None:
                            for item in event.ranges:
                                self._open(holder, item.file_index)
                                holder.saw(item)
                        case Complete() if holder is not None:
                            holder.completed(whole)
                            break
        except BaseException:
            attachment.close()
            if holder is not None:
                self._world.release(holder)
            raise
        if holder is None:
            raise Violation(f"an attach of {name} ended without a word")
        self._held.append((attachment, holder))
        return holder

    def _opened(self, name: str, event: Opened) -> Holder:
        holder = self._world.holder(name, event.revision, event.token, event.files)
        for index in range(len(event.files)) if event.selected is None else event.selected.files:
            self._open(holder, index)
        return holder

    def _open(self, holder: Holder, index: int) -> None:
        if index not in holder.fds:
            [holder.fds[index]] = self.cache.open_descriptors(holder.token, [index], Peer(1, 0, 0))

    async def _release(self) -> str:
        if not self._held:
            return "release: nothing is held"
        attachment, holder = self._rng.choice(self._held)
        self._let_go(attachment, holder)
        return f"release {holder.name}@{holder.revision[:8]}"

    def _let_go(self, attachment: Attachment, holder: Holder) -> None:
        self._held.remove((attachment, holder))
        attachment.close()
        self._world.release(holder)

    async def _take_up(self, holder: Holder) -> None:
        """A worker's lease after a restart: it is there again, or the worker goes on with what it maps."""
        try:
            attachment = await self.cache.attach(
                f"{holder.name}@{holder.revision}", client=Client("simulated", 1), resume=True
            )
        except CachedError as error:
            self._log(f"lease on {holder.name} is not taken up: {error.message}")
            self._world.release(holder)
            return
        self._held.append((attachment, holder))

    async def _evict(self, name: str) -> str:
        level = self._rng.choice((Level.L1, Level.L2, None))
        self._log(f"evict {name} from {level} begins")
        await self.cache.evict(name, level)
        return f"evict {name} from {level}"

    async def _remove(self, name: str) -> str:
        self._log(f"rm {name} begins")
        await self.cache.remove(name)
        return f"rm {name}"

    async def _tier(self, name: str) -> str:
        tier = self._rng.choice(list(Tier))
        await self.cache.set_tier(name, tier)
        return f"tier {name} {tier}"

    async def _pin(self, name: str) -> str:
        if self._rng.random() < 0.5:
            await self.cache.pin(name)
            return f"pin {name}"
        await self.cache.unpin(name)
        return f"unpin {name}"

    async def _verify(self) -> str:
        async for progress in self.cache.verify(None, repair=True):
            damage = progress.damage
            if damage is not None and not self._world.damaged and not self._world.faults.hit:
                raise Violation(f"verify found damage where none was done: {damage}")
        return "verify --repair"

    async def _catalog(self) -> str:
        tiers = {name: self._rng.choice(("hot", "warm", "cold", "auto")) for name in NAMES if self._rng.random() < 0.5}
        models = ", ".join(
            f'"{name}": {{"source": "{BUCKET}/{name}", "tier": "{tier}"}}' for name, tier in tiers.items()
        )
        self.cache.set_catalog(parse_catalog(f'{{"models": {{{models}}}}}', "json", "simulated"))
        return f"catalog {tiers}"

    async def _budgets(self) -> str:
        capacity = self._rng.choice((self._config.l1.capacity, f"{self._world.rng.randrange(20, 200)}KiB"))
        self.cache.set_budgets(replace(self._config, l1=replace(self._config.l1, capacity=capacity)))
        return f"l1.capacity = {capacity}"

    async def _replace(self, name: str) -> str:
        self._world.replace(name)
        return f"{name} is replaced at the origin"

    async def _flip(self) -> str:
        return f"a bit flips in l2: {self._world.flip_bit(self._world.l2)}"

    # What must hold

    def inspect(self) -> None:
        """At any moment: what is held is there and is what it was; no level has more than it may."""
        storage = self._parts.services.storage
        for _, holder in self._held:
            holder.look_again()
            if holder.complete and len(holder.fds) == len(holder.files):
                gone = [file.path for file in holder.files if file.sha256 and not self._in_l1(file.sha256)]
                if gone and not holder.tainted:
                    raise Violation(f"{gone} of {holder.name}@{holder.revision[:8]} left L1, which a worker holds")
        for level in storage.levels:
            ledger = storage.ledger(level)
            ledger.check()
            counted = sum(ledger.used.values()), sum(ledger.reservations.values())
            if counted != (ledger.used_bytes, ledger.reserved_bytes):
                raise Violation(
                    f"{level}: used and reserved are {ledger.used_bytes}, {ledger.reserved_bytes}: {counted}"
                )

    def _in_l1(self, digest: str) -> bool:
        try:
            self._parts.services.storage.l1.blob(digest)
        except CachedError:
            return False
        return True

    async def _end(self) -> None:
        """No worker holds anything, nobody wants anything; bounded faults are over, and everything must work now."""
        for attachment, holder in list(self._held):
            self._let_go(attachment, holder)
        bounded = self._world.faults.left is not None
        self._world.faults.on = not bounded
        self.cache.set_catalog(Catalog())
        self.cache.set_budgets(self._config)
        for summary in self.cache.list_models():
            await self._answered("end", partial(self._calm, summary.name))
        if bounded:
            await self._settled()
            for name in NAMES:
                await self._must(name, partial(self._pull, name, Level.L1, wait=True))
                await self._must(name, partial(self._attach_once, name))
            await self._settled()
            self._at_rest()

    async def _calm(self, name: str) -> str:
        await self.cache.set_tier(name, Tier.AUTO)
        await self.cache.unpin(name)
        return f"{name} is nobody's"

    async def _must(self, name: str, work: Callable[[], Awaitable[str]]) -> None:
        """The faults are over: it must succeed."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                self._log(await work())
        except (CachedError, TimeoutError) as error:
            raise Violation(f"with all faults over, {name} does not work: {error!r}") from error

    async def _attach_once(self, name: str) -> str:
        """Several workers that ask at once cause one download, of what is not here."""
        await self._idle()
        await self.cache.remove(name)
        before_bytes = sum(self._world.bucket.served_bytes.values())
        attaches = [self.cache.attach(name, source=f"{BUCKET}/{name}") for _ in range(3)]
        followed = [self._follow(name, attachment) for attachment in await asyncio.gather(*attaches)]
        for holder in await asyncio.gather(*followed):
            self._let_go(next(attachment for attachment, other in self._held if other is holder), holder)
        served_bytes = sum(self._world.bucket.served_bytes.values()) - before_bytes
        total_bytes = self._world.bucket.total_bytes(name)
        if served_bytes > total_bytes:
            raise Violation(f"three attaches of {name} fetched {served_bytes} bytes of {total_bytes}")
        return f"three workers attach {name}"

    async def _idle(self) -> None:
        while self._parts.loader.loads or self.cache.stats().active_load_count:
            await self._clock.sleep(0.5)

    async def _settled(self) -> None:
        """Until nothing moves any more."""
        try:
            async with asyncio.timeout(_SETTLE_S):
                await self._idle()
                while any(level.reserved_bytes for level in self.cache.stats().levels):
                    await self._clock.sleep(0.5)
                await self._clock.sleep(3.0)
                await self._idle()
        except TimeoutError:
            loads = [load.plan.name for load in self._parts.loader.loads.values()]
            raise Violation(f"it does not come to rest; loads of {loads}") from None

    def _at_rest(self) -> None:
        """Accounts, folders and records agree."""
        self.cache.check_invariants()
        storage, registry, world = self._parts.services.storage, self._parts.services.registry, self._world
        owned = {digest for manifest in registry.manifests() for digest in manifest.blobs}
        for level, folder in ((Level.L1, world.l1), (Level.L2, world.l2)):
            ledger = storage.ledger(level)
            there = world.blobs(folder)
            counted = {key[5:]: size for key, size in ledger.used.items() if key.startswith("blob:")}
            if there != counted:
                raise Violation(
                    f"{level}: {_short(there, counted)} are there and not counted, "
                    f"{_short(counted, there)} counted and not there"
                )
            if there.keys() - owned:
                raise Violation(f"{level}: {sorted(there.keys() - owned)} belong to no revision")
            if ledger.used_bytes > ledger.capacity_bytes:
                raise Violation(f"{level}: {ledger.used_bytes} bytes of {ledger.capacity_bytes}")


def _short(blobs: dict[str, int], without: dict[str, int]) -> dict[str, int]:
    return {digest[:8]: size for digest, size in blobs.items() if digest not in without}
