"""vLLM's compile cache, restored before the engine compiles and saved once it is done. Knows nothing of vLLM.

A compile cache that does not work must not keep an engine from starting: nothing here raises, it is logged.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import cached_client
from cached_client.artifacts import Missed, Restored, restore, save, scan
from cached_client.artifacts.archive import EXCLUDED
from cached_client.errors import ArtifactError, CacheError, PermissionDeniedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from cached_client.artifacts import Saved

_log = logging.getLogger("vllm.cached")

STILL_S = 10.0
"""So long no file may have come or grown before what there is counts as finished."""
WORTH = 0.25
"""A restored cache is saved again if so much came to it, of its bytes: some entries vLLM makes anew at every start."""
_POLL_S = 2.0
_WATCH_S = 3600.0
_TIMEOUT_S = 120.0
_ATTEMPTS = 3
_AOT = "torch_aot_compile"

Files = frozenset[tuple[str, int]]


class CompileCache:
    """The folder in which vLLM keeps what it compiled for its models: ``VLLM_CACHE_ROOT/torch_compile_cache``.

    In it each model and configuration has folders of its own, named by hashes. Saved are those that this engine wrote
    to since it was restored, or that ``used`` names; what other engines keep there stays out.

    Args:
        socket: the daemon's; empty: the default.
        folder: it need not be there yet.
        key: what has to be equal (see `environment_key`).
        used: paths that this engine names as its caches, once it knows; any thread may call it.
        is_warm: whether the engine has compiled what it compiles at its start; any thread may call it.
    """

    def __init__(
        self,
        socket: str,
        folder: Path,
        key: Mapping[str, str],
        used: Callable[[], Iterable[str]] = tuple,
        is_warm: Callable[[], bool] = lambda: True,
    ) -> None:
        self.saved: Saved | None = None
        self._socket = socket
        self._folder = folder
        self._key = dict(key)
        self._used = used
        self._is_warm = is_warm
        self._base = ""
        self._restored = False
        self._before: Files = frozenset()
        self._last: Files = frozenset()
        self._last_saved: Files = frozenset()
        self._changed_s = 0.0
        self._failures = 0
        self._misses = 0

    def restore(self) -> Restored | Missed | None:
        """Restores what there is for exactly this key; None if that failed. Never raises CacheError."""
        found: Restored | Missed | None = None
        try:
            with cached_client.connect(self._socket or None) as cache:
                found = restore(cache, self._folder, self._key, timeout_s=_TIMEOUT_S)
        except CacheError as error:
            _log.warning("cached: the compile cache was not restored: %s: %s", error.reason, error)
        if isinstance(found, Restored):
            self._base, self._restored = found.sha256, True
            _log.info(
                "cached: compile cache restored: %s files=%d kept=%d bytes=%d level=%s seconds=%.3f",
                found.name, found.added_files, found.kept_files, found.size_bytes, found.from_level, found.seconds,
            )  # fmt: skip
        elif found is not None:
            _log.info("cached: no compile cache to restore: %s", found.reason)
        return found

    def watch(self) -> None:
        """Saves from now on, in a thread that keeps no process from ending, whenever something new has come to rest."""
        self.begin(time.monotonic())
        thread = threading.Thread(target=self._watch, name="cached compile cache", daemon=True)
        thread.start()

    def begin(self, now_s: float) -> None:
        """What is there now is not new. Call it before the engine compiles; for `watch`, as is `look`."""
        with contextlib.suppress(ArtifactError):  # then all of it is
            self._before = self._last = self._files()
        self._changed_s = now_s

    def look(self, now_s: float) -> bool:
        """Saves what is new, once the engine is warm and the folder has been still for `STILL_S`.

        ``now_s`` is of ``time.monotonic()``. False once there is no use in going on.
        """
        if not self._is_warm():
            self._changed_s = now_s
            return True
        try:
            files = self._files()
        except ArtifactError as error:
            return self._unreadable(error, now_s)
        self._misses = 0
        if files != self._last:
            self._last, self._changed_s = files, now_s
            return True
        if now_s - self._changed_s < STILL_S:
            return True
        known = {path for path, _ in self._before}
        new = frozenset(item for item in files if item[0] not in known)
        units = {unit_of(path) for path, _ in new} | self._used_units()
        wanted = frozenset(item for item in files if unit_of(item[0]) in units)
        if not wanted or wanted == self._last_saved or not self._is_worth(wanted, new):
            return True
        self._changed_s = now_s
        return self._save(files, wanted, units)

    def _unreadable(self, error: ArtifactError, now_s: float) -> bool:
        """A compiler may remove a file just then; one folder that is never readable, or too large, is given up."""
        self._misses += 1
        self._changed_s = now_s
        if self._misses < _ATTEMPTS:
            return True
        _log.warning("cached: the compile cache is not saved: %s", error)
        return False

    def _is_worth(self, wanted: Files, new: Files) -> bool:
        if not self._restored:
            return True
        units = {unit_of(path) for path, _ in wanted}
        there = frozenset(item for item in self._last_saved or self._before if unit_of(item[0]) in units)
        added_bytes = _bytes((wanted & new) - there)
        return added_bytes > 0 and added_bytes >= WORTH * _bytes(there)

    def _save(self, files: Files, wanted: Files, units: set[str]) -> bool:
        others = {unit_of(path) for path, _ in files} - units
        try:
            with cached_client.connect(self._socket or None) as cache:
                self.saved = save(
                    cache, self._folder, self._key, replaces=self._base, timeout_s=_TIMEOUT_S,
                    exclude=(*EXCLUDED, *(Path(unit).name for unit in others)),
                )  # fmt: skip
        except PermissionDeniedError as error:
            _log.warning("cached: the compile cache is not saved: %s", error)
            return False
        except CacheError as error:
            self._failures += 1
            last = self._failures == _ATTEMPTS
            then = "it is left at that" if last else "it will be tried again"
            _log.warning("cached: the compile cache was not saved: %s: %s; %s", error.reason, error, then)
            return not last
        self._last_saved = wanted
        if self.saved.outcome in {"stored", "same"}:
            self._base = self.saved.sha256
        _log.info(
            "cached: compile cache saved: %s outcome=%s files=%d bytes=%d seconds=%.3f",
            self.saved.name, self.saved.outcome, self.saved.files, self.saved.size_bytes, self.saved.seconds,
        )  # fmt: skip
        return True

    def _watch(self) -> None:
        try:
            began_s = time.monotonic()
            while self.look(time.monotonic()) and time.monotonic() - began_s < _WATCH_S:
                time.sleep(_POLL_S)
        except Exception:  # noqa: BLE001 the engine serves without it
            _log.exception("cached: the compile cache is not saved")

    def _files(self) -> Files:
        if not self._folder.is_dir():
            return frozenset()
        return frozenset((member.path, member.size_bytes) for member in scan(self._folder)[0])

    def _used_units(self) -> set[str]:
        inside = [Path(path) for path in self._used() if Path(path).is_relative_to(self._folder)]
        relative = [path.relative_to(self._folder).as_posix() for path in inside]
        return {unit_of(path) for path in relative if path not in {".", _AOT}}


def _bytes(files: Files) -> int:
    return sum(size_bytes for _, size_bytes in files)


def unit_of(path: str) -> str:
    """The folder of one model and configuration that a path, relative to the compile cache, is in."""
    parts = path.split("/")
    return "/".join(parts[: 2 if parts[0] == _AOT else 1])
