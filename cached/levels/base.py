"""The protocol of a local level (L1, L2). Every level passes tests/conformance/test_levels.py.

A level stores bytes under two kinds of name: an *ingest* (still arriving; never visible as a blob) and a *blob*, named
by the SHA-256 of its content. It keeps no accounts (the ledger does) and verifies nothing (the planner does).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cached.level import Level


@dataclass(frozen=True, slots=True)
class FileRef:
    """A local file that bytes can be moved to or from: a segment or an L2 file.

    ``inode`` and ``size_bytes`` are compared after opening, so that a name that was reused in the meantime is noticed.
    ``memory``: shared memory, to be written through a mapping; otherwise by O_DIRECT or buffered writes.
    """

    path: str
    inode: int
    size_bytes: int
    memory: bool


@dataclass(frozen=True, slots=True)
class Found:
    """What a level holds of ours after a restart. Sizes are bytes on that level."""

    blobs: dict[str, int]
    """SHA-256 → size."""
    ingests: dict[str, int]
    """Ingest id → size."""
    set_aside: tuple[str, ...]
    """Unknown names that were moved out of the way or left alone, with the reason, for the log."""
    failed: tuple[str, ...] = ()
    """Drives that cannot be used, with the reason, where a level has others."""


Later = Callable[[Callable[[], None]], None]
"""Runs what it is given, now or some time later."""


def at_once(work: Callable[[], None]) -> None:
    """A ``Later`` that does not wait."""
    work()


class LocalLevel(Protocol):
    """Called from the loop. No method moves content; those that may take long say so and may run in a thread.

    Errors: LevelError for any failing I/O, NoRoomError for ENOSPC/EDQUOT, NotFoundError for an unknown name,
    InvalidRequestError for a digest or ingest id that may not become part of a path.
    """

    level: Level

    def scan(self) -> Found:
        """Finds what an earlier daemon left, and makes the level usable: comes before every other call.

        What can never be used (pool segments, torn ingests) is removed; withdrawn segments are tracked again, since
        workers may still map them. May take long; safe to run in a thread.
        """
        ...

    def create(self, ingest_id: str, size_bytes: int) -> FileRef:
        """A new ingest of exactly this length, exclusively created: an existing one of that id is a LevelError.

        L1 takes it from the pool if it can, and then may take long where a bigger segment is cut down only now.
        """
        ...

    def ingest(self, ingest_id: str) -> FileRef:
        """An ingest that exists (created before, or found by ``scan``)."""
        ...

    def commit(self, ingest_id: str, digest: str) -> FileRef:
        """Makes the ingest the blob ``digest``, durably for its level. May take long (fsync); safe to run in a thread.

        If the blob exists already, of the same length, the ingest is discarded and the existing blob returned. An error
        leaves no blob by that name that is not whole and durable. Where the bytes could not be made durable the ingest
        is gone with it: they cannot be trusted again, though they read well. Otherwise the caller discards it.
        """
        ...

    def discard(self, ingest_id: str, *, later: Later = at_once) -> None:
        """Drops an ingest; unknown ids are ignored. ``later``: see ``remove``."""
        ...

    def blob(self, digest: str) -> FileRef:
        """A committed blob."""
        ...

    def open_blob(self, digest: str) -> int:
        """A new read-only descriptor of a blob (O_RDONLY | O_CLOEXEC | O_NOFOLLOW); the caller closes it."""
        ...

    def open_ingest(self, ingest_id: str) -> int:
        """A new read-only descriptor of an ingest; the caller closes it."""
        ...

    def remove(self, digest: str, *, later: Later = at_once) -> None:
        """Takes a blob's name away. L2: its bytes are free. L1: withdrawn until ``collect`` proves them free.

        The name is gone at once. On L2 freeing takes long (some 0.1 s a GB, and a sync of the folder): it is handed to
        ``later``, which may run it in a thread.
        """
        ...

    def free_bytes(self) -> int:
        """What the file system could still take, now."""
        ...
