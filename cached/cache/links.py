"""The directory view: each resident revision as an ordinary Hugging Face-style folder, for engines that know no cache.

``models_dir/NAME`` is a link to ``.views/NAME@REVISION``, whose files are links to segments or L2 blobs. Links are
replaced by rename, so a reader sees the old or the new target, never none.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

from cached.errors import LevelError

_PRIVATE = 0o1700
"""With the sticky bit, which means nothing here: so it is known that it was us who closed the folder."""


class DirectoryView:
    """Owns ``models_dir``; everything in it is ours and made anew at start. Loop only; does little I/O."""

    def __init__(self, models_dir: Path) -> None:
        self._root = models_dir
        self._views = models_dir / ".views"
        self._arriving: dict[str, dict[str, str]] = {}
        """Views of content whose bytes are to get other names: path in the model → absolute path of its bytes."""

    def keep_private(self, *, private: bool) -> None:
        """Whether others than the daemon's own user, and root, are kept from entering it, and so from its names."""
        try:
            _make_folder(self._root)
            mode = stat.S_IMODE(self._root.stat().st_mode)
            if private and mode & 0o077:
                self._root.chmod(_PRIVATE)
            elif not private and mode == _PRIVATE:
                self._root.chmod(0o755)
        except OSError as error:
            raise self._failed(error) from error

    def clear(self) -> None:
        """Starts empty: links of an earlier daemon may point to what is gone."""
        self._arriving.clear()
        try:
            shutil.rmtree(self._views, ignore_errors=True)
            _make_folder(self._views)
            for entry in self._root.iterdir():
                if entry.is_symlink():
                    entry.unlink()
        except OSError as error:
            raise self._failed(error) from error

    def show(
        self, name: str, revision: str, targets: Mapping[str, str], *, current: bool, arriving: bool = False
    ) -> None:
        """Shows a revision, as the model's folder if it is the ``current`` one.

        ``targets``: path in the model → absolute path of its bytes. ``arriving``: some get another path; see ``moved``.
        """
        view = self._views / f"{name}@{revision}"
        self._arriving.pop(view.name, None)
        if arriving:
            self._arriving[view.name] = dict(targets)
        try:
            for path, target in targets.items():
                link = view / path
                _make_folder(link.parent)
                _replace_link(target, link)
            if current:
                _replace_link(f".views/{name}@{revision}", self._root / name)
        except OSError as error:
            raise self._failed(error) from error

    def moved(self, source: str, target: str) -> None:
        """What was at ``source`` is at ``target`` now, too: ``source`` goes when this returns."""
        try:
            for view, targets in self._arriving.items():
                for path in [path for path, where in targets.items() if where == source]:
                    targets[path] = target
                    _replace_link(target, self._views / view / path)
        except OSError as error:
            raise self._failed(error) from error

    def hide(self, name: str, revision: str) -> None:
        """Takes a revision away; the model's folder goes with it if it shows this revision."""
        view = self._views / f"{name}@{revision}"
        self._arriving.pop(view.name, None)
        link = self._root / name
        try:
            if link.is_symlink() and os.readlink(link) == f".views/{name}@{revision}":
                link.unlink()
            shutil.rmtree(view, ignore_errors=True)
        except OSError as error:
            raise self._failed(error) from error

    def path(self, name: str, revision: str) -> str:
        """The absolute path of a model's folder if it shows this revision, else of the revision's own, else nothing."""
        view = self._views / f"{name}@{revision}"
        link = self._root / name
        if link.is_symlink() and os.readlink(link) == f".views/{name}@{revision}":
            return str(link)
        return str(view) if view.is_dir() else ""

    def _failed(self, error: OSError) -> LevelError:
        return LevelError(
            f"the directory view {self._root} cannot be written: {error.strerror}",
            hint="set daemon.models_dir to a folder that the daemon may write",
            path=self._root,
            cause=error,
        )


def _make_folder(path: Path) -> None:
    """Readable by everybody, whatever the umask: it shows names only; segments and blobs have modes of their own."""
    missing: list[Path] = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)


def _replace_link(target: str, link: Path) -> None:
    if link.is_symlink() and os.readlink(link) == target:
        return
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.rename(link)
