"""L2: blobs as files on a local disk.

Layout, below the root: ``FORMAT`` (the text "1"), ``blobs/ab/<sha256>``, ``ingests/<id>/data``, and ``aside/``, where
whatever we do not know is put: it is never deleted and never keeps the daemon from starting.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import time
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

from cached.errors import CachedError, LevelError, NotFoundError
from cached.level import Level
from cached.levels.base import FileRef, Found, Later, at_once
from cached.levels.files import (
    checked_digest,
    checked_ingest_id,
    free_bytes,
    is_digest,
    is_ingest_id,
    level_errors,
    libc,
    open_checked,
    stat_ref,
)
from cached.own_files import foreign, fsync_folder

FORMAT = "1"
_FOLDER_MODE = 0o700
_FILE_MODE = 0o600
_KNOWN = frozenset({"FORMAT", "blobs", "ingests", "aside"})


class DiskLevel:
    """L2. Call ``scan`` first.

    ``scan``, ``create``, ``commit``, ``discard`` and ``remove`` may take long, and may run in threads, one at a time
    for each ingest and blob; everything else is quick.

    Not to be shared by two daemons: the state folder's lock sees to that.
    """

    level = Level.L2

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._blobs = os.path.join(root, "blobs")
        self._ingests = os.path.join(root, "ingests")
        self._aside = os.path.join(root, "aside")
        self._lengths: dict[str, int] = {}

    # What there is

    def scan(self) -> Found:
        """See LocalLevel. Makes the layout, or sets an unknown one aside and starts afresh.

        Raises LevelError or NoRoomError where the disk is gone, read-only or full; it may then be called again later.
        """
        self._lengths = {}
        aside: list[str] = []
        with level_errors(Level.L2, str(self.root), "prepare", missing_is_failure=True):
            self._prepare(aside)
            blobs = self._scan_blobs(aside)
            ingests = self._scan_ingests(aside)
        self._lengths.update(ingests)
        return Found(blobs=blobs, ingests=ingests, set_aside=tuple(aside))

    def blob(self, digest: str) -> FileRef:
        """See LocalLevel."""
        return stat_ref(Level.L2, self._blob_path(digest))

    def ingest(self, ingest_id: str) -> FileRef:
        """See LocalLevel."""
        return stat_ref(Level.L2, self._data_path(ingest_id))

    def open_blob(self, digest: str) -> int:
        """See LocalLevel."""
        return open_checked(Level.L2, self._blob_path(digest))

    def open_ingest(self, ingest_id: str) -> int:
        """See LocalLevel."""
        return open_checked(Level.L2, self._data_path(ingest_id))

    def free_bytes(self) -> int:
        """See LocalLevel."""
        return free_bytes(Level.L2, str(self.root))

    # Coming and going

    def create(self, ingest_id: str, size_bytes: int) -> FileRef:
        """See LocalLevel. The blocks are allocated now, so that a full disk is known before the first byte arrives."""
        path = self._data_path(ingest_id)
        folder = os.path.dirname(path)
        with level_errors(Level.L2, path, "create", size_bytes, missing_is_failure=True):
            os.mkdir(folder, _FOLDER_MODE)
            try:
                inode = _create_data(path, size_bytes)
            except OSError:
                _remove_ingest(folder)
                raise
        self._lengths[ingest_id] = size_bytes
        return FileRef(path=path, inode=inode, size_bytes=size_bytes, memory=False)

    def take_in(self, path: str, ingest_id: str) -> FileRef:
        """Makes a file of the same file system a new ingest: damaged, it is to be mended, and to be seen no more.

        Raises NotFoundError, and LevelError also for a file that is not ours alone or an ingest that exists.
        """
        ref = stat_ref(Level.L2, path)
        target = self._data_path(ingest_id)
        with level_errors(Level.L2, path, "take in"):
            os.mkdir(os.path.dirname(target), _FOLDER_MODE)
            os.rename(path, target)
        self._lengths[ingest_id] = ref.size_bytes
        return FileRef(path=target, inode=ref.inode, size_bytes=ref.size_bytes, memory=False)

    def commit(self, ingest_id: str, digest: str) -> FileRef:
        """See LocalLevel: fsync, check, rename, fsync of the folders. As slow as the disk writes what is dirty."""
        source, target = self._data_path(ingest_id), self._blob_path(digest)
        ref = self._sync_data(ingest_id, source)
        existing = self._existing(target, ref.size_bytes)
        if existing is None:
            with level_errors(Level.L2, target, "commit"):
                self._make_blob_folder(os.path.dirname(target))
                os.rename(source, target)
                _fsync_or_unlink(target)
        self.discard(ingest_id)
        return existing or FileRef(path=target, inode=ref.inode, size_bytes=ref.size_bytes, memory=False)

    def discard(self, ingest_id: str, *, later: Later = at_once) -> None:
        """See LocalLevel. Not fsynced: an ingest that comes back after a power cut is found by ``scan``."""
        folder = os.path.dirname(self._data_path(ingest_id))
        self._lengths.pop(ingest_id, None)
        with level_errors(Level.L2, folder, "discard"):
            _remove_ingest(folder, later)

    def remove(self, digest: str, *, later: Later = at_once) -> None:
        """See LocalLevel."""
        path = self._blob_path(digest)
        with level_errors(Level.L2, path, "remove"):
            fd = _unlink(path)
        later(partial(_free, fd, os.path.dirname(path)))

    def _sync_data(self, ingest_id: str, path: str) -> FileRef:
        fd = open_checked(Level.L2, path)
        try:
            with level_errors(Level.L2, path, "fsync"):
                os.fsync(fd)
            found = os.fstat(fd)
        except CachedError:
            # The kernel may have dropped the dirty pages and count them as written: whoever took this ingest up again
            # would find the right bytes in memory, and the next fsync would succeed without having written them.
            with suppress(LevelError):
                self.discard(ingest_id)
            raise
        finally:
            os.close(fd)
        if found.st_size != self._lengths.get(ingest_id, found.st_size):
            raise LevelError(f"l2: {path} changed its length", level=Level.L2, path=path, cause="length")
        return FileRef(path=path, inode=found.st_ino, size_bytes=found.st_size, memory=False)

    def _existing(self, path: str, size_bytes: int) -> FileRef | None:
        """The blob, if it is there and whole by its length; one of another length is damaged and gets replaced."""
        try:
            existing = stat_ref(Level.L2, path)
        except NotFoundError:
            return None
        return existing if existing.size_bytes == size_bytes else None

    def _make_blob_folder(self, folder: str) -> None:
        with suppress(FileExistsError):
            os.mkdir(folder, _FOLDER_MODE)
            fsync_folder(self._blobs)

    # Starting

    def _prepare(self, aside: list[str]) -> None:
        os.makedirs(self.root, _FOLDER_MODE, exist_ok=True)
        if not self._format_is_known():
            self._set_layout_aside(aside)
        for folder in (self._blobs, self._ingests):
            self._require_folder(folder, aside)
        self._write_format()

    def _format_is_known(self) -> bool:
        """True for our format, and for a root that has nothing of ours in it yet."""
        path = os.path.join(self.root, "FORMAT")
        if not os.path.lexists(path):
            return not any(os.path.lexists(folder) for folder in (self._blobs, self._ingests))
        try:
            fd = open_checked(Level.L2, path)
        except (LevelError, NotFoundError):
            return False
        with os.fdopen(fd, "rb") as file:
            return file.read(64).strip() == FORMAT.encode("ascii")

    def _set_layout_aside(self, aside: list[str]) -> None:
        """Ours by name; where the format is another's, everything but what no daemon of ours makes."""
        names = set(os.listdir(self.root)) - {"aside", "lost+found"}
        if "FORMAT" not in names:
            names &= _KNOWN
        for name in sorted(names):
            self._set_aside(os.path.join(self.root, name), "its format is not known", aside)

    def _require_folder(self, path: str, aside: list[str]) -> None:
        if os.path.lexists(path):
            found = os.lstat(path)
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
                return
            self._set_aside(path, "it is not a folder of ours", aside)
        os.mkdir(path, _FOLDER_MODE)
        fsync_folder(os.path.dirname(path))

    def _write_format(self) -> None:
        path = os.path.join(self.root, "FORMAT")
        if os.path.lexists(path):
            return
        with suppress(FileNotFoundError):
            os.unlink(path + ".new")
        fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _FILE_MODE)
        try:
            os.write(fd, f"{FORMAT}\n".encode("ascii"))
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(path + ".new", path)
        fsync_folder(str(self.root))

    def _scan_blobs(self, aside: list[str]) -> dict[str, int]:
        blobs: dict[str, int] = {}
        for folder in _listed(self._blobs):
            if not (_is_blob_folder(folder.name) and folder.is_dir(follow_symlinks=False)):
                self._set_aside(folder.path, "it is not a folder of blobs", aside)
                continue
            for entry in _listed(folder.path):
                found = entry.stat(follow_symlinks=False)
                problem = foreign(found)
                if not (is_digest(entry.name) and entry.name.startswith(folder.name)):
                    problem = "its name is not that of a blob"
                if problem:
                    self._set_aside(entry.path, problem, aside)
                else:
                    blobs[entry.name] = found.st_size
        return blobs

    def _scan_ingests(self, aside: list[str]) -> dict[str, int]:
        ingests: dict[str, int] = {}
        for folder in _listed(self._ingests):
            if not (is_ingest_id(folder.name) and folder.is_dir(follow_symlinks=False)):
                self._set_aside(folder.path, "it is not an ingest", aside)
                continue
            data = self._scan_ingest(folder.path, aside)
            if data is None:  # a crash before the data was there, or after it was renamed to a blob
                _remove_ingest(folder.path)
            else:
                ingests[folder.name] = data
        return ingests

    def _scan_ingest(self, folder: str, aside: list[str]) -> int | None:
        size_bytes = None
        for entry in _listed(folder):
            found = entry.stat(follow_symlinks=False)
            problem = foreign(found)
            if entry.name != "data":
                problem = "it is no part of an ingest"
            if problem:
                self._set_aside(entry.path, problem, aside)
            else:
                size_bytes = found.st_size
        return size_bytes

    def _set_aside(self, path: str, problem: str, aside: list[str]) -> None:
        """Moves an unknown thing out of the way, under its path within the root. One that cannot be moved is left."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        target = os.path.join(self._aside, stamp, os.path.relpath(path, self.root))
        try:
            os.makedirs(os.path.dirname(target), _FOLDER_MODE, exist_ok=True)
            target = _unused(target)
            os.rename(path, target)
        except OSError as error:
            aside.append(f"{path}: {problem}; it could not be moved away: {error.strerror}")
        else:
            aside.append(f"{path}: {problem}; moved to {target}")

    def _blob_path(self, digest: str) -> str:
        return os.path.join(self._blobs, checked_digest(digest)[:2], digest)

    def _data_path(self, ingest_id: str) -> str:
        return os.path.join(self._ingests, checked_ingest_id(ingest_id), "data")


def _create_data(path: str, size_bytes: int) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _FILE_MODE)
    try:
        _allocate(fd, size_bytes)
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


def _allocate(fd: int, size_bytes: int) -> None:
    """Blocks for the whole file; only its length where the file system has no fallocate.

    Not ``os.posix_fallocate``: where there is none, the C library would write into every block.
    """
    while size_bytes:
        if _fallocate()(fd, 0, 0, size_bytes) == 0:
            return
        code = ctypes.get_errno()
        if code in {errno.EOPNOTSUPP, errno.ENOSYS}:
            break
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    os.ftruncate(fd, size_bytes)


def _fsync_or_unlink(path: str) -> None:
    """Makes a blob's name durable, or takes it away again: a name that a power cut may undo is no commit."""
    try:
        fsync_folder(os.path.dirname(path))
    except OSError:
        with suppress(FileNotFoundError):
            os.unlink(path)
        raise


def _free(fd: int, folder: str) -> None:
    """The name is gone; a folder that cannot be synced gives it back after a power cut, to be found by ``scan``."""
    try:
        with suppress(OSError):
            fsync_folder(folder)
    finally:
        _close(fd)


def _unlink(path: str) -> int:
    """Takes a name away, which takes no time: its bytes are not freed as long as the descriptor that it gives is open.

    -1 where the file cannot be opened.
    """
    fd = -1
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        os.unlink(path)
    except OSError:
        _close(fd)
        raise
    return fd


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


def _remove_ingest(folder: str, later: Later = at_once) -> None:
    with suppress(FileNotFoundError):
        later(partial(_close, _unlink(os.path.join(folder, "data"))))
    with suppress(FileNotFoundError):
        os.rmdir(folder)


def _listed(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_blob_folder(name: str) -> bool:
    return len(name) == 2 and set(name) <= set("0123456789abcdef")


def _unused(path: str) -> str:
    number, candidate = 1, path
    while os.path.lexists(candidate):
        number, candidate = number + 1, f"{path}.{number}"
    return candidate


@cache
def _fallocate() -> ctypes._NamedFuncPointer:
    function = libc().fallocate
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    function.restype = ctypes.c_int
    return function
