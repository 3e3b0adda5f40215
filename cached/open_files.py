"""What each listener may take of the limit of open files, so that all of them together leave enough for the rest."""

from __future__ import annotations

import resource
from dataclasses import dataclass

from cached.errors import UnavailableError

SETTING = "RLIMIT_NOFILE"
HINT = "raise the daemon's limit of open files (LimitNOFILE=), or use fewer processes"
_KEPT = 1024
"""For everything else: segments, files of L2, descriptors on their way, origins, HTTP. Of a low limit it is half."""
_OF_A_CALLER = 3
"""Each connection of calls has an inner one, and gRPC the other end of that."""
_UNLIMITED = 1 << 20


@dataclass(frozen=True, slots=True)
class FileShares:
    """Connections that each listener takes at most. ``unread``: descriptors that were sent, and that nobody read yet.

    Those are not open files of the daemon; but the kernel takes no more of them from a user than its limit is.
    """

    calls: int
    descriptors: int
    http: int
    unread: int


def file_shares() -> FileShares:
    """By the limit as it is now."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        files = _UNLIMITED
    kept = min(_KEPT, files // 2)
    descriptors = min(4096, (files - kept) // 8)
    return FileShares(
        calls=max(8, (files - kept - descriptors) // _OF_A_CALLER),
        descriptors=max(8, descriptors),
        http=max(8, kept // 8),
        unread=max(64, files // 2),
    )


def not_accepted(what: str, error: OSError) -> UnavailableError:
    """A listener could not take a connection: out of descriptors, usually. ``what``: which one, in words."""
    failed = UnavailableError(f"{what} cannot take a connection: {error.strerror}", hint=HINT, setting=SETTING)
    failed.__cause__ = error
    return failed
