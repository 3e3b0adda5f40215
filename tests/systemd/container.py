"""A container of this very host, with systemd as its first process: an overlay of / that is thrown away.

systemd-nspawn within a mount namespace of its own; no network, its own /dev/shm, /run and /tmp. Nothing of the host is
changed. Needs root, and the package systemd-container.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

NEEDED = ("systemd-nspawn", "unshare", "systemctl")
_BOOT_S = 300

_UNIT = """\
[Unit]
After=basic.target
[Service]
Type=oneshot
ExecStart=/opt/cached/bin/python -I /scenario/scenario.py
StandardOutput=file:/scenario/out.txt
StandardError=file:/scenario/out.txt
ExecStopPost=/bin/sh -c 'echo "$SERVICE_RESULT" > /scenario/result'
ExecStopPost=systemctl poweroff --force
TimeoutStartSec=240
"""

_TARGET = """\
[Unit]
Requires=basic.target
After=basic.target
Wants=scenario.service
"""

# $1: a folder for the overlay, $2: what is laid over /, $3: systemd's first target, $4: where the outcome goes.
_BOOT = """\
set -eu
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
rm -rf "$1/root/etc/systemd/system"/*.wants
cp -a "$2/." "$1/root/"
# Of the host's own machine-id nspawn would say that the journals are the same.
echo 0123456789abcdef0123456789abcdef > "$1/root/etc/machine-id"
systemd-nspawn --quiet --directory="$1/root" --boot --register=no --keep-unit --private-network --console=pipe \\
    --link-journal=no --machine="cached-test-$$" "systemd.unit=$3" || true
cp -a "$1/root/scenario/." "$4/"
"""


def missing() -> str:
    """Why no container can be started here, or nothing."""
    if os.geteuid() != 0:
        return "only root can start a container"
    gone = [name for name in NEEDED if not shutil.which(name)]
    return f"not installed: {', '.join(gone)} (apt-get install systemd-container)" if gone else ""


def run_scenario(folder: Path, scenario: Path, files: Mapping[str, Path]) -> str:
    """Boots, runs the scenario as root with /opt/cached's Python, and powers off. What it printed.

    ``files``: path in the container → file or folder to copy there. AssertionError unless the scenario ended with 0.
    """
    over, out, work = folder / "over", folder / "out", folder / "overlay"
    for path in (over, out, work):
        path.mkdir()
    for target, source in {**files, "/scenario/scenario.py": scenario}.items():
        place = over / target.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, place, **({"symlinks": True} if source.is_dir() else {}))
    units = over / "etc/systemd/system"
    units.mkdir(parents=True)
    (units / "scenario.service").write_text(_UNIT)
    (units / "scenario.target").write_text(_TARGET)
    command = ["unshare", "--mount", "sh", "-c", _BOOT, "boot", work, over, "scenario.target", out]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=_BOOT_S)
    told = (out / "out.txt").read_text() if (out / "out.txt").exists() else ""
    result = (out / "result").read_text().strip() if (out / "result").exists() else "it did not run"
    assert result == "success", f"{result}\n{told}\n{done.stdout[-5000:]}\n{done.stderr}"
    return told
