"""The protocol of an origin (L3), and the values it speaks in; tests/conformance/test_origins.py holds for each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class OriginSpec:
    """How to reach an origin: a URI and plain-text options (endpoint, profile, region, …). Never holds a secret.

    A place where a secret is (``profile``, ``token_file``) may be an option.

    ``front``: a chain: other places of the same objects, nearer ones, which are asked for bytes before this one. What
    the objects are, and what they must hold, this one says alone. Only ``transfer.chain`` looks at it.
    """

    uri: str
    options: Mapping[str, str] = field(default_factory=dict)
    front: tuple[OriginSpec, ...] = ()

    @property
    def links(self) -> tuple[OriginSpec, ...]:
        """All of a chain, each by itself, in the order in which they are asked for bytes."""
        return (*self.front, self.alone)

    @property
    def alone(self) -> OriginSpec:
        """Without those in front."""
        return replace(self, front=()) if self.front else self


@dataclass(frozen=True, slots=True)
class OriginChecksum:
    """A full-content checksum that the origin itself vouches for.

    ``algorithm``: ``sha256``, ``sha1``, ``git-sha1`` (git's name of a blob: the SHA-1 of its length and its content),
    ``crc64nvme``, ``crc32c`` or ``crc32``. ``value_hex``: the digest, big-endian.
    ``part_sizes_bytes`` empty: over the whole object. Otherwise the value is the algorithm over the concatenated binary
    digests of parts of these sizes (an S3 composite).
    """

    algorithm: str
    value_hex: str
    part_sizes_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class OriginObject:
    """One object below an origin's URI.

    ``path`` is relative, with forward slashes, validated against escapes. ``version`` is an opaque marker (ETag and
    version id; for files size, mtime and inode) that changes when the content does; it is never taken for a digest. A
    listing may know less of it than ``stat`` (S3 lists no version ids): compare only markers that ``stat`` gave.
    """

    path: str
    size_bytes: int
    version: str
    checksums: tuple[OriginChecksum, ...] = ()


class Abort:
    """Asks one read to end early, from another thread. Once asked for, it stays so. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        self._aborted = False

    @property
    def aborted(self) -> bool:
        """Whether it was asked for."""
        return self._aborted

    def abort(self) -> None:
        """Asks for it. Callbacks run here, in this thread."""
        with self._lock:
            self._aborted = True
            for callback in self._callbacks:
                callback()

    @contextmanager
    def calling(self, callback: Callable[[], None]) -> Iterator[None]:
        """In the block an abort calls ``callback``, and at once if it was asked for before.

        It must be quick and not raise. Once the block was left it is not running, and never runs again.
        """
        with self._lock:
            self._callbacks.append(callback)
            if self._aborted:
                callback()
        try:
            yield
        finally:
            with self._lock:
                self._callbacks.remove(callback)


ReadInto = Callable[[memoryview], None]
"""Fills the view with the next bytes of a range; if it raises, with junk. The views may not exceed the range."""


class Origin(Protocol):
    """A place that models come from. Methods block, may be called from several threads at once, and run in movers.

    Errors: NotFoundError, OriginDeniedError, OriginUnavailableError, OriginProtocolError, ObjectChangedError.
    """

    def prepare(self) -> None:
        """What has to be done once before the first call, and takes a while; it connects to nothing."""
        ...

    def list_objects(self) -> list[OriginObject]:
        """All objects below the URI (a URI naming one object gives that one), sorted by path, without checksums."""
        ...

    def stat(self, path: str) -> OriginObject:
        """One object with its version and every usable full-content checksum."""
        ...

    def open_range(
        self, item: OriginObject, offset_bytes: int, length_bytes: int, abort: Abort | None = None
    ) -> AbstractContextManager[ReadInto]:
        """Reads the range of exactly ``item.version``: call what it gives with one view after the other.

        The length and the range of the answer are checked against what was asked for, and its version against
        ``item.version`` (else ObjectChangedError): what was read counts only once the block was left without an error.
        Does not retry: the planner does, with its own budget. After an ``abort`` it soon raises any error at all,
        whatever it waits for, unless it is through already. A range without bytes is only checked.
        """
        ...

    def close(self) -> None:
        """Ends connections; idempotent."""
        ...


class WritableOrigin(Origin, Protocol):
    """An origin that models can be uploaded to."""

    def upload_file(self, local_path: Path, path: str, progress: Callable[[int], None] | None = None) -> OriginObject:
        """Stores a local file as ``path`` below the URI, replacing what is there; gives what ``stat`` then says of it.

        Blocks; safe from several threads. Retries by itself. ``progress`` is called with counts of further bytes sent,
        from any thread; a retry may count bytes again; a CachedError that it raises ends the upload. What was stored is
        compared by size, and by checksum where the origin returns one: IntegrityError. On an error the object is
        absent, old, or whole, never partial.
        """
        ...
