"""What a benchmark ran on, as its results say it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from cached.cli.measure import hardware

_ROOT = Path(__file__).resolve().parents[1]


def describe(folder: Path) -> dict[str, Any]:
    """The machine, the page policy of its shared memory, the disk below ``folder``, versions, and the revision."""
    return {**hardware.describe(folder), "revision": _revision()}


def _revision() -> str:
    found = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", "cached", "client")
    return f"{found}, changed" if found and changed else found


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *words], capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
