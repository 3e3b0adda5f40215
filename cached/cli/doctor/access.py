"""Whether somebody may use a path, by modes and owners on the way to it; ACLs and capabilities are not looked at."""

from __future__ import annotations

import os
from pathlib import Path

from cached.cli.doctor.checks import User


def may(user: User, path: str | Path, wanted: int) -> bool:
    """Whether the user may reach ``path`` and has the access ``wanted`` there (os.R_OK, W_OK, X_OK together)."""
    return not obstacle(user, path, wanted)


def obstacle(user: User, path: str | Path, wanted: int) -> str:
    """The first folder or file on the way that keeps the user out; empty where none does. Raises FileNotFoundError."""
    if user.uid == 0:
        os.stat(path)
        return ""
    real = Path(os.path.realpath(path))
    for folder in reversed(real.parents):
        if not _allows(user, os.stat(folder), os.X_OK):
            return str(folder)
    return "" if _allows(user, os.stat(real), wanted) else str(real)


def _allows(user: User, found: os.stat_result, wanted: int) -> bool:
    if found.st_uid == user.uid:
        shift = 6
    elif found.st_gid in user.gids:
        shift = 3
    else:
        shift = 0
    return (found.st_mode >> shift) & wanted == wanted
