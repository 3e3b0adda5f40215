"""The local levels together with their accounts: no byte is at a level that its ledger does not know of."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace

import structlog

from cached.cache.capacity import Allocated, Limit, Pressure, l1_budget, l1_host_limit, l2_limit
from cached.cache.disk_work import DiskWork
from cached.config import Config, resolve_capacity
from cached.errors import CachedError, NotFoundError
from cached.ledger import Ledger, whatever_fits
from cached.level import Level
from cached.levels.base import FileRef, Found, LocalLevel
from cached.levels.shm import ShmLevel
from cached.manifest import BlobRecord
from cached.signals import Signal, in_thread
from cached.units import GIB, MIB, parse_size

_log = structlog.get_logger(__name__)

_BUDGETS = {
    "l1": (
        "capacity", "memory_reserve_bytes", "pool_bytes", "pool_reserve_bytes", "hot_capacity", "free_ahead",
        "transient_capacity",
    ),
    "l2": ("capacity",),
}  # fmt: skip
"""Settings that may change while the daemon runs."""
_POOL, _WITHDRAWN = "pool", "withdrawn"
_SMALLEST_POOLED_BYTES = 2 * MIB
"""Below this, fresh pages cost less than keeping account of old ones."""
_SMALLEST_GROWN_BYTES = 32 * MIB
_LARGEST_GROWN_BYTES = 4 * GIB
_LARGEST_RESERVE_BYTES = 64 * GIB
"""What is allocated ahead at most, unless it is configured: a large model, and not the memory of a large host."""


class Storage:
    """Loop only. What may take long runs in a thread that touches the level alone, never the accounts."""

    def __init__(self, config: Config, l1: ShmLevel, l2: LocalLevel | None) -> None:
        self.l1 = l1
        self._config = config
        self._levels: dict[Level, LocalLevel] = {Level.L1: l1} | ({Level.L2: l2} if l2 is not None else {})
        self._ledgers = {level: Ledger(level, 0) for level in self._levels}
        self.limits = dict.fromkeys(self._levels, Limit(0, "not looked at yet"))
        self._resumed: dict[Level, set[str]] = {level: set() for level in self._levels}
        self._collecting = asyncio.Lock()
        self._allocated = Allocated(l1.instance, l1.folder)
        self._beside: dict[tuple[str, str], int] = {}
        self._leaving_bytes = 0
        self._host_bytes = 0
        self.pressure = Pressure()
        self.closed = Signal()
        self._disk = {} if l2 is None else {Level.L2: DiskWork(l2, self._ledgers[Level.L2], self.closed)}

    @property
    def disk(self) -> DiskWork | None:
        """What is asked of L2's disk, where there is an L2."""
        return self._disk.get(Level.L2)

    @property
    def levels(self) -> tuple[Level, ...]:
        """Those that this daemon has, nearest first."""
        return tuple(self._levels)

    def has(self, level: Level) -> bool:
        """False for L2 where it is switched off."""
        return level in self._levels

    def level(self, level: Level) -> LocalLevel:
        """The level itself, for references and descriptors."""
        return self._levels[level]

    def ledger(self, level: Level) -> Ledger:
        """Its accounts; to be read, not changed."""
        return self._ledgers[level]

    def withdrawn_bytes(self, level: Level) -> int:
        """Evicted, but not yet proven to be free."""
        return self._ledgers[level].used.get(_WITHDRAWN, 0)

    def pool_bytes(self, level: Level) -> int:
        """Kept for the next blob."""
        return self._ledgers[level].used.get(_POOL, 0)

    def refresh_capacities(self) -> None:
        """Looks at what the host can give now."""
        reserve = parse_size(self._config.l1.memory_reserve_bytes)
        host = l1_host_limit(
            reserve_bytes=reserve, ours_bytes=self._allocated.size_bytes(), free_bytes=self.l1.free_bytes()
        )
        self._host_bytes = host.size_bytes
        within = Limit(max(0, host.size_bytes - self._beside_bytes), host.because)
        budget = min(l1_budget(self._config.l1.capacity), within, key=lambda limit: limit.size_bytes)
        self.limits[Level.L1] = self.pressure.limited(budget)
        if Level.L2 in self._levels:
            ledger = self._ledgers[Level.L2]
            ours_bytes = ledger.used_bytes + ledger.reserved_bytes
            self.limits[Level.L2] = l2_limit(self._config.l2.capacity, self._config.l2.folders, ours_bytes=ours_bytes)
        self._settle()

    def _set_capacities(self) -> None:
        for level, ledger in self._ledgers.items():
            ledger.capacity_bytes = self.budget_bytes(level) + (self._beside_bytes if level is Level.L1 else 0)

    def set_budgets(self, config: Config) -> list[str]:
        """Takes over the settings that may change while the daemon runs; those that did, with their values."""
        changed = []
        for section, names in _BUDGETS.items():
            old, new = getattr(self._config, section), getattr(config, section)
            values = {name: getattr(new, name) for name in names if getattr(new, name) != getattr(old, name)}
            changed += [f"{section}.{name} = {value}" for name, value in values.items()]
            self._config = replace(self._config, **{section: replace(old, **values)})
        self.refresh_capacities()
        return changed

    def budget_bytes(self, level: Level) -> int:
        """What may be at a level, transient segments left out of account."""
        return self.limits[level].size_bytes

    # Beside the budget of L1

    @property
    def transient_bytes(self) -> int:
        """What is held beside the budget until its last lease ends."""
        return sum(self._beside.values())

    @property
    def _beside_bytes(self) -> int:
        return self.transient_bytes + self._leaving_bytes

    def transient_room_bytes(self, level: Level) -> int:
        """How much more may be held beside the budget, or over it: as configured, and as the host has it."""
        if level is not Level.L1:
            return 0
        budget_bytes = self.budget_bytes(Level.L1)
        allowed_bytes = resolve_capacity(self._config.l1.transient_capacity, budget_bytes)
        spare_bytes = self._host_bytes - budget_bytes if self.pressure.share == 1.0 else 0
        return max(0, min(allowed_bytes, spare_bytes) - self._beside_bytes - self._ledgers[Level.L1].excess_bytes)

    def hold_beside(self, name: str, revision: str, size_bytes: int) -> None:
        """So many more bytes of L1, about to be opened, do not count against the budget."""
        self._beside[name, revision] = self._beside.get((name, revision), 0) + size_bytes
        self._set_capacities()

    @property
    def beside(self) -> list[tuple[str, str]]:
        """Name and revision of all that is."""
        return list(self._beside)

    def could_stay(self, name: str, revision: str) -> bool:
        """Whether the budget has room by now for what is beside it."""
        ledger = self._ledgers[Level.L1]
        return self._beside[name, revision] <= ledger.available_bytes + ledger.used.get(_POOL, 0)

    def count_again(self, name: str, revision: str) -> None:
        """It stays, and counts against the budget from now on."""
        self._beside.pop((name, revision), None)
        self._settle()

    def left_beside(self, name: str, revision: str) -> None:
        """It was withdrawn. Until its memory is free, that does not count against the budget either."""
        self._leaving_bytes += self._beside.pop((name, revision), 0)
        self._settle()

    def hot_capacity_bytes(self) -> int:
        """What hot models may take of L1 together."""
        return resolve_capacity(self._config.l1.hot_capacity, self.budget_bytes(Level.L1))

    def free_ahead_bytes(self, level: Level) -> int:
        """What is kept free ahead of need."""
        if level is not Level.L1:
            return 0
        return resolve_capacity(self._config.l1.free_ahead, self.budget_bytes(Level.L1))

    # Ingests

    def missing_bytes(self, level: Level, sizes: Mapping[str, int]) -> int:
        """By how much these ingests exceed what is free; the pool counts as free, kept ingests as paid for."""
        self.refresh_capacities()
        ledger = self._ledgers[level]
        kept = sum(ledger.used.get(_kept(ingest_id), 0) for ingest_id in sizes)
        free = ledger.capacity_bytes - ledger.used_bytes - ledger.reserved_bytes + ledger.used.get(_POOL, 0)
        return max(0, sum(sizes.values()) - kept - free)

    async def fit_pool(self, sizes: Mapping[str, int]) -> None:
        """Makes what the pool has for these ingests fit, before ``open``: cutting takes long, so in a thread.

        Nothing else may open ingests meanwhile. Cancelled, it leaves the pool as anybody's.
        """
        used = self._ledgers[Level.L1].used
        new = {ingest_id: size_bytes for ingest_id, size_bytes in sizes.items() if _kept(ingest_id) not in used}
        if not self.l1.fit_pool(new):
            return
        try:
            await in_thread(self.l1.cut_pool, new)
        except BaseException:
            self.l1.unfit_pool()
            raise
        finally:
            self._settle()

    async def open(self, level: Level, sizes: Mapping[str, int], lengths: Mapping[str, int] | None = None) -> None:
        """Reserves and creates these ingests, all or none; kept ones are taken up again.

        ``lengths``: of those of L1 that are longer than what is reserved for them, since most of them stays a hole.
        Raises NoRoomError when they do not fit (nothing is evicted here), LevelError when they cannot be created.
        Cancelled, it leaves none.
        """
        ledger = self._ledgers[level]
        if level in self._disk:
            self._disk[level].check()  # before anything is taken up that would have to be dropped then
        ledger.resize(_POOL, 0)  # lent to the ingests: what they do not take comes back with _settle
        opened: list[str] = []
        new: dict[str, int] = {}
        try:
            for ingest_id, size_bytes in sizes.items():
                length_bytes = (lengths or {}).get(ingest_id, size_bytes)
                kept = self._is_whole(level, ingest_id, length_bytes)
                if kept:
                    ledger.remove(_kept(ingest_id))
                ledger.reserve(ingest_id, size_bytes)
                opened.append(ingest_id)
                if kept:
                    self._resumed[level].add(ingest_id)
                    continue
                self._resumed[level].discard(ingest_id)
                if lengths and ingest_id in lengths:
                    self.l1.create_sparse(ingest_id, length_bytes)
                else:
                    new[ingest_id] = size_bytes
            if level is Level.L1:
                _create(self.l1, new)
            else:
                await self._disk[level].create(new)  # its blocks are allocated on the disk
        except (CachedError, asyncio.CancelledError):
            for ingest_id in opened:
                self.discard(level, ingest_id)
            raise
        finally:
            if level is Level.L1:
                self.l1.unfit_pool()
            self._settle()

    def _is_whole(self, level: Level, ingest_id: str, size_bytes: int) -> bool:
        """True for a kept ingest of this length. One of another (a crash came before it got its own) is dropped."""
        if _kept(ingest_id) not in self._ledgers[level].used:
            return False
        with suppress(NotFoundError):
            if self._levels[level].ingest(ingest_id).size_bytes == size_bytes:
                return True
        self.discard(level, ingest_id)
        return False

    def is_resumed(self, level: Level, ingest_id: str) -> bool:
        """True for an open ingest that was taken up again with what it had, False for one that was made anew."""
        return self.is_open(level, ingest_id) and ingest_id in self._resumed[level]

    def is_open(self, level: Level, ingest_id: str) -> bool:
        """True between ``open`` and ``commit``, ``suspend`` or ``discard``, which ``closed`` tells of."""
        return level in self._ledgers and ingest_id in self._ledgers[level].reservations

    async def commit(
        self,
        level: Level,
        ingest_id: str,
        record: BlobRecord,
        moved: Callable[[str, str], None] = lambda _source, _target: None,
    ) -> FileRef:
        """Makes an open ingest the blob, durably for its level. A blob that is there already is kept instead.

        ``moved``: see ``ShmLevel.commit``; of L1 only.
        """
        ledger, key = self._ledgers[level], _blob(record.digest)
        if level is Level.L1:
            ref = self.l1.commit(ingest_id, record.digest, moved)
        else:
            disk = self._disk[level]
            ref = await disk.commit(ingest_id, record.digest, record.size_bytes, lambda: key in ledger.used)
        if key in ledger.used:
            ledger.release(ingest_id)
        else:
            ledger.commit(ingest_id, key)
        self._settle()
        self.closed.notify()
        return ref

    def commit_kept(self, ingest_id: str, record: BlobRecord, moved: Callable[[str, str], None]) -> bool:
        """Makes the blob of what waits in L1, even where L1 may hold less now. False, and it is gone, if it is torn."""
        if whole := self._is_whole(Level.L1, ingest_id, record.size_bytes):
            self.l1.commit(ingest_id, record.digest, moved)
            self._ledgers[Level.L1].remove(_kept(ingest_id))
            self.adopt(Level.L1, record.digest, record.size_bytes)
        return whole

    def suspend(self, level: Level, ingest_id: str, *, sparse: bool = False) -> None:
        """Keeps an open ingest for later: its bytes are used, no longer reserved. One that L2 dropped is gone.

        ``sparse``: only its pages count. Otherwise all of it does, so that whoever takes it up has room for the rest.
        """
        if self.is_open(level, ingest_id):
            size_bytes = self._ledgers[level].release(ingest_id)
            with suppress(NotFoundError):
                self._levels[level].ingest(ingest_id)
                self.keep_ingest(level, ingest_id, size_bytes, sparse=sparse)
            self.closed.notify()

    def kept_bytes(self, level: Level, ingest_id: str) -> int:
        """What an ingest that waits to be taken up again counts for; 0 if there is none."""
        return self._ledgers[level].used.get(_kept(ingest_id), 0)

    def discard(self, level: Level, ingest_id: str) -> None:
        """Drops an ingest, open or kept; unknown ones are ignored."""
        if (ledger := self._ledgers.get(level)) is None:
            return
        if self.is_open(level, ingest_id):
            counted_bytes = ledger.release(ingest_id)
            self.closed.notify()
        elif _kept(ingest_id) in ledger.used:
            counted_bytes = ledger.remove(_kept(ingest_id))
        else:
            return
        if level is Level.L1:
            with suppress(NotFoundError):
                self.l1.discard(ingest_id, sparse=counted_bytes < self.l1.ingest(ingest_id).size_bytes)
        else:
            self._disk[level].discard(ingest_id, counted_bytes)
        self._settle()

    def kept_ingests(self, level: Level) -> list[str]:
        """Ids of ingests that wait to be taken up again."""
        return [key.removeprefix("ingest:") for key in self._ledgers[level].used if key.startswith("ingest:")]

    # Blobs

    def disk_copy(self, digest: str, size_bytes: int) -> FileRef | None:
        """The L2 blob of this content, or None; one of another length is damaged beyond use."""
        if not digest or Level.L2 not in self._levels:
            return None
        try:
            ref = self._levels[Level.L2].blob(digest)
        except NotFoundError:
            return None
        return ref if ref.size_bytes == size_bytes else None

    def drop(self, level: Level, digest: str) -> None:
        """Takes a blob out of a level: ``withdraw`` or ``remove_from_disk``."""
        if level is Level.L1:
            self.withdraw(digest)
        else:
            self.remove_from_disk(digest)

    def withdraw(self, digest: str) -> None:
        """Takes a blob out of L1. Its bytes count until ``collect`` has the proof that nobody maps them."""
        with suppress(NotFoundError):  # somebody has removed the segment
            self.l1.remove(digest)
        self._ledgers[Level.L1].remove(_blob(digest))
        self._settle()

    def remove_from_disk(self, digest: str) -> None:
        """Takes a blob out of L2; one whose file is gone only counts no longer. Raises as ``DiskWork.remove``."""
        self._disk[Level.L2].remove(digest, self._ledgers[Level.L2].used.get(_blob(digest), 0))
        self._ledgers[Level.L2].remove(_blob(digest))

    def forget_on_disk(self, digest: str) -> None:
        """A damaged blob that ``remove_from_disk`` could not remove counts no longer, nor as the blob."""
        self._disk[Level.L2].distrust(digest)
        self._ledgers[Level.L2].remove(_blob(digest))

    async def freed(self) -> None:
        """Until the disk has the bytes back of all that was removed from it. LevelError where that does not come."""
        if self.disk is not None:
            await self.disk.freed()

    async def collect(self) -> None:
        """Frees what is withdrawn and no longer mapped, into the pool where that may grow; shrinks it if it must."""
        async with self._collecting:
            if self.l1.has_withdrawn:
                limit = self._pool_limit()
                await asyncio.to_thread(
                    self.l1.collect,
                    lambda size_bytes: (
                        size_bytes >= _SMALLEST_POOLED_BYTES and self.l1.make_pool_room(size_bytes, limit)
                    ),
                )
            self._settle()
            excess = self.l1.pool_bytes - self.pool_bytes(Level.L1)
            if excess > 0:
                await asyncio.to_thread(self.l1.drop_pool, excess)
            self._settle()

    def grow_pool(self, expected: Iterable[int]) -> FileRef | None:
        """Adds fresh memory to the pool, to be cleared. None when the pool has its reserve, or there is no room.

        It is of the first of the ``expected`` sizes that the pool has not. Beyond those each segment is half of what
        lacks: of segments of halving sizes, one is about as large as whatever comes.
        """
        lacking_bytes = min(self._pool_reserve() - self.l1.pool_bytes, self._ledgers[Level.L1].available_bytes)
        if lacking_bytes < _SMALLEST_GROWN_BYTES:
            return None
        there = Counter(self.l1.pool_sizes())
        size_bytes = min(_LARGEST_GROWN_BYTES, max(_SMALLEST_GROWN_BYTES, lacking_bytes // 2))
        for expected_bytes in expected:
            if there[expected_bytes]:
                there[expected_bytes] -= 1
            elif _SMALLEST_GROWN_BYTES <= expected_bytes <= lacking_bytes:
                size_bytes = expected_bytes
                break
        ref = self.l1.grow_pool(size_bytes)
        self._settle()
        return ref

    async def drop_pooled(self, ref: FileRef) -> None:
        """Gives one segment of the pool back."""
        await asyncio.to_thread(self.l1.drop_pooled, ref)
        self._settle()

    def _pool_reserve(self) -> int:
        configured, limit = self._config.l1.pool_reserve_bytes, self._pool_limit()
        if configured == "auto":
            return min(self._ledgers[Level.L1].capacity_bytes // 8, _LARGEST_RESERVE_BYTES, limit)
        return min(parse_size(configured), limit)

    def _pool_limit(self) -> int:
        configured = self._config.l1.pool_bytes
        return self._ledgers[Level.L1].capacity_bytes if configured == "auto" else parse_size(configured)

    def _settle(self) -> None:
        """Brings the capacities, and the accounts of memory that holds nothing, up to date.

        The pool counts as far as there is room for it: ``collect`` gives back what is over before its bytes are needed.
        """
        ledger = self._ledgers[Level.L1]
        withdrawn_bytes = self.l1.withdrawn_bytes
        with whatever_fits(ledger, withdrawn_bytes):
            ledger.resize(_WITHDRAWN, withdrawn_bytes)
        self._leaving_bytes = min(self._leaving_bytes, withdrawn_bytes)
        self._set_capacities()
        ledger.resize(_POOL, 0)
        ledger.resize(_POOL, min(self.l1.pool_bytes, ledger.available_bytes))

    async def give_back_pool(self) -> None:
        """For a daemon that stops: memory that holds nothing is the host's again, and so is disk."""
        if self.disk is not None:
            await self.disk.close()
        await asyncio.to_thread(self.l1.drop_pool, self.l1.pool_bytes)
        self._settle()

    # Recovery

    async def scan(self, level: Level) -> Found:
        """What an earlier daemon left at a level. Raises LevelError or NoRoomError where it cannot be used."""
        found = await (self._disk[level].scan() if level in self._disk else in_thread(self.l1.scan))
        self.refresh_capacities()
        return found

    def adopt(self, level: Level, digest: str, size_bytes: int) -> None:
        """Accounts for a blob that was found, even where the level may hold less now: the policy trims it."""
        ledger = self._ledgers[level]
        with whatever_fits(ledger, size_bytes):
            ledger.add(_blob(digest), size_bytes)

    def keep_ingest(self, level: Level, ingest_id: str, size_bytes: int, *, sparse: bool = False) -> None:
        """Accounts for an ingest that was found and may be taken up again; ``sparse`` as of ``suspend``."""
        ledger = self._ledgers[level]
        if sparse and level is Level.L1:
            size_bytes = min(size_bytes, self.l1.allocated_bytes(ingest_id))
        with whatever_fits(ledger, size_bytes):
            ledger.add(_kept(ingest_id), size_bytes)

    def check(self) -> None:
        """Raises AssertionError or AccountingError if accounts and levels disagree; nothing may be in flight."""
        for level, ledger in self._ledgers.items():
            ledger.check()
            assert ledger.reserved_bytes == 0, f"{level} has reservations at rest: {dict(ledger.reservations)}"  # noqa: S101
            for key, size_bytes in ledger.used.items():
                if key.startswith("blob:"):
                    ref = self._levels[level].blob(key.removeprefix("blob:"))
                    assert ref.size_bytes == size_bytes, f"{level}: {key}"  # noqa: S101


def _create(store: LocalLevel, sizes: Mapping[str, int]) -> None:
    for ingest_id, size_bytes in sizes.items():
        store.create(ingest_id, size_bytes)


def _blob(digest: str) -> str:
    return f"blob:{digest}"


def _kept(ingest_id: str) -> str:
    return f"ingest:{ingest_id}"
