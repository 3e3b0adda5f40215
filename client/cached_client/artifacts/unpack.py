"""Puts an archive's files into a directory: all checked before anything is seen there, each durable before its name is.

Whoever can save an artifact chose its bytes, so nothing of the archive is trusted: only regular files with plain names
below the directory come out of it, whatever it says.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import re
import shutil
import tarfile
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cached_client.artifacts.archive import MAX_FILES, is_too_long
from cached_client.errors import ArtifactError, IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO

_PREFIX = ".cached-restore."
_MAX_PATH_RECORD_BYTES = 16 * 1024
_COPY_BYTES = 1 << 20
_STALE_S = 3600.0
_BLOCK_BYTES = tarfile.BLOCKSIZE
_FILE, _LONG_PATH, _END = b"0", b"x", bytes(tarfile.BLOCKSIZE)
_PATH_RECORD = re.compile(rb"\d{1,5} path=[^\n\0]+\n")


def unpack(archive: memoryview, directory: Path, *, max_bytes: int) -> tuple[int, int]:
    """Makes the archive's files appear in ``directory``; (files that were added, files that were there already).

    A directory that is not there, or empty, appears whole in one step (a rename). To one with files, or on which a file
    system is mounted, each missing file is added in one step of its own, and none that is there is touched. Any number
    of processes may do this at once.
    Whatever fails or is killed leaves the directory as it was, or with whole files of this archive.

    Raises IntegrityError for an archive that is damaged, or holds what it may not: links, devices, absolute paths or
    such that lead out, special modes, more than ``max_bytes``. Raises ArtifactError if the directory cannot be written.
    """
    try:
        target = directory.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        place = target if _is_filled(target) else target.parent
        _sweep(place)
        with _workspace(place) as folder:
            content = folder / "content"
            content.mkdir(mode=0o755)
            count = _extract(archive, content, max_bytes)
            if place != target and _moved_whole(content, target):
                _sync_folder(place)
                return count, 0
            added = _merge(content, target)
            return added, count - added
    except OSError as error:
        raise ArtifactError(
            f"{directory} cannot be written: {error.strerror or error}",
            hint="choose a directory on a local disk with room, that this user may write to",
            path=directory,
            cause=error.strerror,
        ) from error


def _is_filled(target: Path) -> bool:
    """Whether it cannot be replaced, so that files have to be added to it: then they are made ready inside it."""
    if not target.is_dir():
        return False
    return os.path.ismount(target) or not os.access(target.parent, os.W_OK) or any(target.iterdir())


@contextlib.contextmanager
def _workspace(parent: Path) -> Iterator[Path]:
    """A folder for what is made ready, locked as long as it is used: one that a killed process left can be told."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(fd)


def _sweep(parent: Path) -> None:
    """Removes what killed processes left; one that is in use is locked, and another user's is not ours to remove."""
    for entry in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            fd = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its maker locks it a moment after it has made it: a fresh empty one may be about to be used.
                if any(entry.iterdir()) or time.time() - entry.stat().st_mtime > _STALE_S:
                    shutil.rmtree(entry, ignore_errors=True)
            finally:
                os.close(fd)


def _extract(archive: memoryview, folder: Path, max_bytes: int) -> int:
    """Writes and syncs every file; how many there are."""
    seen: set[str] = set()
    total_bytes = 0
    _check_blocks(archive)
    try:
        with io.BufferedReader(_ViewFile(archive)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                total_bytes += member.size
                _check(member, seen, total_bytes, max_bytes, folder)
                seen.add(member.name)
                source = tar.extractfile(member)
                assert source is not None  # noqa: S101 - a regular file
                with source:
                    _write_within(source, folder / member.name, member)
    except (tarfile.TarError, EOFError, UnicodeError, ValueError) as error:
        raise _refused("", f"it is damaged: {error}") from error
    if not seen:
        raise _refused("", "it holds no file")
    for place, _, _ in os.walk(folder, topdown=False):
        _sync_folder(Path(place))
    return len(seen)


def _check_blocks(archive: memoryview) -> None:
    """Only headers of files and of long paths, as our own archives have: tarfile is shown nothing else to interpret."""
    at = 0
    while at + _BLOCK_BYTES <= len(archive) and (block := bytes(archive[at : at + _BLOCK_BYTES])) != _END:
        kind, octal = block[156:157], block[124:136].rstrip(b"\0 ")
        if kind not in {_FILE, _LONG_PATH} or not octal.isdigit():
            raise _refused("", "it holds something that is no regular file")
        begin, size_bytes = at + _BLOCK_BYTES, _parse_octal(octal)
        if kind == _LONG_PATH:
            record = bytes(archive[begin : begin + min(size_bytes, _MAX_PATH_RECORD_BYTES + 1)])
            if size_bytes > _MAX_PATH_RECORD_BYTES or not _PATH_RECORD.fullmatch(record):
                raise _refused("", "a header of it says more than a path")
        at = begin + -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
    if at + 2 * _BLOCK_BYTES != len(archive) or any(archive[at:]):
        raise _refused("", "it is cut off, or goes on after its end")


def _parse_octal(octal: bytes) -> int:
    try:
        return int(octal, 8)
    except ValueError:
        raise _refused("", "a size in it is no number") from None


def _check(member: tarfile.TarInfo, seen: set[str], total_bytes: int, max_bytes: int, folder: Path) -> None:
    """Raises IntegrityError unless the member is a plain file with a plain name within the bounds."""
    name = member.name
    if member.type != tarfile.REGTYPE or member.issparse() or member.linkname:
        raise _refused(name, "it is no regular file")
    if member.mode & ~0o755 or not member.mode & 0o400:
        raise _refused(name, f"its mode is {member.mode:o}")
    if is_too_long(name):
        raise _refused(name, "its path is too long")
    if any(part in {"", ".", ".."} for part in name.split("/")):
        raise _refused(name, "its path leads elsewhere")
    if not name.isprintable() or "\\" in name:
        raise _refused(name, "its path has control characters")
    if name in seen:
        raise _refused(name, "it is there twice")
    if len(seen) >= MAX_FILES or total_bytes > max_bytes or member.size < 0:
        raise _refused(name, f"it holds more than {MAX_FILES} files or {max_bytes} bytes")
    data_filter = getattr(tarfile, "data_filter", None)  # Python's own rules, where this one has them
    if data_filter is not None:
        try:
            data_filter(member, os.fspath(folder))
        except tarfile.TarError as error:
            raise _refused(name, str(error)) from error


def _refused(path: str, why: str) -> IntegrityError:
    what = f"{path!r} of the compile artifact" if path else "the compile artifact"
    return IntegrityError(
        f"{what} is refused: {why}; nothing was restored",
        hint="remove the artifact (`cached artifact rm`), and find out who saved it",
        path=path,
        check="archive",
    )


def _write_within(source: IO[bytes], target: Path, member: tarfile.TarInfo) -> None:
    try:
        _write(source, target, member)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise _refused(member.name, "another file of it is in its way") from None


def _write(source: IO[bytes], target: Path, member: tarfile.TarInfo) -> None:
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(target, flags, 0o755 if member.mode & 0o100 else 0o644)
    left_bytes = member.size
    with open(fd, "wb", buffering=0) as file:
        while part := source.read(_COPY_BYTES):
            left_bytes -= len(part)
            view = memoryview(part)
            while view:
                view = view[file.write(view) or 0 :]
        os.fsync(file.fileno())
    if left_bytes:
        raise _refused(member.name, "it ends early")


def _moved_whole(content: Path, directory: Path) -> bool:
    """Gives the content the directory's name in one step; False where there are files already."""
    try:
        os.rename(content, directory)  # also over an empty directory
    except OSError:
        if directory.is_dir() and not directory.is_symlink():
            return False
        raise
    return True


def _merge(content: Path, directory: Path) -> int:
    """Adds what is missing; how many files that were. A folder that is a link is refused: it may lead anywhere."""
    added = 0
    for place, folders, names in os.walk(content):
        inside = directory / Path(place).relative_to(content)
        for name in folders:
            with contextlib.suppress(FileExistsError):
                (inside / name).mkdir(mode=0o755)
            if (inside / name).is_symlink() or not (inside / name).is_dir():
                raise ArtifactError(
                    f"{inside / name} is no folder, though the compile artifact has one there",
                    hint="remove it, or restore to another directory", path=inside / name,
                )  # fmt: skip
        for name in names:
            added += _added(Path(place) / name, inside / name)
        _sync_folder(inside)
    return added


def _added(source: Path, target: Path) -> bool:
    """Gives a file its name unless something has it."""
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}:
            raise
        if target.exists() or target.is_symlink():
            return False
        os.rename(source, target)  # a file system without hard links: of two at once the later one's file stays
    return True


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _ViewFile(io.RawIOBase):
    """A file over memory that is not copied."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._view)}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: object) -> int:
        with memoryview(buffer).cast("B") as target:  # type: ignore[arg-type]
            part = self._view[self._at : self._at + len(target)]
            target[: len(part)] = part
        self._at += len(part)
        return len(part)
