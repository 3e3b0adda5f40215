"""Files of the daemon's own: nobody else may read them, and no link that somebody planted is followed."""

from __future__ import annotations

import os


def opener(path: str, flags: int) -> int:
    """For ``open(…, opener=)``. Mode 0600 whatever the umask. Raises OSError for a link, also a dangling one."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
