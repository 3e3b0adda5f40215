"""Keeps the engine's catalog that of a file, whatever the file brings about."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from cached.cache import ModelCache
from cached.catalog_file import Catalog, load_catalog
from cached.errors import CachedError
from cached.metrics import Reload
from cached.signatures import SUFFIX, CatalogGuard, Signed

POLL_S = 2.0


class CatalogWatch:
    """Keeps the engine's catalog that of the file, which is looked at every two seconds and on demand.

    A changed file is noticed by what ``stat`` says of where its path leads, so a ConfigMap's exchanged links count too.
    A file that cannot be used is reported once, and one that cannot be read is tried again with each look; the catalog
    that was loaded before stays.
    """

    def __init__(self, path: str, engine: ModelCache, reload: Reload, guard: CatalogGuard | None = None) -> None:
        """``guard``: only what it lets pass is taken."""
        self._guard = guard
        self._path = path
        self._engine = engine
        self._reload = reload
        self._seen: tuple[int, ...] | None = None
        self._unread = False
        """It could not be read, and nothing of it may change until it can be: each look tries."""
        self._forced = asyncio.Event()
        self._loaded = not path
        self._problem = ""

    @property
    def missing(self) -> str:
        """Why there is no catalog although one is configured; empty once one was loaded."""
        return "" if self._loaded else f"the catalog is not loaded: {self._problem or 'not read yet'}"

    @property
    def problem(self) -> str:
        """Why the file as it is now cannot be used, whether an older catalog is in use or none; empty if it can."""
        return f"the catalog cannot be used: {self._problem}" if self._problem else ""

    def reload_soon(self) -> None:
        """Lets ``run`` reload. Any caller in the loop."""
        self._forced.set()

    async def run(self, reload: Callable[[], Awaitable[None]]) -> None:
        """Until cancelled. ``reload`` is called when somebody asked for it, and loads the catalog as well."""
        while True:
            try:
                async with asyncio.timeout(POLL_S):
                    await self._forced.wait()
            except TimeoutError:
                await self.load()
                continue
            self._forced.clear()
            with self._engine.failures.survived("reload"):
                await reload()

    async def load(self, *, force: bool = False) -> None:
        """Reads the file if it changed. Raises nothing: whatever comes of a file, the next one is read."""
        try:
            await self._load(force=force)
        except CachedError as error:
            known = self._unread and error.message == self._problem
            self._unread = isinstance(error.__cause__, OSError)
            if known and not force:
                return
            self._engine.failures.report(
                "catalog.refused", error, f"the catalog cannot be used: {error.message}",
                file=self._path, error=error.message, hint=error.hint, kept_old=self._loaded,
            )  # fmt: skip
            self._refuse(error)
        except Exception as bug:  # noqa: BLE001 - told; a task that ended would never read the mended file
            self._refuse(self._engine.failures.bug("catalog", bug, file=self._path))

    def _refuse(self, error: CachedError) -> None:
        self._problem = error.message
        self._reload.done(successful=False)
        self._engine.failures.degraded.began("catalog", self.problem, error)

    async def _load(self, *, force: bool) -> None:
        if not self._path:
            return
        seen = _identity(self._path) + (_identity(f"{self._path}{SUFFIX}") if self._guard is not None else ())
        if seen == self._seen and not self._unread and not force:
            return
        self._seen = seen
        catalog, signed = await asyncio.to_thread(self._read)
        self._unread = False
        self._engine.set_catalog(catalog)
        self._loaded, self._problem = True, ""
        self._engine.failures.degraded.ended("catalog")
        self._reload.done(successful=True)
        count = len(catalog.models)
        by: dict[str, object] = {}
        if self._guard is not None and signed is not None:
            await asyncio.to_thread(self._guard.taken, signed)
            by = {"signed_by": signed.key_id, "signed_at": signed.at}
        self._engine.tell("catalog.loaded", f"the catalog names {count} models", file=self._path, models=count, **by)

    def _read(self) -> tuple[Catalog, Signed | None]:
        """In a thread. What is parsed are the very bytes whose signature was checked."""
        guard, signed = self._guard, []
        check = (lambda _data: None) if guard is None else lambda data: signed.append(guard.check(self._path, data))
        return load_catalog(Path(self._path), check), next(iter(signed), None)


def _identity(path: str) -> tuple[int, ...]:
    try:
        found = os.stat(path)
    except OSError as error:
        return (error.errno or 0,)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
