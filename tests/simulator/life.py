"""One life of a daemon within a history: what is asked of it, and what must hold meanwhile."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial

from cached.cache import ModelCache
from cached.cache.attachment import Attachment
from cached.cache.build import Outside, build_parts
from cached.catalog_file import Catalog, parse_catalog
from cached.config import Config
from cached.errors import CachedError, NotFoundError
from cached.level import Level
from cached.metrics import Metrics
from cached.tracing import Tracer
from cached.types import Client, Complete, Opened, Peer, RangesReady, Selection, Tier
from tests.simulator.checks import Checks
from tests.simulator.loop import SimClock, SimLoop
from tests.simulator.movers import SimMovers
from tests.simulator.origin import BUCKET
from tests.simulator.store import SimStore
from tests.simulator.world import NAMES, Holder, Violation, World

ALWAYS = frozenset({"NO_ROOM", "IN_USE", "NOT_FOUND", "NO_SOURCE", "OBJECT_CHANGED", "UNAVAILABLE"})
FAULTY = frozenset({"ORIGIN_UNAVAILABLE", "ORIGIN_PROTOCOL", "LEVEL_FAILED", "MOVER_FAILED"})
DAMAGED = frozenset({"INTEGRITY", "QUARANTINED"})
"""What may be answered: always, once something failed, and once content was damaged here or could not be read."""

_ANSWER_S = 4 * 3600.0
_SETTLE_S = 3600.0
_MOMENT_S = 1e-6
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
        movers = SimMovers(world.bucket, world.faults, random.Random(self._rng.random()))
        outside = Outside(movers, lambda path: SimStore(path, world.durable, world.faults))  # type: ignore[arg-type,return-value]
        self._parts = build_parts(config, metrics, self._clock, Tracer(), version="simulated", outside=outside)
        self.cache = ModelCache(self._parts)
        self.checks = Checks(world, self._parts, config)
        self._held = self.checks.held
        self._to_be_back: set[str] = set()
        """Workers of these revisions must get their leases back, unless somebody evicts the model."""
        self._loop = loop

    async def live(self) -> None:
        """From its start to an orderly end, if nobody kills it."""
        committed = self._world.committed()
        await self.cache.start()
        self._loop.on_step = self.checks.accounts
        lost = committed - self._world.blobs(self._world.l2).keys()
        if lost and not self._world.faults.hit.keys() & {"fsync_eio", "fsync_lies"}:
            raise Violation(f"the start lost committed blobs: {sorted(lost)}")
        self.checks.remembered(self.cache.list_models())
        self._to_be_back = self._kept_for_workers()
        async with asyncio.TaskGroup() as callers:
            for holder in self._world.holders:
                if not holder.lost:
                    callers.create_task(self._take_up(holder))
            for number in range(self._rng.randint(1, 4)):
                callers.create_task(self._call(number, self._rng.randint(1, 6)))
        if self._last:
            await self._end()
        await self.cache.close()

    def _kept_for_workers(self) -> set[str]:
        """Revisions that workers hold, and that this daemon found recorded, or about to be, and whole in L1."""
        if self._world.damaged or not self._config.daemon.restart_grace_s:
            return set()
        blobs, inodes = set(self._world.blobs(self._world.l1)), self._world.named_inodes()
        kept = set()
        for holder in self._world.holders:
            recorded = f"manifest/{holder.name}/{holder.revision}" in self._world.durable
            begun = f"pending/{holder.name}/{holder.revision}" in self._world.durable
            mapped = {os.fstat(fd).st_ino for fd in holder.fds.values()}
            there = blobs.issuperset(holder.digests.values()) if recorded else begun and mapped <= inodes
            if holder.complete and holder.is_whole and there:
                kept.add(holder.revision)
        return kept

    async def _call(self, number: int, count: int) -> None:
        for _ in range(count):
            await self._clock.sleep(self._rng.choice(_PAUSES_S) * self._rng.random())
            await self._answered(f"caller {number}", self._choose())
            self.checks.inspect()
            if self.checks.left_l1():
                await self._clock.sleep(_MOMENT_S)  # at the end of this moment its worker has been told
                if left := self.checks.left_l1():
                    raise Violation(f"{', '.join(left)} left L1, which a worker holds")

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
        hit, damaged = self._world.faults.hit, self._world.damaged or "disk_eio" in self._world.faults.hit
        allowed = ALWAYS | (FAULTY if hit else frozenset()) | (DAMAGED if damaged else frozenset())
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
        lost = [holder for holder in self._world.holders if holder.lost]
        if not self._held and not lost:
            return "release: nothing is held"
        attachment, holder = self._rng.choice([*self._held, *((None, holder) for holder in lost)])
        self._let_go(attachment, holder)
        return f"release {holder.name}@{holder.revision[:8]}"

    def _let_go(self, attachment: Attachment | None, holder: Holder) -> None:
        """``attachment`` None: it had lost its lease."""
        if attachment is not None:
            self._held.remove((attachment, holder))
            attachment.close()
        self._world.release(holder)

    async def _take_up(self, holder: Holder) -> None:
        """A worker's lease after a restart: it is there again, or the worker goes on with what it maps."""
        await self._clock.sleep(self._rng.random() * self._config.daemon.restart_grace_s)
        if holder not in self._world.holders:
            return
        attachment: Attachment | None = None
        try:
            async with asyncio.timeout(_ANSWER_S):
                attachment = await self.cache.attach(
                    f"{holder.name}@{holder.revision}", client=Client("simulated", 1), resume=True,
                    selection=None if holder.is_whole else Selection(held=holder.ranges),
                )  # fmt: skip
                self._held.append((attachment, holder))
                await self._confirmed(attachment, holder)
        except TimeoutError:
            raise Violation(f"nobody says whether a worker has {holder.name} again") from None
        except CachedError as error:
            self._lost(holder, attachment, error)

    async def _confirmed(self, attachment: Attachment, holder: Holder) -> None:
        async with aclosing(attachment.events()) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Opened):
                    holder.token = event.token
                if isinstance(event, Complete) or (isinstance(event, Opened) and event.complete is not None):
                    self._log(f"the lease on {holder.name}@{holder.revision[:8]} is taken up")
                    return

    def _lost(self, holder: Holder, attachment: Attachment | None, error: CachedError) -> None:
        self._log(f"the lease on {holder.name}@{holder.revision[:8]} is lost: {error.reason}: {error.message}")
        holder.lost = True
        if attachment is not None and (attachment, holder) in self._held:
            self._held.remove((attachment, holder))
            attachment.close()
        if isinstance(error, NotFoundError) and holder.revision in self._to_be_back and not self._replaced(holder):
            raise Violation(f"a worker's lease on {holder.name} is lost, though all of it was there: {error.message}")
        if not self._may_answer(error):
            raise Violation(f"a worker's lease on {holder.name} is lost: {error!r}") from error

    def _replaced(self, holder: Holder) -> bool:
        """A pull that was begun before a kill goes on with what the origin has now; of what it had nothing is kept."""
        known = self._parts.services.registry.models.get(holder.name)
        revisions = {key.rpartition("/")[2] for key in self._world.durable if key.startswith(f"pending/{holder.name}/")}
        revisions |= {known.record.current_revision} if known else set()
        return f"manifest/{holder.name}/{holder.revision}" not in self._world.durable and bool(
            revisions - {"", holder.revision}
        )

    async def _evict(self, name: str) -> str:
        level = self._rng.choice((Level.L1, Level.L2, None))
        self._log(f"evict {name} from {level} begins")
        self._not_kept(name)
        await self.cache.evict(name, level)
        return f"evict {name} from {level}"

    async def _remove(self, name: str) -> str:
        self._log(f"rm {name} begins")
        self._not_kept(name)
        self._world.pinned.pop(name, None)
        await self.cache.remove(name)
        return f"rm {name}"

    def _not_kept(self, name: str) -> None:
        held = [holder for _, holder in self._held]
        for holder in self._world.holders:
            if holder.name == name:
                self._to_be_back.discard(holder.revision)
                holder.evicted = holder.evicted or holder not in held

    async def _tier(self, name: str) -> str:
        tier = self._rng.choice(list(Tier))
        await self.cache.set_tier(name, tier)
        return f"tier {name} {tier}"

    async def _pin(self, name: str) -> str:
        pinned, pins = self._rng.random() < 0.5, self._world.pinned
        pins.pop(name, None)
        await (self.cache.pin(name) if pinned else self.cache.unpin(name))
        pins[name] = pinned
        return f"{'pin' if pinned else 'unpin'} {name}"

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

    async def _end(self) -> None:
        """No worker holds anything, nobody wants anything; bounded faults are over, and everything must work now."""
        for attachment, holder in list(self._held):
            self._let_go(attachment, holder)
        for holder in list(self._world.holders):
            self._let_go(None, holder)
        bounded = self._world.faults.left is not None
        self._world.faults.on = not bounded
        self.cache.set_catalog(Catalog())
        self.cache.set_budgets(self._config)
        for summary in self.cache.list_models():
            await self._answered("end", partial(self._calm, summary.name))
        if bounded:
            await self._settled()
            pulled, attached = self._rng.sample(NAMES, 2)
            await self._must(pulled, partial(self._pull, pulled, Level.L1, wait=True))
            await self._must(attached, partial(self._attach_once, attached))
            await self._settled()
            self.checks.at_rest()

    async def _calm(self, name: str) -> str:
        self._world.pinned.pop(name, None)
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
        with suppress(NotFoundError):
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
        while self._parts.loader.loads:
            await self._clock.sleep(0.5)

    async def _settled(self) -> None:
        """Until nothing moves any more."""
        try:
            async with asyncio.timeout(_SETTLE_S):
                await self._idle()
                storage = self._parts.services.storage
                while any(storage.ledger(level).reserved_bytes for level in storage.levels):
                    await self._clock.sleep(0.5)
                await self._clock.sleep(3.0 + self._config.daemon.restart_grace_s)
                await self._idle()
        except TimeoutError:
            loads = [load.plan.name for load in self._parts.loader.loads.values()]
            raise Violation(f"it does not come to rest; loads of {loads}") from None
