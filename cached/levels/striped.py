"""L2 on one drive or several: each blob lies whole on one of them, and the files of a model on different ones.

So a model of several files is read from all drives at once, a file stays one file for the directory view, and a drive
that fails takes only its own blobs with it: they count as gone, and are fetched again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import structlog

from cached.errors import CachedError, LevelError, NoRoomError, NotFoundError
from cached.level import Level
from cached.levels.base import FileRef, Found, Later, at_once
from cached.levels.disk import DiskLevel
from cached.levels.files import checked_digest, checked_ingest_id

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")

_DRIVE_FAILED = frozenset({"EIO", "ENODEV", "ENXIO", "EREMOTEIO", "ESHUTDOWN", "ESTALE", "EUCLEAN"})
"""What says that the whole drive or its file system failed, and not that one name is not what it should be."""


class StripedDisk:
    """L2 over several DiskLevels, one a drive. Call ``scan`` first; threads may do what DiskLevel's may.

    A drive that cannot be used when it is scanned is left out until the next scan.
    """

    level = Level.L2

    def __init__(self, disks: Sequence[DiskLevel]) -> None:
        """At least one."""
        self._disks = tuple(disks)
        self._usable = self._disks
        self._homes: dict[str, DiskLevel] = {}
        self._arriving: dict[str, tuple[DiskLevel, int]] = {}
        self._reported: set[DiskLevel] = set()

    # What there is

    def scan(self) -> Found:
        """See LocalLevel. Raises LevelError or NoRoomError where no drive can be used; the others are in ``failed``."""
        found = Found(blobs={}, ingests={}, set_aside=())
        self._homes, self._arriving, self._reported = {}, {}, set()
        usable: list[DiskLevel] = []
        failures: list[CachedError] = []
        for disk in self._disks:
            try:
                found = self._joined(found, disk, disk.scan())
            except (LevelError, NoRoomError) as error:
                failures.append(error)
            else:
                usable.append(disk)
        if not usable:
            raise failures[0]
        self._usable = tuple(usable)
        return Found(found.blobs, found.ingests, found.set_aside, tuple(error.message for error in failures))

    def blob(self, digest: str) -> FileRef:
        """See LocalLevel."""
        return self._first(lambda disk: disk.blob(digest), self._likely(digest))[1]

    def ingest(self, ingest_id: str) -> FileRef:
        """See LocalLevel."""
        return self._first(lambda disk: disk.ingest(ingest_id))[1]

    def open_blob(self, digest: str) -> int:
        """See LocalLevel."""
        return self._first(lambda disk: disk.open_blob(digest), self._likely(digest))[1]

    def open_ingest(self, ingest_id: str) -> int:
        """See LocalLevel."""
        return self._first(lambda disk: disk.open_ingest(ingest_id))[1]

    def free_bytes(self) -> int:
        """See LocalLevel; folders of one file system count once."""
        free: dict[int, int] = {}
        for disk in self._usable:
            with suppress(LevelError, NotFoundError, OSError):
                free[os.stat(disk.root).st_dev] = disk.free_bytes()
        return sum(free.values())

    # Coming and going

    def create(self, ingest_id: str, size_bytes: int) -> FileRef:
        """See LocalLevel. On the best drive that takes it; the error of the first one where none does."""
        with suppress(NotFoundError):
            return self._disk_of(ingest_id).create(ingest_id, size_bytes)  # there is one: raises
        failures: list[CachedError] = []
        for disk in self._ranked(size_bytes):
            try:
                ref = disk.create(ingest_id, size_bytes)
            except (LevelError, NoRoomError) as error:
                failures.append(error)
            else:
                self._arriving[ingest_id] = disk, size_bytes
                return ref
        raise failures[0]

    def commit(self, ingest_id: str, digest: str) -> FileRef:
        """See LocalLevel. Durable on the ingest's drive; a blob of that content on another drive is kept instead."""
        checked_digest(digest)
        disk, ref = self._first(lambda disk: disk.ingest(ingest_id))
        for other in self._usable:
            if other is disk or not self._has(other, digest):
                continue
            existing = other.blob(digest)
            if existing.size_bytes == ref.size_bytes:
                self.discard(ingest_id)
                return existing
            other.remove(digest)
        try:
            committed = disk.commit(ingest_id, digest)
        finally:
            self._arriving.pop(ingest_id, None)  # what is left of one that failed is found on its drive
        self._homes[digest] = disk
        return committed

    def discard(self, ingest_id: str, *, later: Later = at_once) -> None:
        """See LocalLevel."""
        with suppress(NotFoundError):
            disk = self._disk_of(ingest_id)
            self._arriving.pop(ingest_id, None)
            disk.discard(ingest_id, later=later)

    def remove(self, digest: str, *, later: Later = at_once) -> None:
        """See LocalLevel. A blob that is gone with its drive is removed without an error."""
        checked_digest(digest)
        having = [disk for disk in self._usable if self._has(disk, digest)]
        if not having and digest not in self._homes:
            self._first(lambda disk: disk.blob(digest))
        for disk in having:
            disk.remove(digest, later=later)
        self._homes.pop(digest, None)

    def _joined(self, found: Found, disk: DiskLevel, more: Found) -> Found:
        """Of a blob that two drives have (one was away for a while) the first is kept."""
        aside = [*found.set_aside, *more.set_aside]
        for digest in found.blobs.keys() & more.blobs.keys():
            path = disk.blob(digest).path
            try:
                disk.remove(digest)
            except LevelError as error:
                aside.append(f"{path}: another drive has this blob, too; {error.message}")
            else:
                aside.append(f"{path}: another drive has this blob, too; it was removed")
        self._homes |= dict.fromkeys(more.blobs.keys() - found.blobs.keys(), disk)
        self._arriving |= {ingest_id: (disk, size_bytes) for ingest_id, size_bytes in more.ingests.items()}
        return Found(more.blobs | found.blobs, more.ingests | found.ingests, tuple(aside))

    def _ranked(self, size_bytes: int) -> list[DiskLevel]:
        """Drives, the best for a new blob first.

        The one with the most free room; but of those that have at least half as much, the one on which the least is
        arriving: so the files of a model, which arrive together, lie on different drives.
        """
        free: dict[DiskLevel, int] = {}
        for disk in self._usable:
            with suppress(LevelError, NotFoundError):
                free[disk] = disk.free_bytes()
        arriving = dict.fromkeys(self._usable, 0)
        for disk, arriving_bytes in list(self._arriving.values()):  # a thread may commit one meanwhile
            arriving[disk] += arriving_bytes
        roomy = max(size_bytes, max(free.values(), default=0) // 2)

        def rank(disk: DiskLevel) -> tuple[bool, int, int]:
            is_roomy = free.get(disk, 0) >= roomy
            return not is_roomy, arriving[disk] if is_roomy else 0, -free.get(disk, 0)

        return sorted(self._usable, key=rank)

    def _disk_of(self, ingest_id: str) -> DiskLevel:
        checked_ingest_id(ingest_id)
        if ingest_id in self._arriving:
            return self._arriving[ingest_id][0]
        return self._first(lambda disk: disk.ingest(ingest_id))[0]

    def _has(self, disk: DiskLevel, digest: str) -> bool:
        try:
            self._first(lambda disk: disk.blob(digest), (disk,))
        except NotFoundError:
            return False
        return True

    def _likely(self, digest: str) -> Sequence[DiskLevel]:
        """All drives, the one that is known to have this blob before the others."""
        home = self._homes.get(checked_digest(digest))
        return self._usable if home is None else (home, *(disk for disk in self._usable if disk is not home))

    def _first(self, look: Callable[[DiskLevel], _T], disks: Sequence[DiskLevel] | None = None) -> tuple[DiskLevel, _T]:
        """The first drive where it is, and what was found there.

        Raises NotFoundError, also when a drive fails, whose content counts as gone; LevelError for what is not ours.
        """
        missing: CachedError | None = None
        for disk in disks or self._usable:
            try:
                return disk, look(disk)
            except NotFoundError as error:
                missing = missing or error
            except LevelError as error:
                if error.fields.get("errno") not in _DRIVE_FAILED:
                    raise
                self._report(disk, error)
                missing = NotFoundError(error.message, **error.fields)
        assert missing is not None  # noqa: S101 - there is at least one drive
        raise missing

    def _report(self, disk: DiskLevel, error: CachedError) -> None:
        if disk not in self._reported:
            self._reported.add(disk)
            _log.error("l2.drive_failed", path=str(disk.root), cause=error.message)
