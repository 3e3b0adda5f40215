"""Where bytes of an origin land: in a range of a local file, checksummed on their way. Runs in movers, from any thread.

They are taken in small pieces that are still in the processor's cache when they are checksummed and written. Into small
pages that write is a system call: on the way to memory of 4 KiB pages it costs half of what a mapping does, whose every
page is a fault (0.27 against 0.56 CPU-s/GB, receiving included). Huge pages are filled in place.
"""

from __future__ import annotations

import traceback

from cached.checksum import crc64nvme
from cached.levels.base import FileRef
from cached.origins.base import ReadInto
from cached.transfer import ranges
from cached.units import CHUNK_BYTES, MIB

PIECE_BYTES = MIB // 2
_ZEROS = memoryview(bytes(PIECE_BYTES))


def land(target: FileRef, offset_bytes: int, length_bytes: int, read_into: ReadInto, slab: memoryview) -> int:
    """Fills a range of ``target`` with what ``read_into`` gives; its CRC64-NVME.

    Raises what ``read_into`` raises, NoRoomError and LevelError. ``slab`` is a private buffer of CHUNK_BYTES.
    """
    if target.memory and ranges.has_huge_pages(target):
        with ranges.pages_for(target, offset_bytes, length_bytes) as view:
            return read_checksummed(view, read_into)
    crc64 = 0
    with ranges.LocalFile(target, writable=True) as file:
        if not target.memory:  # a disk is written in large pieces, which it takes directly
            for at in range(0, length_bytes, CHUNK_BYTES):
                view = slab[: min(CHUNK_BYTES, length_bytes - at)]
                crc64 = read_checksummed(view, read_into, crc64)
                file.write(offset_bytes + at, view)
            return crc64
        for at in range(0, length_bytes, PIECE_BYTES):
            view = slab[: min(PIECE_BYTES, length_bytes - at)]
            read_into(view)
            crc64 = crc64nvme(view, crc64)
            file.write(offset_bytes + at, view)
    return crc64


def clear(target: FileRef, offset_bytes: int, length_bytes: int) -> None:
    """Zeroes a range of a memory file, and allocates the pages that it has not. Raises NoRoomError, LevelError."""
    if ranges.has_huge_pages(target):
        with ranges.pages_for(target, offset_bytes, length_bytes) as view:
            for at in range(0, length_bytes, PIECE_BYTES):
                with view[at : at + PIECE_BYTES] as piece:
                    piece[:] = _ZEROS[: len(piece)]
        return
    with ranges.LocalFile(target, writable=True) as file:
        for at in range(0, length_bytes, PIECE_BYTES):
            file.write(offset_bytes + at, _ZEROS[: min(PIECE_BYTES, length_bytes - at)])


def read_checksummed(view: memoryview, read_into: ReadInto, crc64: int = 0) -> int:
    """Fills ``view``; the CRC64-NVME of its bytes, continued from ``crc64``. An error holds no slice of the view."""
    for at in range(0, len(view), PIECE_BYTES):
        with view[at : at + PIECE_BYTES] as piece:
            try:
                read_into(piece)
            except Exception as error:
                # Slices in the frames of the failed call would keep the view, and its mapping, from being closed.
                _clear_frames(error)
                raise
            crc64 = crc64nvme(piece, crc64)
    return crc64


def _clear_frames(error: BaseException | None) -> None:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
