"""A file of a model, mapped into this process without a copy."""

from __future__ import annotations

import mmap
import os
import sys
from typing import Any

from cached_client.errors import IntegrityError


class MappedFile:
    """A private mapping of a read-only descriptor: zero-copy to read, copy-on-write if somebody writes.

    So no in-place operation can change another worker's weights, or fail: a write gives this process its own copy of
    that page. The mapping is exactly as long as the file.

    **Lifetime.** The mapping lives as long as anything uses it. Each view that is made from it, and each tensor or
    array made from a view, holds a reference to it, and it is unmapped when the last of them is gone. `close` only
    gives up this object's own reference; it never pulls memory away from under a tensor, and so never fails. (Python's
    ``mmap.close`` would raise BufferError here; nothing in this package calls it.)

    Any thread may use it.
    """

    def __init__(self, fd: int, size_bytes: int) -> None:
        """Maps and then closes ``fd``, also when it raises: IntegrityError if the file is not ``size_bytes`` long."""
        try:
            status = os.fstat(fd)
            if status.st_size != size_bytes:
                raise IntegrityError(
                    f"a segment has {status.st_size} bytes where {size_bytes} were announced",
                    hint="attach again; if it persists, run `cached verify`",
                    expected=size_bytes,
                    found=status.st_size,
                )
            self.identity: tuple[int, int] | None = (status.st_dev, status.st_ino)
            self._view: memoryview | None = _map(fd, size_bytes)
        finally:
            os.close(fd)
        self.size_bytes = size_bytes

    @classmethod
    def empty(cls) -> MappedFile:
        """A file without bytes, which has no segment."""
        self = cls.__new__(cls)
        self.identity, self.size_bytes, self._view = None, 0, memoryview(bytearray())
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
        self._view = None


def _map(fd: int, size_bytes: int) -> memoryview:
    if size_bytes == 0:
        return memoryview(bytearray())
    # Before 3.13 an mmap object keeps a duplicate of the descriptor: one more open file per segment.
    options: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
    return memoryview(mmap.mmap(fd, size_bytes, access=mmap.ACCESS_COPY, **options))
