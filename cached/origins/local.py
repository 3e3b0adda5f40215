"""The origin ``file:///folder`` or ``file:///one/file``: a local disk, NFS, or any other mounted file system."""

from __future__ import annotations

import errno
import os
import secrets
import stat as stat_bits
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cached.errors import (
    CachedError,
    IntegrityError,
    InvalidRequestError,
    NotFoundError,
    ObjectChangedError,
    OriginDeniedError,
    OriginError,
    OriginProtocolError,
    OriginUnavailableError,
)
from cached.origins.base import Abort, OriginObject, OriginSpec, ReadInto
from cached.own_files import fsync_folder
from cached.refs import check_path
from cached.urls import local_path

_COPY_BYTES = 4 << 20
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


class LocalOrigin:
    """See Origin and WritableOrigin.

    Symbolic links to files are followed where their target lies below the folder or, for a ``snapshots/REVISION``
    folder of a Hugging Face cache, below the ``blobs`` folder beside ``snapshots``. A link that leads elsewhere, or to
    a folder, is an error and not skipped: a model with a file silently missing is worse than none.
    """

    def __init__(self, spec: OriginSpec) -> None:
        top = local_path(spec.uri)
        if spec.options:
            raise InvalidRequestError(
                f"file:// origins take no options, and {', '.join(sorted(spec.options))} was given",
                hint="remove the options",
                value=next(iter(sorted(spec.options))),
            )
        self._uri = spec.uri
        self._top = os.path.normpath(top)

    def prepare(self) -> None:
        """See Origin. There is nothing to do."""

    def list_objects(self) -> list[OriginObject]:
        """See Origin."""
        with self._errors(""):
            if not stat_bits.S_ISDIR(os.stat(self._top).st_mode):
                return [self.stat(os.path.basename(self._top))]
            found = [self.stat(path) for path in self._walk("")]
        if not found:
            raise NotFoundError(
                f"there are no files in {self._top}", hint="look whether the path is right", uri=self._uri, path=""
            )
        return sorted(found, key=lambda item: item.path)

    def stat(self, path: str) -> OriginObject:
        """See Origin. Files have no checksums."""
        with self._opened(path) as descriptor, self._errors(path):
            return _described(path, os.fstat(descriptor))

    @contextmanager
    def open_range(
        self, item: OriginObject, offset_bytes: int, length_bytes: int, abort: Abort | None = None
    ) -> Iterator[ReadInto]:
        """See Origin. The version is looked at before and after reading."""
        del length_bytes  # a file is read as it is asked for
        at_bytes = offset_bytes

        def read_into(view: memoryview) -> None:
            nonlocal at_bytes
            with self._errors(item.path):
                done_bytes = _fill(descriptor, view, at_bytes, abort)
            at_bytes += done_bytes
            if done_bytes < len(view):
                raise self._ended(item, len(view) - done_bytes)

        with self._opened(item.path) as descriptor:
            self._check_version(item, descriptor)
            yield read_into
            self._check_version(item, descriptor)

    def close(self) -> None:
        """See Origin; nothing is kept open."""

    def upload_file(self, local_path: Path, path: str, progress: Callable[[int], None] | None = None) -> OriginObject:
        """See WritableOrigin: written beside its place, synced, and renamed."""
        if not local_path.is_file():
            raise NotFoundError(f"{local_path} is not a file", hint="name a file that is there", path=local_path)
        target = os.path.join(self._top, *check_path(path).split("/"))
        partial = f"{target}.{secrets.token_hex(6)}.part"
        with self._errors(path):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            try:
                size_bytes = _copy_synced(local_path, partial, progress or _ignore)
                os.replace(partial, target)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(partial)
                raise
            fsync_folder(os.path.dirname(target))
        stored = self.stat(path)
        if stored.size_bytes != size_bytes:
            raise IntegrityError(
                f"{path} has {stored.size_bytes} bytes after the upload of {size_bytes}",
                hint="something else writes to the same folder; upload again",
                path=path,
                check="size",
                expected=size_bytes,
                found=stored.size_bytes,
            )
        return stored

    def _walk(self, folder: str) -> Iterator[str]:
        with os.scandir(os.path.join(self._top, folder)) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    yield from self._walk(path)
                elif entry.is_symlink() and entry.is_dir():
                    raise self._bad_link(path, "it leads to a folder")
                elif entry.is_symlink() or entry.is_file(follow_symlinks=False):
                    yield path

    def _resolve(self, path: str) -> str:
        """The real path of an object, inside what this origin may read."""
        check_path(path)
        top = os.path.realpath(self._top, strict=True)
        if not os.path.isdir(top):
            if path != os.path.basename(self._top):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            return top
        real = os.path.realpath(os.path.join(self._top, path), strict=True)
        if not any(real.startswith(f"{zone.rstrip('/')}/") for zone in _zones(top)):
            raise self._bad_link(path, "it leads out of the folder")
        return real

    @contextmanager
    def _opened(self, path: str) -> Iterator[int]:
        """Its descriptor. What goes wrong in the block is not taken for an error of this origin."""
        with self._errors(path):
            # Not blocking: a named pipe in the folder must be refused, not waited for.
            descriptor = os.open(self._resolve(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not stat_bits.S_ISREG(os.fstat(descriptor).st_mode):
                raise InvalidRequestError(
                    f"{path} in {self._top} is not a file", hint="name a file or a folder of files", value=path
                )
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._typed(error, path) from error

    def _typed(self, error: OSError, path: str) -> CachedError:
        where = os.path.join(self._top, path) if path else self._top
        cause = os.strerror(error.errno) if error.errno else str(error)
        fields = {"uri": self._uri, "path": path, "cause": cause}
        if error.errno in _MISSING:
            return NotFoundError(f"{where} is not there", hint="look whether the path is right and mounted", **fields)
        if error.errno in _DENIED:
            hint = "let the user of this process read (to upload: write) there, and enter every folder on the way"
            return OriginDeniedError(f"{where} may not be used: {cause}", hint=hint, **fields)
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return OriginError(f"{where} cannot be written: {cause}", hint="make room there", **fields)
        return OriginUnavailableError(f"{where} failed: {cause}", hint="look at the disk or the mount", **fields)

    def _bad_link(self, path: str, why: str) -> InvalidRequestError:
        return InvalidRequestError(
            f"{path} in {self._top} is a symbolic link that is not followed: {why}",
            hint="replace it by the file itself, or give the URI of the folder that it leads to",
            value=path,
        )

    def _ended(self, item: OriginObject, missing_bytes: int) -> OriginProtocolError:
        return OriginProtocolError(
            f"{item.path} ended {missing_bytes} bytes before the range that was asked for",
            hint="the file is shorter than it was when it was listed",
            uri=self._uri,
            path=item.path,
            cause="short read",
        )

    def _check_version(self, item: OriginObject, descriptor: int) -> None:
        found = _version(os.fstat(descriptor))
        if found != item.version:
            raise ObjectChangedError(
                f"{item.path} in {self._top} was changed after it was listed",
                hint="pull again once nobody writes to it",
                uri=self._uri,
                path=item.path,
                expected=item.version,
                found=found,
            )


def _zones(top: str) -> tuple[str, ...]:
    parent, grandparent = os.path.dirname(top), os.path.dirname(os.path.dirname(top))
    if os.path.basename(parent) == "snapshots":
        return top, os.path.join(grandparent, "blobs")
    return (top,)


def _fill(descriptor: int, view: memoryview, offset_bytes: int, abort: Abort | None) -> int:
    """The count of bytes read: less than the view holds at the end of the file, or after an abort."""
    done_bytes = 0
    while done_bytes < len(view) and not (abort and abort.aborted):
        with view[done_bytes:] as rest:
            count = os.preadv(descriptor, [rest], offset_bytes + done_bytes)
        if count == 0:
            break
        done_bytes += count
    return done_bytes


def _described(path: str, status: os.stat_result) -> OriginObject:
    return OriginObject(path=path, size_bytes=status.st_size, version=_version(status))


def _version(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"


def _copy_synced(source: Path, target: str, progress: Callable[[int], None]) -> int:
    size_bytes = 0
    with source.open("rb", buffering=0) as reader, open(target, "xb", buffering=0) as writer:
        while block := reader.read(_COPY_BYTES):
            rest = memoryview(block)
            while rest:
                rest = rest[writer.write(rest) :]
            size_bytes += len(block)
            progress(len(block))
        os.fsync(writer.fileno())
    return size_bytes


def _ignore(_count: int) -> None:
    """Nobody wants to know the progress."""
