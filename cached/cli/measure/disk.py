"""How fast a folder of L2 takes models and gives them back, through the code that movers run."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cached.cli.measure.scratch import Span, filled_segment, scratch_file
from cached.levels.base import FileRef
from cached.transfer.jobs import Copy, Moved
from cached.transfer.worker import Worker
from cached.units import CHUNK_BYTES

_ALIGNMENTS = (512, 4096)


@dataclass(frozen=True, slots=True)
class DiskRates:
    """``write`` includes the fsync at the end. ``size_bytes`` of each may be less than asked for: time was up."""

    write: Span
    read: Span


def rates(folder: Path, size_bytes: int, *, shm: str, threads: int, limit_s: float) -> DiskRates:
    """Writes a temporary file from a segment in ``shm`` and reads it back, chunk by chunk, on ``threads`` threads.

    Either direction ends after ``limit_s``, or a little later. Raises OSError, LevelError, NoRoomError.
    """
    with filled_segment(size_bytes, shm) as memory, scratch_file(folder, size_bytes) as file:
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            write = _moved(memory, file, threads, limit_s, lambda: os.fsync(fd))
            # What the file system could not write directly would come from memory again.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            # Never past what was written: holes are read without the disk.
            read = _moved(file, memory, threads, limit_s, lambda: None, upto_bytes=write.size_bytes)
        finally:
            os.close(fd)
        return DiskRates(write, read)


def direct_alignment(folder: Path) -> int | None:
    """The least alignment at which O_DIRECT writes and reads work here: 512 or 4096; None where they do not at all."""
    with scratch_file(folder, max(_ALIGNMENTS)) as ref, mmap.mmap(-1, max(_ALIGNMENTS)) as page:
        for alignment in _ALIGNMENTS:
            if _direct_works(ref.path, page, alignment):
                return alignment
    return None


def _direct_works(path: str, page: mmap.mmap, length_bytes: int) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    try:
        with memoryview(page)[:length_bytes] as view:
            return os.pwritev(fd, [view], 0) == os.preadv(fd, [view], 0) == length_bytes
    except OSError as error:
        if error.errno in {errno.EINVAL, errno.EOPNOTSUPP}:
            return False
        raise
    finally:
        os.close(fd)


def _moved(
    source: FileRef,
    target: FileRef,
    threads: int,
    limit_s: float,
    finish: Callable[[], object],
    upto_bytes: int | None = None,
) -> Span:
    """Chunks in order until time is up or all are moved."""
    end_bytes = source.size_bytes if upto_bytes is None else upto_bytes
    worker, counter, stop = Worker(), itertools.count(), threading.Event()
    cpu_s, began_s = time.process_time(), time.perf_counter()

    def work() -> int:
        done = 0
        while not stop.is_set() and time.perf_counter() - began_s < limit_s:
            at = next(counter) * CHUNK_BYTES
            if at >= end_bytes:
                break
            moved = worker.perform(Copy(source, target, at, min(CHUNK_BYTES, end_bytes - at)))
            assert isinstance(moved, Moved)  # noqa: S101 - what a Copy answers
            done += moved.length_bytes
        return done

    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="measure") as executor:
            try:
                done = sum(executor.map(lambda _: work(), range(threads)))
            finally:
                stop.set()  # an interrupted measurement does not go on to its end
    finally:
        worker.close()
    finish()
    return Span(done, time.perf_counter() - began_s, time.process_time() - cpu_s)
