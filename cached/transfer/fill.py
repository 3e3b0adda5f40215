"""The planner's unit of work: one blob brought to one place, every chunk verified as it lands. Runs in the loop.

One mechanism serves the pull, its resume, the promotion, the adoption after a restart and the repair. Each chunk climbs
down a ladder of places that may have it, nearest first: *in place* (it is at the target already), *disk* (L2), *origin*
(L3). A rung counts only if its bytes have the expected checksum, where one is known.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Protocol

import structlog

from cached.checksum import combine_crc64nvme
from cached.clock import Clock
from cached.errors import CachedError, IntegrityError, LevelError, MoverError, NotFoundError, ObjectChangedError
from cached.level import Level
from cached.levels.base import FileRef
from cached.origins.base import OriginObject, OriginSpec
from cached.signals import Signal, run_all
from cached.transfer.jobs import Checksum, Copy, Fetch, Hash, Hashed, Job, Listing, Moved, Prepare, Result, StatObjects
from cached.transfer.ranges import check_crc64
from cached.units import CHUNK_BYTES, chunk_count, chunk_length

_log = structlog.get_logger(__name__)

_HASH_STEP_CHUNKS = 4
_HASH_RESTARTS = 3
_HASH_PRIORITY = -1
_HASH_BEHIND_PRIORITY = 500_000_000
"""After every range that somebody waits for, before what only writes to L2."""
_AHEAD = 50_000
"""By so much a chunk that is preferred goes before the others of its load, and not before those of earlier loads."""
_PIECES = 8
"""Of the first chunk where it is urgent: so many connections bring it together."""


class Runner(Protocol):
    """What runs jobs: the mover pool."""

    async def run(self, job: Job, *, key: str | None = None, priority: int = 0) -> Result:
        """The job's result, or its typed error."""
        ...

    def prepare(self, job: Prepare) -> None:
        """Has every mover open an origin that is about to be read from; nobody waits for that."""
        ...

    def prefer(self, path: str, offsets: Collection[int], by: int) -> None:
        """Lowers the priority of ranges at these offsets of a target, as far as they wait for their turn."""
        ...

    async def settled(self, path: str) -> bool:
        """Returns when no job that was cancelled still writes to this file. False: one may, and cannot be ended."""
        ...


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long an origin's passing failures are borne, for each chunk."""

    max_attempts: int
    budget_s: float
    first_delay_s: float = 0.2
    max_delay_s: float = 10.0

    def delay_s(self, attempt: int, error: CachedError | None = None) -> float:
        """Full jitter: anywhere up to an exponentially growing bound, so that hosts do not retry in step.

        On top of what the origin asked for with its error (``retry_after_s``), within the budget.
        """
        asked_s = float(error.fields.get("retry_after_s", "0")) if error else 0.0
        jitter_s = random.uniform(0, min(self.max_delay_s, self.first_delay_s * 2**attempt))  # noqa: S311 not a secret
        return min(asked_s, self.budget_s) + jitter_s


@dataclass(frozen=True, slots=True)
class OriginSource:
    """An object of an origin, at one version. ``chain``: the one that this origin stands in for (see Chains)."""

    spec: OriginSpec
    item: OriginObject
    chain: OriginSpec | None = None

    @property
    def alone(self) -> OriginSource:
        """From the authority of the chain alone."""
        return replace(self, spec=(self.chain or self.spec).alone, chain=None)


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a blob's chunks may come from. ``expected`` holds the checksums known beforehand, by chunk.

    ``on_disk`` names the chunks that ``disk`` has, when it is an ingest that does not have all. A chunk in place or on
    disk must have an expected checksum; ``disk_crc64`` holds those that only ``disk`` is measured by.
    """

    in_place: frozenset[int] = frozenset()
    disk: FileRef | None = None
    on_disk: frozenset[int] | None = None
    origin: OriginSource | None = None
    expected: Mapping[int, int] = field(default_factory=dict)
    disk_crc64: Mapping[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class Observer:
    """What the owner of a fill wants to hear, in the loop. Each must return quickly and not raise."""

    on_chunk: Callable[[int, int, Level], None] = lambda _index, _crc64, _from: None
    on_moved: Callable[[Level, Moved], None] = lambda _from, _moved: None
    on_damage: Callable[[Level, int, str], None] = lambda _level, _index, _why: None
    on_retry: Callable[[CachedError], None] = lambda _error: None


@dataclass(frozen=True, slots=True)
class _Piece:
    """``crc64`` is None once it failed."""

    offset_bytes: int
    length_bytes: int
    crc64: asyncio.Future[int | None] = field(default_factory=asyncio.Future)


class HeadStart:
    """Chunks of several fills that go before everything else: others begin once all of these were asked for."""

    def __init__(self, chunk_count: int) -> None:
        self._left = chunk_count
        self._signal = Signal()

    def asked(self, chunk_count: int = 1) -> None:
        """So many more are under way, or will never be."""
        self._left -= chunk_count
        if self._left <= 0:
            self._signal.notify()

    async def over(self) -> None:
        """Until the others may begin."""
        while self._left > 0:
            await self._signal.wait()


class Fill:
    """Brings ``size_bytes`` of one blob to ``target``, or only some ``chunks``. Construct, then ``await run()`` once.

    While it runs, ``order`` grows by each verified chunk, ``crc64`` holds their checksums, and ``signal`` fires.
    Cancelling ``run`` leaves the verified chunks in place, to be resumed by a later fill.
    """

    def __init__(
        self,
        *,
        key: str,
        runner: Runner,
        clock: Clock,
        target: FileRef,
        sources: Sources,
        retry: RetryPolicy,
        width: int,
        priority: int = 0,
        with_sha256: bool = False,
        sha256_behind: bool = False,
        urgent: bool = False,
        chunks: frozenset[int] | None = None,
        first: frozenset[int] = frozenset(),
        head_start: HeadStart | None = None,
        observer: Observer | None = None,
    ) -> None:
        """``urgent``: somebody waits for the first chunk more than for the others.

        ``first``: chunks that go before the others, and with ``head_start`` before those of other fills.
        ``sha256_behind``: the SHA-256 is not begun before ``want_sha256``.
        """
        self.key = key
        self.target = target
        self.size_bytes = target.size_bytes
        self.chunk_count = chunk_count(target.size_bytes)
        self.wanted = frozenset(range(self.chunk_count)) if chunks is None else chunks
        self.crc64: dict[int, int] = {}
        self.order: list[int] = []
        self.bytes_from: dict[Level, int] = dict.fromkeys(Level, 0)
        self.bytes_of: Counter[str] = Counter()
        """Of those from an origin, by its name."""
        self.sha256 = ""
        self.signal = Signal()
        self._runner = runner
        self._clock = clock
        self._sources = sources
        self._retry = retry
        self._width = width
        self._priority = priority
        self._with_sha256 = with_sha256
        self._sha256_wanted = not sha256_behind
        self._sha256_priority = _HASH_BEHIND_PRIORITY if sha256_behind else _HASH_PRIORITY
        self._urgent = urgent
        self._pieces: list[_Piece] = []
        self._first = set(first & self.wanted)
        self._pending = deque(sorted(self.wanted, key=lambda index: (index not in self._first, index)))
        self._head_start = head_start
        self._unasked = len(self._first)
        self._observer = observer or Observer()
        self._restat = asyncio.Lock()
        self._followed = False
        self._aside = False

    @property
    def done_bytes(self) -> int:
        """Verified so far."""
        return sum(self.bytes_from.values())

    @property
    def chunks_done(self) -> bool:
        """All that are wanted are verified (the SHA-256 may still be running)."""
        return len(self.order) == len(self.wanted)

    async def run(self) -> None:
        """Until every chunk is verified and, if asked for, ``sha256`` is known. Raises the first typed error."""
        self._pieces = self._first_pieces() if self._urgent else []
        works = [self._fetch_piece(piece) for piece in self._pieces]
        works += [self._work() for _ in range(min(self._width, len(self._pending)))]
        if self._with_sha256:
            works.append(self._hash())
        try:
            await run_all(*works)
        finally:
            if self._head_start is not None:
                self._head_start.asked(self._unasked)  # nobody may wait for what is not going to be
                self._unasked = 0

    def prefer(self, chunks: AbstractSet[int]) -> None:
        """Somebody waits for these more than for the others: of what was not begun yet they go first."""
        new = (chunks & self.wanted) - self._first
        self._first |= new
        self._runner.prefer(self.target.path, [index * CHUNK_BYTES for index in new - self.crc64.keys()], _AHEAD)
        self._pending = deque(sorted(self._pending, key=lambda index: (index not in self._first, index)))

    def want_sha256(self) -> None:
        """Somebody waits for it now."""
        self._sha256_wanted = True
        self.signal.notify()

    async def mend(self, index: int) -> None:
        """Brings a single chunk again into a blob that may be mapped. Raises its typed error.

        Bytes are written only if they have the expected checksum, which must be known.
        """
        self._aside = True
        await self._bring(index)

    async def _work(self) -> None:
        while (index := await self._next()) is not None:
            crc64, level = await self._bring(index)
            self.crc64[index] = crc64
            self.order.append(index)
            self.bytes_from[level] += chunk_length(self.size_bytes, index)
            self._observer.on_chunk(index, crc64, level)
            self.signal.notify()

    async def _next(self) -> int | None:
        """The chunk to bring now, at its turn; None when there is none left."""
        head_start = self._head_start
        if head_start is not None and self._pending and self._pending[0] not in self._first:
            await head_start.over()
        if not self._pending:
            return None
        index = self._pending.popleft()
        if head_start is not None and self._unasked and index in self._first:
            self._unasked -= 1
            head_start.asked()
        return index

    async def _bring(self, index: int) -> tuple[int, Level]:
        sources = self._sources
        if index in sources.in_place and await self._confirmed_in_place(index):
            return sources.expected[index], Level.L1
        if sources.disk is not None and (sources.on_disk is None or index in sources.on_disk):
            crc64 = await self._copied_from_disk(index, sources.disk)
            if crc64 is not None:
                return crc64, Level.L2
        if sources.origin is None:
            raise IntegrityError(
                "a chunk is damaged, and no origin is known to fetch it from",
                hint="pull the model again with --source URI",
                path=self.target.path,
                chunk_index=index,
            )
        if index == 0 and self._pieces:
            crc64 = await self._joined_pieces()
            if crc64 is not None:
                return crc64, Level.L3
        return await self._fetched_from_origin(index), Level.L3

    def _first_pieces(self) -> list[_Piece]:
        """The first chunk in pieces; none where it is all, or where a nearer place than the origin may have it."""
        sources = self._sources
        on_disk = sources.disk is not None and (sources.on_disk is None or 0 in sources.on_disk)
        if self.chunk_count < 2 or sources.origin is None or on_disk or 0 in sources.in_place:
            return []
        length = CHUNK_BYTES // _PIECES
        return [_Piece(at, length) for at in range(0, CHUNK_BYTES, length)]

    async def _fetch_piece(self, piece: _Piece) -> None:
        source = self._origin()
        try:
            job = Fetch(source.spec, source.item, piece.offset_bytes, piece.length_bytes, self.target)
            piece.crc64.set_result((await self._moved(job, Level.L3)).crc64)
        except CachedError as error:
            if error.retryable:
                self._observer.on_retry(error)
            _log.info("transfer.piece_failed", offset_bytes=piece.offset_bytes, cause=error.message)
            piece.crc64.set_result(None)

    async def _joined_pieces(self) -> int | None:
        """The first chunk's checksum; None if it has to be fetched as every other chunk is, with all that may help."""
        pieces, self._pieces = self._pieces, []
        # All of them: one that still runs might write junk over what comes instead.
        found = [(await piece.crc64, piece.length_bytes) for piece in pieces]
        known = [(crc64, length_bytes) for crc64, length_bytes in found if crc64 is not None]
        whole = combine_crc64nvme(known)
        intact = len(known) == len(found) and whole == self._sources.expected.get(0, whole)
        return whole if intact else None

    async def _confirmed_in_place(self, index: int) -> bool:
        job = Checksum(self.target, index * CHUNK_BYTES, chunk_length(self.size_bytes, index))
        found = await self._moved(job, Level.L1)
        expected = self._sources.expected[index]
        if found.crc64 != expected:
            self._observer.on_damage(Level.L1, index, f"expected crc64 {expected:016x}, found {found.crc64:016x}")
        return found.crc64 == expected

    async def _copied_from_disk(self, index: int, disk: FileRef) -> int | None:
        offset, length = index * CHUNK_BYTES, chunk_length(self.size_bytes, index)
        expected = self._sources.expected.get(index, self._sources.disk_crc64.get(index))
        try:
            if self._aside and self.target.memory:
                found = await self._moved(Checksum(disk, offset, length), Level.L2)
                check_crc64(disk, offset, length, expected, found.crc64)
            return (await self._moved(Copy(disk, self.target, offset, length, expected), Level.L2)).crc64
        except (IntegrityError, LevelError, NotFoundError) as error:
            self._observer.on_damage(Level.L2, index, error.message)
            if self._sources.origin is None:
                raise
            return None

    async def _fetched_from_origin(self, index: int) -> int:
        started_s = self._clock.monotonic_s()
        attempt = 0
        while True:
            try:
                return await self._fetch(index)
            except CachedError as error:
                attempt += 1
                spent_s = self._clock.monotonic_s() - started_s
                if not error.retryable or attempt >= self._retry.max_attempts or spent_s > self._retry.budget_s:
                    raise
                self._observer.on_retry(error)
                _log.info("transfer.retry", chunk=index, attempt=attempt, reason=error.reason, cause=error.message)
                await self._clock.sleep(self._retry.delay_s(attempt, error))

    async def _fetch(self, index: int) -> int:
        offset, length = index * CHUNK_BYTES, chunk_length(self.size_bytes, index)
        expected = self._sources.expected.get(index)
        source = self._origin()
        try:
            moved = await self._moved(self._fetch_job(source, offset, length, expected), Level.L3)
        except ObjectChangedError:
            # Where the checksum is known, the same bytes under a new version (an object uploaded again) will do.
            if expected is None or not await self._follow_new_version(source):
                raise
            source = self._origin()
            moved = await self._moved(self._fetch_job(source, offset, length, expected), Level.L3)
        if expected is not None and moved.crc64 != expected:
            raise self._not_this_revision(source, index, expected, moved.crc64)
        return moved.crc64

    def _fetch_job(self, source: OriginSource, offset: int, length: int, expected: int | None) -> Fetch:
        aside = self._aside and expected is not None
        return Fetch(source.spec, source.item, offset, length, self.target, expected, aside)

    def _origin(self) -> OriginSource:
        source = self._sources.origin
        assert source is not None  # noqa: S101 - _bring has looked
        return source

    def _not_this_revision(self, source: OriginSource, index: int, expected: int, found: int) -> CachedError:
        """A new version with other bytes is a change of the object; the same version with other bytes is damage."""
        kind = ObjectChangedError if self._followed else IntegrityError
        return kind(
            "the origin's bytes are not those of this revision",
            hint="the object was replaced: pull the model again to get the new revision",
            uri=source.spec.uri,
            path=source.item.path,
            check="chunk-crc64nvme",
            expected=f"{expected:016x}",
            found=f"{found:016x}",
            offset_bytes=index * CHUNK_BYTES,
            length_bytes=chunk_length(self.size_bytes, index),
        )

    async def _follow_new_version(self, stale: OriginSource) -> bool:
        """True when the origin has the object, of the same size, at another version, which is used from now on."""
        async with self._restat:
            current = self._sources.origin
            if current is not None and current.item.version != stale.item.version:
                return True
            answer = await self._runner.run(StatObjects(stale.spec, (stale.item.path,)))
            if not isinstance(answer, Listing):
                raise MoverError("a mover answered a stat with something else")
            item = answer.items[0]
            if item.version == stale.item.version or item.size_bytes != self.size_bytes:
                return False
            self._sources = replace(self._sources, origin=replace(stale, item=item))
            self._followed = True
            return True

    async def _moved(self, job: Fetch | Copy | Checksum, level: Level) -> Moved:
        first = job.offset_bytes // CHUNK_BYTES in self._first
        answer = await self._runner.run(job, priority=self._priority - _AHEAD if first else self._priority)
        if not isinstance(answer, Moved):
            raise MoverError("a mover answered a move with something else")
        if level is Level.L3:
            self.bytes_of[answer.origin] += answer.length_bytes
        self._observer.on_moved(level, answer)
        return answer

    async def _hash(self) -> None:
        """SHA-256 of the whole, behind the watermark of contiguous chunks. A lost mover costs a new start from 0."""
        while not self._sha256_wanted:
            await self.signal.wait()
        for restart in range(_HASH_RESTARTS + 1):
            try:
                self.sha256 = await self._hash_once()
            except MoverError:
                if restart == _HASH_RESTARTS:
                    raise
            else:
                self.signal.notify()
                return

    async def _hash_once(self) -> str:
        done = watermark = 0
        if self.chunk_count == 0:
            return "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        while True:
            while watermark in self.crc64 and watermark - done < _HASH_STEP_CHUNKS:
                watermark += 1
            if watermark == done:
                await self.signal.wait()
                continue
            final = watermark == self.chunk_count
            end = min(watermark * CHUNK_BYTES, self.size_bytes)
            job = Hash(self.key, self.target, done * CHUNK_BYTES, end - done * CHUNK_BYTES, final)
            answer = await self._runner.run(job, key=self.key, priority=self._sha256_priority)
            if not isinstance(answer, Hashed):
                raise MoverError("a mover answered a hash with something else")
            if final:
                return answer.sha256
            done = watermark
