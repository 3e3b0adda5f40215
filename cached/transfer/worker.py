"""What a mover does with a job. Also runs in the process of a test. Thread-safe; knows nothing of pipes and models."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cached.checksum import RunningDigest, new_digest
from cached.errors import InvalidRequestError, MoverError, NotFoundError, ObjectChangedError, OriginDeniedError
from cached.origins.base import Abort, Origin, OriginObject, OriginSpec, ReadInto
from cached.transfer import ranges
from cached.transfer.control import Control
from cached.transfer.jobs import (
    Checksum,
    Clear,
    Copy,
    Digests,
    Fetch,
    FindTensors,
    Found,
    Hash,
    Hashed,
    Hedge,
    Job,
    Listing,
    ListObjects,
    Moved,
    PartDigests,
    Prepare,
    ReadTexts,
    Result,
    StatObjects,
    Texts,
    Upload,
)
from cached.transfer.landing import clear, land, read_checksummed
from cached.units import CHUNK_BYTES

_MAX_ORIGINS = 8
_MAX_HASHES = 1024
_STAT_THREADS = 8


class Worker:
    """Performs jobs, blocking, from any number of threads. Keeps origins open and running hashes between jobs."""

    def __init__(self, open_origin: Callable[[OriginSpec], Origin] | None = None) -> None:
        """``open_origin``: that of origins.registry, unless another is given."""
        self._origins = OpenOrigins(open_origin)
        self._hashes = RunningHashes()
        self._slabs = ranges.Slabs()

    def perform(self, job: Job, control: Control | None = None) -> Result:
        """The job's result; raises its CachedError. Other exceptions are faults of the code below.

        After an abort by ``control`` a Fetch or Hedge raises MoverError, or another error that came of it. Where an
        origin denies what it allowed before, the job is done once more, with the credentials that there are now.
        """
        control = control or Control()
        try:
            return self._perform(job, control)
        except _LapsedError:
            return self._perform(job, control)
        finally:
            self._slabs.give_back()

    def _perform(self, job: Job, control: Control) -> Result:
        started_s, started_cpu_s = time.perf_counter(), time.thread_time()
        match job:
            case ListObjects() | StatObjects() | Prepare() | ReadTexts():
                return self._ask(job)
            case Upload():
                return Listing((_upload(job),))
            case FindTensors():
                return self._find_tensors(job)
            case Hash():
                digest = self._hashes.feed(job, self._slabs.view())
                return Hashed(digest, job.length_bytes, time.perf_counter() - started_s)
            case PartDigests():
                return Digests(self._part_digests(job))
            case Fetch() | Hedge() | Copy() | Checksum() | Clear():
                crc64, length_bytes = self._move(job, control)
                busy_s, cpu_s = time.perf_counter() - started_s, time.thread_time() - started_cpu_s
                return Moved(crc64, length_bytes, busy_s, cpu_s)

    def close(self) -> None:
        """Ends the origins' connections; no job may be running."""
        self._origins.close()

    def _ask(self, job: ListObjects | StatObjects | Prepare | ReadTexts) -> Listing | Texts:
        match job:
            case ListObjects():
                with self._origins.use(job.origin) as origin:
                    return Listing(tuple(origin.list_objects()))
            case StatObjects():
                return Listing(self._stat(job))
            case Prepare():
                with self._origins.use(job.origin) as origin:
                    origin.prepare()
                return Listing(())
            case ReadTexts():
                return Texts(self._read_texts(job))

    def _move(self, job: Fetch | Hedge | Copy | Checksum | Clear, control: Control) -> tuple[int, int]:
        match job:
            case Fetch():
                ranges.check_range(job.target, job.offset_bytes, job.length_bytes)
                if job.aside:
                    return self._fetch_aside(job, control, lambda: None), job.length_bytes
                control.check()
                crc64 = self._fetch(job, control.abort)
                # What a broken read may have left is never taken for a result.
                control.check()
                return crc64, job.length_bytes
            case Hedge():
                ranges.check_range(job.fetch.target, job.fetch.offset_bytes, job.fetch.length_bytes)
                return self._hedge(job.fetch, control), job.fetch.length_bytes
            case Copy():
                ranges.check_range(job.source, job.offset_bytes, job.length_bytes)
                ranges.check_range(job.target, job.offset_bytes, job.length_bytes)
                return self._copy(job), job.length_bytes
            case Checksum():
                ranges.check_range(job.source, job.offset_bytes, job.length_bytes)
                crc64 = ranges.checksum(job.source, job.offset_bytes, job.length_bytes, self._slabs.view())
                return crc64, job.length_bytes
            case Clear():
                ranges.check_range(job.target, job.offset_bytes, job.length_bytes)
                clear(job.target, job.offset_bytes, job.length_bytes)
                return 0, job.length_bytes

    def _hedge(self, job: Fetch, control: Control) -> int:
        return self._fetch_aside(job, control, control.arrived)

    def _fetch_aside(self, job: Fetch, control: Control, before_write: Callable[[], None]) -> int:
        """By way of the thread's own buffer."""
        if job.length_bytes > CHUNK_BYTES:
            raise InvalidRequestError(f"a range of {job.length_bytes} bytes fits no buffer", value=job.item.path)
        with self._slabs.view()[: job.length_bytes] as view:
            control.check()
            with self._opened(job, control.abort) as read_into:
                crc64 = read_checksummed(view, read_into)
            control.check()
            before_write()
            if not job.aside or crc64 == job.expected_crc64:
                with ranges.LocalFile(job.target, writable=True) as file:
                    file.write(job.offset_bytes, view)
            return crc64

    @contextmanager
    def _opened(self, job: Fetch, abort: Abort) -> Iterator[ReadInto]:
        with (
            self._origins.use(job.origin) as origin,
            origin.open_range(job.item, job.offset_bytes, job.length_bytes, abort) as read_into,
        ):
            yield read_into

    def _fetch(self, job: Fetch, abort: Abort) -> int:
        with self._opened(job, abort) as read_into:
            return land(job.target, job.offset_bytes, job.length_bytes, read_into, self._slabs.view())

    def _copy(self, job: Copy) -> int:
        where = (job.source, job.target, job.offset_bytes, job.length_bytes)
        if not job.target.memory:
            return ranges.copy_to_disk(*where, job.expected_crc64, self._slabs.view())
        crc64 = ranges.copy_to_memory(*where, self._slabs.view())
        ranges.check_crc64(job.source, job.offset_bytes, job.length_bytes, job.expected_crc64, crc64)
        return crc64

    def _stat(self, job: StatObjects) -> tuple[OriginObject, ...]:
        with self._origins.use(job.origin) as origin:
            if len(job.paths) == 1:
                return (origin.stat(job.paths[0]),)
            with ThreadPoolExecutor(_STAT_THREADS, thread_name_prefix="stat") as executor:
                return tuple(executor.map(origin.stat, job.paths))

    def _read_texts(self, job: ReadTexts) -> tuple[str, ...]:
        with (
            self._origins.use(job.origin) as origin,
            ThreadPoolExecutor(_STAT_THREADS, thread_name_prefix="read") as executor,
        ):
            return tuple(executor.map(lambda item: _read_text(origin, item, job.max_bytes), job.items))

    def _find_tensors(self, job: FindTensors) -> Found:
        from cached.transfer.heads import find_tensors  # takes a while to import, and few movers are asked

        if job.source is not None:
            with ranges.LocalFile(job.source) as file:
                return find_tensors(job, job.source.path, job.source.size_bytes, partial(_read, file.read))
        if job.origin is None or job.item is None:
            raise InvalidRequestError("neither a local file nor an object of an origin is named", value="FindTensors")
        with self._origins.use(job.origin) as origin:

            def read(offset_bytes: int, length_bytes: int) -> bytes:
                assert job.item is not None  # noqa: S101 - looked at above
                with origin.open_range(job.item, offset_bytes, length_bytes) as read_into:
                    return _read(lambda _offset, view: read_into(view), offset_bytes, length_bytes)

            return find_tensors(job, job.item.path, job.item.size_bytes, read)

    def _part_digests(self, job: PartDigests) -> tuple[str, ...]:
        values_hex: list[str] = []
        at = 0
        for size_bytes in job.part_sizes_bytes:
            ranges.check_range(job.source, at, size_bytes)
            digest = new_digest(job.algorithm, size_bytes)
            for piece in ranges.pieces(job.source, at, size_bytes, self._slabs.view()):
                digest.update(piece)
            values_hex.append(digest.hexdigest())
            at += size_bytes
        return tuple(values_hex)


def _upload(job: Upload) -> OriginObject:
    from cached.origins.registry import open_writable

    origin = open_writable(job.origin)
    try:
        # Our own file, and not what somebody may have put in its place.
        with ranges.LocalFile(job.source):
            return origin.upload_file(Path(job.source.path), job.path)
    finally:
        origin.close()


def _read_text(origin: Origin, item: OriginObject, max_bytes: int) -> str:
    try:
        # A listing may know less of the version than the answer will say.
        stated = origin.stat(item.path)
        if stated.size_bytes > max_bytes:
            return ""
        content = bytearray(stated.size_bytes)
        with origin.open_range(stated, 0, len(content)) as read_into:
            read_into(memoryview(content))
        return content.decode("utf-8")
    except (NotFoundError, ObjectChangedError, UnicodeDecodeError):
        return ""


def _read(fill: Callable[[int, memoryview], None], offset_bytes: int, length_bytes: int) -> bytes:
    buffer = bytearray(length_bytes)
    with memoryview(buffer) as view:
        fill(offset_bytes, view)
    return bytes(buffer)


class _LapsedError(OriginDeniedError):
    """Access is denied that was given before: the credentials may have expired since they were read."""


class OpenOrigins:
    """Origins by their specification, the least recently used closed when there are too many. Thread-safe."""

    def __init__(self, open_origin: Callable[[OriginSpec], Origin] | None = None) -> None:
        self._opener = open_origin
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[str, tuple[tuple[str, str], ...]], _Shared] = OrderedDict()

    @contextmanager
    def use(self, spec: OriginSpec) -> Iterator[Origin]:
        """The open origin, kept open while in use. One that denied access is opened anew: credentials change.

        Raises _LapsedError where it denies access that it gave before.
        """
        key = (spec.uri, tuple(sorted(spec.options.items())))
        shared = self._take(key, spec)
        try:
            yield shared.origin
            shared.allowed = True
        except OriginDeniedError as error:
            with self._lock:
                if self._open.get(key) is shared:
                    del self._open[key]
                    shared.kept = False
            if shared.allowed:
                raise _LapsedError(error.message, hint=error.hint, **error.fields) from error
            raise
        finally:
            self._give_back(shared)

    def close(self) -> None:
        """Closes all; none may be in use."""
        with self._lock:
            for shared in self._open.values():
                shared.origin.close()
            self._open.clear()

    def _take(self, key: tuple[str, tuple[tuple[str, str], ...]], spec: OriginSpec) -> _Shared:
        from cached.origins.registry import open_origin

        with self._lock:
            shared = self._open.pop(key, None) or _Shared((self._opener or open_origin)(spec))
            self._open[key] = shared
            shared.users += 1
            surplus = [self._open.popitem(last=False)[1] for _ in range(len(self._open) - _MAX_ORIGINS)]
        for old in surplus:
            old.kept = False
            self._close_if_unused(old)
        return shared

    def _give_back(self, shared: _Shared) -> None:
        with self._lock:
            shared.users -= 1
        self._close_if_unused(shared)

    def _close_if_unused(self, shared: _Shared) -> None:
        with self._lock:
            unused = not shared.kept and not shared.users and not shared.closed
            shared.closed = shared.closed or unused
        if unused:
            shared.origin.close()


@dataclass(slots=True, eq=False)
class _Shared:
    """An open origin; ``kept`` while new users may get it, ``allowed`` once it has given access."""

    origin: Origin
    users: int = 0
    allowed: bool = False
    kept: bool = True
    closed: bool = False


class RunningHashes:
    """SHA-256 states between jobs, by key. Thread-safe; the state of a key is with one job at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._states: OrderedDict[str, tuple[RunningDigest, int]] = OrderedDict()

    def feed(self, job: Hash, slab: memoryview) -> str:
        """Takes the range in; the digest in hex if it is the last, else "".

        Raises MoverError for a range that does not follow what was fed before. A failure drops the state, so that no
        byte is ever counted twice.
        """
        ranges.check_range(job.source, job.offset_bytes, job.length_bytes)
        running = self._take(job)
        for piece in ranges.pieces(job.source, job.offset_bytes, job.length_bytes, slab):
            running.update(piece)
        if job.final:
            return running.hexdigest()
        with self._lock:
            self._states[job.key] = (running, job.offset_bytes + job.length_bytes)
            while len(self._states) > _MAX_HASHES:
                self._states.popitem(last=False)
        return ""

    def _take(self, job: Hash) -> RunningDigest:
        with self._lock:
            running, at_bytes = self._states.pop(job.key, (None, 0))
        if job.offset_bytes == 0:
            return new_digest("sha256")
        if running is None or at_bytes != job.offset_bytes:
            raise MoverError(
                f"no running SHA-256 of {job.source.path} at byte {job.offset_bytes}", hint="start again from byte 0"
            )
        return running
