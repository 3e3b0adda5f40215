"""L1: blobs as POSIX shared-memory objects, byte-identical images of their files. The only importer of posix_ipc.

In a tmpfs of L1's own they are files of it, which is all that shm_open(3) makes in /dev/shm.

Names say all there is to know, so that a scan needs no index: ``cached.<instance>.<kind>.<id>``, flat in the folder, of
kind ``blob`` (id: SHA-256), ``ingest``, ``withdrawn`` (no longer to be opened; workers may still map it) and ``pool``
(memory kept for the next blob). A segment goes ingest → blob → withdrawn → pool → ingest by renaming, and no step
overwrites a name. For a moment of ``commit`` it has a second name (``spare``), for those who come by path.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

import posix_ipc
import structlog

from cached.errors import CachedError, InvalidRequestError, LevelError, NotFoundError
from cached.level import Level
from cached.levels.base import FileRef, Found, Later, at_once
from cached.levels.files import (
    checked_digest,
    checked_ingest_id,
    free_bytes,
    is_digest,
    is_ingest_id,
    level_errors,
    open_checked,
    rename_new,
    stat_ref,
)
from cached.levels.segments import Collected, Pool, Segment, Use, probe
from cached.own_files import foreign

_log = structlog.get_logger(__name__)

SHM_FOLDER = "/dev/shm"  # noqa: S108 - where shm_open(3) keeps its objects; ours are made with O_EXCL
_OCTAL = re.compile(r"\\([0-7]{3})")
_INSTANCE = re.compile(r"[0-9A-Za-z_-]{1,32}")
_PRIVATE = 0o600
_BLOCK_BYTES = 512
"""What st_blocks counts, whatever the file system. stat(3type)."""


class ShmLevel:
    """L1. Belongs to the loop, but for what is said to be safe in a thread beside it.

    ``instance`` keeps daemons on one host apart. ``mode`` and ``group`` are those of segments that may be opened by
    path; withdrawn and pooled ones are always 0600. ``folder`` is that of shm_open(3), or on a tmpfs.
    """

    level = Level.L1

    def __init__(
        self, instance: str, *, folder: str = SHM_FOLDER, mode: int = _PRIVATE, group: int | None = None
    ) -> None:
        if not _INSTANCE.fullmatch(instance):
            raise InvalidRequestError(f"{instance!r} cannot name an instance", value=instance)
        self.instance = instance
        self.folder = folder
        self._mode = mode
        self._group = group
        self._prefix = f"cached.{instance}."
        self._lengths: dict[str, int] = {}
        self._withdrawn: dict[str, Segment] = {}
        self._copies: set[str] = set()
        self._leaving: dict[str, Segment] = {}
        self._pool = Pool()

    # What there is

    def scan(self) -> Found:
        """See LocalLevel. Pool segments of an earlier daemon are given back; what is foreign is left alone."""
        self._lengths, self._withdrawn, self._leaving, self._pool = {}, {}, {}, Pool()
        found = Found(blobs={}, ingests={}, set_aside=())
        aside: list[str] = []
        with level_errors(Level.L1, self.folder, "list", missing_is_failure=True):
            names = sorted(name for name in os.listdir(self.folder) if name.startswith(self._prefix))
        self._remove_spares(names)
        for name in names:
            problem = self._sort_in(name, found)
            if problem:
                aside.append(f"{self.folder}/{name}: {problem}, left alone")
        return Found(found.blobs, found.ingests, tuple(aside))

    def blob(self, digest: str) -> FileRef:
        """See LocalLevel."""
        return stat_ref(Level.L1, self._path("blob", checked_digest(digest)))

    def ingest(self, ingest_id: str) -> FileRef:
        """See LocalLevel."""
        return stat_ref(Level.L1, self._path("ingest", checked_ingest_id(ingest_id)))

    def open_blob(self, digest: str) -> int:
        """See LocalLevel."""
        return open_checked(Level.L1, self._path("blob", checked_digest(digest)))

    def open_ingest(self, ingest_id: str) -> int:
        """See LocalLevel."""
        return open_checked(Level.L1, self._path("ingest", checked_ingest_id(ingest_id)))

    def free_bytes(self) -> int:
        """See LocalLevel."""
        return free_bytes(Level.L1, self.folder)

    @property
    def withdrawn_bytes(self) -> int:
        """Bytes whose name is gone but whose memory is not known to be free; they count as used."""
        segments = {**self._withdrawn, **self._leaving}
        return sum(segment.size_bytes for segment in segments.values())

    @property
    def has_withdrawn(self) -> bool:
        """True if ``collect`` may free something; empty segments count too."""
        return bool(self._withdrawn)

    @property
    def leaving_sizes(self) -> dict[str, int]:
        """Bytes of the withdrawn segments that may be free in a moment, by an id that each withdrawal has of its own.

        Without those that are second copies of a blob: whoever maps one has just got it, and goes on using it.
        """
        return {key: segment.size_bytes for key, segment in self._withdrawn.items() if key not in self._copies}

    @property
    def pool_bytes(self) -> int:
        """Bytes kept for the next blob, clean or not; they count as used."""
        return self._pool.bytes

    def pool_sizes(self) -> list[int]:
        """The sizes of its segments."""
        return self._pool.sizes()

    # Coming and going

    def create(self, ingest_id: str, size_bytes: int) -> FileRef:
        """See LocalLevel. From the pool it takes whole segments; those of ``fit_pool`` need not be cut here.

        Pages are not allocated here: movers do it before they write (``levels.memory.allocate_pages``).
        """
        path = self._path("ingest", checked_ingest_id(ingest_id))
        ref = self._reuse(path, ingest_id, size_bytes) or self._create_fresh(path, size_bytes)
        self._lengths[ingest_id] = size_bytes
        return ref

    def create_sparse(self, ingest_id: str, size_bytes: int) -> FileRef:
        """As ``create``, for one of which only a part will come: never from the pool, whose segments have all pages."""
        path = self._path("ingest", checked_ingest_id(ingest_id))
        ref = self._create_fresh(path, size_bytes)
        self._lengths[ingest_id] = size_bytes
        return ref

    def allocated_bytes(self, ingest_id: str) -> int:
        """What an ingest's pages take up; it may be much shorter than the ingest. Raises NotFoundError, LevelError."""
        path = self._path("ingest", checked_ingest_id(ingest_id))
        with level_errors(Level.L1, path, "stat"):
            return os.lstat(path).st_blocks * _BLOCK_BYTES

    def fit_pool(self, sizes: Mapping[str, int]) -> bool:
        """Sets aside what ``create`` will take for these ingests, until ``unfit_pool``. True: ``cut_pool`` has work.

        The largest choose first, for they spare the most.
        """
        for ingest_id, size_bytes in sorted(sizes.items(), key=lambda item: -item[1]):
            self._pool.fit(ingest_id, size_bytes)
        return any(segment.size_bytes > sizes[ingest_id] for ingest_id, segment in self._pool.fitted().items())

    def cut_pool(self, sizes: Mapping[str, int]) -> None:
        """Cuts what is set aside to its size, or else gives it back. About 0.15 s a GiB; safe to run in a thread."""
        for ingest_id, segment in self._pool.fitted().items():
            size_bytes = sizes[ingest_id]
            if segment.size_bytes <= size_bytes:
                continue
            try:
                _cut(segment.ref, size_bytes)
            except CachedError as error:
                _log.warning("l1.not_cut", path=segment.ref.path, error=error.message)
                self._pool.take_fitted(ingest_id)
                self._release(segment)
                continue
            ref = replace(segment.ref, size_bytes=size_bytes)
            self._pool.resized(ingest_id, Segment(segment.segment_id, ref))

    def unfit_pool(self) -> None:
        """What was set aside and not taken is the pool's again."""
        self._pool.unfit()

    def commit(
        self, ingest_id: str, digest: str, moved: Callable[[str, str], None] = lambda _source, _target: None
    ) -> FileRef:
        """See LocalLevel. Never blocks: shared memory has nothing to be made durable.

        ``moved(source, target)`` is called while both paths lead to the content: it leads to ``target`` what leads to
        ``source``, which is gone after. It must not raise. The segment itself is renamed, so that whoever maps it
        already is shown with the blob's name; a spare name bridges that.
        """
        source = self._path("ingest", checked_ingest_id(ingest_id))
        target = self._path("blob", checked_digest(digest))
        ref = stat_ref(Level.L1, source)
        if ref.size_bytes != self._lengths.get(ingest_id, ref.size_bytes):
            raise LevelError(f"l1: {source} changed its length", level=Level.L1, path=source, cause="length")
        if os.path.lexists(target):
            existing = stat_ref(Level.L1, target)
            if existing.size_bytes == ref.size_bytes:
                moved(source, target)
                self._lengths.pop(ingest_id, None)
                self._copies &= self._withdrawn.keys()
                self._copies.add(self._withdraw(source))
                return existing
            self._withdraw(target)
        spare = self._path("spare", ingest_id)
        with level_errors(Level.L1, spare, "link to"):
            os.link(source, spare, follow_symlinks=False)
        moved(source, spare)
        try:
            with level_errors(Level.L1, target, "rename to"):
                rename_new(source, target)
        except CachedError:
            moved(spare, source)
            _unlink(spare)
            raise
        moved(spare, target)
        _unlink(spare)
        self._lengths.pop(ingest_id, None)
        return FileRef(path=target, inode=ref.inode, size_bytes=ref.size_bytes, memory=True)

    def discard(self, ingest_id: str, *, later: Later = at_once, sparse: bool = False) -> None:  # noqa: ARG002 - of L2
        """See LocalLevel. Its bytes are withdrawn: a mover or a worker may still map them.

        ``sparse``: only its pages count, and it never becomes part of the pool.
        """
        self._lengths.pop(checked_ingest_id(ingest_id), None)
        path = self._path("ingest", ingest_id)
        if os.path.lexists(path):
            self._withdraw(path, sparse=sparse)

    def remove(self, digest: str, *, later: Later = at_once) -> None:  # noqa: ARG002 - of L2
        """See LocalLevel."""
        self._withdraw(self._path("blob", checked_digest(digest)))

    # Memory that holds nothing

    def collect(self, keep: Callable[[int], bool] = lambda _size_bytes: False) -> list[Collected]:
        """Frees the withdrawn segments that no process has open or mapped any more; the others stay withdrawn.

        ``keep(size_bytes)`` says whether one goes to the pool. Where the kernel cannot tell whether a segment is in
        use, it is never kept, only unlinked, and counted as free. One that cannot be examined stays, and is logged.
        Giving memory back takes about 0.15 s a GiB; safe to run in a thread, one at a time.
        """
        collected = []
        for segment in list(self._withdrawn.values()):
            try:
                freed = self._collect_one(segment, keep)
            except NotFoundError:
                freed = Collected(segment.size_bytes, kept=False, proven=False)
                self._withdrawn.pop(segment.segment_id, None)
            except CachedError as error:
                _log.warning("l1.collect_failed", path=segment.ref.path, error=error.message)
                continue
            if freed:
                collected.append(freed)
        return collected

    def dirty_pool(self) -> tuple[FileRef, ...]:
        """Pool segments that a mover must clear (``jobs.Clear``) before ``create`` takes them; then ``mark_clean``."""
        return self._pool.dirty()

    def mark_clean(self, ref: FileRef) -> bool:
        """A segment of ``dirty_pool`` is all zeros now. False if it has left the pool meanwhile."""
        return self._pool.mark_clean(ref)

    def grow_pool(self, size_bytes: int) -> FileRef:
        """Adds fresh memory to the pool, dirty until a mover has cleared it, which allocates its pages."""
        segment_id = secrets.token_hex(8)
        ref = self._create_fresh(self._path("pool", segment_id), size_bytes, private=True)
        self._pool.add_dirty(Segment(segment_id, ref))
        return ref

    def drop_pool(self, needed_bytes: int) -> int:
        """Gives at least ``needed_bytes`` of the pool back, or all; what was freed. Takes as long as ``collect``."""
        return sum(self.drop_pooled(segment.ref) for segment in self._pool.victims(needed_bytes))

    def make_pool_room(self, size_bytes: int, limit_bytes: int) -> bool:
        """Whether the pool may take a segment of this size; smaller ones go for it, as a large one spares the most.

        False, and nothing goes, where the pool would have more than ``limit_bytes`` without them.
        """
        excess_bytes = self.pool_bytes + size_bytes - limit_bytes
        if excess_bytes <= 0:
            return True
        victims = self._pool.victims(excess_bytes, below_bytes=size_bytes)
        if sum(segment.size_bytes for segment in victims) < excess_bytes:
            return False
        for segment in victims:
            self.drop_pooled(segment.ref)
        return True

    def drop_pooled(self, ref: FileRef) -> int:
        """Gives one pool segment back (it could not be cleared, say); the bytes freed, 0 if it has left already."""
        segment = self._pool.take(ref)
        if segment is None:
            return 0
        self._release(segment)
        return segment.size_bytes

    def _collect_one(self, segment: Segment, keep: Callable[[int], bool]) -> Collected | None:
        use = probe(segment)
        if use is Use.IN_USE:
            return None
        kept = use is Use.FREE and not segment.is_sparse and keep(segment.size_bytes)
        if kept:
            path = self._path("pool", segment.segment_id)
            with level_errors(Level.L1, path, "rename to"):
                rename_new(segment.ref.path, path)
            ref = FileRef(path=path, inode=segment.ref.inode, size_bytes=segment.size_bytes, memory=True)
            self._pool.add_dirty(Segment(segment.segment_id, ref))
            self._withdrawn.pop(segment.segment_id, None)
        else:
            self._release(segment)
        return Collected(segment.size_bytes, kept=kept, proven=use is Use.FREE)

    def _release(self, segment: Segment) -> None:
        """Unlinks; while the kernel frees its pages, and if that fails, they count as withdrawn."""
        self._leaving[segment.segment_id] = segment
        self._withdrawn.pop(segment.segment_id, None)
        try:
            _unlink(segment.ref.path)
        except CachedError:
            self._withdrawn[segment.segment_id] = segment
            raise
        finally:
            self._leaving.pop(segment.segment_id, None)

    def _withdraw(self, path: str, *, sparse: bool = False) -> str:
        """Its id from now on."""
        ref = stat_ref(Level.L1, path)
        segment_id = secrets.token_hex(8)
        target = self._path("withdrawn", segment_id)
        with level_errors(Level.L1, path, "withdraw"):
            rename_new(path, target)
            moved = FileRef(target, ref.inode, ref.size_bytes, memory=True)
            self._withdrawn[segment_id] = _by_pages(segment_id, moved) if sparse else Segment(segment_id, moved)
            os.chmod(target, _PRIVATE)
        return segment_id

    def _reuse(self, path: str, ingest_id: str, size_bytes: int) -> FileRef | None:
        if os.path.lexists(path):
            return None
        segment = self._pool.take_fitted(ingest_id)
        if segment is None:
            match = self._pool.match(size_bytes)
            segment = self._pool.take(match.ref) if match is not None else None
        if segment is None:
            return None
        try:
            fd = open_checked(Level.L1, segment.ref.path, os.O_RDWR, segment.ref)
        except NotFoundError:
            return None
        except CachedError:
            self._release(segment)
            raise
        try:
            with level_errors(Level.L1, path, "make from the pool"):
                os.ftruncate(fd, size_bytes)
                self._set_access(fd)
                rename_new(segment.ref.path, path)
        except CachedError:
            self._release(segment)
            raise
        finally:
            os.close(fd)
        return FileRef(path=path, inode=segment.ref.inode, size_bytes=size_bytes, memory=True)

    def _create_fresh(self, path: str, size_bytes: int, *, private: bool = False) -> FileRef:
        with level_errors(Level.L1, path, "create", size_bytes):
            fd = _create_exclusive(path)
            try:
                os.ftruncate(fd, size_bytes)
                if not private:
                    self._set_access(fd)
                inode = os.fstat(fd).st_ino
            except OSError:
                _unlink(path)
                raise
            finally:
                os.close(fd)
        return FileRef(path=path, inode=inode, size_bytes=size_bytes, memory=True)

    def _set_access(self, fd: int) -> None:
        if self._group is not None:
            os.fchown(fd, -1, self._group)
        # Explicitly, since the umask may have taken bits away.
        os.fchmod(fd, self._mode)

    def _remove_spares(self, names: list[str]) -> None:
        """Second names, left by a daemon that was killed within ``commit``. First of all: a file of ours has one."""
        for name in [name for name in names if name.startswith(f"{self._prefix}spare.")]:
            with suppress(OSError):  # _sort_in tells what cannot be looked at
                found = os.lstat(f"{self.folder}/{name}")
                if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
                    _unlink(f"{self.folder}/{name}")
                    names.remove(name)

    def _sort_in(self, name: str, found: Found) -> str:
        """Takes account of one name of ours; the reason why it is none of ours, or nothing."""
        kind, _, own_id = name.removeprefix(self._prefix).partition(".")
        path = f"{self.folder}/{name}"
        try:
            problem = foreign(os.lstat(path))
        except OSError as error:
            return "" if error.errno == errno.ENOENT else str(error.strerror)
        if problem:
            return problem
        ref = stat_ref(Level.L1, path)
        if kind == "blob" and is_digest(own_id):
            found.blobs[own_id] = ref.size_bytes
        elif kind == "ingest" and is_ingest_id(own_id):
            found.ingests[own_id] = self._lengths[own_id] = ref.size_bytes
        elif kind == "withdrawn" and is_ingest_id(own_id):
            self._withdrawn[own_id] = _by_pages(own_id, ref)
        elif kind == "pool" and is_ingest_id(own_id):
            _unlink(path)
        else:
            return "its name is not one that we give"
        return ""

    def _path(self, kind: str, own_id: str) -> str:
        return f"{self.folder}/{self._prefix}{kind}.{own_id}"


def huge_pages_allowed(mounts: str, folder: str = SHM_FOLDER) -> bool:
    """Whether the mount that a folder is on gives huge pages to those who ask, from the text of /proc/self/mounts."""
    _, options = mount_of(mounts, folder)
    return bool({"huge=always", "huge=within_size", "huge=advise"} & set(options.split(",")))


def mount_of(mounts: str, folder: str) -> tuple[str, str]:
    """Type and options of the file system that a folder is on, from the text of /proc/self/mounts; empty: not told."""
    found, best = ("", ""), ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 4:
            continue
        point = _OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[1])
        inside = folder == point or folder.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # of several on one folder the last one is seen
            found, best = (fields[2], fields[3]), point
    return found


def _by_pages(segment_id: str, ref: FileRef) -> Segment:
    """A withdrawn segment that counts for its pages, if it has not all of them."""
    allocated_bytes = os.lstat(ref.path).st_blocks * _BLOCK_BYTES
    return Segment(segment_id, ref, pages_bytes=allocated_bytes if allocated_bytes < ref.size_bytes else None)


def _cut(ref: FileRef, size_bytes: int) -> None:
    fd = open_checked(Level.L1, ref.path, os.O_RDWR, ref)
    try:
        with level_errors(Level.L1, ref.path, "cut"):
            os.ftruncate(fd, size_bytes)
    finally:
        os.close(fd)


def _create_exclusive(path: str) -> int:
    if os.path.dirname(path) != SHM_FOLDER:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _PRIVATE)
    name = "/" + os.path.basename(path)
    try:
        segment = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=_PRIVATE)
    except posix_ipc.ExistentialError as error:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from error
    except posix_ipc.PermissionsError as error:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path) from error
    return int(segment.fd)


def _unlink(path: str) -> None:
    """Takes the name away, and with it the memory once nobody maps it; a name that is gone already is fine."""
    with level_errors(Level.L1, path, "unlink"):
        if os.path.dirname(path) != SHM_FOLDER:
            with suppress(FileNotFoundError):
                os.unlink(path)
            return
        try:
            posix_ipc.unlink_shared_memory("/" + os.path.basename(path))
        except posix_ipc.ExistentialError:
            pass
        except posix_ipc.PermissionsError as error:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path) from error
