"""The folder that a standalone pull fills: whose files are in it, what arrives beside them, how they get their names.

``.cached/`` in it is ours: ``lock``, ``manifest.json`` (cached.seed), and while a pull is under way or was interrupted
``incoming/``, an L2 of its own, with ``journals/``.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cached.errors import CachedError, InvalidRequestError, LevelError, NoRoomError, NotFoundError
from cached.level import Level
from cached.levels.base import FileRef
from cached.levels.disk import DiskLevel
from cached.levels.files import level_errors, stat_ref
from cached.own_files import fsync_folder
from cached.rpc.sockets import FileLock
from cached.seed import FOLDER, RECORD, SeedRecord, read_seed
from cached.units import format_size

_FOLDER_MODE = 0o755
_FILE_MODE = 0o644
_SHOWN = 3


class SeedFolder:
    """Everything blocks. ``lock`` first, then ``prepare``. Errors: LevelError, NoRoomError, InvalidRequestError."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        self.journals = self.root / FOLDER / "journals"
        self.incoming = DiskLevel(self.root / FOLDER / "incoming")
        self._lock: FileLock | None = None

    def lock(self) -> None:
        """Makes the folder and takes its lock. Raises AlreadyRunningError, naming who has it."""
        with _plain(self.root), level_errors(Level.L2, str(self.root), "make", missing_is_failure=True):
            try:
                os.makedirs(self.root, _FOLDER_MODE, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise InvalidRequestError(
                    f"{self.root} is not a folder", hint="give a folder with --to", value=self.root
                ) from error
            with suppress(FileExistsError):
                os.mkdir(self.root / FOLDER, _FOLDER_MODE)
            if not stat.S_ISDIR(os.lstat(self.root / FOLDER).st_mode):
                raise InvalidRequestError(f"{self.root / FOLDER} is not a folder", hint="remove it", value=self.root)
        self._lock = FileLock(
            str(self.root / FOLDER / "lock"), str(self.root), who="pull", hint="wait until it is through, or end it"
        )

    def release(self) -> None:
        """Gives the lock back; idempotent."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def record(self) -> SeedRecord | None:
        """What an earlier pull recorded. Raises IntegrityError."""
        return read_seed(self.root)

    def prepare(self) -> tuple[dict[str, int], dict[str, int]]:
        """Makes the place where files arrive; blobs and ingests that an interrupted pull left there, with sizes."""
        with _plain(self.root):
            found = self.incoming.scan()
            with level_errors(Level.L2, str(self.journals), "make"):
                os.makedirs(self.journals, 0o700, exist_ok=True)
        return found.blobs, found.ingests

    def check_paths(self, paths: Iterable[str], ours: Iterable[str], *, force: bool) -> None:
        """Raises InvalidRequestError where a file would take the place of something that no pull of ours laid."""
        paths, known = list(paths), set(ours)
        for path in paths:
            if path.split("/")[0] == FOLDER:
                raise InvalidRequestError(
                    f"the model has a file {path!r}, in the folder that the record of the pull is kept in",
                    hint="leave it out with an exclude pattern in the catalog",
                    value=path,
                )
        for folder in sorted({parent for path in paths for parent in _parents(path)}):
            with suppress(FileNotFoundError):
                self._require_folder(str(self.root / folder))
        wanted = {path for path in paths if path not in known}
        foreign = sorted(path for path in wanted if os.path.lexists(self.root / path))
        if foreign and not force:
            more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
            raise InvalidRequestError(
                f"{self.root} holds files that this pull did not lay and would replace: "
                f"{', '.join(foreign[:_SHOWN])}{more}",
                hint="give an empty folder, or --force to replace them",
                value=self.root,
            )

    def file(self, path: str) -> FileRef:
        """A file at its place. Raises NotFoundError, and LevelError for what is no file of ours alone."""
        return stat_ref(Level.L2, str(self.root / path))

    def stamp(self, path: str) -> tuple[int, int]:
        """Size and mtime of a file, in bytes and ns; (-1, 0) where there is none."""
        try:
            found = os.lstat(self.root / path)
        except OSError:
            return -1, 0
        return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else (-1, 0)

    def reserve(self, sizes: dict[str, int]) -> None:
        """Creates these ingests, all or none, with their blocks: a full disk is told before the first byte comes."""
        needed_bytes, free_bytes = sum(sizes.values()), self.incoming.free_bytes()
        if needed_bytes > free_bytes:
            raise NoRoomError(
                f"{self.root} has {format_size(free_bytes)} free, and {format_size(needed_bytes)} are to come",
                hint="make room there, or give another folder with --to",
                path=self.root,
                needed_bytes=needed_bytes,
                available_bytes=free_bytes,
            )
        made: list[str] = []
        try:
            with _plain(self.root):
                for ingest_id, size_bytes in sizes.items():
                    self.incoming.create(ingest_id, size_bytes)
                    made.append(ingest_id)
        except CachedError:
            for ingest_id in made:
                self.incoming.discard(ingest_id)
            raise

    def write(self, record: SeedRecord) -> None:
        """Replaces the record, durably."""
        path = self.root / RECORD
        with _plain(self.root), level_errors(Level.L2, str(path), "write"):
            fresh = f"{path}.new"
            with suppress(FileNotFoundError):
                os.unlink(fresh)
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w", encoding="ascii") as file:
                file.write(record.to_text())
                file.flush()
                os.fchmod(file.fileno(), _FILE_MODE)
                os.fsync(file.fileno())
            os.rename(fresh, path)
            fsync_folder(os.path.dirname(path))

    def sync(self, path: str) -> None:
        """Makes the content of a file that arrived durable."""
        with _plain(self.root), level_errors(Level.L2, path, "fsync"), open(path, "rb") as file:
            os.fsync(file.fileno())

    def place(self, source: str, path: str) -> None:
        """Gives a file that is whole and durable its name, durably, in place of what has it."""
        target = self.root / path
        with _plain(self.root), level_errors(Level.L2, str(target), "place"):
            parent = self._folder_of(path)
            os.chmod(source, _FILE_MODE)
            os.replace(source, target)
            fsync_folder(parent)

    def _folder_of(self, path: str) -> str:
        """The folder of a path, made; never one that a link leads to."""
        place = str(self.root)
        for part in path.split("/")[:-1]:
            place = os.path.join(place, part)
            with suppress(FileExistsError):
                os.mkdir(place, _FOLDER_MODE)
                fsync_folder(os.path.dirname(place))
            self._require_folder(place)
        return place

    def _require_folder(self, place: str) -> None:
        if not stat.S_ISDIR(os.lstat(place).st_mode):
            raise InvalidRequestError(
                f"{place} is not a folder, and files are to be laid in it", hint="remove it", value=place
            )

    def remove(self, paths: Iterable[str]) -> None:
        """Files that we laid and the model no longer has, with the folders that are empty then."""
        for path in paths:
            with level_errors(Level.L2, str(self.root / path), "remove"), suppress(FileNotFoundError):
                os.unlink(self.root / path)
            folder = os.path.dirname(path)
            with suppress(OSError):
                while folder:
                    os.rmdir(self.root / folder)
                    folder = os.path.dirname(folder)

    def finish(self) -> None:
        """Removes the place where files arrive: all of them have their names."""
        shutil.rmtree(self.incoming.root, ignore_errors=True)
        shutil.rmtree(self.journals, ignore_errors=True)


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


@contextmanager
def _plain(root: Path) -> Iterator[None]:
    """Errors in the words of somebody who has a folder, and no levels."""
    try:
        yield
    except (LevelError, NoRoomError, NotFoundError) as error:
        raise in_plain_words(error, root) from error


def in_plain_words(error: CachedError, root: Path) -> CachedError:
    """The same error, of the same type, without the cache's words."""
    fields = {key: value for key, value in error.fields.items() if key not in {"level", "capacity_bytes", "ref"}}
    hint = error.hint
    if isinstance(error, NoRoomError):
        hint = "make room there, or give another folder with --to"
    elif isinstance(error, LevelError) and not hint:
        hint = f"let this user write to {root}, and look at the disk"
    return type(error)(error.message.removeprefix("l2: "), hint=hint, **fields)
