"""Mappings of local files, and their pages: allocated before use, so that a shortage is an error and never a SIGBUS.

Used by movers and levels, from any thread. The calls into the kernel release the interpreter lock, which
``mmap.madvise`` does not.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from functools import cache
from types import TracebackType
from typing import Self

from cached.errors import CachedError, LevelError
from cached.levels.base import FileRef
from cached.levels.files import level_error, level_of, libc, no_room, open_checked
from cached.units import MIB

_STEP_BYTES = 16 * MIB
_HUGE_PAGE_BYTES = 2 * MIB
_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_SHORTAGE = frozenset({errno.ENOMEM, errno.EFAULT, errno.ENOSPC})
"""What MADV_POPULATE_WRITE answers when there is no page: EFAULT on a full tmpfs, ENOMEM from the allocator."""


class Mapping:
    """A shared mapping of a whole file. Close it after releasing every view taken of it; also a context manager.

    ``view`` covers the file, read-only unless it was opened writable.
    """

    def __init__(self, ref: FileRef, fd: int, *, writable: bool) -> None:
        """Takes over ``fd``. Use ``open_mapping``."""
        self.ref = ref
        self.writable = writable
        self._fd = fd
        self._huge = False
        self._mmap: mmap.mmap | None = None
        if ref.size_bytes:  # an empty file cannot be mapped
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            self._mmap = mmap.mmap(fd, ref.size_bytes, flags=mmap.MAP_SHARED, prot=protection)
        self.view = memoryview(self._mmap if self._mmap is not None else bytearray())

    @property
    def size_bytes(self) -> int:
        """Length of the file and of ``view``."""
        return self.ref.size_bytes

    @property
    def fd(self) -> int:
        """The descriptor that was mapped; the mapping closes it."""
        return self._fd

    @property
    def address(self) -> int:
        """Where it is mapped. Only of a writable mapping that is not empty; ValueError otherwise."""
        if self._mmap is None or not self.writable:
            msg = "only a writable mapping that is not empty has an address"
            raise ValueError(msg)
        return ctypes.addressof(ctypes.c_char.from_buffer(self._mmap))

    def advise_huge(self) -> None:
        """Asks for huge pages, once. Advice: where the kernel or the mount has none, nothing happens."""
        if not self._huge and self._mmap is not None:
            self._huge = True
            _madvise(self.address, self.size_bytes, _MADV_HUGEPAGE)

    def fault_in(self, offset_bytes: int, length_bytes: int) -> None:
        """Maps the pages of a range to be read, at once. Raises NoRoomError for a hole that gets no page: no SIGBUS.

        Holds the interpreter lock: for huge pages, of which a range has few.
        """
        start_bytes, length_bytes = _page_range(self, offset_bytes, length_bytes)
        if self._mmap is None or not length_bytes:
            return
        try:
            self._mmap.madvise(_MADV_POPULATE_READ, start_bytes, min(length_bytes, self.size_bytes - start_bytes))
        except OSError as error:
            code = error.errno or errno.EIO
            if code != errno.EINVAL:  # before Linux 5.14
                raise _page_error(self, code, length_bytes) from error

    def close(self) -> None:
        """Unmaps and closes; idempotent. Raises BufferError while a view taken by a caller is not released."""
        self.view.release()
        if self._mmap is not None:
            self._mmap.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_mapping(ref: FileRef, *, writable: bool) -> Mapping:
    """Maps ``ref`` after checking that it is still that file, ours and not a planted link.

    Raises NotFoundError if the name is gone (renamed, evicted), LevelError if it is another file or cannot be mapped.
    """
    level = level_of(ref)
    fd = open_checked(level, ref.path, os.O_RDWR if writable else os.O_RDONLY, ref)
    try:
        return Mapping(ref, fd, writable=writable)
    except OSError as error:
        os.close(fd)
        raise level_error(level, ref.path, "map", error, ref.size_bytes) from error


def allocate_pages(mapping: Mapping, offset_bytes: int, length_bytes: int, *, huge: bool = False) -> None:
    """Backs a range of a writable mapping with pages, rounded outwards to whole pages; content is kept.

    Raises NoRoomError when the file system or the memory is full; what was allocated until then stays. Never SIGBUS.
    """
    offset_bytes, length_bytes = _page_range(mapping, offset_bytes, length_bytes)
    if huge and length_bytes:
        mapping.advise_huge()
    end_bytes = offset_bytes + length_bytes
    for start_bytes in range(offset_bytes, end_bytes, _STEP_BYTES):
        step_bytes = min(_STEP_BYTES, end_bytes - start_bytes)
        code = _madvise(mapping.address + start_bytes, step_bytes, _MADV_POPULATE_WRITE)
        if code == errno.EINVAL:  # before Linux 5.14
            code = _fallocate(mapping, start_bytes, step_bytes)
        if code:
            raise _page_error(mapping, code, step_bytes)


def huge_buffer(size_bytes: int) -> memoryview:
    """Private, zeroed memory, of huge pages where the kernel gives them to who asks. It goes with its last view.

    A drive writes into it at its full speed; into memory of scattered small pages some reach a third of it.
    """
    memory = mmap.mmap(-1, size_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _madvise(address, len(memory), _MADV_HUGEPAGE)
    start_bytes = -address % _HUGE_PAGE_BYTES
    return memoryview(memory)[start_bytes : start_bytes + size_bytes]


def _page_range(mapping: Mapping, offset_bytes: int, length_bytes: int) -> tuple[int, int]:
    if offset_bytes < 0 or length_bytes < 0 or offset_bytes + length_bytes > mapping.size_bytes:
        msg = f"[{offset_bytes}, +{length_bytes}) is outside a mapping of {mapping.size_bytes} bytes"
        raise ValueError(msg)
    if not length_bytes:
        return offset_bytes, 0
    start_bytes = offset_bytes // mmap.PAGESIZE * mmap.PAGESIZE
    end_bytes = -(-(offset_bytes + length_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    return start_bytes, end_bytes - start_bytes


def _page_error(mapping: Mapping, code: int, needed_bytes: int) -> CachedError:
    level, path = level_of(mapping.ref), mapping.ref.path
    if os.fstat(mapping.fd).st_size < mapping.size_bytes:
        return LevelError(f"{level}: {path} was cut short while mapped", level=level, path=path, cause="truncated")
    if code in _SHORTAGE:
        return no_room(level, path, needed_bytes, f"no pages to be had ({errno.errorcode[code]})")
    return level_error(level, path, "allocate pages of", OSError(code, os.strerror(code)))


def _madvise(address: int, length_bytes: int, advice: int) -> int:
    """The error number, 0 when it went well."""
    while True:
        if _libc_madvise()(address, length_bytes, advice) == 0:
            return 0
        code = ctypes.get_errno()
        if code not in {errno.EINTR, errno.EAGAIN}:
            return code


def _fallocate(mapping: Mapping, offset_bytes: int, length_bytes: int) -> int:
    # Not past the end: that would lengthen the file.
    length_bytes = min(length_bytes, mapping.size_bytes - offset_bytes)
    try:
        os.posix_fallocate(mapping.fd, offset_bytes, length_bytes)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


@cache
def _libc_madvise() -> ctypes._NamedFuncPointer:
    function = libc().madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_int
    return function
