"""cached top: the status page in a terminal."""

from __future__ import annotations

from cached.cli.top.command import top

__all__ = ["top"]
