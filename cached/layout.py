"""The layout of the state folder: one number for all that outlives a restart, so that no version misreads another's.

It stands in the file ``LAYOUT`` of the folder, and covers the index, the journals, L2's folders and the names of
segments. A version that changes one of these so that an older one would misread it gives it the next number, and reads
the one before. An older daemon then does not start on it: to guess would cost blobs.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import structlog

from cached.errors import ConfigError
from cached.own_files import fsync_folder, opener

_log = structlog.get_logger(__name__)

LAYOUT = 1
"""What this version writes, and the newest that it reads."""

FILE = "LAYOUT"
_MAX_BYTES = 1024


def claim_layout(state_dir: str, version: str) -> None:
    """Checks that this version may use the folder, and writes its number. For the holder of the folder's lock.

    A folder without a number is new, or of a time before there were any, which is layout 1. Raises ConfigError, and
    touches nothing, where the number is newer than ours or is none.
    """
    path = Path(state_dir) / FILE
    try:
        with open(path, "rb", opener=opener) as file:
            found = file.read(_MAX_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        found = ""
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}",
            hint="let the daemon's user own and read it; what is there in its place instead is to go",
            file=path, key="", value="",
        ) from error  # fmt: skip
    else:
        _check(state_dir, found, version)
    text = f"{LAYOUT}\ncached {version}\n"
    if found != text:
        _write(path, text)


def _check(state_dir: str, found: str, version: str) -> None:
    number, _, rest = found.partition("\n")
    writer = rest.strip() or "another version"
    if re.fullmatch(r"[1-9]\d{0,8}", number) and int(number) <= LAYOUT:
        return
    what = f"has layout {number}, of {writer}" if number.isdecimal() else f"has no layout that can be read: {number!r}"
    raise ConfigError(
        f"the state folder {state_dir} {what}; this is cached {version}, which reads layouts up to {LAYOUT}",
        hint=f"start {writer} or a newer one again. Or begin anew and fetch models again: "
        f"mv {state_dir} {state_dir}.aside; nothing was changed in it",
        key="daemon.state_dir",
        value=state_dir,
    )


def _write(path: Path, text: str) -> None:
    """In one step. A disk that is full or read-only is told of, and is no reason not to serve what is there."""
    fresh = path.with_name(f"{FILE}.new")
    try:
        fresh.unlink(missing_ok=True)
        with open(fresh, "x", encoding="utf-8", opener=opener) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        fsync_folder(str(path.parent))
    except OSError as error:
        _log.warning("layout.not_written", path=str(path), cause=error.strerror)
