"""How fast this host fills shared memory, copies and checksums, on one core."""

from __future__ import annotations

import ctypes
import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cached.checksum import crc64nvme
from cached.cli.measure.scratch import Span, scratch_segment
from cached.levels.base import FileRef
from cached.levels.memory import allocate_pages, huge_buffer, open_mapping
from cached.levels.shm import SHM_FOLDER
from cached.transfer.landing import land
from cached.units import CHUNK_BYTES, MIB

_BLOCK_BYTES = MIB // 2
"""Stays in the processor's cache, as what comes from a network does."""
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Filled:
    """Of a segment: filled when it was new, and when it had its pages. ``huge_share`` of it is in huge pages.

    ``first``: of a segment before it. Memory that nobody touched lately may first have to come from a hypervisor.
    """

    first: Span
    fresh: Span
    again: Span
    huge_share: float


def fill(size_bytes: int, folder: str = SHM_FOLDER) -> Filled:
    """Fills a segment as a mover does with what arrives: page by page or huge page by huge page, checksummed.

    Raises LevelError, NoRoomError, OSError.
    """
    with scratch_segment(size_bytes, folder) as ref:
        first = _land(ref)
    with scratch_segment(size_bytes, folder) as ref:
        fresh = _land(ref)
        again = min((_land(ref) for _ in range(_ROUNDS)), key=lambda span: span.seconds)
        return Filled(first, fresh, again, _huge_share(ref))


def copy(size_bytes: int) -> Span:
    """Copies between private buffers larger than caches."""
    buffers = [_touched(size_bytes) for _ in range(2)]
    target, source = (ctypes.addressof(ctypes.c_char.from_buffer(buffer)) for buffer in buffers)
    return _best(size_bytes, lambda: ctypes.memmove(target, source, size_bytes))


def checksum_crc64(size_bytes: int) -> Span:
    """CRC64-NVME, on one core."""
    data = _touched(size_bytes)
    return _best(size_bytes, lambda: crc64nvme(data))


def checksum_sha256(size_bytes: int) -> Span:
    """SHA-256, on one core."""
    data = _touched(size_bytes)
    return _best(size_bytes, lambda: hashlib.sha256(data).digest(), rounds=1)


def timed(size_bytes: int, work: Callable[[], object]) -> Span:
    """On the clock, and on all threads of this process."""
    cpu_s, began_s = time.process_time(), time.perf_counter()
    work()
    return Span(size_bytes, time.perf_counter() - began_s, time.process_time() - cpu_s)


def _best(size_bytes: int, work: Callable[[], object], rounds: int = _ROUNDS) -> Span:
    return min((timed(size_bytes, work) for _ in range(rounds)), key=lambda span: span.seconds)


def _touched(size_bytes: int) -> memoryview:
    """Private memory with pages of its own: zeros that nobody wrote are all one page, in the processor's cache."""
    buffer = huge_buffer(size_bytes)
    ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(buffer)), 1, size_bytes)
    return buffer


def _land(ref: FileRef) -> Span:
    block = memoryview(bytes(range(256)) * (_BLOCK_BYTES // 256))
    slab = huge_buffer(CHUNK_BYTES)

    def read_into(view: memoryview) -> None:
        view[:] = block[: len(view)]

    def work() -> None:
        for at in range(0, ref.size_bytes, CHUNK_BYTES):
            land(ref, at, min(CHUNK_BYTES, ref.size_bytes - at), read_into, slab)

    return timed(ref.size_bytes, work)


def _huge_share(ref: FileRef) -> float:
    """Mapped whole, as the kernel tells it of the mapping."""
    with open_mapping(ref, writable=True) as mapping:
        mapping.advise_huge()
        allocate_pages(mapping, 0, ref.size_bytes, huge=True)
        smaps = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace")
        _, _, ours = smaps.partition(f"{mapping.address:x}-")
        found = re.search(r"^ShmemPmdMapped:\s+(\d+) kB", ours, re.MULTILINE)
        return int(found[1]) * 1024 / ref.size_bytes if found else 0.0
