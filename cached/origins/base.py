"""The protocol of an origin (L3), and the values it speaks in. Every origin passes tests/conformance/test_origins.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class OriginSpec:
    """How to reach an origin: a URI and plain-text options (endpoint, profile, region, …). Never holds a secret."""

    uri: str
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OriginChecksum:
    """A full-content checksum that the origin itself vouches for.

    ``algorithm``: ``sha256``, ``sha1``, ``crc64nvme``, ``crc32c`` or ``crc32``. ``value_hex``: the digest, big-endian hex.
    ``part_sizes_bytes`` empty: over the whole object. Otherwise the value is the algorithm over the concatenated binary
    digests of parts of these sizes (an S3 composite).
    """

    algorithm: str
    value_hex: str
    part_sizes_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class OriginObject:
    """One object below an origin's URI.

    ``path`` is relative, with forward slashes, validated against escapes. ``version`` is an opaque marker (version id or
    ETag; for files size, mtime and inode) that changes when the content does; it is never taken for a digest.
    """

    path: str
    size_bytes: int
    version: str
    checksums: tuple[OriginChecksum, ...] = ()


class Origin(Protocol):
    """A place that models come from. Methods block, may be called from several threads at once, and run in movers.

    Errors: NotFoundError, OriginDeniedError, OriginUnavailableError, OriginProtocolError, ObjectChangedError.
    """

    def list_objects(self) -> list[OriginObject]:
        """All objects below the URI (a URI naming one object gives that one), sorted by path, without checksums."""
        ...

    def stat(self, path: str) -> OriginObject:
        """One object with its version and every usable full-content checksum."""
        ...

    def read_into(self, item: OriginObject, offset_bytes: int, view: memoryview) -> None:
        """Fills ``view`` with the bytes from ``offset_bytes`` of exactly ``item.version``, or raises and leaves junk in it.

        The length and the range of the answer are checked against what was asked for, and its version against
        ``item.version`` (else ObjectChangedError). Does not retry: the planner does, with its own budget.
        """
        ...

    def close(self) -> None:
        """Ends connections; idempotent."""
        ...
