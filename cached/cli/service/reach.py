"""Whether the service's user can run a program: what the unit hides from it, and what modes keep from it."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import cached
import cached_client

HIDDEN = {
    "/home": "ProtectHome=",
    "/root": "ProtectHome=",
    "/run/user": "ProtectHome=",
    "/tmp": "PrivateTmp=",  # noqa: S108
    "/var/tmp": "PrivateTmp=",  # noqa: S108
}
"""Folders that the unit keeps from the daemon, and by which of its settings."""


def needed_paths(program: str) -> tuple[Path, ...]:
    """What a start of this installation reads: the program, its interpreter, and both packages."""
    return (
        Path(program),
        Path(sys.executable),
        Path(sys.base_prefix),
        Path(cached.__file__).parent,
        Path(cached_client.__file__).parent,
    )


def obstacles(path: Path) -> Iterator[str]:
    """Why a user who owns nothing cannot read this path, through all its links; nothing if he can."""
    for link in (path, Path(os.path.realpath(path))):
        hidden = next((folder for folder in HIDDEN if link.is_relative_to(folder)), None)
        if hidden is not None:
            yield f"{link}: the service cannot see {hidden} ({HIDDEN[hidden]} in its unit)"
            return
    real = Path(os.path.realpath(path))
    for step in reversed((real, *real.parents)):
        try:
            mode = os.stat(step).st_mode
        except OSError as error:
            yield f"{step}: {error.strerror}"
            return
        wanted = stat.S_IXOTH if stat.S_ISDIR(mode) else stat.S_IROTH
        if not mode & wanted:
            yield f"{step}: mode {stat.S_IMODE(mode):04o} keeps the service's user out"
            return
