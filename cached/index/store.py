"""Durable text under text keys, in one SQLite file through diskcache: no pickles, no files beside it."""

from __future__ import annotations

import os
import sqlite3
import time
import zlib
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import diskcache
import structlog

from cached.errors import LevelError
from cached.level import Level

_log = structlog.get_logger(__name__)

FORMAT = 1
"""Version of what is stored. A store of a newer one is set aside, not guessed at."""

_FORMAT_KEY = "format"
_LOCK_TIMEOUT_S = 1.0
_CACHE_PAGES = 256
"""Of 4 KiB each."""

_FAILURES = (sqlite3.Error, diskcache.Timeout, OSError)
_ENVIRONMENT = tuple(
    f"SQLITE_{word}" for word in ("READONLY", "CANTOPEN", "FULL", "BUSY", "LOCKED", "PERM", "AUTH", "NOMEM")
)
"""SQLite's words for trouble with where the file is; all others say that the file itself is no good."""


class DamagedEntryError(ValueError):
    """One entry is not what was written."""


class Store:
    """The file; its owner keeps the content. One thread at a time may write. Failures are LevelErrors with ``path``."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the folder ``path``. A database that is damaged or of a newer format is set aside beside it.

        ``warnings`` then says so. Raises LevelError when the folder cannot be used (read-only, full, gone).
        """
        self.path = path
        self.warnings: list[str] = []
        self.damaged: list[str] = []
        """Keys of entries that are not what was written."""
        self._entries: dict[str, str] = {}
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                self._cache = self._load()
            except _UnusableError as error:
                self._set_aside(error)
                path.mkdir(mode=0o700)
                self._cache = self._load()
        except (*_FAILURES, _UnusableError) as error:
            raise self._failed("open", error) from error

    def take_entries(self) -> dict[str, str]:
        """Everything that was stored when the store was opened, once: key → text."""
        entries, self._entries = self._entries, {}
        return entries

    def write(self, changes: Mapping[str, str | None]) -> None:
        """Sets (or with None deletes) these keys in one transaction, durable on return. Raises LevelError: none was."""
        try:
            with self._cache.transact():
                for key, text in changes.items():
                    if text is None:
                        self._cache.delete(key)
                    else:
                        self._cache.set(key, _sealed(text))
        except _FAILURES as error:
            # A commit that failed leaves its transaction open; the next use connects again.
            self._cache.close()
            raise self._failed("write", error) from error

    def close(self) -> None:
        """Ends this thread's connection; idempotent."""
        self._cache.close()

    def _load(self) -> diskcache.Cache:
        """The opened database with all of it read. Raises _UnusableError when it is to be set aside."""
        _check_database(self.path / diskcache.core.DBNAME)
        cache = None
        try:
            cache = _connect(self.path)
            self._read(cache)
        except BaseException as error:
            if cache is not None:
                cache.close()
            damaged = isinstance(error, sqlite3.Error) and not _is_environment(error)
            if damaged or isinstance(error, TypeError | ValueError | KeyError | AttributeError):
                raise _UnusableError("corrupt", f"{type(error).__name__}: {error}") from error
            raise
        return cache

    def _read(self, cache: diskcache.Cache) -> None:
        keys = list(cache.iterkeys())
        version = cache.get(_FORMAT_KEY)
        if version is None and not keys:
            cache.set(_FORMAT_KEY, _sealed(str(FORMAT)))
            return
        number = int(_unsealed(version))
        if number > FORMAT:
            raise _UnusableError(f"format-{number}", f"it has format {number}, this version reads up to {FORMAT}")
        for key in keys:
            if key == _FORMAT_KEY:
                continue
            try:
                self._entries[key] = _unsealed(cache.get(key))
            except DamagedEntryError:
                self.damaged.append(key)

    def _set_aside(self, cause: _UnusableError) -> None:
        stem = f"{self.path.name}.{cause.kind}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
        target, number = self.path.with_name(stem), 1
        while target.exists():
            number += 1
            target = self.path.with_name(f"{stem}-{number}")
        os.rename(self.path, target)
        self._entries.clear()
        self.damaged.clear()
        message = f"the index was set aside as {target} and a new one begun: {cause}"
        self.warnings.append(message)
        _log.warning("index.set_aside", path=str(self.path), target=str(target), cause=str(cause))

    def _failed(self, what: str, error: Exception) -> LevelError:
        cause = f"{type(error).__name__}: {error}"
        return LevelError(
            f"cannot {what} the index {self.path}: {cause}",
            hint="make room on its file system, and check that it is mounted read-write and that the daemon owns it",
            level=Level.L2,
            path=self.path,
            cause=cause,
        )


class _UnusableError(Exception):
    """The whole database must be set aside; ``kind`` goes into its new name."""

    def __init__(self, kind: str, cause: str) -> None:
        super().__init__(cause)
        self.kind = kind


class _TextDisk(diskcache.Disk):  # type: ignore[misc]
    """Text only, inside the database only: nothing is ever pickled, unpickled, or put in a file of its own."""

    def put(self, key: object) -> tuple[str, bool]:
        if not isinstance(key, str):
            raise TypeError(f"a key is text, not a {type(key).__name__}")
        return key, True

    def get(self, key: object, raw: object) -> str:
        if not isinstance(key, str) or not raw:
            raise TypeError("the database holds a key that is not text")
        return key

    def store(self, value: object, read: object, key: object = None) -> tuple[int, int, None, str]:
        if not isinstance(value, str) or read:
            raise TypeError(f"the value of {key!r} is not text but a {type(value).__name__}")
        return 0, diskcache.core.MODE_RAW, None, value

    def fetch(self, mode: int, filename: str | None, value: object, read: object) -> str:
        if mode != diskcache.core.MODE_RAW or filename is not None or not isinstance(value, str) or read:
            raise DamagedEntryError("it is not text")
        return value

    def remove(self, file_path: str) -> None:
        """There are no files; a name of one in a damaged row must not remove anything."""


def _connect(path: Path) -> diskcache.Cache:
    return diskcache.Cache(
        str(path),
        timeout=_LOCK_TIMEOUT_S,
        disk=_TextDisk,
        eviction_policy="none",
        cull_limit=0,
        size_limit=1 << 62,
        statistics=0,
        sqlite_synchronous=2,
        # A mapping of a file that shrinks or has bad sectors would be a SIGBUS instead of an error.
        sqlite_mmap_size=0,
        # All of it is read once, at the start; its default of 32 MiB would fill with what nobody reads again.
        sqlite_cache_size=_CACHE_PAGES,
    )


def _check_database(database: Path) -> None:
    """Raises _UnusableError unless SQLite finds the file sound (or absent)."""
    if not database.exists():
        return
    try:
        with closing(sqlite3.connect(database, timeout=_LOCK_TIMEOUT_S, isolation_level=None)) as connection:
            ((verdict,),) = connection.execute("PRAGMA integrity_check(1)").fetchall()
    except sqlite3.Error as error:
        if _is_environment(error):
            raise
        raise _UnusableError("corrupt", str(error)) from error
    if verdict != "ok":
        raise _UnusableError("corrupt", str(verdict))


def _is_environment(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorname", "").startswith(_ENVIRONMENT)


def _sealed(text: str) -> str:
    """Text with its CRC32 before it: SQLite itself keeps no checksums of its pages."""
    return f"{zlib.crc32(text.encode()):08x}:{text}"


def _unsealed(sealed: str | None) -> str:
    crc, _, text = (sealed or "").partition(":")
    if crc != f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}":
        raise DamagedEntryError("its checksum is wrong")
    return text
