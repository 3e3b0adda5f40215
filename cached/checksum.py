"""CRCs and digests of content: one place for their conventions. The only importer of awscrt.

CRCs are finished values (zlib's convention: ``crc(b, crc(a)) == crc(a + b)``); their hex and binary forms are
big-endian, as S3 sends them. All may be called from any thread or process; long inputs release the interpreter lock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import reduce
from typing import Protocol

from awscrt import checksums

from cached.errors import InvalidRequestError

Readable = bytes | bytearray | memoryview
"""What can be checksummed; a memoryview must be C-contiguous."""


def crc64nvme(view: Readable, initial: int = 0) -> int:
    """CRC64-NVME of ``view``, continued from ``initial``."""
    return int(checksums.crc64nvme(view, initial))


def crc32c(view: Readable, initial: int = 0) -> int:
    """CRC32C (Castagnoli) of ``view``, continued from ``initial``."""
    return int(checksums.crc32c(view, initial))


def crc32(view: Readable, initial: int = 0) -> int:
    """CRC32 (the one of zlib and Ethernet) of ``view``, continued from ``initial``."""
    return int(checksums.crc32(view, initial))


def combine_crc64nvme(parts: Iterable[tuple[int, int]]) -> int:
    """The CRC64-NVME of a concatenation, from (CRC, length in bytes) of each part in order; 0 for none."""
    return reduce(lambda folded, part: int(checksums.combine_crc64nvme(folded, part[0], part[1])), parts, 0)


def crc64_hex(crc64: int) -> str:
    """16 lower-case hex digits, most significant first."""
    return f"{crc64:016x}"


def parse_crc64_hex(text: str) -> int:
    """The inverse of ``crc64_hex``. Raises ValueError for anything else."""
    if len(text) != 16 or not set(text) <= _HEX_DIGITS:
        msg = f"{text!r} is not a CRC64 (16 lower-case hex digits)"
        raise ValueError(msg)
    return int(text, 16)


class RunningDigest(Protocol):
    """What hashlib's objects can do, for CRCs too."""

    def update(self, data: Readable, /) -> None:
        """Takes the next bytes in."""
        ...

    def digest(self) -> bytes:
        """The value so far, big-endian."""
        ...

    def hexdigest(self) -> str:
        """The value so far, in hex."""
        ...


class RunningCrc:
    """A CRC behind hashlib's interface."""

    def __init__(self, step: Callable[[Readable, int], int], width_bytes: int) -> None:
        self._step = step
        self._width_bytes = width_bytes
        self._value = 0

    def update(self, data: Readable, /) -> None:
        """Takes the next bytes in."""
        self._value = self._step(data, self._value)

    def digest(self) -> bytes:
        """The value so far, big-endian."""
        return self._value.to_bytes(self._width_bytes, "big")

    def hexdigest(self) -> str:
        """The value so far, in hex."""
        return self.digest().hex()


ALGORITHMS = ("sha256", "crc64nvme", "sha1", "git-sha1", "crc32c", "crc32")
"""Those that an origin's checksum may use; see ``OriginChecksum``."""


def new_digest(algorithm: str, size_bytes: int = 0) -> RunningDigest:
    """An empty running digest. Raises InvalidRequestError for an algorithm that is not one of ALGORITHMS.

    ``size_bytes``: of what is to be digested, for ``git-sha1``: git names a blob by its length and its content.
    """
    match algorithm:
        case "sha256":
            return hashlib.sha256()
        case "sha1":
            return hashlib.sha1(usedforsecurity=False)
        case "git-sha1":
            return hashlib.sha1(b"blob %d\0" % size_bytes, usedforsecurity=False)
        case "crc64nvme":
            return RunningCrc(crc64nvme, 8)
        case "crc32c":
            return RunningCrc(crc32c, 4)
        case "crc32":
            return RunningCrc(crc32, 4)
    raise InvalidRequestError(f"{algorithm!r} cannot be used here; known are {', '.join(ALGORITHMS)}", value=algorithm)


def part_digest(algorithm: str, *views: Readable) -> str:
    """Hex digest of the concatenation of ``views``. Raises InvalidRequestError for an unknown algorithm."""
    running = new_digest(algorithm, sum(len(view) for view in views))
    for view in views:
        running.update(view)
    return running.hexdigest()


def compose_parts(algorithm: str, values_hex: Iterable[str]) -> str:
    """Hex of an S3 composite: the algorithm over the concatenated binary digests of the parts, in order."""
    return part_digest(algorithm, *(bytes.fromhex(value) for value in values_hex))


_HEX_DIGITS = frozenset("0123456789abcdef")
