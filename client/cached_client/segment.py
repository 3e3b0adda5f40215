"""A file of a model, mapped into this process without a copy."""

from __future__ import annotations

import ctypes
import mmap
import os
from functools import cache
from typing import TYPE_CHECKING, Any

from cached_client.errors import CacheError, IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_PROT_NONE = 0
# Documentation/admin-guide/mm/pagemap.rst of Linux.
_PAGEMAP_ENTRY_BYTES = 8
_PAGEMAP_PRESENT = 1 << 63
_PAGEMAP_SWAPPED = 1 << 62
_PAGEMAP_OF_FILE = 1 << 61
_PAGEMAP_READ_BYTES = 4 * 1024 * 1024


class MappedFile:
    """A private mapping of a read-only descriptor: zero-copy to read, copy-on-write if somebody writes.

    So no in-place operation can change another worker's weights, or fail: a write gives this process its own copy of
    that page. The mapping is exactly as long as the file.

    **Lifetime.** The mapping lives as long as anything uses it. Each view that is made from it, and each tensor or
    array made from a view, holds a reference to it, and it is unmapped when the last of them is gone. `close` only
    gives up this object's own reference; it never pulls memory away from under a tensor, and so never fails. (Python's
    ``mmap.close`` would raise BufferError here; nothing in this package calls it.)

    **Suspension.** `withdraw` takes the file out of the range of addresses, and keeps the range; `place` puts a file
    there again. Views, tensors and arrays stay what they are meanwhile, but must not be touched.

    Any thread may use it.
    """

    def __init__(self, fd: int, size_bytes: int) -> None:
        """Maps and then closes ``fd``, also when it raises: IntegrityError if the file is not ``size_bytes`` long."""
        self.size_bytes = size_bytes
        self.identity: tuple[int, int] | None = None
        # Python owns a range of addresses, in which the file is then mapped: so a view, by which a tensor lives,
        # belongs to the range, whatever lies in it, and no descriptor stays open for it.
        try:
            self.range: mmap.mmap | None = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE) if size_bytes else None
        except OSError:
            os.close(fd)
            raise
        self._view: memoryview | None = memoryview(bytearray() if self.range is None else self.range)
        self.identity = place(self.range, fd, size_bytes)

    @classmethod
    def empty(cls) -> MappedFile:
        """A file without bytes, which has no segment."""
        self = cls.__new__(cls)
        self.identity, self.size_bytes, self.range, self._view = None, 0, None, memoryview(bytearray())
        return self

    @property
    def view(self) -> memoryview:
        """All bytes. Writable, and a write stays private to this process. Raises ValueError after `close`."""
        if self._view is None:
            msg = "the mapping was closed"
            raise ValueError(msg)
        return self._view

    def close(self) -> None:
        """Gives up this object's reference to the mapping (see *Lifetime*). Idempotent."""
        self.range = self._view = None


def place(region: mmap.mmap | None, fd: int, size_bytes: int) -> tuple[int, int]:
    """Maps a file over a range of addresses of that size, whatever is there, and closes ``fd``, also when it raises.

    Returns the file's device and inode. Raises IntegrityError if it is not ``size_bytes`` long.
    """
    try:
        status = os.fstat(fd)
        if status.st_size != size_bytes:
            raise IntegrityError(
                f"a segment has {status.st_size} bytes where {size_bytes} were announced",
                hint="attach again; if it persists, run `cached verify`",
                expected=size_bytes,
                found=status.st_size,
            )
        if region is not None:
            _map_over(region, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, fd)
        return status.st_dev, status.st_ino
    finally:
        os.close(fd)


def withdraw(region: mmap.mmap) -> None:
    """Takes what is mapped out of a range of addresses, and keeps the range: touching it ends the process (SIGSEGV)."""
    _map_over(region, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)


def changed_pages(region: mmap.mmap) -> Iterator[int]:
    """Where, from the range's begin, pages are that this process wrote to, and so has a copy of its own of.

    The kernel's own word: such a page is there, or in swap, and is not the file's. Raises CacheError where the kernel
    does not tell (``/proc/self/pagemap``).
    """
    import numpy as np

    page_bytes = mmap.PAGESIZE
    first = _address(region) // page_bytes
    entries = -(-len(region) // page_bytes)
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            for at in range(0, entries, _PAGEMAP_READ_BYTES // _PAGEMAP_ENTRY_BYTES):
                number = min(entries - at, _PAGEMAP_READ_BYTES // _PAGEMAP_ENTRY_BYTES)
                wanted_bytes = number * _PAGEMAP_ENTRY_BYTES
                content = os.pread(pagemap.fileno(), wanted_bytes, (first + at) * _PAGEMAP_ENTRY_BYTES)
                if len(content) != wanted_bytes:
                    raise OSError("it ends early")  # noqa: TRY301 told below, with what else can be wrong
                found = np.frombuffer(content, np.uint64)
                own = (found & _PAGEMAP_SWAPPED != 0) | (
                    found & (_PAGEMAP_PRESENT | _PAGEMAP_OF_FILE) == _PAGEMAP_PRESENT
                )
                yield from ((at + np.flatnonzero(own)) * page_bytes).tolist()
    except OSError as error:
        raise CacheError(
            f"the kernel does not tell which pages were written to: /proc/self/pagemap: {error}",
            hint="if nothing wrote to the model's tensors, pass discard_changes=True",
        ) from error


@cache
def _libc_mmap() -> Any:
    """``mmap(2)``: Python's own cannot say where to map."""
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    integer = ctypes.c_int
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, integer, integer, integer, ctypes.c_long]
    return function


def _map_over(region: mmap.mmap, protection: int, flags: int, fd: int) -> None:
    address = _address(region)
    mapped = _libc_mmap()(address, len(region), protection, flags | _MAP_FIXED, fd, 0)
    if mapped != address:
        number = ctypes.get_errno()
        raise CacheError(f"{len(region)} bytes cannot be mapped: {os.strerror(number)}", errno=number)


def _address(region: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(region))
