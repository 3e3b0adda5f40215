"""A compile cache for as long as a worker compiles: restored before, saved after if there is anything new."""

from __future__ import annotations

import logging
import os
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from cached_client.artifacts.archive import EXCLUDED, scan
from cached_client.artifacts.environment import environment_key
from cached_client.artifacts.store import Missed, Restored, Saved, restore, save
from cached_client.errors import ArtifactError, CacheError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from cached_client.cache import Cache

_log = logging.getLogger("cached_client.artifacts")

ENVIRONMENT: Mapping[str, str] = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "VLLM_CACHE_ROOT": "vllm",
}
"""What ``set_environment`` sets, each to a folder of this name in the directory."""


def compile_cache(
    cache: Cache,
    *,
    model: str,
    engine: str,
    directory: str | os.PathLike[str] | None = None,
    revision: str = "",
    engine_version: str = "",
    device: str = "auto",
    key: Mapping[str, str] | None = None,
    set_environment: bool = False,
    save_new: bool = True,
    strict: bool = False,
    exclude: Sequence[str] = EXCLUDED,
    timeout_s: float | None = None,
) -> CompileCache:
    """A context that restores the compile cache of a model when it is entered, and saves what is new when it is left.

    ``directory`` is the engine's cache folder, by default ``~/.cache/cached/artifacts/MODEL-ENGINE``.
    ``set_environment`` points TORCHINDUCTOR_CACHE_DIR, TRITON_CACHE_DIR and VLLM_CACHE_ROOT to folders in it while the
    context lasts; nothing else of the process is touched. ``key`` replaces what `environment_key` makes of the other
    arguments. ``save_new=False`` only restores. A block that raises saves nothing.

    A cache that does not work must not keep a worker from starting: failures of restore and save are logged as
    warnings, and are in ``error``; with ``strict`` they are raised. Where the directory cannot be made, nothing is set
    in the environment and nothing is saved.
    """
    made = environment_key(model, engine, revision=revision, engine_version=engine_version, device=device)
    place = Path(directory) if directory is not None else _default_directory(model, engine)
    return CompileCache(
        cache, place, dict(key) if key is not None else made, set_environment=set_environment, save_new=save_new,
        strict=strict, exclude=exclude, timeout_s=timeout_s,
    )  # fmt: skip


def _default_directory(model: str, engine: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    plain = "".join(char if char.isalnum() or char in "._-" else "-" for char in f"{model}-{engine}")
    return Path(base, "cached", "artifacts", plain)


class CompileCache:
    """Made by `compile_cache`. ``restored`` is known within the context, ``saved`` after it, or after `save`."""

    def __init__(
        self,
        cache: Cache,
        directory: Path,
        key: dict[str, str],
        *,
        set_environment: bool,
        save_new: bool,
        strict: bool,
        exclude: Sequence[str],
        timeout_s: float | None,
    ) -> None:
        self.directory = directory
        self.key = key
        self.restored: Restored | Missed | None = None
        self.saved: Saved | None = None
        self.error: CacheError | None = None
        self._cache = cache
        self._set_environment = set_environment
        self._save_new = save_new
        self._strict = strict
        self._exclude = exclude
        self._timeout_s = timeout_s
        self._seen: frozenset[tuple[str, int]] = frozenset()
        self._has_directory = True
        self._base = ""
        self._before: dict[str, str | None] = {}

    def __enter__(self) -> Self:
        try:
            self.restored = restore(self._cache, self.directory, self.key, timeout_s=self._timeout_s)
        except CacheError as error:
            self._failed("restored", error)
        if isinstance(self.restored, Restored):
            self._base = self.restored.sha256
            _log.info("compile cache restored: %s", self.restored)
        elif self.restored is not None:
            _log.info("no compile cache to restore: %s", self.restored.reason)
        try:
            self._make_directory()
            # What was there before, by restore or otherwise. After a miss all of it is worth saving.
            self._seen = self._files() if self._base else frozenset()
        except ArtifactError as error:
            self._failed("made ready", error)
        # A compiler that is pointed to a folder that cannot be there fails; its own default may work.
        self._has_directory = os.path.isdir(self.directory)  # Path.is_dir raises where it may not look
        if self._set_environment and self._has_directory:
            self._enter_environment()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave_environment()
        if kind is None and self._save_new:
            self.save()

    def save(self) -> Saved | None:
        """Saves now if anything is new since the restore or the last save; for a worker that never leaves the block.

        None where nothing is new, or the save failed or the directory could not be made (see ``error``).
        """
        if not self._has_directory:
            return None
        try:
            files = self._files()
            if files <= self._seen:
                return None
            self.saved = save(
                self._cache, self.directory, self.key, replaces=self._base, exclude=self._exclude,
                timeout_s=self._timeout_s,
            )  # fmt: skip
        except CacheError as failure:
            self._failed("saved", failure)
            return None
        self._seen = files
        if self.saved.outcome in {"stored", "same"}:
            self._base = self.saved.sha256
        _log.info("compile cache saved: %s", self.saved)
        return self.saved

    def _make_directory(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"the directory {self.directory} cannot be made: {error.strerror or error}",
                hint="choose a directory on a local disk with room, that this user may write to",
                path=self.directory,
                cause=error.strerror,
            ) from error

    def _files(self) -> frozenset[tuple[str, int]]:
        members, _ = scan(self.directory, self._exclude)
        return frozenset((member.path, member.size_bytes) for member in members)

    def _failed(self, what: str, error: CacheError) -> None:
        self.error = error
        if self._strict:
            raise error
        _release(error)
        _log.warning("the compile cache in %s was not %s: %s", self.directory, what, error)

    def _enter_environment(self) -> None:
        for name, folder in ENVIRONMENT.items():
            self._before[name] = os.environ.get(name)
            os.environ[name] = str(self.directory / folder)

    def _leave_environment(self) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._before = {}


def _release(error: BaseException) -> None:
    """An error that is kept must not keep what its frames refer to: mappings of the archive, memory of the host."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
