"""Moving ranges of bytes between local files, with their checksums. Runs in movers, from any thread.

Disk is read and written with O_DIRECT where offset and length allow it and the file system supports it, else buffered
and dropped from the page cache: weights that are in L1 or on their way there must not take memory a second time. Before
a buffered read they are dropped too, so that a checksum tells of the disk (but for pages that some process has mapped).

Memory is reached through a mapping where its pages are huge: nothing is copied then. Small pages would cost a fault
each, in every mover, which is dearer than copying what is in them: they are read and written by system calls through a
buffer that stays in the processor's cache. Neither ever raises SIGBUS; a shortage is an error.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Self

from cached.checksum import crc64_hex, crc64nvme
from cached.errors import IntegrityError, InvalidRequestError, LevelError, NotFoundError
from cached.levels.base import FileRef
from cached.levels.files import level_error, level_errors, level_of, open_checked
from cached.levels.memory import Mapping, allocate_pages, huge_buffer, open_mapping
from cached.units import CHUNK_BYTES, MIB

STEP_BYTES = 2 * MIB
"""What one system call reads from or writes to a disk, and what is checksummed and copied at once after that.

Several threads' steps together stay in the processor's last cache. Of 4 MiB they do not, and smaller ones, or a copy in
more calls, pay more for waking up, for the interpreter and for the lock that tmpfs has on each file that is written.
"""
CACHED_BYTES = MIB // 2
"""What is checksummed, and copied while it is still in the core's own cache, where bytes come from memory."""

_BLOCK_BYTES = 4096
_KEPT_S = 10.0
_NO_DIRECT = frozenset({errno.EINVAL, errno.EOPNOTSUPP})

_Call = Callable[[int, list[memoryview], int], int]


class Slabs:
    """Private buffers of CHUNK_BYTES each, as many as are used at the same time: a thread has one for its job.

    Were it a thread's for ever, each of dozens would have touched all of its own in the end. What a burst needed goes
    back to the host with the first job that ends after nobody needed it for ten seconds. Thread-safe.
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._local = threading.local()
        self._lock = threading.Lock()
        self._free: deque[tuple[float, memoryview]] = deque()
        """Since when each is free; the one that was used last comes last."""

    def view(self) -> memoryview:
        """This thread's buffer until ``give_back``, with whatever it held last, whosever it was."""
        view: memoryview | None = getattr(self._local, "view", None)
        if view is None:
            with self._lock:
                view = self._free.pop()[1] if self._free else None
            self._local.view = view = huge_buffer(CHUNK_BYTES) if view is None else view
        return view

    def give_back(self) -> None:
        """The thread's job is done."""
        view: memoryview | None = getattr(self._local, "view", None)
        if view is not None:
            now_s, self._local.view = self._now_s(), None
            with self._lock:
                self._free.append((now_s, view))
                while self._free[0][0] < now_s - _KEPT_S:
                    self._free.popleft()


class LocalFile:
    """An open file of a level; reads and writes whole ranges by system calls. A context manager.

    For O_DIRECT to be used on disk, views must lie in memory as their offset lies in the file, modulo the page size.
    """

    def __init__(self, ref: FileRef, *, writable: bool = False) -> None:
        self._ref = ref
        self._direct = False
        self._may_be_direct = not ref.memory
        with _local_file():
            self._fd = open_checked(level_of(ref), ref.path, os.O_RDWR if writable else os.O_RDONLY, ref)

    def read(self, offset_bytes: int, view: memoryview) -> None:
        """Fills ``view``. Raises LevelError, also when the file ends before."""
        self._move(os.preadv, "read", offset_bytes, view)

    def write(self, offset_bytes: int, view: memoryview) -> None:
        """Writes all of ``view``. Raises LevelError, or NoRoomError."""
        self._move(os.pwritev, "write", offset_bytes, view)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        os.close(self._fd)

    def _move(self, call: _Call, doing: str, offset_bytes: int, view: memoryview) -> None:
        try:  # not ``level_errors``, which costs more: this runs some thousand times for a GB
            done = call(self._fd, [view], offset_bytes) if self._ref.memory else 0
            while done < len(view):
                done += self._move_step(call, offset_bytes + done, view, done)
        except OSError as error:
            raise level_error(level_of(self._ref), self._ref.path, doing, error, len(view)) from error

    def _move_step(self, call: _Call, at_bytes: int, view: memoryview, done: int) -> int:
        length = min(STEP_BYTES, len(view) - done)
        direct = self._may_be_direct and at_bytes % _BLOCK_BYTES == 0 and length >= _BLOCK_BYTES
        if direct:
            length -= length % _BLOCK_BYTES
        if not direct and not self._ref.memory and call is os.preadv:
            # What the disk has, and not what the page cache still remembers of it.
            os.posix_fadvise(self._fd, at_bytes, length, os.POSIX_FADV_DONTNEED)
        try:
            self._set_direct(direct)
            with view[done : done + length] as step:
                moved = call(self._fd, [step], at_bytes)
        except OSError as error:
            if direct and error.errno in _NO_DIRECT:
                self._may_be_direct = False
                return 0
            raise
        if not moved:
            raise OSError(errno.ENODATA, f"it ends at byte {at_bytes}")
        if not direct and not self._ref.memory:
            os.posix_fadvise(self._fd, at_bytes, moved, os.POSIX_FADV_DONTNEED)
        return moved

    def _set_direct(self, direct: bool) -> None:  # noqa: FBT001 - the one thing it sets
        if direct != self._direct:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, os.O_DIRECT if direct else 0)
            self._direct = direct


@contextmanager
def mapped(ref: FileRef, *, writable: bool = False) -> Iterator[Mapping]:
    """A mapping for one job, closed with it: an evicted segment cannot be reused while anybody maps it."""
    with _local_file():
        mapping = open_mapping(ref, writable=writable)
    with mapping:
        yield mapping


@contextmanager
def pages_for(target: FileRef, offset_bytes: int, length_bytes: int) -> Iterator[memoryview]:
    """The range of a memory file, writable and backed by pages. Raises NoRoomError, LevelError."""
    with mapped(target, writable=True) as mapping:
        allocate_pages(mapping, offset_bytes, length_bytes, huge=True)
        with mapping.view[offset_bytes : offset_bytes + length_bytes] as view:
            yield view


@contextmanager
def _huge_view(source: FileRef, offset_bytes: int, length_bytes: int) -> Iterator[memoryview]:
    """The range of a memory file with huge pages, to be read in place."""
    with mapped(source) as mapping:
        mapping.fault_in(offset_bytes, length_bytes)
        with mapping.view[offset_bytes : offset_bytes + length_bytes] as view:
            yield view


def check_range(ref: FileRef, offset_bytes: int, length_bytes: int) -> None:
    """Raises InvalidRequestError for a range that is not inside the file."""
    if offset_bytes < 0 or length_bytes < 0 or offset_bytes + length_bytes > ref.size_bytes:
        raise InvalidRequestError(
            f"bytes {offset_bytes} to {offset_bytes + length_bytes} are not in {ref.path} of {ref.size_bytes} bytes",
            value=ref.path,
        )


def pieces(source: FileRef, offset_bytes: int, length_bytes: int, slab: memoryview) -> Iterator[memoryview]:
    """The range in pieces of STEP_BYTES at most, each valid until the next. Iterate to the end. May use ``slab``."""
    if source.memory and has_huge_pages(source):
        with _huge_view(source, offset_bytes, length_bytes) as view:
            for at in range(0, length_bytes, CACHED_BYTES):
                with view[at : at + CACHED_BYTES] as piece:
                    yield piece
        return
    step_bytes = CACHED_BYTES if source.memory else STEP_BYTES
    with LocalFile(source) as file:
        for at in range(0, length_bytes, step_bytes):
            with slab[: min(step_bytes, length_bytes - at)] as piece:
                file.read(offset_bytes + at, piece)
                yield piece


def checksum(source: FileRef, offset_bytes: int, length_bytes: int, slab: memoryview) -> int:
    """CRC64-NVME of a range of a local file."""
    crc64 = 0
    for piece in pieces(source, offset_bytes, length_bytes, slab):
        crc64 = crc64nvme(piece, crc64)
    return crc64


def copy_to_memory(source: FileRef, target: FileRef, offset_bytes: int, length_bytes: int, slab: memoryview) -> int:
    """Disk or memory → memory at the same offset; the CRC64-NVME of the bytes as read. Raises NoRoomError."""
    crc64 = 0
    if has_huge_pages(target):
        with pages_for(target, offset_bytes, length_bytes) as view, LocalFile(source) as reader:
            return _read_checksummed(reader, offset_bytes, view, crc64)
    at_bytes = offset_bytes
    with LocalFile(target, writable=True) as file:
        for piece in pieces(source, offset_bytes, length_bytes, slab):
            crc64 = crc64nvme(piece, crc64)
            file.write(at_bytes, piece)
            at_bytes += len(piece)
    return crc64


def copy_to_disk(
    source: FileRef, target: FileRef, offset_bytes: int, length_bytes: int, expected: int | None, slab: memoryview
) -> int:
    """Memory or disk → disk at the same offset; the CRC64-NVME of the bytes as read.

    Nothing is written unless the whole range is as expected; a range that the slab cannot hold is read twice for that.
    """
    if source.memory and has_huge_pages(source):
        with _huge_view(source, offset_bytes, length_bytes) as view, LocalFile(target, writable=True) as writer:
            crc64 = crc64nvme(view)
            check_crc64(source, offset_bytes, length_bytes, expected, crc64)
            writer.write(offset_bytes, view)
        return crc64
    if length_bytes > len(slab) and expected is not None:
        found = checksum(source, offset_bytes, length_bytes, slab)
        check_crc64(source, offset_bytes, length_bytes, expected, found)
    crc64 = 0
    with LocalFile(source) as reader, LocalFile(target, writable=True) as writer:
        for at in range(0, length_bytes, len(slab)):
            with slab[: min(len(slab), length_bytes - at)] as view:
                crc64 = _read_checksummed(reader, offset_bytes + at, view, crc64)
                if length_bytes <= len(slab):
                    check_crc64(source, offset_bytes, length_bytes, expected, crc64)
                writer.write(offset_bytes + at, view)
    check_crc64(source, offset_bytes, length_bytes, expected, crc64)
    return crc64


def _read_checksummed(reader: LocalFile, offset_bytes: int, view: memoryview, crc64: int) -> int:
    for at in range(0, len(view), STEP_BYTES):
        with view[at : at + STEP_BYTES] as step:
            reader.read(offset_bytes + at, step)
            crc64 = crc64nvme(step, crc64)
    return crc64


def has_huge_pages(ref: FileRef) -> bool:
    """Whether the file system of a memory file gives huge pages to mappings that ask for them."""
    with _local_file(), level_errors(level_of(ref), ref.path, "stat"):
        device = os.stat(ref.path).st_dev
    return f"{os.major(device)}:{os.minor(device)}" in _huge_mounts()


@cache
def _huge_mounts() -> frozenset[str]:
    """Devices of the file systems mounted with huge pages. proc_pid_mountinfo(5)."""
    found = set()
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            fields, _, rest = line.partition(" - ")
            options = rest.split()[-1].split(",")
            if any(option.startswith("huge=") and option != "huge=never" for option in options):
                found.add(fields.split()[2])
    return frozenset(found)


def check_crc64(source: FileRef, offset_bytes: int, length_bytes: int, expected: int | None, found: int) -> None:
    """Raises IntegrityError when something else was expected."""
    if expected is not None and found != expected:
        raise IntegrityError(
            f"bytes {offset_bytes} to {offset_bytes + length_bytes} of {source.path} are damaged: "
            f"expected crc64 {crc64_hex(expected)}, found {crc64_hex(found)}",
            check="chunk-crc64nvme",
            path=source.path,
            expected=crc64_hex(expected),
            found=crc64_hex(found),
            offset_bytes=offset_bytes,
            length_bytes=length_bytes,
        )


@contextmanager
def _local_file() -> Iterator[None]:
    """A file that a job names and that is gone is a failing level; NotFoundError is for what users ask for."""
    try:
        yield
    except NotFoundError as error:
        raise LevelError(error.message, **{**error.fields, "cause": "gone"}) from error
