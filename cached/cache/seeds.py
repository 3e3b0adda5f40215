"""Seeds that were laid on this host before the daemon came: read instead of the origin, as far as they are true.

A seed is never trusted: its bytes are copied chunk by chunk, and count once the SHA-256 of the whole, or the origin's
own checksum, was confirmed. What a seed lacks, or has damaged, is fetched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cached.cache.events import EventBus
from cached.errors import CachedError
from cached.level import Level
from cached.levels.base import FileRef
from cached.levels.files import stat_ref
from cached.manifest import BlobRecord, FileEntry
from cached.own_files import foreign
from cached.seed import RECORD, SeedRecord, read_seed
from cached.signals import in_thread
from cached.transfer.fill import OriginSource

_Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class SeedFile:
    """A file of a seed, as it is now, and the checksums that its record has for it."""

    ref: FileRef
    record: BlobRecord


@dataclass(frozen=True, slots=True)
class _Seed:
    folder: Path
    stamp: _Stamp
    record: SeedRecord | None
    problem: str = ""


class Seeds:
    """The seeds of ``folders``: each is one, or holds some. Loop only."""

    def __init__(self, folders: Sequence[str], events: EventBus) -> None:
        self._folders = tuple(Path(folder) for folder in folders)
        self._events = events
        self._seeds: dict[Path, _Seed] = {}
        self._refused: set[str] = set()
        """Paths of files whose content turned out to be something else."""

    async def of(self, name: str) -> SeedRecord | None:
        """What the seed of a model is recorded to be, as of now; None if there is none that has all its files."""
        if not self._folders:
            return None
        found = await in_thread(_read, self._folders, self._seeds)
        for folder, seed in found.items():
            if seed.problem and seed != self._seeds.get(folder):
                self._events.emit("seed.refused", f"a seed cannot be used: {seed.problem}", folder=folder)
        self._seeds = found
        for seed in found.values():
            if seed.record is not None and seed.record.manifest.name == name and self._is_whole(seed):
                return seed.record
        return None

    def _is_whole(self, seed: _Seed) -> bool:
        """As far as that shows without reading: nothing of it was refused, and every file has its length."""
        entries = seed.record.manifest.files if seed.record else ()
        return all(
            str(seed.folder / entry.path) not in self._refused and _length(seed.folder / entry.path) == entry.size_bytes
            for entry in entries
        )

    def used(self, name: str, why: str) -> None:
        """Tells that a model's files are known from its seed alone."""
        self._events.emit("seed.used", f"{name} is taken from its seed: {why}", name=name)

    def find(self, digest: str, origin: OriginSource | None) -> SeedFile | None:
        """A file with this content; or, where its digest is not known, with what the origin has at this version."""
        for seed in self._seeds.values():
            for entry in seed.record.manifest.files if seed.record else ():
                path = seed.folder / entry.path
                if str(path) in self._refused or not _is(entry, seed.record, digest, origin):
                    continue
                try:
                    ref = stat_ref(Level.L2, str(path))
                except CachedError:
                    continue
                assert seed.record is not None  # noqa: S101 - it has entries
                if ref.size_bytes == entry.size_bytes:
                    return SeedFile(ref, seed.record.blobs[entry.digest])
        return None

    def refuse(self, file: SeedFile, name: str) -> None:
        """It is not what it was taken for, or what the origin has now: it is not looked at again by this daemon."""
        self._refused.add(file.ref.path)
        why = f"{file.ref.path} is not what it was taken for"
        self._events.emit("seed.refused", why, name=name, folder=os.path.dirname(file.ref.path))


def _is(entry: FileEntry, record: SeedRecord | None, digest: str, origin: OriginSource | None) -> bool:
    if digest:
        return entry.digest == digest
    if origin is None or record is None or record.manifest.source != origin.spec.uri:
        return False
    item = origin.item
    return (entry.path, entry.version, entry.size_bytes) == (item.path, item.version, item.size_bytes)


def _length(path: Path) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:
        return -1


def _read(folders: Sequence[Path], known: Mapping[Path, _Seed]) -> dict[Path, _Seed]:
    """Every seed; only what changed is read again."""
    found: dict[Path, _Seed] = {}
    for place in _places(folders):
        try:
            status = os.stat(place / RECORD)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            found[place] = _Seed(place, (0, 0, 0), None, f"{place / RECORD}: {error.strerror}")
            continue
        stamp = status.st_ino, status.st_size, status.st_mtime_ns
        earlier = known.get(place)
        found[place] = earlier if earlier and earlier.stamp == stamp else _read_one(place, stamp)
    return found


def _places(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        if os.path.exists(folder / RECORD):
            yield folder
            continue
        try:
            names = sorted(os.listdir(folder))
        except FileNotFoundError:
            continue  # it may be laid or mounted later
        except OSError:
            yield folder  # which says why
            continue
        yield from (folder / name for name in names)


def _read_one(place: Path, stamp: _Stamp) -> _Seed:
    try:
        record = read_seed(place)
    except CachedError as error:
        return _Seed(place, stamp, None, error.message)
    for entry in record.manifest.files if record else ():
        try:
            problem = foreign(os.lstat(place / entry.path))
        except OSError as error:
            problem = error.strerror or str(error)
        if problem:
            return _Seed(place, stamp, None, f"{place / entry.path}: {problem}")
    return _Seed(place, stamp, record)
