"""Runs Python code where a small tmpfs lies on a folder, in a mount namespace of its own: a real shortage, safely."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run_on_small_tmpfs(folder: str | os.PathLike[str], options: str, code: str, *, remount: str = "") -> str:
    """What ``code`` prints. Skips the test where mount namespaces are not permitted; fails it if the code dies.

    ``{folder}`` in the shell command ``remount`` is the folder; the code may run it with ``os.system(sys.argv[1])``.
    """
    folder = os.fspath(folder)
    script = 'mount -t tmpfs -o "$0" none "$1" || exit 99; exec "$2" -c "$3" "$4"'
    argv = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    argv += [options, folder, sys.executable, code, remount.format(folder=folder)]
    try:
        result = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        )
    except FileNotFoundError:
        pytest.skip("needs unshare(1) of util-linux")
    if result.returncode == 99 or (result.returncode == 1 and "unshare:" in result.stderr):
        pytest.skip(f"needs a mount namespace of its own: {result.stderr.strip()}")
    assert result.returncode == 0, f"died with {result.returncode}: {result.stderr}"
    return result.stdout
